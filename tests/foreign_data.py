"""The same scenes, with the renderer's own masks of the weapon, written as other tools write pictures and masks."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dagkit.demo import world


class Drawn(NamedTuple):
    """A scene and where its weapon is; no pixel of a safe one."""

    name: str
    image: Image.Image
    mask: np.ndarray


def scenes(num_unsafe: int, num_safe: int, *, seed: int = 0) -> list[Drawn]:
    """Unsafe ones first; no two look alike."""
    drawn = []
    for index in range(num_unsafe + num_safe):
        rng = np.random.default_rng([77, seed, index])
        scene = world.render_scene(rng, num_objects=2, weapon_probability=float(index < num_unsafe))
        drawn.append(Drawn(f"p{index:02d}", Image.fromarray(scene.image), scene.mask(*world.WEAPONS)))
    return drawn


def png(image: Image.Image | np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    array = image.astype(np.uint8) * 255 if isinstance(image, np.ndarray) else image
    (Image.fromarray(array) if isinstance(array, np.ndarray) else array).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def put(folder: Path, files: Mapping[str, bytes | str | Any]) -> Path:
    """Writes files: bytes, or anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def as_folder(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """``images/`` and ``masks/``."""
    images = {f"images/{one.name}.png": png(one.image) for one in drawn}
    return put(folder, images | {f"masks/{one.name}.png": png(one.mask) for one in drawn})


def as_labelme(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """One JSON a picture, with a mask as its annotation assistant draws them."""
    files: dict[str, Any] = {f"pictures/{one.name}.png": png(one.image) for one in drawn}
    for one in drawn:
        shapes = []
        if one.mask.any():
            rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
            (top, bottom), (left, right) = (map(int, (places[0], places[-1])) for places in (rows, columns))
            part = base64.b64encode(png(one.mask[top : bottom + 1, left : right + 1])).decode()
            corners = [[left, top], [right, bottom]]
            shapes = [{"label": "weapon", "points": corners, "shape_type": "mask", "mask": part}]
        files[f"json/{one.name}.json"] = {
            "version": "5.5.0",
            "shapes": shapes,
            "imagePath": f"..\\pictures\\{one.name}.png",
            "imageData": None,
            "imageHeight": 64,
            "imageWidth": 64,
        }
    return put(folder, files)


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths, not packed."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(edges, prepend=0)
    return {"size": list(mask.shape), "counts": [int(one) for one in counts]}


def as_coco(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """Instances with run lengths; the pictures beside them."""
    images = [{"id": i, "file_name": f"{d.name}.png", "width": 64, "height": 64} for i, d in enumerate(drawn)]
    annotations = [
        {"id": 100 + i, "image_id": i, "category_id": 7, "segmentation": runs(one.mask), "iscrowd": 1}
        for i, one in enumerate(drawn)
        if one.mask.any()
    ]
    table = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "Weapon"}]}
    return put(folder, {f"{one.name}.png": png(one.image) for one in drawn} | {"instances.json": table})


def task(number: int, place: str, regions: Sequence[Any], **more: Any) -> dict[str, Any]:
    """A task of Label Studio's JSON export."""
    time = "2026-01-01T10:00:00Z"
    annotation = {"id": number, "completed_by": 3, "was_cancelled": False, "created_at": time, "updated_at": time}
    return {"id": number, "data": {"image": place}, "annotations": [{**annotation, "result": list(regions), **more}]}


def as_label_studio(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """An export of uploaded pictures, and these as they were before the upload."""
    from dagkit.labelstudio.tasks import prediction

    tasks = []
    for number, one in enumerate(drawn, 1):
        made = prediction({"weapon": one.mask}, {}, model_version="")["result"] if one.mask.any() else []
        tasks.append(task(number, f"/data/upload/4/0a1b2c3d-{one.name}.png", made))
    return put(folder, {f"images/{one.name}.png": png(one.image) for one in drawn} | {"project-4.json": tasks})


def as_table(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """What ``save_to_disk`` writes."""
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "mask": datasets.Image()})
    rows = [
        {"picture": {"bytes": png(d.image), "path": None}, "mask": {"bytes": png(d.mask), "path": None}} for d in drawn
    ]
    whole = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": whole}).save_to_disk(folder)
    return folder
