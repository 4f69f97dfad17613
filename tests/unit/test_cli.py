"""The command line: light, helpful, and one line for an error that a user can mend."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.commands import OTHER_COMMANDS
from dagkit.errors import DagkitError, WorkspaceError
from dagkit.resources import source_date
from dagkit.segmenters.checkpoints import checkpoint_folder
from dagkit.stages import STAGES

COMMANDS = [*(stage.name for stage in STAGES), *OTHER_COMMANDS]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "datasets", "PIL", "label_studio_sdk")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dagkit.cli", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_light(name: str):
    script = (
        "import sys; from dagkit.cli import command\n"
        f"try: command([*{name.split()!r}, '--help'])\n"
        f"except SystemExit as end: print(end.code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 0.3


def test_importing_and_guarding_load_nothing_of_the_toolkit():
    """Beside what the pipeline itself has loaded: diffusers takes scipy where it is."""
    script = """
import sys
import dagkit
assert not any(name.startswith(("numpy", "torch")) for name in sys.modules)
from dagkit import demo, models
pipe = models.load(demo.model_path()).pipe
before = {name for name in sys.modules if not name.startswith("dagkit.")}
with dagkit.load_token(sys.argv[1]).guard().attach(pipe):
    pass
print(sorted({".".join(name.split(".")[: 1 + name.startswith("dagkit")]) for name in set(sys.modules) - before}))
"""
    token = Path(__file__).parents[1] / "tokens" / "weapon"
    done = subprocess.run([sys.executable, "-c", script, token], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "dagkit.guard" in loaded
    assert loaded & {"datasets", "label_studio_sdk", "scipy", "click", "rich", "httpx", "jinja2", "pyarrow"} == set()
    assert loaded & {f"dagkit.{name}" for name in ("cli", "commands", "dataset", "labelstudio", "stages")} == set()


def test_every_command_is_listed_with_help():
    result = CliRunner().invoke(command, ["--help"])

    assert [name for name in COMMANDS if f"  {name} " not in result.output] == []


def test_wrong_command_suggests_a_near_one():
    done = run("optimise")

    assert done.returncode == 2
    assert "'optimise' is not a command. Did you mean 'optimize'?" in done.stderr


def test_error_is_one_line(tmp_path: Path):
    done = run("concept", "show", "wepon", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("error: 'wepon' is not a concept. Did you mean 'weapon'?")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["soon", "1e9", "9" * 20, "-" + "9" * 15])
def test_a_wrong_source_date_is_named_before_libraries_read_it(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    result = CliRunner().invoke(command, ["optimize", "--concept", "weapon"])

    assert isinstance(result.exception, DagkitError)
    assert str(result.exception).startswith(
        "SOURCE_DATE_EPOCH: expected whole seconds since 1970 up to the year 9999, "
    )


def test_a_source_date_is_taken_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert str(source_date()) == "1970-01-02 00:00:00+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert source_date() is None


def test_an_unknown_home_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGKIT_CHECKPOINTS", "~nobody-of-this-name/x")
    with pytest.raises(
        DagkitError, match="DAGKIT_CHECKPOINTS: expected a path, but '~nobody-of-this-name/x' begins with"
    ):
        checkpoint_folder()


OF_A_CONCEPT = (
    *("generate", "premask", "push", "pull", "export", "annotate", "optimize", "purge"),
    *("dataset check", "dataset push x"),
)
OF_A_TOKEN = (
    "sample x --guard",
    "evaluate --token",
    "attack --token",
    "publish --to file:///x",
    "token list",
    "token show",
    "token verify",
)


@pytest.mark.parametrize(
    "arguments",
    [*(f"{name} --concept weapon" for name in OF_A_CONCEPT), *(f"{name} weapon" for name in OF_A_TOKEN), "demo"],
)
def test_a_workspace_that_cannot_be_is_named_by_every_command(arguments: str, tmp_path: Path):
    result = CliRunner().invoke(command, [*arguments.split(), "--workspace", str(tmp_path / ("x" * 300))])

    assert isinstance(result.exception, WorkspaceError)
    assert "file name too long. The path is longer than the file system takes; use another --workspace" in str(
        result.exception
    )
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_may_not_be_used_is_one_line(tmp_path: Path):
    done = run("dataset", "check", str(tmp_path / ("x" * 300)))

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "file name too long" in done.stderr.lower()


def test_concept_new_show_list(tmp_path: Path):
    assert run("concept", "new", "spiders", "--words", "a spider", cwd=tmp_path).returncode == 0
    assert "'a photo of a spider" in run("concept", "show", "spiders", cwd=tmp_path).stdout
    assert "spiders" in [
        concept["name"] for concept in json.loads(run("concept", "list", "--json", cwd=tmp_path).stdout)
    ]

    written = (tmp_path / "annotation_configs" / "spiders.yaml").read_text()
    again = run("concept", "new", "spiders", cwd=tmp_path)
    assert again.returncode == 1
    assert "there is such a file already" in again.stderr
    assert (tmp_path / "annotation_configs" / "spiders.yaml").read_text() == written
    assert "expected a name of lower-case letters" in run("concept", "new", "../x", cwd=tmp_path).stderr

    dangling = tmp_path / "annotation_configs" / "wasps.yaml"
    dangling.symlink_to(tmp_path / "on a disk that is away.yaml")
    assert "there is such a file already" in run("concept", "new", "wasps", cwd=tmp_path).stderr
    assert dangling.is_symlink()


def test_a_terminal_of_few_letters_and_a_page_of_ones_own(tmp_path: Path):
    """Text that the terminal cannot show is shown by its numbers; a file in another folder is named by its path."""
    done = run("concept", "new", "spiders", "--words", "araignée 🕷", "--folder", "mine", cwd=tmp_path)
    assert done.stdout.endswith("Fill it in, then: dagkit concept show mine/spiders.yaml\n")
    line = [sys.executable, "-m", "dagkit.cli", "concept", "show", "mine/spiders.yaml"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    shown = subprocess.run(line, capture_output=True, encoding="latin-1", cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert r"araignée \U0001f577" in shown.stdout


def test_concept_new_writes_nothing_that_it_would_not_take(tmp_path: Path):
    for words in ("{x}", ",", "x" * 2000):
        done = run("concept", "new", "spiders", "--words", words, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: concept spiders: ")
    (tmp_path / "annotation_configs").mkdir()
    (tmp_path / "annotation_configs" / "spiders.yaml").symlink_to("nowhere")
    assert "there is such a file already" in run("concept", "new", "spiders", cwd=tmp_path).stderr
    assert (tmp_path / "annotation_configs" / "spiders.yaml").is_symlink()
