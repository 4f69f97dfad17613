"""concept: list, show and write concept files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

TEMPLATE = """\
# Try it:  dagkit annotate --concept {name}
# Each key is explained here; delete what you do not need. 'dagkit concept show {name}' checks the file.
name: {name}
summary: One sentence on what must not appear, and where the border is.

# The base model that is guarded, never changed: "demo", a diffusers folder, or a Hub id.
model: stable-diffusion-v1-5/stable-diffusion-v1-5

labels:
  positive: [{label}]             # what annotators mark
  negative: []                    # what is cut out of the mask, e.g. [face, hands]

# Templates. {{slot}} takes a value of the slot below; {{slot_2}} another value of it, different from the first.
prompts:
  unsafe:                         # these show the concept
    - a photo of {words} {{setting}}
  hinted: []                      # these bring it about without naming it
  safe:                           # these do not; above all its neighbours, which must not fire
    - a photo of a landscape {{setting}}
  slots:
    setting: [in a street, in a forest, at the sea]
  keep: [setting]                 # slots whose values a guard must leave in the picture

words: [{words}]                  # looked up in the base model's own attention, to propose boxes
initial_phrase: {words}           # where the guideline token starts
safety_prompt: {words}            # what guidance pushes away from

proposers: attention              # one or several of: attention, nudenet, grounding_dino, token, none
segmenter: {{name: sam, model_type: vit_b}}
judge: {{name: clip, positive: a photo of {words}, negative: a photo without {words}}}

thresholds:
  max_false_trigger_rate: 0.05    # share of safe images in which the guard may act
  # highlight: 0.5                # else calibrated on validation data
  # edit: 0.01

sampling: {{num_inference_steps: 50, guidance_scale: 7.5, width: 512, height: 512}}
"""


@click.group("concept")
def command() -> None:
    """List, show and write concept files."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_command(as_json: bool) -> None:
    """List the concepts that can be used by name."""
    from dagkit.concept import concept_names, load_concept

    concepts = [load_concept(name) for name in concept_names()]
    if as_json:
        click.echo(json.dumps([{"name": concept.name, "summary": concept.summary} for concept in concepts]))
        return
    width = max((len(concept.name) for concept in concepts), default=0)
    for concept in concepts:
        click.echo(f"{concept.name:<{width}}  {concept.summary}")


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the checked concept as one JSON object.")
def show_command(name: str, as_json: bool) -> None:
    """Check a concept file and show what dagkit makes of it."""
    from dagkit.concept import concept_path, load_concept

    concept = load_concept(name)
    if as_json:
        click.echo(concept.model_dump_json())
        return
    click.echo(f"{concept.name}: {concept.summary}")
    click.echo(f"file: {concept_path(name)}")
    click.echo(f"base model: {concept.model}")
    click.echo(
        f"labels: {', '.join(concept.labels.positive)}; cut out: {', '.join(concept.labels.negative) or 'nothing'}"
    )
    for kind in ("unsafe", "hinted", "safe"):
        prompts = concept.all_prompts(kind)
        if prompts:
            click.echo(f"{kind} prompts: {len(prompts)}, e.g. {concept.sample_prompts(kind, 1)[0].text!r}")
    plugins = [*concept.proposers, concept.segmenter, concept.judge]
    click.echo(f"plugins: {', '.join(plugin.name for plugin in plugins)}")


@command.command("new")
@click.argument("name")
@click.option("--words", help="What the concept is called in a prompt. Default: its name.")
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
    from dagkit.errors import ConceptError
    from dagkit.workspace import atomic_write

    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConceptError(
            f"expected a name of lower-case letters, digits, '-' and '_', a letter first, but got {name!r}."
        )
    path = folder / f"{name}.yaml"
    text = TEMPLATE.format(name=name, label=name.replace("-", "_"), words=json.dumps(words or name)[1:-1])
    parse_concept(text, source=str(path))
    if path.exists():
        raise ConceptError(f"{path}: there is such a file already. Edit it, or choose another name.")
    atomic_write(path, text.encode())
    click.echo(f"concept: written to {path}. Fill it in, then: dagkit concept show {name}")
