"""A dataset in the formats of others, and back: mask by mask the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from click.testing import CliRunner

from dagkit import dataset
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset import examples, load_dataset
from dagkit.errors import DatasetError
from drawn_workspace import draw_workspace
from interruption import content, finish

datasets.disable_progress_bars()
CONCEPT = load_concept("weapon")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    workspace = draw_workspace(root / "runs", CONCEPT, 5, 3)
    built = dataset.build(dataset.collect(workspace, CONCEPT, accept_unreviewed=True), CONCEPT)
    dataset.save_dataset(built, root / "weapon", dataset.summarise(built, CONCEPT))
    return root / "weapon"


def masks_of(folder: Path) -> dict[bytes, np.ndarray]:
    return {row.image.tobytes(): row.mask for split in load_dataset(folder).values() for row in examples(split)}


def needs(format_name: str) -> None:
    if format_name == "coco":
        pytest.importorskip("pycocotools")


@pytest.mark.parametrize("format_name", ["masks", "coco", "label-studio"])
def test_out_and_back_is_the_same(format_name: str, whole: Path, tmp_path: Path):
    needs(format_name)
    line = ["dataset", "export", tmp_path / "theirs", whole, "--format", format_name]
    assert f"dataset export: 8 rows as {format_name} -> " in finish(*line)
    before = content(tmp_path / "theirs")
    assert "8 rows" in finish(*line)  # in place of its own
    assert content(tmp_path / "theirs") == before
    assert len([name for name in before if name.startswith("images/")]) == 8

    where = ["--concept", "weapon", "--workspace", tmp_path / "runs"]
    report = json.loads(finish("dataset", "import", tmp_path / "theirs", *where, "--json", "--quiet"))
    assert (report["done"], report["refused"]) == (8, [])
    finish("export", *where)
    back, wanted = masks_of(tmp_path / "runs/dataset/weapon"), masks_of(whole)
    assert back.keys() == wanted.keys()
    assert sum(mask.any() for mask in wanted.values()) == 5
    assert all(np.array_equal(back[key], wanted[key]) for key in wanted)


def test_the_command_offers_all_formats_that_there_are():
    from dagkit.exchange import EXPORTS, FORMATS

    for name, formats in {"import": FORMATS, "export": EXPORTS}.items():
        shown = finish("dataset", name, "--help")
        assert f"[{'|'.join(formats)}]" in shown


def test_coco_reads_what_is_written(whole: Path, tmp_path: Path):
    """By COCO's own library, as any other tool would."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    finish("dataset", "export", tmp_path / "theirs", whole, "--format", "coco")
    areas = []
    for file in sorted((tmp_path / "theirs/annotations").glob("*.json")):
        table = COCO(str(file))
        for one in table.loadAnns(table.getAnnIds()):
            mask = table.annToMask(one)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert one["area"] == mask.sum()
            assert one["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            areas.append(int(mask.sum()))
    assert sorted(areas) == sorted(int(mask.sum()) for mask in masks_of(whole).values() if mask.any())


def test_a_folder_of_something_else_is_not_replaced(whole: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    line = ["dataset", "export", str(tmp_path / "mine"), str(whole), "--format", "masks"]
    result = CliRunner().invoke(command, line)
    assert isinstance(result.exception, DatasetError)
    assert "not replaced: it holds notes.txt" in str(result.exception)
    assert content(tmp_path / "mine").keys() == {"notes.txt"}
    assert "Give a folder, hf://owner/name, or --concept." in CliRunner().invoke(command, [*line[:3], *line[4:]]).output


POLYGON = [10.0, 10.0, 30.0, 10.0, 30.0, 40.0, 10.0, 40.0]


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([POLYGON], 20 * 30),
        ([POLYGON, [50.0, 50.0, 60.0, 50.0, 60.0, 60.0, 50.0, 60.0]], 20 * 30 + 100),
        ({"size": [64, 64], "counts": [0, 64, 64 * 63]}, 64),
        ({"size": [64, 64], "counts": [0, 64, 64]}, "its run lengths come to 128 px, but 64x64 are 4096"),
        ({"size": [64, 32], "counts": [2048]}, "its run lengths are of 32x64 px, but the picture is listed with 64x64"),
        ({"size": [64, 64], "counts": [5000, -904]}, "its run lengths are damaged"),
        ({"size": [64, 64], "counts": "~~~~"}, "not in COCO's packing"),
        ({"size": [64, 64], "counts": "oooo"}, "they end in the middle"),
        ({"size": [64, 64], "counts": ""}, "its run lengths come to 0 px"),
        ([], "it has no outline"),
        (None, "it has no outline"),
        ([[1, 2, 3]], "expected polygons of at least three corners"),
        ([[1e9, 2, 3, 4, 5, 6]], "expected polygons of at least three corners"),
        ([[0, 0, 1e6, 0] * 4000], "an outline of more than"),
    ],
)
def test_coco_masks_are_read_or_named(segmentation: Any, said: int | str, tmp_path: Path):
    pytest.importorskip("pycocotools")
    from dagkit.exchange import coco

    if isinstance(said, int):
        assert coco._mask(segmentation, 64, 64).sum() == said
    else:
        with pytest.raises(DatasetError, match=said):
            coco._mask(segmentation, 64, 64)
