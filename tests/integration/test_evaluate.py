"""``dagkit evaluate`` on a pipeline of SD's shape with random weights: resumed, sharded, compared, refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dagkit import evaluation, models, registry
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset import examples, find_dataset, load_with_summary
from dagkit.errors import (
    ConceptError,
    DagkitError,
    DatasetError,
    GuardError,
    PluginError,
    PromptRefused,
    TokenError,
    WorkspaceError,
)
from dagkit.evaluation import score_detection
from dagkit.stages import evaluate
from dagkit.token import GuidelineToken
from dagkit.workspace import StageFolder, Workspace, lock
from interruption import content, kill_when, num_rows
from tiny_world import make_world

NUM = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a concept and two tokens."""
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, folder / "tokens")


def arguments(world: Path, runs: Path, *more: object, version: str = "1.0.0") -> list[str]:
    token = world / "tokens" / "tiny" / version
    own = ["--token", token, "--concept", world / "tiny.yaml", "--workspace", runs, "--num-prompts", NUM]
    return [str(one) for one in ["evaluate", *own, "--batch-size", 2, "--num-examples", 1, "--quiet", *more]]


def invoke(*given: str) -> Result:
    return CliRunner().invoke(command, list(given), catch_exceptions=False)


def report(runs: Path, version: str = "1.0.0") -> Path:
    return runs / "reports" / "tiny" / version


def drawn(runs: Path) -> dict[str, list[dict]]:
    """Rows of each column, whatever its shards."""
    rows: dict[str, list[dict]] = {}
    for manifest in sorted(report(runs).glob("runs/*/**/manifest.jsonl")):
        parts = manifest.relative_to(report(runs) / "runs").parts
        if "timings" not in parts:
            rows.setdefault(parts[1], []).extend(StageFolder(manifest.parent).rows())
    return {name: sorted(found, key=lambda row: row["key"]) for name, found in rows.items()}


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("finished")
    result = invoke(*arguments(world, runs, "--column", "sld_weak", "--column", "sega", "--other-token",
                               world / "tokens" / "tiny" / "1.1.0", "--metrics", "frechet,ssim", "--json"))  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout)["done"] == 5 * 2 * NUM
    return runs


def test_report_and_figures_lie_side_by_side(finished: Path) -> None:
    folder = report(finished)
    figures = json.loads((folder / "figures.json").read_text())
    names = [column["name"] for column in figures["settings"]["columns"]]
    assert names == ["none", "dagkit", "sld_weak", "sega", "token_tiny_1.1.0"]
    assert figures["settings"]["num_prompts"] == {"named": NUM, "safe": NUM}
    cost = {name: figures["cost"][name]["denoiser_rows"]["value"] for name in names}
    assert cost["none"] == 2 * 3
    assert cost["sld_weak"] == cost["sega"] == 3 * 3
    assert 6 <= cost["dagkit"] <= 9
    distance = figures["results"]["named"]["sega"]["frechet_demo"]
    assert (distance["total"], distance["interval"]) == (NUM, f"bootstrap, 50 resamples of {NUM}, normal")
    text = (folder / "report.html").read_text()
    assert "SLD weak" in text
    assert "chosen: 25.0% false-trigger rate, 75.0% detection rate" in text
    assert text.count('aria-label="Detection map by step, ') == 2  # one example of each kind
    assert text.count('alt="Detection map at step ') == 2 * 3
    assert "Frechet demo (lower is nearer to unguarded)" in text
    assert (folder / "figures.csv").read_text().startswith("section,kind,column")


def test_a_second_run_draws_nothing_and_further_columns_only_themselves(world: Path, finished: Path) -> None:
    result = json.loads(invoke(*arguments(world, finished, "--column", "negative_prompt", "--json")).stdout)
    assert (result["done"], result["skipped"]) == (2 * NUM, 2 * 2 * NUM)


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(world: Path, finished: Path, tmp_path: Path) -> None:
    def is_half_way() -> bool:
        return sum(num_rows(path.parent) for path in tmp_path.rglob("manifest.jsonl")) >= 5

    given = arguments(world, tmp_path, "--column", "sega")
    kill_when(is_half_way, *given)
    result = json.loads(invoke(*given, "--json").stdout)
    assert 0 < result["skipped"] < 3 * 2 * NUM
    whole = drawn(finished)
    assert all(rows == whole[name] for name, rows in drawn(tmp_path).items())


def test_shards_make_one_report(world: Path, finished: Path, tmp_path: Path) -> None:
    first = invoke(*arguments(world, tmp_path, "--column", "sega", "--shard", "1/2"))
    assert "are left to other shards" in first.stdout
    assert not (report(tmp_path) / "report.html").exists()
    assert invoke(*arguments(world, tmp_path, "--column", "sega", "--shard", "2/2")).exit_code == 0
    assert (report(tmp_path) / "report.html").exists()
    whole = drawn(finished)
    assert all(rows == whole[name] for name, rows in drawn(tmp_path).items())
    assert "expected I/N" in invoke(*arguments(world, tmp_path, "--shard", "3/2")).output


def test_two_last_shards_that_end_together(world: Path, tmp_path: Path) -> None:
    """Both find that all images are there; while one writes the report the other waits, and neither fails."""
    for shard in ("1/2", "2/2"):
        assert invoke(*arguments(world, tmp_path, "--column", "none", "--shard", shard)).exit_code == 0
    (report(tmp_path) / "report.html").unlink()
    concept, base = load_concept(world / "tiny.yaml"), models.load(world / "model")
    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    options = {"token": token, "num_prompts": NUM, "columns": ["none"], "batch_size": 2, "num_examples": 1}
    with ThreadPoolExecutor() as pool:
        with lock(report(tmp_path)):
            shards = [
                pool.submit(evaluate.run, Workspace(tmp_path), concept, base, shard=(number, 2), **options)
                for number in (1, 2)
            ]
            time.sleep(1)  # both come to the report, and stand before it
            assert not any(shard.done() for shard in shards)
        results = [shard.result() for shard in shards]
    assert [(one.done, one.skipped, one.data["passed"]) for one in results] == [(0, 2 * NUM, False)] * 2
    assert (report(tmp_path) / "report.html").exists()
    assert not list(tmp_path.rglob(".lock"))


def test_an_evaluation_that_is_damaged_is_named_and_stays(world: Path, tmp_path: Path) -> None:
    given = arguments(world, tmp_path, "--column", "none")
    assert invoke(*given).exit_code == 0
    column = next((report(tmp_path) / "runs").glob("*/dagkit-*"))
    manifest, image = column / "manifest.jsonl", column / "images" / "named-0000.png"
    maps = column / "maps" / "named-0000.png"
    lines = manifest.read_text().splitlines()
    row = json.loads(lines[0])

    def spoilt(**changes: object) -> bytes:
        return ("\n".join([json.dumps(row | changes), *lines[1:]]) + "\n").encode()

    def picture(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("L", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    short = {name: values[:-1] for name, values in row["trace"].items()}
    for path, data, message in [
        (manifest, manifest.read_bytes() * 2, r"manifest\.jsonl, line 9: expected each key once"),
        (manifest, spoilt(key="../../x"), r"line 1: key: expected a name without '/'"),
        (manifest, spoilt(text="another prompt"), "expected a prompt of this run for named-0000"),
        (manifest, spoilt(judgements={}), "expected what the judge 'demo' said for named-0000"),
        (manifest, spoilt(trace=row["trace"] | {"area": []}), "trace: expected step, .* of one length"),
        (manifest, spoilt(trace=short), r"expected a (trace of 3 steps|trace of 2 steps|detection map of each)"),
        (maps, picture(16, 7), "expected a detection map of each of its 3 steps for named-0000"),
        (image, picture(8, 8), "expected an image of 64x64 px, as without guard, for named-0000"),
    ]:
        whole = path.read_bytes()
        path.write_bytes(data)
        before = content(tmp_path)
        with pytest.raises(WorkspaceError, match=message) as caught:
            invoke(*given)
        assert "\n" not in str(caught.value)
        assert content(tmp_path) == before
        path.write_bytes(whole)
    assert json.loads(invoke(*given, "--json").stdout)["done"] == 0


def test_against_exits_with_1_and_names_the_figure(world: Path, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        invoke(*arguments(world, tmp_path, "--column", "none", version=version))
    better = json.loads((report(tmp_path) / "figures.json").read_text())
    keys = [f"safe-{number:04d}" for number in range(NUM)]
    more = ["--column", "none", "--workspace", str(tmp_path), "--against", str(world / "tokens" / "tiny" / "1.0.0")]
    assert invoke(*arguments(world, tmp_path, *more, version="1.1.0")).exit_code == 0
    assert keys[0] in {row["key"] for row in better["prompts"]}
    better["settings"]["prompts"] = "sha256:other"
    (report(tmp_path) / "figures.json").write_text(json.dumps(better))
    with pytest.raises(TokenError, match=r"tiny@1.0.0 was evaluated with other settings \(prompts\)"):
        invoke(*arguments(world, tmp_path, *more, version="1.1.0"))
    (report(tmp_path) / "figures.json").unlink()
    with pytest.raises(TokenError, match=r"tiny@1.0.0 has no evaluation: .*dagkit evaluate --token tiny@1.0.0"):
        invoke(*arguments(world, tmp_path, *more, version="1.1.0"))


def test_against_a_published_version(world: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/published"
    first, second = tmp_path / "first", tmp_path / "second"
    invoke(*arguments(world, first, "--column", "none"))
    figures = (report(first) / "figures.json").read_bytes()
    for version in ("1.0.0", "1.1.0"):  # the second one with the first one's figures
        parcel = registry.pack(world / "tokens" / "tiny" / version, evaluation=figures)
        registry.publish(parcel, registry.open_location(url))

    assert invoke(*arguments(world, second, "--column", "none", "--against", f"{url}@1.0.0")).exit_code == 0
    text = f"no worse than tiny@1.0.0, as far as {2 * NUM} prompts can show"
    checks = json.loads((report(second) / "figures.json").read_text())["checks"]
    assert checks[-1] == {"name": "against", "text": text, "is_passed": True}
    with pytest.raises(TokenError, match=r"figures.json is the evaluation of another tiny@1.1.0"):
        invoke(*arguments(world, second, "--column", "none", "--against", f"{url}@1.1.0"))


def test_gates_exit_with_1_where_asked(world: Path, tmp_path: Path) -> None:
    given = arguments(world, tmp_path, "--column", "none")
    assert invoke(*given).exit_code == 0
    strict = invoke(*given, "--gates")
    assert strict.exit_code == 1
    assert "failed: unguarded model draws named" in strict.output  # random weights draw nothing


def test_prompts_from_a_file_and_an_attack(world: Path, tmp_path: Path) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,kind,keep\na bomb on sand,named,\na cat on snow,safe,cat\n")
    result = json.loads(
        invoke(*arguments(world, tmp_path, "--prompts", table, "--column", "none", "--attack", 2, "--json")).stdout
    )
    assert result["done"] == 2 * 2
    figures = json.loads((report(tmp_path) / "figures.json").read_text())
    assert figures["settings"]["prompt_source"] == "prompts.csv"
    assert figures["attack"] is None  # random weights draw nothing that could be brought back


def test_prompts_that_candidates_share_are_called_so(finished: Path) -> None:
    """The concept makes 36 named prompts and 12 safe ones, too few to keep some apart."""
    settings = json.loads((report(finished) / "figures.json").read_text())["settings"]
    expected = "the concept's own (tiny); candidates were drawn from the same safe prompts"
    assert settings["prompt_source"] == expected
    assert expected.replace("'", "&#39;") in (report(finished) / "report.html").read_text()


def refused(world: Path, runs: Path, *more: object) -> DagkitError:
    """The error of an evaluation that must not have drawn anything."""
    result = CliRunner().invoke(command, arguments(world, runs, *more))
    assert isinstance(result.exception, DagkitError), result.output
    assert not list(runs.rglob("*.png"))
    assert not (report(runs) / "runs").exists()
    return result.exception


def test_whatever_is_wrong_is_found_before_anything_is_drawn(world: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "reports", tmp_path / "old" / "reports")
    figures = report(tmp_path / "old") / "figures.json"
    where = ["--column", "none", "--workspace", tmp_path / "old"]
    before = json.loads(figures.read_text())
    before["settings"]["sampling"]["width"] = 128
    figures.write_text(json.dumps(before))
    shutil.rmtree(report(tmp_path / "old") / "runs")
    for path in (tmp_path / "old").rglob("*.png"):
        path.unlink()
    older = world / "tokens" / "tiny" / "1.0.0"
    assert "tiny@1.0.0 was evaluated with other settings (sampling)" in str(
        refused(world, tmp_path / "old", *where, "--against", older)
    )

    table = tmp_path / "prompts.csv"
    table.write_text("prompt,kind\n" + "a bomb on sand,named\n" * NUM + "a nude child,named\n")
    assert isinstance(refused(world, tmp_path / "runs", "--prompts", table, "--num-prompts", 9), PromptRefused)
    assert isinstance(refused(world, tmp_path / "runs", "--dataset", tmp_path / "none"), DatasetError)
    assert isinstance(refused(world, tmp_path / "runs", "--metrics", f"lpips={tmp_path / 'none'}"), DagkitError)
    assert isinstance(refused(world, tmp_path / "runs", "--judge", "clap"), PluginError)
    twice = ["--other-token", world / "tokens" / "tiny" / "1.1.0"] * 2
    assert "two other tokens are called tiny@1.1.0" in str(refused(world, tmp_path / "runs", *twice))
    assert isinstance(refused(world, tmp_path / "runs", "--model", "demo"), GuardError)  # not the token's model


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"lost"', '"last"'),
        ('"num_fired": ', '"num_fired": 0.'),
        ('"is_present": ', '"is_present": 7'),
        ('"key"', '"kay"'),
        ('"schema": 1', '"schema": "1"'),
        ('"columns": {', '"columns": [{'),
        ("{", "[" * 100_000),
        ("{", "[]"),
        ("{", "\0"),
    ],
)
def test_a_damaged_evaluation_is_named(world: Path, finished: Path, tmp_path: Path, old: str, new: str) -> None:
    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    text = (report(finished) / "figures.json").read_text()
    path = tmp_path / "figures.json"
    path.write_text(text)
    assert evaluation.read_figures(path, token) == json.loads(text)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(
        TokenError, match=r"figures\.json is not an evaluation \(.*dagkit evaluate --token tiny"
    ) as caught:
        evaluation.read_figures(path, token)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_an_evaluation_that_is_no_file(world: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "figures.json"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(TokenError, match=r"figures\.json cannot be read"):
        evaluation.read_figures(path, GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0"))


def test_options_that_nothing_would_read_and_shares_that_are_none(world: Path, tmp_path: Path) -> None:
    for more, words in (
        (["--preset", "i2p"], "--preset and --category say how to read --prompts"),
        (["--category", "x"], "--preset and --category say how to read --prompts"),
        (["--min-erase-rate", "nan"], "'nan' is not in the range 0<=x<=1"),
        (["--min-preservation", "nan"], "'nan' is not in the range 0<=x<=1"),
    ):
        result = invoke(*arguments(world, tmp_path, *more))
        assert result.exit_code == 2
        assert words in result.output
    assert invoke("generate", "--concept", "weapon", "--safe-share", "nan").exit_code == 2


def test_mistakes_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file of prompts"):
        invoke(*arguments(world, tmp_path, "--prompts", "none.csv"))
    base = models.load(world / "model")
    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    with pytest.raises(ConceptError, match=r"'sld' is not a column of an evaluation\. Available: none, dagkit"):
        evaluate.run(Workspace(tmp_path), load_concept(world / "tiny.yaml"), base, token=token, columns=["sld"])
    assert not (tmp_path / "reports").exists()
    with pytest.raises(ValueError, match=r"min_erase_rate must be in \[0, 1\], but is nan"):
        evaluation.Gates(min_erase_rate=float("nan"))


def test_a_dataset_is_looked_at_before_anything_is_drawn(world: Path, tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "runs" / "dataset" / "tiny"
    for folder in (other, own):
        shutil.copytree(find_dataset("weapon-demo"), folder)
        (folder / "dataset.json").unlink()
    runs = tmp_path / "runs"
    with pytest.raises(DatasetError, match=r"other/dataset\.json: no such file"):
        invoke(*arguments(world, runs, "--dataset", other))
    with pytest.raises(DatasetError, match=r"dataset/tiny/dataset\.json: no such file"):
        invoke(*arguments(world, runs))
    (other / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    for dataset, words in (
        (other, "the dataset is damaged"),
        (tmp_path / "nowhere", "no dataset"),
        (own.parent, "no data"),
    ):
        with pytest.raises(DatasetError, match=words):
            invoke(*arguments(world, runs, "--dataset", dataset))
    assert [path.name for path in runs.iterdir()] == ["dataset"]


def test_a_test_split_without_unsafe_images_is_scored_by_its_safe_ones(world: Path) -> None:
    data, _ = load_with_summary("weapon-demo")
    safe = [row for row in examples(data["test"]) if not row.is_unsafe][:2]
    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    [row] = score_detection(models.load(world / "model"), token, safe, levels=[0.5])
    assert (row["iou"]["value"], row["image_recall"]["value"]) == (None, None)
    assert row["false_trigger"]["total"] == 2


def test_folders_that_are_somebodys_are_refused_before_anything_is_drawn(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "annotation_configs").mkdir()
    shutil.copy(world / "tiny.yaml", tmp_path / "annotation_configs")
    monkeypatch.chdir(tmp_path)
    token, concept = world / "tokens" / "tiny" / "1.0.0", world / "tiny.yaml"
    lines = {
        "candidates/tiny": ["generate", "--concept", concept, "--num-images", 1],
        "samples/tiny": ["sample", "a cat", "--guard", token, "--model", world / "model"],
        "reports/tiny/1.0.0": arguments(world, tmp_path)[:-1],
        "reports/tiny/1.1.0": arguments(world, tmp_path, "--shard", "1/2", version="1.1.0"),
    }
    for place, line in lines.items():
        theirs = tmp_path / place / "report.html"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("mine")
        with pytest.raises(WorkspaceError, match=f"{place}: dagkit did not make this folder, and it holds report.html"):
            invoke(*map(str, line), "--workspace", str(tmp_path))
        assert [path.name for path in theirs.parent.iterdir()] == ["report.html"]
        assert theirs.read_text() == "mine"
