"""purge: deletes candidate images that no dataset uses, and what was made of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from dagkit.stages import base

if TYPE_CHECKING:
    from dagkit.concept import Concept
    from dagkit.workspace import Row, StageFolder, Workspace

_NOT_USED = ("skipped", "cannot_tell")  # review states that no dataset takes
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOLDERS = {"candidates": "images", "premasks": "masks", "annotations": "masks"}
"""Stage -> where its pictures are."""


def run(workspace: Workspace, concept: Concept, *, is_dry_run: bool = True) -> base.StageResult:
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
        WorkspaceError: a row names what is no picture of its stage, or another process is writing; nothing was deleted.
    """
    from dagkit.dataset import load_dataset
    from dagkit.workspace import lock

    used = {key for rows in load_dataset(workspace.stage("dataset", concept.name).path).values() for key in rows["key"]}
    candidates, labeling = workspace.stage("candidates", concept.name), workspace.stage("labeling", concept.name)
    folders = {workspace.stage(name, concept.name): subfolder for name, subfolder in FOLDERS.items()}
    with ExitStack() as stack:
        if not is_dry_run:  # nobody sends or answers what is about to go
            for folder in (*folders, labeling):
                if folder.path.is_dir():
                    stack.enter_context(lock(folder.path))
        states = {row["key"]: row["state"] for row in workspace.stage("annotations", concept.name).rows()}
        waiting = labeling.keys() - states.keys() - candidates.purged() - used
        usable = {key for key, state in states.items() if state not in _NOT_USED} - candidates.purged() - used
        unused = candidates.keys() - used - usable - waiting
        files = [(folder, name) for folder, subfolder in folders.items() for name in _files(folder, subfolder, unused)]
        num_bytes = sum(folder.inside(name).stat().st_size for folder, name in files)
        if not is_dry_run:
            if unused:  # before the first picture goes: a purge that is killed leaves no riddle
                candidates.write_json("purged.json", sorted(candidates.purged() | unused))
            for folder, name in files:
                folder.delete(name)
    size = f"{num_bytes / 1e6:.1f} MB"
    kept = [f"{len(waiting)} wait for annotators and are kept"] * bool(waiting)
    kept += [f"{len(usable)} have answers that no export has taken up and are kept"] * bool(usable)
    message = (
        f"{len(files)} files ({size}) of {len(unused)} unused candidates would be deleted. Add --yes to delete them."
        if is_dry_run
        else f"{len(files)} files ({size}) of {len(unused)} unused candidates were deleted; {len(used)} are in use."
    )
    return base.StageResult(
        "purge",
        0 if is_dry_run else len(files),
        len(used),
        " ".join([message, *(f"{part}." for part in kept)]),
        {
            "is_dry_run": is_dry_run,
            "num_bytes": num_bytes,
            "num_waiting": len(waiting),
            "num_not_exported": len(usable),
            "files": [str(folder.inside(name)) for folder, name in files],
        },
    )


def _files(folder: StageFolder, subfolder: str, unused: set[str]) -> list[str]:
    """Pictures of unused candidates in one stage's folder, and of these only: never what another row names, too.

    Raises:
        WorkspaceError: a row names what is not a file in its folder of pictures.
    """
    from dagkit.errors import WorkspaceError

    rows = folder.rows()
    kept = {folder.inside(path).resolve() for row in rows if row["key"] not in unused for path in _pictures(row)}
    found = set()
    for row in rows:
        for path in _pictures(row) if row["key"] in unused else []:
            file = folder.inside(path)
            is_there = file.resolve().is_relative_to((folder.path / subfolder).resolve())
            if not is_there or file.is_dir() or file.suffix.lower() not in _PICTURES:
                raise WorkspaceError(
                    f"{folder.manifest}: {row['key']} names {path!r}, which is no picture in {subfolder}/. Nothing was "
                    "deleted. Mend or delete that row."
                )
            if file.is_file() and file.resolve() not in kept:
                found.add(path)
    return sorted(found)


def _pictures(row: Row) -> list[str]:
    """Paths of the image and masks that a row names."""
    masks = row.get("masks", {}).values()
    return [
        *([row["image"]] if "image" in row else []),
        *(mask["path"] if isinstance(mask, dict) else mask for mask in masks),
    ]
