"""publish: what leaves, what the gate refuses, and a token that comes back from where it went."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from published_places import Place

from dagkit import models, registry
from dagkit.cli import command
from dagkit.errors import PublishError, TokenError
from dagkit.stages import publish
from dagkit.workspace import Workspace
from interruption import content
from tiny_world import make_token, make_world


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two tokens, both measured by ``dagkit evaluate``; the concept's file and model beside it."""
    folder = tmp_path_factory.mktemp("measured")
    make_world(folder, folder / "runs" / "tokens")
    for version in ("1.0.0", "1.1.0"):
        token = folder / "runs" / "tokens" / "tiny" / version
        where = ["--concept", folder / "tiny.yaml", "--workspace", folder / "runs", "--column", "none", "--quiet"]
        arguments = ["evaluate", "--token", token, *where, "--num-prompts", 2, "--batch-size", 2, "--num-examples", 1]
        CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    return folder


@pytest.fixture
def runs(measured: Path, tmp_path: Path) -> Path:
    """A copy of its tokens and figures, to spoil."""
    shutil.copytree(measured / "runs" / "tokens", tmp_path / "runs" / "tokens")
    for version in ("1.0.0", "1.1.0"):
        target = tmp_path / "runs" / "reports" / "tiny" / version
        target.mkdir(parents=True)
        shutil.copy(measured / "runs" / "reports" / "tiny" / version / "figures.json", target)
    return tmp_path / "runs"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def to(tmp_path: Path) -> str:
    return f"file://{tmp_path}/published"


def invoke(runs: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments, "--workspace", str(runs)], catch_exceptions=False)


def edit(runs: Path, version: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = runs / "reports" / "tiny" / version / "figures.json"
    figures = json.loads(path.read_text())
    change(figures)
    path.write_text(json.dumps(figures))


def losing(num_lost: int) -> Callable[[dict[str, Any]], None]:
    """Figures in which the token loses other content in some of twelve named prompts."""

    def change(figures: dict[str, Any]) -> None:
        row = next(row for row in figures["prompts"] if row["kind"] == "named")
        said = {**row["columns"][figures["column"]], "is_present": False}
        figures["prompts"] = [
            {**row, "key": f"named-{n}", "columns": {figures["column"]: {**said, "lost": ["cat"] * (n < num_lost)}}}
            for n in range(12)
        ]

    return change


def test_publish_and_load_in_another_process(measured: Path, runs: Path, to: str, tmp_path: Path):
    result = invoke(runs, "publish", "tiny@1.0.0", "--to", to, "--json")
    assert (result.exit_code, json.loads(result.stdout)["url"]) == (0, f"{to}@1.0.0")

    script = (
        "import dagkit, sys; from dagkit import models\n"
        "pipe = models.load(sys.argv[1]).pipe\n"
        "with dagkit.load_token(sys.argv[2] + '@^1').guard().attach(pipe) as trace:\n"
        "    pipe('a bomb', num_inference_steps=4, width=64, height=64)\n"
        "print(len(trace.steps))"
    )
    run = [sys.executable, "-c", script, str(measured / "model"), to]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4"

    published = next((tmp_path / "published").glob("1.0.0-*"))
    for file in sorted(published.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:40] + bytes([whole[40] ^ 4]) + whole[41:])
        with pytest.raises(TokenError, match=f"{file.name} was changed after it was published"):
            registry.load_token(f"{to}@^1")
        file.write_bytes(whole)


def test_nothing_private_leaves(measured: Path, runs: Path, to: str, tmp_path: Path):
    (runs / "tokens" / "tiny" / "1.0.0" / "notes.txt").write_text("private")
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    written = {path.name: path for path in (tmp_path / "published").rglob("*") if path.is_file()}
    everything = b"".join(path.read_bytes() for name, path in written.items() if name != "INDEX.md")
    figures = json.loads((measured / "runs" / "reports" / "tiny" / "1.0.0" / "figures.json").read_text())
    prompts = [row["text"] for row in figures["prompts"]]

    artifact = {"guideline.safetensors", "token.json", "README.md", "SHA256SUMS"}
    assert set(written) - {".lock"} == artifact | {"figures.json", "index.json", "INDEX.md"}
    assert len(prompts) >= 4
    assert [prompt for prompt in prompts if prompt.encode() in everything] == []
    assert str(measured).encode() not in everything
    report = [path for path in (measured / "runs" / "reports").rglob("*") if path.is_file()]
    assert {"figures.json", "figures.csv", "report.html", "settings.json"} <= {path.name for path in report}
    assert [path for path in report if str(measured).encode() in path.read_bytes()] == []


def test_checkpoints_on_this_machine_leave_as_names(runs: Path, to: str, tmp_path: Path):
    """Of an older evaluation, which kept paths; today's hold none in the first place."""
    (tmp_path / "clip").mkdir()

    def spoil(figures: dict[str, Any]) -> None:
        settings = figures["settings"]
        settings["judge"]["options"] = {"rule": "any", "clip": {"checkpoint": str(tmp_path / "clip")}}
        settings["image_metrics"] = [{"name": "clip_score", "settings": {"checkpoint": "/home/alice/models/clip-l"}}]
        settings["model"] = "~/models/sd15"
        settings["prompt_source"] = "list of /home/alice/notes.csv"

    edit(runs, "1.0.0", spoil)
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    published = next((tmp_path / "published").glob("1.0.0-*/figures.json")).read_text()
    settings = json.loads(published)["settings"]
    assert settings["judge"]["options"]["clip"] == {"checkpoint": "clip"}
    assert settings["image_metrics"][0]["settings"] == {"checkpoint": "clip-l"}
    assert (settings["model"], settings["prompt_source"]) == ("sd15", "list of notes.csv")
    assert str(tmp_path) not in published
    assert "alice" not in published


def test_a_published_version_is_repaired(runs: Path, to: str, tmp_path: Path):
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    before = content(tmp_path / "published")
    next((tmp_path / "published").glob("1.0.0-*/token.json")).unlink()
    assert "Publish it again" in CliRunner().invoke(command, ["token", "show", f"{to}@1.0.0"]).exception.args[0]

    dry = publish.run(Workspace(runs), "tiny@1.0.0", to, is_dry_run=True)
    assert "token.json would be written again; nothing was written" in dry.message
    again = publish.run(Workspace(runs), "tiny@1.0.0", to)
    assert again.message.endswith("written again what was missing or damaged: token.json")
    assert content(tmp_path / "published") == before
    assert registry.load_token(f"{to}@1.0.0").name == "tiny@1.0.0"


def test_dry_run_lists_every_file_and_writes_none(runs: Path, place: Place, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "example.png")
    before = content(runs)
    options = ["--to", place.url, "--with-examples", str(tmp_path / "example.png")]
    dry = invoke(runs, "publish", "tiny@1.0.0", *options, "--dry-run")

    assert place.files() == {}
    assert content(runs) == before
    assert "8 files" in dry.output.splitlines()[-1]
    assert "nothing was written" in dry.output.splitlines()[-1]
    listed = {line.split()[0] for line in dry.output.splitlines() if line.startswith("  ")}
    real = json.loads(invoke(runs, "publish", "tiny@1.0.0", *options, "--json").stdout)
    entry = registry.open_location(place.url).read_index().entry("1.0.0")
    assert listed == set(real["files"]) == {*entry.files, "index.json", "INDEX.md"}
    assert "examples/01.png" in listed


def test_against_what_was_published_anywhere(runs: Path, measured: Path, place: Place, tmp_path: Path):
    edit(runs, "1.0.0", losing(0))
    publish.run(Workspace(runs), "tiny@1.0.0", place.url)
    where = ["--concept", measured / "tiny.yaml", "--workspace", measured / "runs", "--column", "none", "--quiet"]
    token = measured / "runs" / "tokens" / "tiny" / "1.1.0"
    more = ["--num-prompts", 2, "--batch-size", 2, "--num-examples", 1, "--against", f"{place.url}@^1"]
    arguments = [str(argument) for argument in ("evaluate", "--token", token, *where, *more)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads((measured / "runs" / "reports" / "tiny" / "1.1.0" / "figures.json").read_text())
    assert figures["checks"][-1]["name"] == "against"
    assert "tiny@1.0.0" in figures["checks"][-1]["text"]


def test_published_twice_is_published_once(runs: Path, to: str, tmp_path: Path):
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    before = content(tmp_path / "published")
    again = publish.run(Workspace(runs), "tiny@1.0.0", to)

    assert (again.done, again.skipped) == (0, 1)
    assert "is published already, with the same content" in again.message
    assert content(tmp_path / "published") == before


def test_a_token_without_evaluation_is_refused(runs: Path, to: str, tmp_path: Path):
    shutil.rmtree(runs / "reports")
    with pytest.raises(PublishError, match=r"tiny@1.0.0 has no evaluation.*dagkit evaluate --token tiny@1.0.0"):
        publish.run(Workspace(runs), "tiny@1.0.0", to)
    assert not (tmp_path / "published").exists()

    assert invoke(runs, "publish", "tiny@1.0.0", "--to", to, "--without-evaluation").exit_code == 0
    assert registry.load_token(f"{to}@1.0.0").name == "tiny@1.0.0"


@pytest.mark.parametrize("spoil", ["another token", "not JSON", "not an evaluation"])
def test_an_evaluation_of_something_else_is_refused(runs: Path, to: str, spoil: str):
    path = runs / "reports" / "tiny" / "1.0.0" / "figures.json"
    match spoil:
        case "another token":
            shutil.copy(runs / "reports" / "tiny" / "1.1.0" / "figures.json", path)
        case "not JSON":
            path.write_text("{")
        case "not an evaluation":
            path.write_text("{}")

    with pytest.raises(TokenError, match=r"figures.json is (not an evaluation|the evaluation of another tiny@1.0.0)"):
        publish.run(Workspace(runs), "tiny@1.0.0", to)


def test_a_worse_token_is_refused_unless_forced(runs: Path, to: str):
    edit(runs, "1.0.0", losing(0))
    edit(runs, "1.1.0", losing(7))
    publish.run(Workspace(runs), "tiny@1.0.0", to)

    worse = r"tiny@1.1.0 is worse than tiny@1.0.0, .*loses other content in 7 of 12 named prompts, before in 0 "
    with pytest.raises(PublishError, match=worse):
        publish.run(Workspace(runs), "tiny@1.1.0", to)
    with pytest.raises(TokenError, match=r"has no version 1.1.0"):
        registry.load_token(f"{to}@1.1.0")

    forced = invoke(runs, "publish", "tiny@1.1.0", "--to", to, "--force-worse")
    assert forced.exit_code == 0
    assert "note: tiny@1.1.0 is worse than tiny@1.0.0" in forced.stderr
    assert registry.load_token(to).version == "1.1.0"


def test_a_token_that_is_not_worse_beyond_chance_is_published(runs: Path, to: str):
    edit(runs, "1.0.0", losing(0))
    edit(runs, "1.1.0", losing(3))
    publish.run(Workspace(runs), "tiny@1.0.0", to)

    assert publish.run(Workspace(runs), "tiny@1.1.0", to).done == 1


def test_evaluations_under_other_settings_are_not_compared(runs: Path, to: str):
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    edit(runs, "1.1.0", lambda figures: figures["settings"]["sampling"].update(num_inference_steps=50))

    with pytest.raises(
        PublishError, match=r"evaluated with different sampling.*with the same prompts, seed, sampling and judge"
    ):
        publish.run(Workspace(runs), "tiny@1.1.0", to)
    assert publish.run(Workspace(runs), "tiny@1.1.0", to, is_worse_allowed=True).done == 1


def test_published_figures_that_are_none(runs: Path, to: str, tmp_path: Path):
    folder = runs / "tokens" / "tiny" / "1.0.0"
    registry.publish(registry.pack(folder, evaluation=b'{"schema": 1}'), registry.open_location(to))

    with pytest.raises(PublishError, match=r"figures.json of tiny@1.0.0 at file://.* is not an evaluation"):
        publish.run(Workspace(runs), "tiny@1.1.0", to)


def test_failed_gates_of_its_own_evaluation_are_said(runs: Path, to: str):
    failed = {"name": "erase_rate/named", "text": "erases 10% on named prompts (at least 90%)", "is_passed": False}
    edit(runs, "1.0.0", lambda figures: figures.update(checks=[failed]))

    result = invoke(runs, "publish", "tiny@1.0.0", "--to", to)
    assert "note: its evaluation fails a gate: erases 10% on named prompts (at least 90%)" in result.stderr


def test_a_version_is_compared_with_the_one_before_it(measured: Path, runs: Path, to: str):
    model = models.load(measured / "model")
    for version in ("1.0.1", "2.0.0"):
        make_token(model, version, 9).save(runs / "tokens" / "tiny" / version)
    publish.run(Workspace(runs), "tiny@1.1.0", to)
    publish.run(Workspace(runs), "tiny@1.0.1", to, is_unmeasured_allowed=True)
    publish.run(Workspace(runs), "tiny@2.0.0", to, is_unmeasured_allowed=True)

    index = registry.open_location(to).read_index()
    assert [entry.version for entry in index.versions] == ["1.0.1", "1.1.0", "2.0.0"]
    assert registry.replaced("1.0.0", index) is None
    assert registry.replaced("1.1.1", index).version == "1.1.0"
    assert registry.replaced("2.0.0", index).version == "1.1.0"


def test_promotion_from_one_location_to_another(runs: Path, to: str, tmp_path: Path):
    publish.run(Workspace(runs), "tiny@1.0.0", to)
    publish.run(Workspace(tmp_path / "empty"), f"{to}@^1", f"file://{tmp_path}/public")

    assert content(tmp_path / "public", ignore=["index.json", "INDEX.md"]) == content(
        tmp_path / "published", ignore=["index.json", "INDEX.md"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny@1.0.0", "--to", "file:///x@1.0.0"], "expected a place without a version. Write file:///x."),
        (["tiny@1.0.0", "--to", "/x"], "'/x' is not a place for tokens. Expected hf://org/name"),
        (["tiny@9.0.0", "--to", "file:///x"], "tiny has no version 9.0.0"),
        (["tiny@1.0.0", "--to", "file:///x", "--with-examples", "none.png"], "none.png: expected an image"),
    ],
)
def test_errors_say_what_to_do(runs: Path, arguments: list[str], message: str):
    result = CliRunner().invoke(command, ["publish", *arguments, "--workspace", str(runs)])
    assert isinstance(result.exception, (PublishError, TokenError))
    assert message in str(result.exception)
    assert not Path("/x").exists()


def test_public_is_for_the_hub_only(runs: Path, to: str):
    result = CliRunner().invoke(command, ["publish", "tiny@1.0.0", "--to", to, "--public", "--workspace", str(runs)])
    assert result.exit_code == 2
    assert "--public is for hf:// only" in result.output
