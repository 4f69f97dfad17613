"""attack: the command of `dagkit.stages.attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from dagkit.commands import _common as common
from dagkit.stages import attack, base
from dagkit.stages.columns import COLUMNS

ALL: Final = "all"


@click.command("attack")
@common.guarded_options
@common.workspace_option
@common.model_option
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([*attack.METHODS, ALL]),
    help="How to attack; repeatable. Default: seeds and words, which see pictures only. Others attack 'dagkit' alone.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    type=click.Choice(COLUMNS),
    help="What to attack; repeatable. Default: 'dagkit', the token's guard.",
)
@click.option(
    "--num-targets", type=click.IntRange(1, 100_000), default=8, show_default=True, help="Prompts to start from."
)
@click.option(
    "--queries",
    "num_queries",
    type=click.IntRange(1, 100_000),
    default=24,
    show_default=True,
    help="Pictures that each method may ask for, a target.",
)
@click.option(
    "--words",
    "words_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Words to make prompts of, separated by spaces or lines. Default: a small tokenizer's, or the concept's.",
)
@common.steps_option
@click.option(
    "--judge",
    "judge_names",
    multiple=True,
    metavar="NAME",
    help="Judges: the first counts successes, each other one is a filter behind the guard. Default: the concept's.",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep prompts and pictures of what got past the guard. Default: nothing is kept.",
)
@common.device_option
@common.seed_option
@common.output_options
def command(
    token_name: str,
    concept_name: str | None,
    workspace_path: Path,
    model: str | None,
    methods: tuple[str, ...],
    columns: tuple[str, ...],
    num_targets: int,
    num_queries: int,
    words_file: Path | None,
    num_inference_steps: int | None,
    judge_names: tuple[str, ...],
    keep: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Attack a token's guard, and say what gets through.

    Starts from the concept's own prompts that show it without a guard. For testing a guard of your own.
    """
    from dagkit import registry
    from dagkit.concept import load_concept
    from dagkit.judges import build_judge

    token = registry.load_token(token_name, workspace=workspace_path)
    concept = load_concept(concept_name or token.concept)
    if num_inference_steps is not None:
        sampling = concept.sampling.model_copy(update={"num_inference_steps": num_inference_steps})
        concept = concept.model_copy(update={"sampling": sampling})
    base_model = common.load_base_model(concept, model, device)
    judges = {name: build_judge(concept, str(base_model.device), name=name) for name in judge_names}
    result = attack.run(
        concept,
        base_model,
        token,
        methods=attack.METHODS if ALL in methods else methods or attack.BLACK_BOX,
        columns=columns or attack.DEFAULT_COLUMNS,
        num_targets=num_targets,
        num_queries=num_queries,
        words=_words(words_file) if words_file else (),
        judges=judges,
        seed=seed,
        keep=keep,
        progress=base.Progress(is_quiet),
    )
    common.show(result, as_json)


def _words(path: Path) -> list[str]:
    """The words of a file.

    Raises:
        ConceptError: it holds none.
        DagkitError: it is no text.
    """
    from dagkit.errors import ConceptError

    words = common.read_text(path).split()
    if not words:
        raise ConceptError(f"{path}: expected words to attack with, but it is empty. Write some, or leave out --words.")
    return list(dict.fromkeys(words))
