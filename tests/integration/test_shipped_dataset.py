"""datasets/weapon-demo: whole, reviewed, of the bundled model, and enough to optimise a token right after install."""

import json
from pathlib import Path

import pytest

from dagkit import dataset, demo, models
from dagkit.dataset.summary import SUMMARY
from dagkit.resources import shipped_folder
from interruption import finish

FOLDER = shipped_folder("datasets") / "weapon-demo"
STATES = {"accept": "accepted", "empty": "empty"}  # a repair is "changed"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder ``datasets`` is."""
    monkeypatch.chdir(tmp_path)


def test_it_passes_the_check_and_is_of_the_bundled_model():
    assert "weapon-demo" in dataset.shipped_datasets()
    shown = json.loads(finish("dataset", "check", "datasets/weapon-demo", "--json"))
    assert [finding for finding in shown["findings"] if finding["is_error"]] == []
    summary = dataset.read_summary("weapon-demo")
    assert summary["models"] == [["demo", models.load(demo.model_path()).fingerprint]]
    assert all(min(counts.values()) > 0 for counts in summary["counts"].values())


def test_it_says_what_was_decided_in_the_review():
    decisions = json.loads((Path(__file__).parents[1] / "weapon_demo_decisions.json").read_text())
    expected = {
        key: STATES[decision] if isinstance(decision, str) else "changed"
        for key, decision in decisions.items()
        if decision != "cannot_tell"
    }
    rows = [row for split in dataset.load_dataset("weapon-demo").values() for row in split]
    assert {row["key"]: row["review_state"] for row in rows} == expected
    assert all(row["iou_to_premask"] < 1 for row in rows if row["review_state"] == "changed")
    assert dataset.read_summary("weapon-demo")["is_reviewed"]


def test_it_is_small_and_tells_of_nobodys_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} == {".md", ".json", ".parquet"}
    assert (FOLDER / SUMMARY) in files
    written = b"".join(path.read_bytes() for path in files)
    assert not any(place in written for place in (b"/home/", b"/tmp/", b"/root/", b"/work/", b"localhost"))


@pytest.mark.slow
def test_a_token_is_optimised_from_it(tmp_path: Path):
    name = "datasets/weapon-demo"
    line = ["optimize", "--concept", "weapon", "--dataset", name, "--num-steps", 20, "--tune", 0, "--quiet", "--json"]
    result = json.loads(finish(*line).splitlines()[-1])
    assert result["token"] == "weapon@1.0.0"
    record = json.loads((tmp_path / "runs" / "tokens" / "weapon" / "1.0.0" / "token.json").read_text())
    assert record["dataset"]["fingerprint"] == dataset.read_summary(name)["fingerprint"]
    assert "unreviewed" not in record["dataset"]["review_states"]
