"""dagkit imports and writes where what only some systems have is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BARE = """
import os, subprocess, sys

MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
NAMES = ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "pread", "pwrite", "fork", "getuid", "geteuid", "killpg")
import multiprocessing.util, random, shutil, socket, tempfile, urllib.request  # the standard library chose already
import _posixsubprocess, ctypes, ssl, hashlib

{before}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for name in MODULES:
    sys.modules.pop(name, None)
for name in NAMES:
    delattr(os, name)

{after}
"""
"""A process that has, once its libraries are loaded, no more of an operating system than Windows has."""

REGIONS = '''
import fcntl, struct, types

def locking(descriptor, mode, size):
    """Locks bytes from the position on for this descriptor, as Windows does; Linux's own kind of that."""
    where = os.lseek(descriptor, 0, os.SEEK_CUR)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, where, size, 0))

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
'''


def run(after: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = BARE.format(before=before, after=after)
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_every_module_imports() -> None:
    libraries = "import torch, diffusers, transformers, datasets, huggingface_hub, httpx, click, rich, jinja2, pydantic"
    done = run(
        """
import importlib, pkgutil, dagkit
names = [module.name for module in pkgutil.walk_packages(dagkit.__path__, "dagkit.")]
for name in names:
    importlib.import_module(name)
assert not {"fcntl", "pwd", "resource"} & set(sys.modules)
print(len(names))
""",
        before=f"{libraries}\nfrom transformers import CLIPTextModel\nimport diffusers.pipelines, scipy.ndimage, yaml",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


WRITE = """
from pathlib import Path
from dagkit.errors import WorkspaceError
from dagkit.workspace import Workspace, lock
folder = Workspace(sys.argv[1]).stage("notes", "weapon")
"""

HELD = """
with lock(folder.path):
    folder.append({"key": "a"})
    folder.write_json("x/note.json", [1])
    print(sorted(path.name for path in folder.path.iterdir()))
    child = [sys.executable, "-c", sys.argv[2], *sys.argv[1:]]
    print(subprocess.run(child, capture_output=True, text=True).stdout.strip())
with lock(folder.path):
    folder.append({"key": "b"})
print([row["key"] for row in folder.rows()], folder.read_json("x/note.json"))
print(sorted(path.name for path in folder.path.iterdir()))
"""

TRY = """
try:
    with lock(folder.path):
        print("free")
except WorkspaceError as error:
    print("another dagkit process is writing here" in str(error))
"""


def test_one_writer_at_a_time_by_locks_of_regions(tmp_path: Path) -> None:
    child = BARE.format(before=REGIONS, after=WRITE + TRY)
    done = run(WRITE + HELD, str(tmp_path), child, before=REGIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['.lock', 'manifest.jsonl', 'x']",
        "True",
        "['a', 'b'] [1]",
        "['manifest.jsonl', 'x']",
    ]


def test_a_dead_holder_by_locks_of_regions(tmp_path: Path) -> None:
    dead = "held = lock(folder.path); held.__enter__(); (folder.path / 'a').touch(); os._exit(1)"
    assert run(WRITE + dead, str(tmp_path), before=REGIONS).returncode == 1
    assert (tmp_path / "notes" / "weapon" / ".lock").exists()
    assert run(WRITE + TRY, str(tmp_path), before=REGIONS).stdout == "free\n"
    assert [path.name for path in (tmp_path / "notes" / "weapon").iterdir()] == ["a"]


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "notes" / "weapon"
    folder.mkdir(parents=True)
    (folder / ".lock").symlink_to(tmp_path / "elsewhere")
    done = run(f"{WRITE}lock(folder.path).__enter__()", str(tmp_path), before=REGIONS)
    assert "A symbolic link stands where there must be none" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_without_any_locks_nothing_is_written_under_one(tmp_path: Path) -> None:
    done = run(
        f"{WRITE}folder.append({{'key': 'a'}})\nprint(folder.keys())\nlock(folder.path).__enter__()", str(tmp_path)
    )
    assert done.stdout == "{'a'}\n"
    assert "cannot be written: no locks available" in done.stderr


@pytest.mark.parametrize(
    "word", ["fcntl", "msvcrt", "/proc", '"ps"', "O_NOFOLLOW", "O_NONBLOCK", "SIGKILL", "os.pread"]
)
def test_what_only_some_systems_have_stands_in_one_module(word: str) -> None:
    package = Path(__file__).parents[2] / "toolkit" / "dagkit"
    found = [path.name for path in package.rglob("*.py") if word in path.read_text(encoding="utf-8")]
    assert set(found) <= {"system.py"}
