"""concept: list, show, describe and write concept files."""

from __future__ import annotations

import json
from pathlib import Path

import click


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
    from dagkit.diagnosis import check_concept

    concept = load_concept(name)
    check_concept(concept)
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


@command.command("schema")
def schema_command() -> None:
    """Print the JSON schema of a concept file, for editors; it knows all plugins that are installed."""
    from dagkit.concept.editor import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


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
    from dagkit.concept.template import template
    from dagkit.errors import ConceptError
    from dagkit.resources import exists
    from dagkit.workspace import atomic_write

    text, path = template(name, words or name), folder / f"{name}.yaml"
    if exists(path):
        raise ConceptError(f"{path}: there is such a file already. Edit it, or choose another name.")
    atomic_write(path, text.encode())
    shown = name if folder == Path("annotation_configs") else path
    click.echo(f"concept: written to {path}. Fill it in, then: dagkit concept show {shown}")
