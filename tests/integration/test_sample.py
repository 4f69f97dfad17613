"""``dagkit sample`` on the bundled model, a few steps an image."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageChops

from dagkit import demo, guidance
from dagkit.cli import command
from dagkit.errors import GuardError
from dagkit.generation import generate_images
from dagkit.guard import Guard, dag
from dagkit.models import BaseModel
from dagkit.stages import sample
from dagkit.token import Guidance, GuidelineToken, Thresholds
from dagkit.workspace import StageFolder, Workspace
from tiny_pipelines import token as random_token

PROMPTS = ("a cat and a bomb on grass", "a cup and a book on snow")
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 64, "height": 64}
ALWAYS = Thresholds(highlight=(0.2,), edit=(0.1,), certain=(0.0,))


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return demo.load_model("demo", "cpu")


def make(base: BaseModel, *, thresholds: Thresholds = ALWAYS, seed: int = 5, **changes: Any) -> GuidelineToken:
    """A token of the bundled model with random rows."""
    token = random_token(base.pipe, thresholds=thresholds, seed=seed)
    changes = {"guidance": Guidance(reuse_steps=1, max_step=1.0), **changes}
    return replace(token, record=token.record.model_copy(update=changes))


def invoke(workspace: Path, *arguments: object) -> Result:
    fixed = ["--workspace", workspace, "--num-inference-steps", 3, "--guidance-scale", 5, "--quiet"]
    return CliRunner().invoke(command, ["sample", *map(str, [*fixed, *arguments])], catch_exceptions=False)


def rows(workspace: Path) -> list[dict[str, Any]]:
    return StageFolder(workspace / "samples" / "weapon").rows()


def pixels(workspace: Path, row: dict[str, Any]) -> Image.Image:
    return Image.open(workspace / "samples" / "weapon" / row["image"]).convert("RGB")


def is_equal(left: Image.Image, right: Image.Image) -> bool:
    return ImageChops.difference(left, right).getbbox() is None


def drawn(base: BaseModel, *guards: Guard) -> Image.Image:
    """The first prompt under these guards, without the stage."""
    with ExitStack() as stack:
        for guard in guards:
            stack.enter_context(guard.attach(base.pipe))
        return generate_images(base, PROMPTS[:1], [0], settings=SAMPLING)[0]


def test_choices_are_those_of_the_guard() -> None:
    assert get_args(sample.Mode) == dag.MODES
    assert set(get_args(sample.Form)) == set(guidance.FORMS)


def test_form_and_reuse_steps_are_the_guards(base: BaseModel, tmp_path: Path) -> None:
    token = make(base)
    folder = token.save(tmp_path / "tokens" / "weapon" / "1.0.0")
    assert invoke(tmp_path, "--guard", "weapon@1.0.0", PROMPTS[0]).exit_code == 0
    result = invoke(tmp_path, "--guard", folder, "--form", "paper", "--reuse-steps", 3, PROMPTS[0])
    assert result.exit_code == 0
    own, changed = rows(tmp_path)  # other options, another image: the first one does not stand for it
    assert [(row["guards"][0]["form"], row["guards"][0]["reuse_steps"]) for row in (own, changed)] == [
        ("drop", 1),
        ("paper", 3),
    ]
    assert own["strength"] == 1.0
    assert own["guards"][0]["is_firing"]
    assert is_equal(pixels(tmp_path, own), drawn(base, Guard(token)))
    assert is_equal(pixels(tmp_path, changed), drawn(base, Guard(token, form="paper", reuse_steps=3)))
    assert not is_equal(pixels(tmp_path, own), pixels(tmp_path, changed))


def test_several_guards_act_together_and_have_a_trace_each(base: BaseModel, tmp_path: Path) -> None:
    tokens = [make(base), make(base, seed=6, concept="nudity", version="2.0.0", safety_prompt="a cat")]
    folders = [token.save(tmp_path / "tokens" / token.concept / token.version) for token in tokens]
    both = [part for folder in folders for part in ("--guard", folder)]
    assert invoke(tmp_path, *both, "--compare", "--json", PROMPTS[0]).exit_code == 0
    guarded, unguarded = rows(tmp_path)
    assert [one["token"] for one in guarded["guards"]] == ["weapon@1.0.0", "nudity@2.0.0"]
    assert is_equal(pixels(tmp_path, guarded), drawn(base, *map(Guard, tokens)))
    assert is_equal(pixels(tmp_path, unguarded), drawn(base))
    assert not is_equal(pixels(tmp_path, guarded), drawn(base, Guard(tokens[0])))
    assert "guards" not in unguarded
    for one in guarded["guards"]:
        steps = json.loads((tmp_path / "samples" / "weapon" / one["trace"]).read_text())["steps"]
        assert [(step["concept"], step["step"]) for step in steps] == [(one["token"], step) for step in range(3)]
        with Image.open(tmp_path / "samples" / "weapon" / one["map"]) as strip:
            assert strip.size == (3 * 64 + 2 * 2, 64)
    with pytest.raises(GuardError, match=r"expected each token once, but got weapon@1.0.0, weapon@1.0.0\. Leave out"):
        invoke(tmp_path, "--guard", folders[0], "--guard", "weapon", PROMPTS[0])
    assert len(rows(tmp_path)) == 2


def test_monitor_changes_nothing_and_stop_ends_only_what_shows_the_concept(base: BaseModel, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    make(base).save(seen / "tokens" / "weapon" / "1.0.0")
    assert invoke(seen, "--guard", "weapon", "--mode", "monitor", "--compare", *PROMPTS).exit_code == 0
    watched = rows(seen)
    for guarded, unguarded in zip(watched[::2], watched[1::2], strict=True):
        assert (guarded["mode"], guarded["is_stopped"]) == ("monitor", False)
        assert guarded["guards"][0]["strength"] == 0.0
        assert is_equal(pixels(seen, guarded), pixels(seen, unguarded))

    scores = [row["guards"][0]["score"] for row in watched[::2]]
    between = sum(scores) / 2
    certain = Thresholds(highlight=(0.2,), edit=(0.1,), certain=(between,))
    folder = make(base, thresholds=certain).save(tmp_path / "tokens" / "weapon" / "1.0.0")
    result = invoke(tmp_path, "--guard", folder, "--mode", "stop", "--json", *PROMPTS)
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert (shown["done"], shown["num_stopped"]) == (2, 1)
    assert "stopped 1, of which there is no image" in shown["message"]
    assert [row["is_stopped"] for row in rows(tmp_path)] == [score > between for score in scores]
    for row, before in zip(rows(tmp_path), watched[::2], strict=True):
        trace = json.loads((tmp_path / "samples" / "weapon" / row["guards"][0]["trace"]).read_text())["steps"]
        assert trace[-1]["is_firing"] == row["is_stopped"]
        assert not any(step["is_firing"] for step in trace[:-1])
        if row["is_stopped"]:
            assert row["image"] is None
            assert not (tmp_path / "samples" / "weapon" / "images" / f"{row['key']}.png").exists()
        else:
            assert is_equal(pixels(tmp_path, row), pixels(seen, before))
    assert [one["image"] is None for one in shown["images"]] == [row["is_stopped"] for row in rows(tmp_path)]

    again = invoke(tmp_path, "--guard", folder, "--mode", "stop", *PROMPTS)
    assert again.exit_code == 1
    assert "0 drawn, 2 were there already" in again.output
    assert is_equal(drawn(base), pixels(seen, watched[1]))  # nothing is left behind on the pipeline


def test_stop_by_one_of_two_guards_leaves_both_traces(base: BaseModel, tmp_path: Path) -> None:
    never = make(base, thresholds=Thresholds(highlight=(0.9,), certain=(0.999,)), concept="nudity", seed=6)
    result = sample.run(
        Workspace(tmp_path), make(base), base, PROMPTS[:1], sampling=SAMPLING, other_tokens=[never], mode="stop"
    )
    (row,) = result.data["images"]
    assert (row["image"], row["is_stopped"], result.data["num_stopped"]) == (None, True, 1)
    assert [one["is_firing"] for one in row["guards"]] == [True, False]
    assert [len(list((tmp_path / "samples").rglob(f"{one['token']}.json"))) for one in row["guards"]] == [1, 1]


def test_another_model_takes_an_explicit_option(base: BaseModel, tmp_path: Path) -> None:
    token = make(base)
    info = token.record.base_model
    foreign = info.model_copy(update={"key_projections": info.text_encoder, "id": "acme/other"})
    record = token.record.model_copy(update={"base_model": foreign})
    replace(token, record=record).save(tmp_path / "tokens" / "weapon" / "1.0.0")
    with pytest.raises(GuardError, match="was made for acme/other"):
        invoke(tmp_path, "--guard", "weapon", PROMPTS[0])
    assert rows(tmp_path) == []
    assert invoke(tmp_path, "--guard", "weapon", "--allow-other-model", PROMPTS[0]).exit_code == 0
    assert is_equal(pixels(tmp_path, rows(tmp_path)[0]), drawn(base, Guard(token)))


def test_options_out_of_range_are_refused_before_anything_is_drawn(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="reuse_steps must be >= 1"):
        sample.run(Workspace(tmp_path), make(base), base, PROMPTS, sampling=SAMPLING, reuse_steps=0)
    assert not (tmp_path / "samples").exists()
