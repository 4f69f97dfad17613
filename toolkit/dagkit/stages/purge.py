"""purge: deletes candidate images that no dataset uses, and what was made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dagkit.stages import _common as common

if TYPE_CHECKING:
    from pathlib import Path

    from dagkit.concept import Concept
    from dagkit.workspace import Workspace

_NOT_USED = ("skipped", "cannot_tell")  # review states that no dataset takes
FOLDERS = {"candidates": "images", "premasks": "masks", "annotations": "masks"}
"""Stage -> where its pictures are."""


def run(workspace: Workspace, concept: Concept, *, is_dry_run: bool = True) -> common.StageResult:
    """Deletes the pictures of candidates that are not in the concept's dataset, nor on their way into it.

    On their way are those that annotators were sent and have not answered yet, and those whose answers no export has
    taken up. Manifests stay: they hold prompts and seeds, no pictures, and say what was drawn; later stages pass over
    what was purged. The dataset holds copies of its images, so it is whole whatever is purged.

    Args:
        workspace: with a dataset of the concept.
        concept: whose candidates to purge.
        is_dry_run: only say what would be deleted.

    Raises:
        DatasetError: there is no dataset, so nobody knows what is still needed.
    """
    from dagkit.dataset import load_dataset
    from dagkit.workspace import lock

    used = {key for rows in load_dataset(workspace.stage("dataset", concept.name).path).values() for key in rows["key"]}
    candidates = workspace.stage("candidates", concept.name)
    states = {row["key"]: row["state"] for row in workspace.stage("annotations", concept.name).rows()}
    waiting = workspace.stage("labeling", concept.name).keys() - states.keys() - candidates.purged() - used
    usable = {key for key, state in states.items() if state not in _NOT_USED} - candidates.purged() - used
    unused = candidates.keys() - used - usable - waiting
    files: list[Path] = []
    for name, subfolder in FOLDERS.items():
        folder = workspace.stage(name, concept.name)
        paths = {path for row in folder.rows() if row["key"] in unused for path in _pictures(row)}
        files += [folder.path / path for path in sorted(paths) if path.startswith(f"{subfolder}/")]
    files = [file for file in files if file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    if not is_dry_run:
        for name in FOLDERS:
            folder = workspace.stage(name, concept.name)
            if not folder.path.is_dir():
                continue
            with lock(folder.path):
                if name == "candidates":  # before the first picture goes: a purge that is killed leaves no riddle
                    folder.write_json("purged.json", sorted(folder.purged() | unused))
                for file in files:
                    if file.is_relative_to(folder.path):
                        file.unlink(missing_ok=True)
    size = f"{num_bytes / 1e6:.1f} MB"
    kept = [f"{len(waiting)} wait for annotators and are kept"] * bool(waiting)
    kept += [f"{len(usable)} have answers that no export has taken up and are kept"] * bool(usable)
    message = (
        f"{len(files)} files ({size}) of {len(unused)} unused candidates would be deleted. Add --yes to delete them."
        if is_dry_run
        else f"{len(files)} files ({size}) of {len(unused)} unused candidates were deleted; {len(used)} are in use."
    )
    return common.StageResult(
        "purge",
        0 if is_dry_run else len(files),
        len(used),
        " ".join([message, *(f"{part}." for part in kept)]),
        {
            "is_dry_run": is_dry_run,
            "num_bytes": num_bytes,
            "num_waiting": len(waiting),
            "num_not_exported": len(usable),
            "files": [str(file) for file in files],
        },
    )


def _pictures(row: dict[str, object]) -> list[str]:
    """Paths of the image and masks that a row names."""
    paths = [row["image"]] if "image" in row else []
    masks = row.get("masks")
    if isinstance(masks, dict):
        paths += [mask["path"] if isinstance(mask, dict) else mask for mask in masks.values()]
    return [str(path) for path in paths]


@click.command("purge")
@common.concept_option
@common.workspace_option
@click.option("--yes", "is_confirmed", is_flag=True, help="Delete. Without it, only say what would be deleted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def command(concept_name: str, workspace_path: Path, is_confirmed: bool, as_json: bool) -> None:
    """Delete candidate images that no dataset uses, with their masks. A dry run unless --yes is given.

    Kept are those that annotators have yet to answer, and those whose answers were not exported yet.
    """
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    run(Workspace(workspace_path), load_concept(concept_name), is_dry_run=not is_confirmed).show(as_json)
