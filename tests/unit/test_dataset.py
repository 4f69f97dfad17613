"""Datasets: what goes in, how it is split, round trips, checks, the card, and which candidates come first."""

import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dagkit import dataset
from dagkit.concept import Concept, load_concept
from dagkit.dataset.card import dataset_card
from dagkit.dataset.likeness import drop_near_duplicates, find_twins, perceptual_hash
from dagkit.dataset.schema import FEATURES
from dagkit.dataset.selection import disagreement, layout_features, select, select_diverse
from dagkit.dataset.splitting import assign_splits, find_groups
from dagkit.demo import world
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.workspace import Workspace
from drawn_workspace import annotate, draw_workspace, premask_of

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory, concept: Concept) -> Workspace:
    """Ten unsafe and six safe candidates; every review state occurs."""
    workspace = draw_workspace(tmp_path_factory.mktemp("runs"), concept, 10, 6)
    for index in range(10):
        key = f"u{index:03d}"
        mask = premask_of(workspace, concept, key)
        if index == 0:
            annotate(workspace, concept, key, "skipped", annotators=["annotator-1"])
        elif index == 1:
            annotate(workspace, concept, key, "cannot_tell", annotators=["annotator-1"])
        elif index == 2:
            annotate(workspace, concept, key, "empty", annotators=["annotator-2"], seconds=3.0, iou_to_premask=0.0)
        elif index == 3:
            cut = np.zeros_like(mask)
            cut[:, :32] = True
            annotate(
                workspace,
                concept,
                key,
                "changed",
                masks={"weapon": np.ones_like(mask), "harmless": cut},
                annotators=["annotator-1", "annotator-2"],
                iou_to_premask=0.25,
                pair_ious=[["annotator-1", "annotator-2", 0.8], ["annotator-1", "annotator-3", None]],
                seconds=21.5,
                created="2026-11-24T10:00:00+00:00",
                updated="2026-11-24T10:05:00.978275Z",  # as Label Studio writes it
            )
        elif index < 8:
            annotate(workspace, concept, key, "accepted", masks={"weapon": mask}, iou_to_premask=1.0, annotators=["a"])
    for index in range(4):
        annotate(workspace, concept, f"s{index:03d}", "empty", annotators=["a"])
    return workspace


@pytest.fixture(scope="module")
def built(reviewed: Workspace, concept: Concept) -> DatasetDict:
    return dataset.build(dataset.collect(reviewed, concept), concept)


def rows_of(data: DatasetDict) -> dict[str, dict]:
    return {row["key"]: {**row, "split": split} for split in data for row in data[split]}


def test_every_review_state_is_handled(reviewed: Workspace, built: DatasetDict, concept: Concept):
    collection = dataset.collect(reviewed, concept)
    assert collection.left_out == {"skipped by annotators": 1, "annotators cannot tell": 1, "not reviewed yet": 4}

    rows = rows_of(built)
    assert sorted(rows) == [*(f"s{i:03d}" for i in range(4)), *(f"u{i:03d}" for i in range(2, 8))]
    states = {key: row["review_state"] for key, row in rows.items()}
    assert states["u002"] == "empty"
    assert (rows["u002"]["label"], rows["u002"]["is_changed"]) == (0, True)
    assert (rows["s000"]["label"], rows["s000"]["is_changed"]) == (0, False)
    assert (rows["u004"]["label"], rows["u004"]["is_changed"]) == (1, False)

    changed = rows["u003"]
    expected = np.zeros((64, 64), bool)
    expected[:, 32:] = True  # positive minus negative
    assert np.array_equal(np.asarray(changed["mask"]) > 127, expected)
    assert changed["annotators"] == ["annotator-1", "annotator-2"]
    assert changed["iou_to_premask"] == 0.25
    assert changed["agreement"] == pytest.approx(0.8)
    assert changed["seconds"] == 21.5
    assert changed["updated"] == datetime(2026, 11, 24, 10, 5, 0, 978_000, tzinfo=UTC)
    assert changed["sampler"] == {
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 25,
        "guidance_scale": 5.0,
        "width": 64,
        "height": 64,
    }
    assert changed["proposers"] == [{"name": "attention", "version": "1"}]
    assert changed["segmenter"] == {"name": "sam", "version": "vit_tiny-1"}
    assert changed["regions"][0]["label"] == "weapon"
    assert changed["model"] == "demo"  # never the path of somebody's home


def test_images_and_masks_are_those_of_the_workspace(reviewed: Workspace, built: DatasetDict, concept: Concept):
    for key, row in rows_of(built).items():
        image = reviewed.stage("candidates", concept.name).read_image(f"images/{key}.png")
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image))
        if row["review_state"] == "accepted":
            assert np.array_equal(np.asarray(row["mask"]) > 127, premask_of(reviewed, concept, key))


def test_unreviewed_pre_masks_count_only_if_asked_for(tmp_path: Path, concept: Concept):
    workspace = draw_workspace(tmp_path, concept, 3, 2)
    extra = draw_workspace(tmp_path / "other", concept, 4, 0, seed=7, with_premasks=False)
    source, target = (w.stage("candidates", concept.name) for w in (extra, workspace))
    row = source.rows()[3]
    target.write_image(row["image"], source.read_image(row["image"]))
    target.append(row)
    workspace.stage("premasks", concept.name).append({"key": "u003", "masks": {}, "proposers": [], "score": 0.0})

    with pytest.raises(
        DatasetError, match=r"0 usable images, and none shows the concept \(6 not reviewed yet left out"
    ):
        dataset.build(dataset.collect(workspace, concept), concept)
    collection = dataset.collect(workspace, concept, accept_unreviewed=True)
    assert collection.left_out == {"unsafe prompt, nothing found, not reviewed": 1}
    summary = dataset.summarise(dataset.build(collection, concept), concept, left_out=collection.left_out)
    assert summary["review_states"] == {"unreviewed": 5}
    assert summary["is_reviewed"] is False


def test_what_is_wrong_in_a_workspace_is_named(tmp_path: Path, concept: Concept):
    workspace = draw_workspace(tmp_path, concept, 3, 1)
    annotate(workspace, concept, "u000", "accepted", masks={"weapon": np.ones((32, 64), bool)})
    with pytest.raises(WorkspaceError, match=r"u000-weapon.png: expected a mask of 64x64 px.* but got 64x32"):
        dataset.collect(workspace, concept)

    workspace = draw_workspace(tmp_path / "b", concept, 1, 0)
    annotate(workspace, concept, "u000", "splendid")
    with pytest.raises(DatasetError, match=r"u000 has the state 'splendid'; expected one of accepted, changed"):
        dataset.collect(workspace, concept)

    workspace = draw_workspace(tmp_path / "d", concept, 1, 0)
    annotate(workspace, concept, "u000", "changed", masks={"knife": np.ones((64, 64), bool)})
    with pytest.raises(DatasetError, match=r"u000 has a mask of the label 'knife'; expected one of weapon, harmless"):
        dataset.collect(workspace, concept)

    workspace = draw_workspace(tmp_path / "c", concept, 2, 0)
    workspace.stage("candidates", concept.name).inside("images/u001.png").write_bytes(b"")
    with pytest.raises(WorkspaceError, match=r"u001\.png: expected an image, but it cannot be read"):
        dataset.collect(workspace, concept, accept_unreviewed=True)


@pytest.mark.parametrize("way", ["save_to_disk", "parquet", "local folder as a Hub"])
def test_round_trips(way: str, built: DatasetDict, concept: Concept, tmp_path: Path):
    summary = dataset.summarise(built, concept)
    folder = tmp_path / "weapon"
    if way == "save_to_disk":
        dataset.save_dataset(built, folder, summary)
    elif way == "parquet":
        dataset.write_parquet(built, folder, summary)
    else:
        dataset.push_dataset(built, str(folder), summary)
    loaded = dataset.load_dataset(folder)

    assert dataset.fingerprint(loaded) == summary["fingerprint"]
    assert loaded["train"].features == FEATURES
    before, after = rows_of(built), rows_of(loaded)
    assert list(before) == list(after)
    for key, row in before.items():
        pictures = {"image", "mask"}
        assert {k: v for k, v in row.items() if k not in pictures} == {
            k: v for k, v in after[key].items() if k not in pictures
        }
        for name in pictures:
            assert np.array_equal(np.asarray(row[name]), np.asarray(after[key][name]))
    assert b"/home/" not in b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert not list(tmp_path.glob(".*"))


def test_the_hubs_own_reader_reads_the_folder(built: DatasetDict, concept: Concept, tmp_path: Path):
    dataset.write_parquet(built, tmp_path / "weapon", dataset.summarise(built, concept))
    found = datasets.load_dataset(str(tmp_path / "weapon"), cache_dir=str(tmp_path / "cache"))
    assert {split: found[split]["key"][:] for split in found} == {
        split: built[split]["key"][:] for split in built if len(built[split])
    }
    assert found["train"][0]["image"].size == (64, 64)


def test_replacing_is_all_or_nothing(built: DatasetDict, concept: Concept, tmp_path: Path):
    folder, summary = tmp_path / "weapon", dataset.summarise(built, concept)
    dataset.save_dataset(built, folder, {**summary, "note": "the first version"})

    with pytest.raises(KeyError):
        dataset.save_dataset(built, folder, {key: value for key, value in summary.items() if key != "licence"})
    assert dataset.read_summary(folder)["note"] == "the first version"

    folder.rename(tmp_path / ".weapon.old")  # as after a crash between the two renames
    (tmp_path / ".weapon.x.partial").mkdir()
    assert dataset.fingerprint(dataset.load_dataset(folder)) == summary["fingerprint"]
    dataset.save_dataset(built, folder, summary)
    assert [path.name for path in tmp_path.iterdir()] == ["weapon"]
    assert dataset.read_summary(folder)["note"] == ""


def test_examples_are_what_the_optimisation_takes(built: DatasetDict):
    rows = [row for split in built for row in dataset.examples(built[split])]
    for row in rows:
        assert row.image.mode == "RGB"
        assert (row.mask.shape, row.mask.dtype) == ((64, 64), np.dtype(bool))
        assert row.mask.any() == row.is_unsafe == (row.key.startswith("u") and row.key != "u002")
        assert row.prompt.endswith(row.key)


def test_damaged_and_changed_datasets_are_named(built: DatasetDict, concept: Concept, tmp_path: Path):
    with pytest.raises(
        DatasetError, match=r"nowhere: no dataset. Expected a folder with dataset_dict.json.* ship with"
    ):
        dataset.load_dataset(tmp_path / "nowhere")

    dataset.save_dataset(built, tmp_path / "a", dataset.summarise(built, concept))
    (shard,) = (tmp_path / "a" / "train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"a: the dataset is damaged: .*Export it again"):
        dataset.load_dataset(tmp_path / "a")

    dataset.write_parquet(built, tmp_path / "b", dataset.summarise(built, concept))
    shutil.copy(tmp_path / "b/data/test-00000-of-00001.parquet", tmp_path / "b/data/train-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match=r"b: the rows do not match the fingerprint in dataset.json"):
        dataset.load_dataset(tmp_path / "b")

    (tmp_path / "b" / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"dataset.json: not a summary of a dataset \('format'\)"):
        dataset.load_dataset(tmp_path / "b")
    (tmp_path / "b" / "dataset.json").write_text('{"format": 9}')
    with pytest.raises(DatasetError, match=r"expected format 1, but got 9. Install a newer dagkit"):
        dataset.load_dataset(tmp_path / "b")
    (tmp_path / "b" / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset.json: no such file"):
        dataset.read_summary(tmp_path / "b")
    assert len(dataset.load_dataset(tmp_path / "b")["train"])

    built.remove_columns(["prompt", "seed"]).save_to_disk(tmp_path / "c")
    with pytest.raises(DatasetError, match=r"c: the columns prompt, seed are missing. Was it made by dagkit export"):
        dataset.load_dataset(tmp_path / "c")
    DatasetDict({"training": built["train"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"d: expected the splits train, validation, test, but got training"):
        dataset.load_dataset(tmp_path / "d")


def test_fingerprint_depends_on_content_only(built: DatasetDict):
    assert dataset.fingerprint(DatasetDict({k: v.shuffle(seed=1) for k, v in built.items()})) == dataset.fingerprint(
        built
    )
    for column, value in {"prompt": "another", "label": 0, "review_state": "unreviewed"}.items():
        other = built["train"].map(lambda row, c=column, v=value: {c: v}, keep_in_memory=True, features=FEATURES)
        assert dataset.fingerprint(DatasetDict({**built, "train": other})) != dataset.fingerprint(built)


def test_card_shows_counts_and_warnings_and_no_image(built: DatasetDict, concept: Concept, tmp_path: Path):
    about = {"licence": "apache-2.0", "note": "Two people reviewed it in a week."}
    summary = dataset.summarise(built, concept, left_out={"skipped by annotators": 1}, **about)
    dataset.save_dataset(built, tmp_path / "weapon", summary)
    card = (tmp_path / "weapon" / "README.md").read_text()

    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| all | 5 | 5 |" in card
    assert "Label balance: 50% unsafe." in card
    assert "Left out: 1 skipped by annotators." in card
    assert "agreement of annotators (mean pairwise IoU): 0.800" in card
    known = dataset.summarise(built, concept, agreement={"mean_iou": 0.7, "kappa": {"weapon": 0.61, "harmless": None}})
    assert "(mean pairwise IoU): 0.700; on presence (kappa): weapon 0.610." in dataset_card(built, known)
    assert "\n\nTwo people reviewed it in a week.\n\n" in card
    assert "20% to  50%" in card
    assert "reviewed by nobody" not in card
    assert "![" not in card
    assert "<img" not in card
    assert json.loads((tmp_path / "weapon" / "dataset.json").read_text())["fingerprint"] in card
    assert all(f"`{column}`" in card for column in FEATURES)


# Splits


def test_linked_keys_are_one_group():
    keys = ["a", "b", "c", "d", "e"]
    prompts = {"a": "p", "b": "p", "c": "q", "d": "r", "e": "s"}
    seeds = {"b": 1, "c": 1, "d": 2}
    assert find_groups(keys, [prompts, seeds]) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=60),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_groups_never_straddle_and_growth_keeps_splits(rows: list[tuple[int, bool]], seed: int):
    groups = {f"k{i}": f"g{group}" for i, (group, _) in enumerate(rows)}
    strata = {f"k{i}": str(label) for i, (_, label) in enumerate(rows)}
    splits = assign_splits(groups, strata, seed=seed)
    assert all(len({splits[k] for k in splits if groups[k] == g}) == 1 for g in groups.values())

    half = {key: splits[key] for key in list(splits)[::2]}
    again = assign_splits(groups, strata, previous=half, seed=seed + 1)
    assert {key: again[key] for key in half} == half
    assert assign_splits(groups, strata, seed=seed) == splits


def test_strata_come_close_to_the_ratios():
    keys = [f"k{i}" for i in range(200)]
    splits = assign_splits({k: k for k in keys}, {k: "unsafe" if i < 120 else "safe" for i, k in enumerate(keys)})
    counts = {
        (split, stratum): sum(splits[k] == split for k in (keys[:120] if stratum == "unsafe" else keys[120:]))
        for split in ("train", "validation", "test")
        for stratum in ("unsafe", "safe")
    }
    assert counts == {
        ("train", "unsafe"): 84,
        ("train", "safe"): 56,
        ("validation", "unsafe"): 18,
        ("validation", "safe"): 12,
        ("test", "unsafe"): 18,
        ("test", "safe"): 12,
    }


def test_a_bridge_between_splits_moves_to_the_test_side():
    groups = {"a": "f", "b": "f", "c": "f"}
    splits = assign_splits(groups, dict.fromkeys("abc", "safe"), previous={"a": "train", "b": "test"})
    assert splits == {"a": "test", "b": "test", "c": "test"}


# Checks


def test_a_good_dataset_has_no_finding(built: DatasetDict):
    assert [finding for finding in dataset.check(built) if finding.is_error] == []


def test_every_problem_is_found_and_names_its_row(built: DatasetDict):
    def png(image: Image.Image) -> dict:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    keys = built["train"]["key"][:]
    unsafe = [key for key in keys if key.startswith("u") and key != "u002"]
    safe = [key for key in keys if key.startswith("s")]
    undecoded = {
        split: built[split]
        .cast_column("image", datasets.Image(decode=False))
        .cast_column("mask", datasets.Image(decode=False))
        for split in built
    }
    rows = {split: [dict(row) for row in undecoded[split]] for split in built}
    by_key = {row["key"]: row for row in rows["train"]}
    by_key[unsafe[0]]["mask"] = png(Image.new("L", (64, 64)))
    by_key[unsafe[1]]["mask"] = png(Image.new("L", (32, 64), 255))
    by_key[safe[0]]["mask"] = png(Image.new("L", (64, 64), 255))
    by_key[safe[1]]["review_state"] = "splendid"
    by_key[unsafe[2]]["image"] = {"bytes": b"no image", "path": None}
    other = rows["validation"][0]
    twin = {**other, "key": "twin", "prompt": "p", "seed": 99, "group": "twin"}
    leak = {
        **by_key[safe[1]],
        "key": "leak",
        "group": "leak",
        "seed": 98,
        "image": png(Image.effect_noise((64, 64), 90)),
    }
    leak["review_state"] = "empty"
    rows["test"] += [twin, leak]
    broken = DatasetDict({split: datasets.Dataset.from_list(rows[split], features=FEATURES) for split in rows})

    found = {(finding.problem, finding.key) for finding in dataset.check(broken)}
    assert found >= {
        ("empty mask", unsafe[0]),
        ("size mismatch", unsafe[1]),
        ("mask on safe", safe[0]),
        ("review state", safe[1]),
        ("unreadable", unsafe[2]),
        ("duplicate", "twin"),
        ("leak", "leak"),
    }
    assert f"shares its prompt with {safe[1]} in train" in {f.message for f in dataset.check(broken) if f.key == "leak"}


# Likeness and selection


def test_near_duplicates_are_found_and_other_scenes_are_not():
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(world.render_scene(rng).image) for _ in range(40)]
    noisy = Image.fromarray(
        np.clip(np.asarray(scenes[3], np.int16) + rng.integers(-6, 7, (64, 64, 3)), 0, 255).astype(np.uint8)
    )
    images = [(f"k{i}", image) for i, image in enumerate(scenes)]
    kept, dropped = drop_near_duplicates([*images, ("noisy", noisy), ("large", scenes[5].resize((256, 256)))])
    assert dropped == {"noisy": "k3", "large": "k5"}
    assert kept == [key for key, _ in images]


def test_twins_of_hashes_by_hand():
    assert find_twins({"a": 0, "b": 0b111, "c": 0b1111111, "d": 2**64 - 1}, 3) == {"b": "a"}
    assert find_twins({"a": 0, "b": 0b111, "c": 0b1111111, "d": 2**64 - 1}, 4) == {"b": "a"}
    assert find_twins({"a": 0, "b": 0}, 0) == {"b": "a"}
    assert perceptual_hash(Image.new("RGB", (64, 64), "red")) == perceptual_hash(Image.new("RGB", (64, 64), "black"))


def test_diverse_goes_where_it_has_not_been():
    points = {
        "centre": np.array([0.1, 0.0]),
        "left": np.array([-5.0, 0]),
        "left2": np.array([-4.9, 0]),
        "right": np.array([4.0, 0]),
    }
    assert select_diverse(points) == ["centre", "left", "right", "left2"]
    assert select("diverse", list(points), features=points, num=2) == ["centre", "left"]
    assert select_diverse({}) == []


def test_uncertain_and_all():
    keys = ["a", "b", "c"]
    assert select("uncertain", keys, uncertainty={"a": 0.1, "b": 0.9, "c": 0.9}) == ["b", "c", "a"]
    assert select("all", keys, num=2) == ["a", "b"]
    with pytest.raises(ValueError, match="'uncertain' needs uncertainties"):
        select("uncertain", keys)
    with pytest.raises(ValueError, match="'diverse' needs features"):
        select("diverse", keys)


def test_disagreement_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert disagreement(a, b) == 0
    a[0], b[0, :2] = True, True
    assert disagreement(a, b) == 0.5
    assert disagreement(a, np.zeros_like(a)) == 1
    assert layout_features(Image.new("RGB", (64, 64), (255, 0, 51)))[:3].tolist() == [1.0, 0.0, 0.2]


def test_candidates_are_chosen_from_a_workspace(tmp_path: Path, concept: Concept):
    workspace = draw_workspace(tmp_path, concept, 4, 2)
    candidates, premasks = (workspace.stage(name, concept.name) for name in ("candidates", "premasks"))
    twin = {**candidates.rows()[1], "key": "twin", "seed": 77}
    candidates.append(twin)
    unsure = {**premasks.rows()[1], "key": "twin", "score": 0.2}
    premasks.append(unsure)

    everything = dataset.choose_candidates(workspace, concept)
    assert everything.keys == ["u000", "u001", "u002", "u003", "s000", "s001"]
    assert everything.duplicates == {"twin": "u001"}
    uncertain = dataset.choose_candidates(workspace, concept, "uncertain", is_dropping_duplicates=False)
    assert uncertain.keys == ["twin", "u000", "u001", "u002", "u003", "s000", "s001"]
    assert len(dataset.choose_candidates(workspace, concept, "diverse", num=3).keys) == 3


def test_a_token_finds_the_candidates_on_which_it_disagrees(tmp_path: Path, concept: Concept):
    class TopHalf:
        """Sees the concept in the upper half of every image."""

        def region(self, image: Image.Image, prompt: str, seed: int) -> np.ndarray:
            region = np.zeros((image.height, image.width), bool)
            region[: image.height // 2] = True
            return region

    workspace = draw_workspace(tmp_path, concept, 3, 1)
    chosen = dataset.choose_candidates(workspace, concept, "uncertain", token=TopHalf(), is_dropping_duplicates=False)
    half = np.zeros((64, 64), bool)
    half[:32] = True
    expected = {f"u{i:03d}": disagreement(half, premask_of(workspace, concept, f"u{i:03d}")) for i in range(3)}
    expected["s000"] = 1.0
    assert chosen.keys == sorted(expected, key=lambda key: -expected[key])
