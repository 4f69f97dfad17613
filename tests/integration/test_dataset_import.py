"""Pictures and masks of others: taken pixel by pixel, and what cannot be taken is named and opens nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import foreign_data as foreign
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset import examples, load_dataset, read_summary
from dagkit.errors import ConceptError, DagkitError, DatasetError
from dagkit.workspace import StageFolder, Workspace
from foreign_data import Drawn, png, put, scenes
from interruption import content, finish, kill_when, num_rows

datasets.disable_progress_bars()
CONCEPT = load_concept("weapon")
Writer = Callable[[Path, list[Drawn]], Path]


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, DagkitError | SystemExit):
        raise result.exception
    return result


def take(source: object, workspace: Path, *options: object) -> dict[str, Any]:
    """Imports a source and returns its report."""
    where = ["--concept", "weapon", "--workspace", workspace]
    printed = finish("dataset", "import", source, *where, *options, "--json", "--quiet")
    return json.loads(Path(json.loads(printed)["report"]).read_text())


def refused(report: dict[str, Any]) -> dict[str, str]:
    return {one["entry"]: one["reason"] for one in report["not_taken"]}


def masks_of(workspace: Path) -> dict[bytes, np.ndarray]:
    """Pixels of each picture of the exported dataset -> its mask."""
    finish("export", "--concept", "weapon", "--workspace", workspace)
    data = load_dataset(workspace / "dataset" / "weapon")
    return {row.image.tobytes(): row.mask for split in data.values() for row in examples(split)}


def expected(drawn: list[Drawn]) -> dict[bytes, np.ndarray]:
    return {one.image.tobytes(): one.mask for one in drawn}


def same(found: dict[bytes, np.ndarray], wanted: dict[bytes, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("writer", "format_name", "options"),
    [
        (foreign.as_folder, "folder", []),
        (foreign.as_labelme, "labelme", []),
        (foreign.as_coco, "coco", []),
        (foreign.as_label_studio, "label-studio", []),
        (foreign.as_table, "huggingface", ["--image-column", "picture"]),
    ],
)
def test_every_format_is_found_out_and_taken_pixel_by_pixel(
    writer: Writer, format_name: str, options: list[str], tmp_path: Path
):
    if format_name == "coco":
        pytest.importorskip("pycocotools")
    drawn = scenes(5, 3)
    source = writer(tmp_path / "theirs", drawn)
    report = take(source, tmp_path / "runs", *options)
    assert (report["format"], len(report["taken"]), report["not_taken"]) == (format_name, 8, [])
    assert same(masks_of(tmp_path / "runs"), expected(drawn))

    summary = read_summary(tmp_path / "runs/dataset/weapon")
    assert (summary["num_imported"], summary["review_states"], summary["is_reviewed"]) == (8, {"imported": 8}, False)
    rows = [row for split in load_dataset(tmp_path / "runs/dataset/weapon").values() for row in split]
    assert all(row["source"].startswith(f"{format_name}: ") for row in rows)
    assert all(row["proposers"][0]["name"] == format_name for row in rows)
    assert {row["model"] for row in rows} == {"imported"}
    assert len({row["group"] for row in rows}) == 8  # an empty prompt does not make them one
    card = (tmp_path / "runs/dataset/weapon/README.md").read_text()
    assert "8 images were imported" in card
    assert f"- imported images: 8 from {format_name}" in card
    assert "All images are synthetic" not in card
    assert str(tmp_path) not in card + json.dumps(rows, default=str)
    assert invoke("dataset", "check", tmp_path / "runs/dataset/weapon").exit_code == 0

    again = take(source, tmp_path / "runs", *options)
    assert (again["taken"], len(again["there_already"]), again["not_taken"]) == ([], 8, [])


def test_a_killed_import_ends_like_an_undisturbed_one(tmp_path: Path):
    source = foreign.as_folder(tmp_path / "theirs", scenes(12, 8))

    def arguments(name: str) -> list[object]:
        return ["dataset", "import", source, "--concept", "weapon", "--workspace", tmp_path / name, "--quiet"]

    finish(*arguments("undisturbed"))
    folder = tmp_path / "killed" / "candidates" / "weapon"
    kill_when(lambda: num_rows(folder) >= 3, *arguments("killed"))
    assert 3 <= num_rows(folder) < 20
    assert "-> " in finish(*arguments("killed"))
    for stage in ("candidates", "premasks"):
        found = [content(tmp_path / name / stage) for name in ("killed", "undisturbed")]
        reports = [{key: one for key, one in files.items() if "imports" not in key} for files in found]
        assert reports[0] == reports[1]


def test_drawn_and_imported_pictures_go_one_way(tmp_path: Path):
    """The ones as their pre-masks say, if asked for; the others as they came."""
    text = Path(CONCEPT.file or "").read_text().replace("num_inference_steps: 25", "num_inference_steps: 2")
    (tmp_path / "weapon.yaml").write_text(text)
    where = ["--concept", tmp_path / "weapon.yaml", "--workspace", tmp_path / "runs"]
    finish("generate", *where, "--num-images", 3, "--quiet")
    finish("dataset", "import", foreign.as_folder(tmp_path / "theirs", scenes(2, 2)), *where, "--quiet")
    finish("generate", *where, "--num-images", 4, "--quiet")
    finish("premask", *where, "--quiet")
    premasks = Workspace(tmp_path / "runs").stage("premasks", "weapon").rows()
    assert [row["proposers"][0]["name"] for row in premasks if row.get("source")] == ["folder"] * 4
    assert len(premasks) == 8
    finish("export", *where)
    assert read_summary(tmp_path / "runs/dataset/weapon")["review_states"] == {"imported": 4}
    finish("export", *where, "--unreviewed")
    summary = read_summary(tmp_path / "runs/dataset/weapon")
    assert summary["review_states"].items() >= {"imported": 4}.items()
    assert [name for name, _ in summary["models"]] == ["demo"]


def test_pictures_without_masks_are_taken_instead_of_drawn(tmp_path: Path):
    drawn = scenes(2, 1)
    folder = put(tmp_path / "photos", {f"deep/{one.name}.png": png(one.image.resize((256, 128))) for one in drawn})
    put(folder, {"broken.jpg": b"no picture", "notes.txt": b"mine"})
    where = ["--concept", "weapon", "--workspace", tmp_path / "runs"]
    printed = finish("generate", *where, "--images", folder)
    assert "not taken: broken.jpg: it cannot be decoded (expected one of PNG, JPEG" in printed
    assert "import: 3 pictures taken (3 unsafe), 0 were there already, 1 not taken" in printed
    candidates = Workspace(tmp_path / "runs").stage("candidates", "weapon")
    rows = candidates.rows()
    assert [row["source"] for row in rows] == [f"pictures: deep/{one.name}.png" for one in drawn]
    assert {candidates.read_image(row["image"]).size for row in rows} == {(64, 64)}
    finish("premask", *where, "--quiet")
    assert len(Workspace(tmp_path / "runs").stage("premasks", "weapon").rows()) == 3
    assert isinstance(invoke("export", *where).exception, DatasetError)  # nobody said what they show

    safe = finish(
        "generate",
        *where,
        "--images",
        put(tmp_path / "safe", {"a.png": png(scenes(0, 1, seed=5)[0].image)}),
        "--images-show",
        "safe",
    )
    assert "1 pictures taken (1 safe)" in safe
    for line, words in (
        (["--images", folder, "--num-images", 3], "--images takes pictures and draws none: leave out --num-images."),
        (["--images-show", "safe"], "add it, or leave that out"),
    ):
        assert words in " ".join(invoke("generate", *where, *line).output.split())


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that viewers turn, as cameras write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def test_turned_photographs_are_upright_with_their_masks(tmp_path: Path):
    """Whether a mask was drawn on the picture as viewers show it, or as it lies in its file, its size tells."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 8, 3), np.uint8)).resize((80, 120))
    mask = np.zeros((120, 80), bool)
    mask[10:40, 5:25] = True
    lying = upright.transpose(Image.Transpose.ROTATE_90)  # what orientation 6 turns back
    files = {"images/a.jpg": turned(lying, 6), "masks/a.png": png(mask)}
    files |= {
        "images/b.jpg": turned(lying.transpose(Image.Transpose.ROTATE_180), 8),
        "masks/b.png": png(np.rot90(mask, 3)),
    }
    files |= {"images/c.jpg": turned(upright.resize((80, 80)), 3), "masks/c.png": png(np.ones((80, 80), bool))}
    report = take(put(tmp_path / "theirs", files), tmp_path / "runs")
    assert report["taken"] == ["images/a.jpg", "images/b.jpg"]
    assert refused(report)["images/c.jpg"].endswith(
        "its EXIF data say that the picture is turned, and its mask would fit both ways. Save the picture upright, "
        "without that mark, and import it again"
    )
    candidates, premasks = (Workspace(tmp_path / "runs").stage(name, "weapon") for name in ("candidates", "premasks"))
    for row in candidates.rows():
        assert row["window"] == [0, 0, 80, 80]  # as wide as it is, around the mask
        with Image.open(candidates.inside(row["image"])) as image:
            assert not image.getexif()
            assert image.info == {}
            wanted = upright.crop((0, 0, 80, 80)).resize((64, 64), Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).mean() < 12  # it was a JPEG
        found = premasks.read_mask(f"masks/{row['key']}-weapon.png", (64, 64))
        assert found[8:32, 4:20].all()
        assert found.sum() == 24 * 16


def test_the_window_lies_around_the_mask_and_losses_are_told(tmp_path: Path):
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 256, 3), np.uint8))
    right, both, speck = (np.zeros((64, 256), bool) for _ in range(3))
    right[20:40, 200:240] = True
    both[20:40, 0:20] = both[20:40, 236:256] = True
    speck[0, 0] = True
    big = Image.fromarray(np.random.default_rng(2).integers(0, 256, (640, 640, 3), np.uint8))
    dot = np.zeros((640, 640), bool)
    dot[5, 5] = True
    flipped = [wide, wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT), wide.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    files = {f"images/{name}.png": png(image) for name, image in zip("abc", flipped, strict=True)}
    files |= {f"masks/{name}.png": png(mask) for name, mask in zip("abc", (right, both, speck), strict=True)}
    files |= {"images/d.png": png(big), "masks/d.png": png(dot), "images/e.png": png(big.crop((0, 0, 16, 16)))}
    report = take(put(tmp_path / "theirs", files | {"masks/e.png": png(np.ones((16, 16), bool))}), tmp_path / "runs")
    assert report["taken"] == ["images/a.png", "images/c.png", "images/e.png"]
    assert "what is marked as weapon (800 of 16384 px) leaves no pixel at 64x64" in refused(report)["images/b.png"]
    assert "what is marked as weapon (1 of 409600 px) leaves no pixel" in refused(report)["images/d.png"]
    assert report["notes"] == [{"entry": "images/e.png", "note": "enlarged 4.0 times, from 16x16 px: it is blurred"}]
    windows = [row["window"] for row in Workspace(tmp_path / "runs").stage("candidates", "weapon").rows()]
    assert windows == [[188, 0, 252, 64], [0, 0, 64, 64], [0, 0, 16, 16]]


def test_masks_that_nobody_can_read_are_named(tmp_path: Path):
    scene = scenes(9, 0)
    values = np.zeros((64, 64), np.uint8)
    values[:8], values[8:16] = 1, 2
    colours = np.zeros((64, 64, 3), np.uint8)
    colours[:8, :, 0] = 255
    see_through = np.zeros((64, 64, 4), np.uint8)
    see_through[:8, :, 3] = 255
    palette = Image.fromarray((values == 1).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    good = {"ones": (values == 1).astype(np.uint8), "palette": palette, "full": np.full((64, 64), 255, np.uint8)}
    soft = values.copy()
    soft[:8], soft[8:16], soft[16:20] = 255, 90, 180
    bad = {"classes": values, "colours": colours, "clear": see_through, "small": np.zeros((32, 64), np.uint8)}
    masks = {**good, "soft": soft, **bad}
    files: dict[str, bytes] = {}
    for one, (name, mask) in zip(scene, masks.items(), strict=False):
        files[f"images/{name}.png"] = png(one.image)
        files[f"masks/{name}.png"] = png(mask if isinstance(mask, Image.Image) else Image.fromarray(mask))
    files |= {
        "images/bare.png": png(scene[8].image),
        "masks/lost.png": png(scene[8].mask),
        "masks/empty.png": png(np.zeros((64, 64), bool)),
    }
    files |= {"images/empty.png": png(scenes(0, 1)[0].image), "safe/calm.png": png(scenes(0, 2)[1].image)}
    report = take(put(tmp_path / "theirs", files), tmp_path / "runs")
    assert sorted(report["taken"]) == sorted(
        [*(f"images/{name}.png" for name in (*good, "soft", "empty")), "safe/calm.png"]
    )
    reasons = refused(report)
    assert {name: reasons.pop(f"images/{name}.png") for name in bad} == {
        "classes": "masks/classes.png: its mask has the values 0, 1, 2: expected black, and white where the concept is",
        "colours": "masks/colours.png: its mask has colours: expected black, and white where the concept is",
        "clear": "masks/clear.png: its mask is partly transparent: expected black, and white where the concept is",
        "small": "masks/small.png: expected a mask of 64x64 px, as large as its picture, but got 64x32",
    }
    assert reasons == {
        "masks/lost.png": "there is no picture for this mask",
        "images/bare.png": "there is no mask for it. Add one (black where nothing is), or put the picture into safe/ "
        "if it does not show the concept",
    }
    assert report["notes"] == [{"entry": "images/empty.png", "note": "its mask is empty: it counts as safe"}]
    premasks = Workspace(tmp_path / "runs").stage("premasks", "weapon")
    areas = {
        row["source"]: [premasks.read_mask(m["path"], (64, 64)).sum() for m in row["masks"].values()]
        for row in premasks.rows()
    }
    rows_of = {"ones": 8, "palette": 8, "full": 64, "soft": 12}
    assert all(areas[f"folder: images/{name}.png"] == [64 * rows] for name, rows in rows_of.items())
    assert areas["folder: safe/calm.png"] == []


def test_labels_of_ones_own(tmp_path: Path):
    """A name that nobody explained is an error of its picture, which might else count as safe."""
    scene = scenes(3, 1)
    box = [[8, 8], [40, 40]]
    shapes = {"knife": box, "Harmless": [[8, 8], [16, 16]], "cat": box}
    files: dict[str, Any] = {}
    for one, labels in zip(scene, (["knife"], ["knife", "Harmless"], ["cat"], []), strict=True):
        drawn = [{"label": label, "points": shapes[label], "shape_type": "rectangle"} for label in labels]
        data = base64.b64encode(png(one.image)).decode()
        files[f"{one.name}.json"] = {"shapes": drawn, "imagePath": "../elsewhere.png", "imageData": data}
    source = put(tmp_path / "theirs", files)
    report = take(source, tmp_path / "a", "--label", "knife=weapon", "--label", "bomb=weapon")
    assert (report["taken"], report["labels_never_met"]) == (["p00.json", "p01.json", "p03.json"], ["bomb"])
    assert refused(report) == {
        "p02.json": "its label 'cat' is none of the concept's (weapon, harmless). Say what it means: "
        "--label 'cat=weapon', or --ignore 'cat'"
    }
    found = masks_of(tmp_path / "a")
    areas = [found[one.image.tobytes()].sum() for one in scene if one.image.tobytes() in found]
    assert areas == [32 * 32, 32 * 32 - 8 * 8, 0]
    everything = take(source, tmp_path / "b", "--label", "knife=weapon", "--ignore", "*")
    assert len(everything["taken"]) == 4
    wrong = invoke("dataset", "import", source, "--concept", "weapon", "--label", "knife=blade")
    assert isinstance(wrong.exception, ConceptError)
    assert "'blade' is not a label of the concept" in str(wrong.exception)
    assert (
        "expected THEIRS=OURS" in invoke("dataset", "import", source, "--concept", "weapon", "--label", "knife").output
    )


def test_pictures_of_one_name_are_not_mixed_up(tmp_path: Path):
    """Two uploads were called alike, and one file is there: whose is it? And a picture that was replaced."""
    first, second, third = scenes(3, 0)
    source = foreign.as_label_studio(tmp_path / "theirs", [first, second, third])
    tasks = json.loads((source / "project-4.json").read_text())
    tasks[1]["data"]["image"] = "/data/upload/4/9f9f9f9f-p00.png"
    put(source, {"project-4.json": tasks})
    report = take(source, tmp_path / "runs")
    assert report["taken"] == ["project-4.json, task 3"]
    assert (
        "2 tasks have a picture called 'p00.png', and nobody can tell which"
        in refused(report)["project-4.json, task 1"]
    )
    put(source, {"0a1b2c3d-p00.png": png(first.image), "images/9f9f9f9f-p00.png": png(second.image)})
    assert len(take(source, tmp_path / "runs")["taken"]) == 2
    assert same(masks_of(tmp_path / "runs"), expected([first, second, third]))

    source = foreign.as_labelme(tmp_path / "me", [first])
    put(source, {"pictures/p00.png": png(first.image.resize((32, 32)))})
    error = invoke("dataset", "import", source, "--concept", "weapon", "--workspace", tmp_path / "b").exception
    assert "it was drawn on a picture of 64x64 px, but the one that is there has 32x32" in str(error)


def test_what_annotators_said_counts(tmp_path: Path):
    """Of several the majority; who skipped or cannot tell says nothing, and nothing is taken for a safe picture."""
    drawn = scenes(5, 0)
    source = foreign.as_label_studio(tmp_path / "theirs", drawn)
    tasks = json.loads((source / "project-4.json").read_text())
    tasks[0]["annotations"][0]["was_cancelled"] = True
    tasks[1]["annotations"] = []
    keypoint = {"type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["weapon"]}}
    tasks[2]["annotations"][0]["result"].append({**keypoint, "original_width": 64, "original_height": 64})
    other = {**tasks[3]["annotations"][0], "id": 77, "completed_by": 4, "result": []}
    tasks[3]["annotations"] += [other, {**other, "id": 78, "completed_by": 5}]
    report = take(put(source, {"project-4.json": tasks}), tmp_path / "runs")
    assert report["taken"] == ["project-4.json, task 4", "project-4.json, task 5"]
    reasons = [refused(report)[f"project-4.json, task {number}"] for number in (1, 2, 3)]
    assert reasons[:2] == ["its annotators skipped it", "nobody annotated it"]
    assert "which says nothing exact about pixels" in reasons[2]
    assert report["notes"] == [
        {
            "entry": "project-4.json, task 4",
            "note": "its 3 annotators disagree (presence): the majority of pixels was taken",
        }
    ]
    found = masks_of(tmp_path / "runs")
    assert [found[one.image.tobytes()].any() for one in drawn[3:]] == [False, True]


def test_duplicates_and_changed_masks_are_named(tmp_path: Path):
    first, second = scenes(2, 0)
    files = {f"images/{name}.png": png(first.image) for name in "ab"} | {
        f"masks/{name}.png": png(first.mask) for name in "ab"
    }
    source = put(tmp_path / "theirs", files | {"images/c.png": png(second.image), "masks/c.png": png(second.mask)})
    report = take(source, tmp_path / "runs")
    assert report["taken"] == ["images/a.png", "images/c.png"]
    assert refused(report) == {"images/b.png": "the same picture as folder: images/a.png: a duplicate"}
    before = content(tmp_path / "runs", ["manifest.jsonl"])
    put(source, {"masks/c.png": png(~second.mask)})
    again = take(source, tmp_path / "runs")
    assert again["there_already"] == ["images/a.png"]
    assert "with other masks, and those stay" in refused(again)["images/c.png"]
    after = content(tmp_path / "runs", ["manifest.jsonl"])
    assert {name: sum_ for name, sum_ in after.items() if "imports" not in name} == {
        name: sum_ for name, sum_ in before.items() if "imports" not in name
    }


PLACES = (
    "../../etc/passwd",
    "/etc/passwd",
    "https://example.org/a.png",
    "file:///etc/passwd",
    "c:\\a.png",
    "link.png",
    "",
    7,
    "images/nowhere.png",
)
SAID = {
    "../../etc/passwd": "its picture '../../etc/passwd' leads out of the folder 'theirs': refused",
    "/etc/passwd": "its picture '/etc/passwd' leads out of the folder 'theirs': refused",
    "https://example.org/a.png": "its picture is a URL or has a drive, 'https://example.org/a.png': nothing is fetched",
    "file:///etc/passwd": "its picture is a URL or has a drive, 'file:///etc/passwd'",
    "c:\\a.png": "its picture is a URL or has a drive",
    "link.png": "its picture 'link.png' leads out of the folder 'theirs': refused",
    "": "",
    7: "",
    "images/nowhere.png": "there is no 'images/nowhere.png' in the folder 'theirs'",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("format_name", ["labelme", "label-studio", "coco"])
def test_no_name_leads_out_of_the_source(place: object, format_name: str, tmp_path: Path):
    """Not by dots, a root, a scheme or a link; the others are taken."""
    secret = put(tmp_path, {"secret.png": png(scenes(1, 0, seed=9)[0].image)}) / "secret.png"
    [good, other] = scenes(2, 0)
    if format_name == "coco":
        pytest.importorskip("pycocotools")
        source = foreign.as_coco(tmp_path / "theirs", [good, other])
        table = json.loads((source / "instances.json").read_text())
        table["images"][1]["file_name"] = place
        put(source, {"instances.json": table})
    elif format_name == "labelme":
        source = foreign.as_labelme(tmp_path / "theirs", [good, other])
        file = json.loads((source / "json/p01.json").read_text())
        up = place if place == "" or not isinstance(place, str) or re.match(r"/|\w+:|\.\.", place) else f"../{place}"
        put(
            source,
            {"json/p01.json": file | {"imagePath": up if place != "../../etc/passwd" else "../../../etc/passwd"}},
        )
    else:
        source = foreign.as_label_studio(tmp_path / "theirs", [good, other])
        tasks = json.loads((source / "project-4.json").read_text())
        tasks[1]["data"]["image"] = place
        put(source, {"project-4.json": tasks})
    (source / "link.png").symlink_to(secret)
    report = take(source, tmp_path / "runs")
    assert len(report["taken"]) == 1
    [reason] = refused(report).values()
    if format_name != "labelme":
        assert SAID[place] in reason
    else:
        assert re.search("leads out of|is a URL|there is no|expected", reason)
    assert len(StageFolder(tmp_path / "runs/candidates/weapon").rows()) == 1


def test_a_row_of_a_dataset_that_names_a_file_opens_nothing(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    [one, other] = scenes(2, 0)
    secret = put(tmp_path, {"secret.png": png(other.image)}) / "secret.png"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"image": {"bytes": png(one.image), "path": "any/where.png"}, "mask": {"bytes": png(one.mask), "path": None}},
        {"image": {"bytes": None, "path": str(secret)}, "mask": {"bytes": png(other.mask), "path": None}},
        {
            "image": {"bytes": None, "path": "https://example.org/a.png"},
            "mask": {"bytes": png(other.mask), "path": None},
        },
        {"image": {"bytes": png(other.image), "path": None}, "mask": None},
    ]
    (tmp_path / "theirs/data").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, pa.schema([("image", kind), ("mask", kind)]))
    parquet.write_table(table, tmp_path / "theirs/data/train-00000-of-00001.parquet")
    report = take(tmp_path / "theirs", tmp_path / "runs")
    where = "data/train-00000-of-00001.parquet, row"
    assert report["taken"] == [f"{where} 0"]
    reasons = refused(report)
    assert reasons[f"{where} 1"].startswith(f"its image is a path or URL, '{secret}'")
    assert reasons[f"{where} 2"].startswith("its image is a path or URL, 'https://example.org/a.png'")
    assert reasons[f"{where} 3"] == "mask: its mask is missing"
    wrong = invoke("dataset", "import", tmp_path / "theirs", "--concept", "weapon", "--mask-column", "masks")
    assert "there is no column 'masks', only image, mask. Say which with --image-column" in str(wrong.exception)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.json": {"what": 1}}, "nothing was taken from folder"),
        ({"a.json": b"{"}, "a.json: expected JSON, but"),
        ({"images/a.png": b"", "masks/a.png": b""}, "images/a.png: it cannot be decoded"),
        ({"a.json": {"images": [], "annotations": {}}}, "a.json: expected COCO's instances"),
        ({"a.json": {"images": [], "annotations": [], "categories": [{"id": 1}]}}, "categories: name: missing"),
        (
            {"a.json": [{"data": {}}], "b.json": {"shapes": [], "imagePath": "a"}},
            "several formats (label-studio, labelme)",
        ),
    ],
)
def test_a_source_that_is_none_is_named(files: dict[str, Any], words: str, tmp_path: Path):
    source = put(tmp_path / "theirs", files)
    where = ["--concept", "weapon", "--workspace", tmp_path / "runs"]
    error = invoke("dataset", "import", source, *where).exception
    assert isinstance(error, DatasetError)
    assert words in str(error)
    assert not list(tmp_path.glob("runs/*/*/manifest.jsonl"))
    assert "no such folder or file. Did you mean hf://acme/weapons, on the Hub?" in str(
        invoke("dataset", "import", "acme/weapons", *where).exception
    )


@pytest.mark.slow
def test_a_token_from_imported_pictures_says_so(tmp_path: Path):
    """Encoded as drawn ones are; what was learned finds the weapon in them."""
    where = ["--concept", "weapon", "--workspace", tmp_path / "runs"]
    finish("dataset", "import", foreign.as_folder(tmp_path / "theirs", scenes(14, 14)), *where, "--quiet")
    assert "28 images, 28 with masks as they were imported (" in finish("export", *where)
    made = json.loads(finish("optimize", *where, "--num-steps", 40, "--tune", 0, "--json", "--quiet"))
    folder = Path(made["path"])
    assert "**Imported images.** 28 of the images that this token was trained on" in (folder / "README.md").read_text()
    record = json.loads((folder / "token.json").read_text())
    assert record["dataset"]["num_imported"] == 28
    assert record["dataset"]["review_states"] == {"imported": 28}
    assert record["metrics"]["validation_iou"] > 0.3
    shown = finish("token", "show", "weapon@1.0.0", "--workspace", tmp_path / "runs")
    assert "14 unsafe and 14 safe images, 28 of them imported; masks: 28 imported" in shown


def test_what_others_marked_is_sent_to_annotators_as_any_premask(tmp_path: Path):
    from dagkit.labelstudio.storage import Upload
    from dagkit.stages.push import _task

    [one] = scenes(1, 0)
    take(foreign.as_folder(tmp_path / "theirs", [one]), tmp_path / "runs")
    workspace = Workspace(tmp_path / "runs")
    candidates, premasks = (workspace.stage(name, "weapon") for name in ("candidates", "premasks"))
    [row] = candidates.rows()
    sent = _task(row["key"], row["image"], premasks.rows()[0], candidates, premasks, Upload())
    assert sent.predictions[0]["model_version"] == "folder@theirs"
    assert sent.predictions[0]["result"][0]["value"]["brushlabels"] == ["weapon"]
