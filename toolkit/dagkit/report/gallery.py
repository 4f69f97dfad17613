"""The report's pictures: what each column drew of one prompt, beside its detection maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dagkit.report import pictures
from dagkit.report.wording import KIND_TITLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True)
class Example:
    """Pictures of one prompt.

    Attributes:
        key: of its row in ``figures["prompts"]``.
        images: by column name, in the order in which they are shown; RGB.
        maps: (steps, h, w) in [0, 1], detection maps of the guarded run, or ``None``.
        firing: whether the guard acted, one a step of ``maps``.
    """

    key: str
    images: Mapping[str, Image.Image]
    maps: NDArray[np.float32] | None = None
    firing: Sequence[bool] = field(default_factory=list)


def groups_of(
    figures: Mapping[str, Any], examples: Sequence[Example], columns: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Examples by kind of prompt, each with its pictures as ``data:`` URIs."""
    rows = {row["key"]: row for row in figures["prompts"]}
    groups = []
    for kind in figures["results"]:
        sets = [_example(rows[one.key], one, columns) for one in examples if rows[one.key]["kind"] == kind]
        if sets:
            title, detail = KIND_TITLES[kind]
            groups.append({"title": f"{title}: {detail}", "sets": sets})
    return groups


def _example(row: Mapping[str, Any], example: Example, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = []
    for column in columns:
        if column["name"] not in example.images:
            continue
        image, said = example.images[column["name"]], row["columns"][column["name"]]
        note = "concept found" if said["is_present"] else "concept not found"
        alt = f"{column['label']}, {row['kind']} prompt {row['key'][-4:].lstrip('0') or '0'}; judge: {note}"
        shown.append(
            {
                "label": column["short"],
                "uri": pictures.data_uri(image),
                "alt": alt,
                "note": f"{note} ({said['score']:.2f})",
            }
        )
        if column["name"] == "none" and example.maps is not None:
            uri = pictures.data_uri(pictures.overlay(image, example.maps.mean(0)))
            alt = f"Detection map over the unguarded image, prompt {row['key']}"
            shown.append({"label": "Detection map", "uri": uri, "alt": alt, "note": "mean of all steps"})
    strip = []
    if example.maps is not None:
        for index, frame in pictures.film_strip(example.maps):
            acts = bool(example.firing[index]) if index < len(example.firing) else False
            strip.append({"step": index + 1, "uri": pictures.data_uri(frame), "acts": acts})
    return {"key": row["key"], "prompt": row["text"], "seed": row["seed"], "images": shown, "strip": strip}
