"""Running dagkit in a process of its own, and killing it half-way."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from click.testing import CliRunner

from dagkit.cli import command

DEADLINE_S = 300


def finish(*arguments: object) -> str:
    """Runs ``dagkit ARGUMENTS`` in this process to its end, which must be a good one; returns what it printed."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def kill_when(is_half_way: Callable[[], bool], *arguments: object) -> None:
    """Runs ``dagkit ARGUMENTS`` and kills it (SIGKILL) once ``is_half_way()``; it must not have ended before."""
    process = subprocess.Popen([sys.executable, "-m", "dagkit.cli", *map(str, arguments)])
    deadline = time.monotonic() + DEADLINE_S
    while not is_half_way():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came half-way"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def num_rows(folder: Path) -> int:
    """Finished items of a stage folder, counted without dagkit."""
    manifest = folder / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def content(folder: Path, ignore: Iterable[str] = ()) -> dict[str, str]:
    """Every file of a folder by the hash of its bytes, locks aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in {".lock", *ignore}]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
