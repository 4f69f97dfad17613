"""concept: list, show, lint, describe and write concept files."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group("concept")
def command() -> None:
    """List, show, lint and write concept files."""


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
@click.option(
    "--words",
    help="What the concept is called in a prompt; several with commas. Default: its name. With --model demo: objects "
    "of the bundled world; asked for where not given.",
)
@click.option("--model", metavar="MODEL", help='The base model: "demo", a folder, or a Hub id. Default: SD 1.5.')
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("annotation_configs"),
    show_default=True,
    help="Where to write it.",
)
def new_command(name: str, words: str | None, model: str | None, folder: Path) -> None:
    """Write a commented concept file to fill in; for the bundled model (demo) one that works as it stands.

    An existing file is never overwritten.
    """
    from dagkit.concept import parse_concept
    from dagkit.concept.template import DEFAULT_MODEL, template
    from dagkit.diagnosis import check_plugins
    from dagkit.errors import ConceptError
    from dagkit.resources import exists
    from dagkit.workspace import atomic_write

    path = folder / f"{name}.yaml"
    if exists(path):
        raise ConceptError(f"{path}: there is such a file already. Edit it, or choose another name.")
    text = _of_the_world(name, words) if model == "demo" else template(name, words or name, model or DEFAULT_MODEL)
    check_plugins(parse_concept(text, source=f"concept {name}"))  # what is written here is taken by all that use it
    atomic_write(path, text.encode())
    shown = name if folder == Path("annotation_configs") else path
    if model == "demo":
        click.echo(f"concept: written to {path}. It works as it stands; check it: dagkit concept lint {shown}")
    else:
        click.echo(f"concept: written to {path}. Fill it in, then: dagkit concept show {shown}")


def _of_the_world(name: str, words: str | None) -> str:
    """The file of a concept of the bundled world; asks for its objects where they are not given."""
    from dagkit.concept.fields import did_you_mean
    from dagkit.concept.template import demo_template
    from dagkit.demo.world import BACKGROUNDS, CLASSES, neighbours
    from dagkit.errors import ConceptError, quoted

    if words is None:
        click.echo(f"The bundled world has these objects: {', '.join(CLASSES)}.")
        words = str(click.prompt("Which of them are the concept", default=name if name in CLASSES else None))
    members = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    for word in members or [words]:
        if word not in CLASSES:
            raise ConceptError(
                f"--words: {quoted(word, 60)} is no object of the bundled world.{did_you_mean(word, CLASSES)} "
                f"It has {', '.join(CLASSES)}."
            )
    others = [one for one in CLASSES if one not in members]
    if len(others) < 2:
        raise ConceptError("--words: expected at least two objects that are not the concept. Name fewer.")
    return demo_template(name, members, others, neighbours(members), BACKGROUNDS)


@command.command("lint")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def lint_command(name: str, as_json: bool) -> None:
    """Look for what is allowed in a concept file but will not work well; status 1 where a later stage cannot work.

    Found are: too few prompts for a split, words that the model's tokenizer cuts to pieces, safe prompts without
    neighbours of the concept, a safety prompt that names what must be kept, and more; each with what to do.
    """
    from dagkit.linting import lint

    remarks = lint(name)
    num_errors = sum(one.is_error for one in remarks)
    if as_json:
        rows = [{"where": one.where, "message": one.message, "is_error": one.is_error} for one in remarks]
        click.echo(json.dumps({"errors": num_errors, "warnings": len(remarks) - num_errors, "remarks": rows}))
    else:
        for one in remarks:
            click.echo(f"{'error' if one.is_error else 'warning'}: {one.where}: {one.message}")
        click.echo(f"concept lint: {num_errors} errors, {len(remarks) - num_errors} warnings")
    if num_errors:
        raise click.exceptions.Exit(1)
