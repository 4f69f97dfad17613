"""Datasets in the formats of others, each of which `dagkit.exchange.find_source` reads back, pixel by pixel.

masks           images/KEY.png, masks/KEY.png     black where nothing is; safe pictures have a black mask
coco            images/KEY.png, annotations/train.json, ...
label-studio    images/KEY.png, tasks.json        to be imported; images are served from this folder
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.dataset.pictures import image_of, mask_of, undecoded
from dagkit.dataset.replacing import Writer, replacement
from dagkit.dataset.schema import SPLITS
from dagkit.errors import DatasetError, quoted
from dagkit.exchange import coco
from dagkit.labelstudio import tasks
from dagkit.labelstudio.config import IMAGE_OBJECT, NOTHING_UNSAFE, VERDICT_CONTROL
from dagkit.png import mask_png, picture_png

if TYPE_CHECKING:
    from datasets import DatasetDict

EXPORT: Final = Writer(
    "dagkit dataset export", re.compile(r"(images|masks)/[^/]+\.png|annotations/\w+\.json|tasks\.json")
)
_NEVER: Final = "1970-01-01T00:00:00Z"
_NAME: Final = re.compile(r"[^\w.-]")


def export_dataset(data: DatasetDict, path: Path, format: str, summary: Mapping[str, Any]) -> int:
    """Writes a dataset in another format, in place of an older export if there is one.

    Args:
        data: as from `dagkit.dataset.load_dataset`.
        path: of the folder to write.
        format: one of `EXPORTS`.
        summary: as from `dagkit.dataset.read_summary`; its first positive label is that of the masks.

    Returns:
        How many rows were written.

    Raises:
        DatasetError: the folder cannot be written or holds something else, or a picture cannot be decoded.
        MissingPackage: COCO's run lengths need pycocotools.
    """
    with replacement(path, EXPORT) as folder:
        (folder / "images").mkdir()
        return EXPORTS[format](data, folder, summary)


def _rows(data: DatasetDict, folder: Path) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Split, row, name of the picture's file, which is written, and mask."""
    names: set[str] = set()
    for split in SPLITS:
        for row in undecoded(data[split], "key", "image", "mask", "created", "updated"):
            name = f"{_NAME.sub('_', row['key'])}.png"
            if name.casefold() in names:
                raise DatasetError(f"row {quoted(row['key'], 80)}: another key makes the same file name, {name:.80}.")
            names.add(name.casefold())
            (folder / "images" / name).write_bytes(picture_png(image_of(row)))
            yield split, row, name, mask_of(row)


def _write_masks(data: DatasetDict, folder: Path, _summary: Mapping[str, Any]) -> int:
    num = 0
    (folder / "masks").mkdir()
    for _, _, name, mask in _rows(data, folder):
        (folder / "masks" / name).write_bytes(mask_png(mask))
        num += 1
    return num


def _write_coco(data: DatasetDict, folder: Path, summary: Mapping[str, Any]) -> int:
    label, concept = summary["labels"]["positive"][0], summary["concept"]
    files: dict[str, dict[str, Any]] = {}
    num = 0
    for split, _, name, mask in _rows(data, folder):
        num += 1
        empty: dict[str, Any] = {
            "info": {"description": f"{concept}, {split}, by dagkit"},
            "categories": [{"id": 1, "name": label, "supercategory": concept}],
            "images": [],
            "annotations": [],
        }
        file = files.setdefault(split, empty)
        height, width = mask.shape
        file["images"].append({"id": num, "file_name": name, "width": width, "height": height})
        if mask.any():
            file["annotations"].append({"id": num, "image_id": num, "category_id": 1, **coco.encoded(mask)})
    (folder / "annotations").mkdir()
    for split, file in files.items():
        _write_json(folder / "annotations" / f"{split}.json", file)
    return num


def _write_label_studio(data: DatasetDict, folder: Path, summary: Mapping[str, Any]) -> int:
    label = summary["labels"]["positive"][0]
    exported: list[dict[str, Any]] = []
    for split, row, name, mask in _rows(data, folder):
        number = len(exported) + 1
        nothing = {
            "id": "verdict",
            "type": "choices",
            "from_name": VERDICT_CONTROL,
            "to_name": IMAGE_OBJECT,
            "value": {"choices": [NOTHING_UNSAFE]},
        }
        regions = tasks.prediction({label: mask}, {}, model_version="")["result"] if mask.any() else [nothing]
        times = {name: value.isoformat() if (value := row[of]) else _NEVER for name, of in _TIMES.items()}
        annotation = {"id": number, "completed_by": 1, "was_cancelled": False, **times, "result": regions}
        place = f"/data/local-files/?d=images/{name}"
        data_of = {IMAGE_OBJECT: place, "key": row["key"], "split": split}
        exported.append({"id": number, "data": data_of, "annotations": [annotation]})
    _write_json(folder / "tasks.json", exported)
    return len(exported)


_TIMES: Final = {"created_at": "created", "updated_at": "updated"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


EXPORTS: Final[dict[str, Callable[[DatasetDict, Path, Mapping[str, Any]], int]]] = {
    "masks": _write_masks,
    "coco": _write_coco,
    "label-studio": _write_label_studio,
}
"""Format -> what writes it."""
