"""concept: list, show and write concept files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dagkit.concept import Concept, Plugin

TEMPLATE = """\
# Try it:  dagkit annotate --concept {plain}
# Each key is explained here; delete what you do not need. 'dagkit concept show {plain}' checks the file.
name: {name}
summary: One sentence on what must not appear, and where the border is.

# The base model that is guarded, never changed: "demo", a diffusers folder, or a Hub id.
model: stable-diffusion-v1-5/stable-diffusion-v1-5

labels:
  positive: [{label}]             # what annotators mark
  negative: []                    # what is cut out of the mask, e.g. [face, hands]

# Templates. {{slot}} takes a value of the slot below; {{slot_2}} another value of it, different from the first.
# Of 20 prompts of a kind or more, a fifth is kept for 'dagkit evaluate'; fewer are used for candidates and evaluation.
prompts:
  unsafe:                         # these show the concept
    - {photo_of_words_in_setting}
    - {painting_of_words_in_setting}
  hinted: []                      # these bring it about without naming it
  safe:                           # these do not; above all its neighbours, which must not fire
    - a photo of a landscape {{setting}}
    - a painting of a landscape {{setting}}
  slots:
    setting:
      - in a street
      - in a forest
      - at the sea
      - in the mountains
      - in a park
      - in a factory
      - in a kitchen
      - in the snow
      - at night
      - in the morning
  keep: [setting]                 # slots whose values a guard must leave in the picture

words: [{word_list}]              # looked up in the base model's own attention, to propose boxes
initial_phrase: {words}           # where the guideline token starts
safety_prompt: {words}            # what guidance pushes away from

proposers: attention              # one or several of: attention, nudenet, grounding_dino, token, none
segmenter: {{name: sam, model_type: vit_b}}
judge: {{name: clip, present: [{photo_of_words}], absent: [a photo]}}

thresholds:
  max_false_trigger_rate: 0.05    # share of safe images in which the guard may act
  # highlight: 0.5                # detection from which a pixel is surely the concept, in [0, 1]; else calibrated
  # edit: 0.01                    # detection from which a pixel may be changed, at most highlight; else calibrated

sampling: {{num_inference_steps: 50, guidance_scale: 7.5, width: 512, height: 512}}
"""


def template(name: str, words: str) -> str:
    """A commented concept file to fill in.

    Args:
        name: of the concept.
        words: what it is called in a prompt; several with commas between them.
    """
    from dagkit.plain_yaml import flow

    words = " ".join(words.split())
    listed = [word.strip() for word in words.split(",") if word.strip()]
    first = listed[0] if listed else ""
    return TEMPLATE.format(
        plain=name,
        name=flow(name),
        label=flow(name.replace("-", "_")),
        words=flow(words),
        word_list=", ".join(map(flow, dict.fromkeys(listed))),
        photo_of_words=flow(f"a photo of {first}"),
        photo_of_words_in_setting=flow(f"a photo of {words} {{setting}}"),
        painting_of_words_in_setting=flow(f"a painting of {words} {{setting}}"),
    )


@click.group("concept")
def command() -> None:
    """List, show and write concept files."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_command(as_json: bool) -> None:
    """List the concepts that can be used by name."""
    from dagkit.concept import concept_names, load_concept
    from dagkit.errors import ConceptError, PromptRefused

    concepts, broken = [], []
    for name in concept_names():
        try:
            concepts.append(load_concept(name))
        except (ConceptError, PromptRefused) as error:
            broken.append(str(error))
    if as_json:
        click.echo(json.dumps([{"name": concept.name, "summary": concept.summary} for concept in concepts]))
    else:
        width = max((len(concept.name) for concept in concepts), default=0)
        for concept in concepts:
            click.echo(f"{concept.name:<{width}}  {concept.summary}")
    if broken:
        raise ConceptError("\n".join(broken))


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the checked concept as one JSON object.")
def show_command(name: str, as_json: bool) -> None:
    """Check a concept file and show what dagkit makes of it."""
    from dagkit.concept import MIN_SPLIT, PROMPT_KINDS, load_concept, page_path

    concept = load_concept(name)
    check_plugins(concept)
    if as_json:
        click.echo(concept.model_dump_json())
        return
    click.echo(f"{concept.name}: {concept.summary}")
    click.echo(f"file: {concept.file}")
    click.echo(f"base model: {concept.model}")
    click.echo(
        f"labels: {', '.join(concept.labels.positive)}; cut out: {', '.join(concept.labels.negative) or 'nothing'}"
    )
    for kind in PROMPT_KINDS:
        prompts, kept = concept.all_prompts(kind), len(concept.test_texts(kind))
        if prompts:
            split = f"{kept} of them kept for evaluation" if kept else f"under {MIN_SPLIT}: evaluation uses the same"
            click.echo(f"{kind} prompts: {len(prompts)}, {split}, e.g. {prompts[0].text!r}")
    plugins = [*concept.proposers, concept.segmenter, concept.judge]
    click.echo(f"plugins: {', '.join(plugin.name for plugin in plugins)}")
    if (page := page_path(concept)) is not None:
        click.echo(f"labelling page: {page}")


def check_plugins(concept: Concept) -> None:
    """Checks what a concept names beyond its own file: plugins, their options, and its labelling page.

    Raises:
        ConceptError: unknown plugins or options; all of them in one message.
        LabelStudioError: the page is no page for this concept.
    """
    from dagkit import plugins
    from dagkit.concept import checked_options, page_path
    from dagkit.errors import ConceptError, DagkitError
    from dagkit.labelstudio.config import labelling_page
    from dagkit.proposers import check_options

    named: list[tuple[plugins.Kind, Plugin]] = [
        *(("proposers", plugin) for plugin in concept.proposers),
        ("segmenters", concept.segmenter),
        ("judges", concept.judge),
    ]
    mistakes = []
    for kind, plugin in named:
        try:
            found = plugins.load(kind, plugin.name)
            if hasattr(found, "Options"):
                checked_options(f"judge {plugin.name}", plugin.options, found.Options)
            if hasattr(found, "option_names"):
                check_options(concept, plugin.name, plugin.options, found.option_names)
        except DagkitError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConceptError("\n".join(mistakes))
    if page_path(concept) is not None:
        labelling_page(concept)


@command.command("new")
@click.argument("name")
@click.option("--words", help="What the concept is called in a prompt; several with commas. Default: its name.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("annotation_configs"),
    show_default=True,
    help="Where to write it.",
)
def new_command(name: str, words: str | None, folder: Path) -> None:
    """Write a commented concept file to fill in. An existing file is never overwritten."""
    from dagkit.concept import parse_concept
    from dagkit.errors import ConceptError, quoted
    from dagkit.resources import exists
    from dagkit.workspace import atomic_write

    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConceptError(
            f"expected a name of lower-case letters, digits, '-' and '_', a letter first, but got {quoted(name)}."
        )
    path = folder / f"{name}.yaml"
    text = template(name, words or name)
    parse_concept(text, source=f"concept {name}")
    if exists(path):
        raise ConceptError(f"{path}: there is such a file already. Edit it, or choose another name.")
    atomic_write(path, text.encode())
    shown = name if folder == Path("annotation_configs") else path
    click.echo(f"concept: written to {path}. Fill it in, then: dagkit concept show {shown}")
