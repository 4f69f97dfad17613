"""The command line: light, helpful, and one line for an error that a user can mend."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.stages import OTHER_COMMANDS, STAGES

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
