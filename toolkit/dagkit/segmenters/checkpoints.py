"""Where segmenters' weights are looked for, and what to do when they are not there. Imports no torch."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

from dagkit.errors import CheckpointError, brief, quoted
from dagkit.resources import expanded, is_file, user_cache_folder

TINY: Final = "vit_tiny"
"""The small SAM of the bundled world; its weights ship with dagkit."""


class Source(NamedTuple):
    """Where the weights of one kind of SAM come from."""

    file_name: str
    url: str
    num_megabytes: int


_META: Final = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_SOURCES: Final = {
    "vit_b": Source("sam_vit_b_01ec64.pth", f"{_META}/sam_vit_b_01ec64.pth", 375),
    "vit_l": Source("sam_vit_l_0b3195.pth", f"{_META}/sam_vit_l_0b3195.pth", 1249),
    "vit_h": Source("sam_vit_h_4b8939.pth", f"{_META}/sam_vit_h_4b8939.pth", 2564),
}


def checkpoint_folder() -> Path:
    """Where checkpoints are kept: ``DAGKIT_CHECKPOINTS``, or ``dagkit/checkpoints`` in the user's cache."""
    given = os.environ.get("DAGKIT_CHECKPOINTS")
    return expanded(given, "DAGKIT_CHECKPOINTS") if given else user_cache_folder() / "checkpoints"


def find_sam(model_type: str, given: Path | str | None = None) -> Path:
    """The weights of one kind of SAM.

    Args:
        model_type: ``vit_b``, ``vit_l``, ``vit_h`` or ``vit_tiny``.
        given: a file; ``demo`` for the bundled one. By default the kind's own file name in `checkpoint_folder`.

    Raises:
        CheckpointError: there is no such kind or file; the message says where to get it and where to put it.
    """
    if model_type not in (TINY, *SAM_SOURCES):
        raise CheckpointError(
            f"{quoted(model_type)} is not a kind of SAM. Available: {', '.join([*SAM_SOURCES, TINY])}. "
            "Mend segmenter.model_type."
        )
    if given == "demo" or (given is None and model_type == TINY):
        return _existing(Path(str(files("dagkit").joinpath("demo/data/sam_tiny.safetensors"))), "Reinstall dagkit.")
    if model_type == TINY:
        return _existing(
            expanded(str(given), "segmenter.checkpoint"), "Give the path of its weights, or write 'checkpoint: demo'."
        )
    source = SAM_SOURCES[model_type]
    path = expanded(given, "segmenter.checkpoint") if given else checkpoint_folder() / source.file_name
    return _existing(
        path,
        f"Get it (about {source.num_megabytes:,} MB) with:\n"
        f"  mkdir -p {path.parent} && curl -L -o {path} {source.url}\n"
        "or give another file with --checkpoint or segmenter.checkpoint.",
    )


def _existing(path: Path, advice: str) -> Path:
    if not is_file(path):
        raise CheckpointError(f"{brief(str(path))}: no such SAM checkpoint. {advice}")
    return path
