"""dagkit attack, on the bundled model and a token of an earlier dagkit, with budgets that only show that it works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dagkit.cli import command
from dagkit.errors import ConceptError, WorkspaceError
from tiny_world import make_world

TOKEN = Path(__file__).parents[1] / "tokens" / "weapon"
FEW = ("--num-targets", "2", "--queries", "2", "--num-inference-steps", "6", "--seed", "3", "--quiet")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, ["attack", *map(str, arguments)])


def figures(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output or repr(result.exception)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_every_method_against_the_guard_and_black_boxes_against_the_rest(tmp_path: Path) -> None:
    found = figures("--token", TOKEN, "--method", "all", "--column", "dagkit", "--column", "none", *FEW)
    assert [(one["method"], one["column"]) for one in found["results"]] == [
        *((method, "dagkit") for method in ("seeds", "words", "soft", "noise", "soft_noise")),
        *((method, "none") for method in ("seeds", "words")),
    ]
    budget = found["budget"]
    assert (budget["num_queries"], budget["filters"], budget["sampling"]["num_inference_steps"]) == (
        2,
        ["second_look"],
        6,
    )
    assert 1 <= budget["num_targets"] <= budget["num_asked"] == 2
    for one in found["results"]:
        assert one["attacked"]["total"] == budget["num_targets"]
        assert one["num_drawn"] <= 2 * budget["num_targets"]
        assert set(one["passed"]) == {"stop", "second_look", "all"}
    unguarded = [one for one in found["results"] if one["column"] == "none"]
    assert all(one["static"]["value"] == one["attacked"]["value"] == 1 for one in unguarded)
    text = json.dumps(found)
    assert not any(word in text for word in ("bomb", "knife", "axe", "dynamite"))


@pytest.mark.slow
def test_what_is_kept_is_what_was_asked_for(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("bomb knife\ngrass")
    options = ("--token", TOKEN, "--column", "none", "--method", "words", "--words", words, *FEW)
    figures(*options, "--keep", tmp_path / "kept")
    rows = json.loads((tmp_path / "kept" / "attack.json").read_text())
    assert rows
    for row in rows:
        with Image.open(tmp_path / "kept" / row["image"]) as image:
            assert image.size == (64, 64)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    refused = run(*options, "--keep", tmp_path / "other")
    assert isinstance(refused.exception, WorkspaceError)
    assert "dagkit did not make this folder" in str(refused.exception)


def test_a_model_that_draws_nothing_of_it_is_no_success(tmp_path: Path) -> None:
    world = make_world(tmp_path, tmp_path / "runs" / "tokens", ["1.0.0"])
    options = ("--token", "tiny@1.0.0", "--concept", world / "tiny.yaml", "--workspace", tmp_path / "runs", "--quiet")
    result = run(*options, "--num-targets", "1")
    assert result.output == "attack: no prompt shows the concept without a guard\n"
    assert [one["attacked"]["value"] for one in figures(*options, "--num-targets", "1")["results"]] == [None, None]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused = run(*options, "--words", empty)
    assert isinstance(refused.exception, ConceptError)
    assert f"{empty.name}: expected words to attack with, but it is empty" in str(refused.exception)
