"""What a concept file may say, but should not: else hours later a figure is bad or missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import DagkitError, PromptRefused, quoted
from dagkit.workspace import listed

if TYPE_CHECKING:
    from dagkit.concept import Concept

MIN_NEIGHBOURS: Final = 3
"""Things that only safe prompts name, from which on they count as neighbours of the concept."""

_SLOT: Final = re.compile(r"\{[a-z_]+?(?:_\d+)?\}")
_SMALL_WORDS: Final = frozenset(
    "a an and as at by for from in into is near of on or over the to under with without photo painting picture image "  # noqa: SIM905
    "drawing".split()
)


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to mend.

    Attributes:
        where: key in the file.
        message: what is wrong, what follows, what to do.
        is_error: whether a later stage cannot work.
    """

    where: str
    message: str
    is_error: bool = False


def lint(name: str | Path) -> list[Remark]:
    """Looks at a concept file: errors first.

    Args:
        name: a concept's name or the path of its YAML file. Its base model need not be there, but what depends on the
            tokenizer is only found where that is.

    Raises:
        ConceptError: there is no such concept.
        PromptRefused: a prompt of the file sexualises minors.
    """
    from dagkit.concept import concept_path, load_concept

    path = concept_path(str(name))
    try:
        concept = load_concept(path)
    except PromptRefused:
        raise
    except DagkitError as error:
        return [Remark("file", str(error), is_error=True)]
    remarks = [*_named(concept), *_prompts(concept), *_kept(concept), *_words(concept)]
    return sorted(remarks, key=lambda one: not one.is_error)


def _named(concept: Concept) -> Iterator[Remark]:
    """Whether all that the file names is there and fits."""
    from dagkit import models
    from dagkit.concept import find_plugin
    from dagkit.diagnosis import check_concept

    try:
        check_concept(concept)
    except DagkitError as error:
        yield Remark("plugins", str(error), is_error=True)
        return
    if concept.model != "demo" and not Path(concept.model).exists() and not models.is_hub_id(concept.model):
        yield Remark(
            "model", f"{quoted(concept.model)} is no folder, and no Hub id. Name one of both, or demo.", is_error=True
        )
    if concept.judge.name == "demo":
        _, options = find_plugin("judges", concept.judge, concept)
        if not {*concept.words, *concept.members} & {*options.present}:
            yield Remark(
                "judge",
                f"it looks for {listed(options.present)}, but the concept is {listed(concept.words)}: evaluate would "
                "count other things. Write {name: demo, present: [...]} with the concept's own.",
                is_error=True,
            )


def _prompts(concept: Concept) -> Iterator[Remark]:
    """Whether there are enough prompts, and of the right kinds."""
    from dagkit.concept import MIN_SPLIT, PROMPT_KINDS

    for kind in PROMPT_KINDS:
        num = len(concept.all_prompts(kind))
        if 0 < num < MIN_SPLIT:
            yield Remark(
                f"prompts.{kind}",
                f"{num} prompts are too few to be split, {MIN_SPLIT} are needed: evaluate would ask what the token was "
                "trained on. Add templates, or values to their slots.",
            )
    for name, values in concept.prompts.slots.items():
        if len(values) == 1:
            text = f"it has one value, {quoted(values[0], 60)}: write that into the templates, or add others."
            yield Remark(f"prompts.slots.{name}", text)
    things = _only_safe(concept)
    if len(things) < MIN_NEIGHBOURS:
        shown = f"only {listed(things)} stand" if things else "nothing stands"
        yield Remark(
            "prompts.safe",
            f"{shown} in safe prompts alone: without the concept's neighbours, which look like it and are not, the "
            "guard learns to act on them. Add a slot for them, such as {neighbour}, and templates that use it.",
        )


def _only_safe(concept: Concept) -> list[str]:
    """What safe prompts name for its own sake: values of slots that no unsafe prompt has, and words of their own."""
    prompts = concept.prompts
    shows = " ".join([*prompts.unsafe, *prompts.hinted])
    mine = [name for name in prompts.slots if _uses(name, prompts.safe) and not _uses(name, [shows])]
    values = [value for name in mine for value in prompts.slots[name]]
    said = set(_content(shows))
    return list(
        dict.fromkeys([*values, *(word for text in prompts.safe for word in _content(text) if word not in said)])
    )


def _uses(slot: str, templates: list[str]) -> bool:
    return any(re.search(rf"\{{{slot}(_\d+)?\}}", template) for template in templates)


def _content(template: str) -> list[str]:
    """Words of a template itself, small ones aside."""
    found = re.findall(r"[^\W\d_]+", _SLOT.sub(" ", template).casefold())
    return [word for word in found if word not in _SMALL_WORDS]


def _kept(concept: Concept) -> Iterator[Remark]:
    """Whether what must be kept can be, and can be measured."""
    prompts = concept.prompts
    if not prompts.keep:
        yield Remark("prompts.keep", "it is empty: evaluate cannot tell what else stays. Name slots of other things.")
    for slot in prompts.keep:
        if not _uses(slot, [*prompts.unsafe, *prompts.hinted]):
            text = (
                f"no unsafe prompt uses {slot!r}, so nothing shows whether a guard keeps it. Write {{{slot}}} in one."
            )
            yield Remark("prompts.keep", text)
        named = [value for value in prompts.slots[slot] if _says(concept.safety_prompt, value)]
        if named:
            yield Remark(
                "safety_prompt",
                f"it names {listed(named)}, which must be kept (the slot {slot!r}): guidance would push it away. Name "
                "the concept alone.",
                is_error=True,
            )


def _says(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold()) is not None


def _words(concept: Concept) -> Iterator[Remark]:
    """Whether the base model has the words."""
    from dagkit import demo

    tokenizer = _tokenizer(concept.model)
    if tokenizer is None:
        text = f"the tokenizer of {quoted(concept.model, 100)} is not on this machine: words were not looked up in it."
        yield Remark("model", f"{text} The first command that draws fetches it; lint again then.")
        return
    if concept.model == "demo":
        kinds = {
            "words": concept.words,
            "prompts": [p.text for k in ("unsafe", "safe") for p in concept.all_prompts(k)],
        }
        kinds["safety_prompt"] = [concept.safety_prompt]
        for where, texts in kinds.items():
            unknown = list(dict.fromkeys(word for text in texts for word in demo.unknown_words(tokenizer, text)))
            if unknown:
                text = f"the bundled model never saw {listed(unknown)} and draws something else."
                yield Remark(where, f"{text} It knows the words of its world alone.", is_error=where != "safety_prompt")
        return
    for where, texts in {"words": concept.words, "safety_prompt": [concept.safety_prompt]}.items():
        pieces = {word: tokenizer.tokenize(word) for text in texts for word in re.findall(r"[^\W\d_]+", text)}
        cut = {word: parts for word, parts in pieces.items() if len(parts) > 1}
        if cut:
            shown = listed(
                [f"{word} ({' '.join(part.removesuffix('</w>') for part in ones)})" for word, ones in cut.items()]
            )
            yield Remark(
                where,
                f"the tokenizer cuts {shown} to pieces, so no row of attention is the word's own. Use words that it "
                "has whole, or find boxes with another proposer.",
            )


def _tokenizer(model: str) -> Any:
    """The tokenizer of a base model, from this machine alone; None where it is not here."""
    from transformers import AutoTokenizer

    from dagkit import demo

    try:
        place = demo.model_path() if model == "demo" else model
        return AutoTokenizer.from_pretrained(place, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
