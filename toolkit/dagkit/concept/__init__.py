"""A concept file: everything that dagkit must be told about one concept, in one YAML file.

A concept file names what must not appear, the prompts that show it and those that do not, how it is labelled, and
which plugins find, outline and judge it. ``dagkit concept new NAME`` writes a commented one. All mistakes of a file are
reported at once, each with its line.
"""

from dagkit.concept.fields import OneOrMoreTexts, Share, Text
from dagkit.concept.files import (
    concept_names,
    concept_path,
    load_concept,
    page_path,
    parse_concept,
    read_text,
)
from dagkit.concept.options import JudgePlugin, Label, Plugin, PluginOptions, find_plugin
from dagkit.concept.schema import (
    MAX_CHECKED,
    MAX_MISTAKES,
    MAX_PROMPTS,
    MIN_SPLIT,
    PROMPT_KINDS,
    Concept,
    Labels,
    Prompt,
    PromptKind,
    Prompts,
    Sampling,
    ThresholdSettings,
)

__all__ = [
    "MAX_CHECKED",
    "MAX_MISTAKES",
    "MAX_PROMPTS",
    "MIN_SPLIT",
    "PROMPT_KINDS",
    "Concept",
    "JudgePlugin",
    "Label",
    "Labels",
    "OneOrMoreTexts",
    "Plugin",
    "PluginOptions",
    "Prompt",
    "PromptKind",
    "Prompts",
    "Sampling",
    "Share",
    "Text",
    "ThresholdSettings",
    "concept_names",
    "concept_path",
    "find_plugin",
    "load_concept",
    "page_path",
    "parse_concept",
    "read_text",
]
