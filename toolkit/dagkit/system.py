"""What operating systems do differently: locks, opening without waiting, other processes. And who is hushed.

Nothing else imports ``fcntl`` or ``msvcrt``, asks for ``/proc`` or ``ps``, or names a flag or signal that only some
systems have. The package `filelock` does not do here: it empties the file that it locks, whoever wrote that, and locks
no folders.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

_PROC: Final = Path("/proc")
_PLAIN: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_CHATTY: Final = ("bitsandbytes", "torch.utils._pytree", "diffusers.quantizers")
"""Loggers of quantisers, which warn of each other when diffusers is imported where they are installed."""
_BEYOND: Final = 1 << 30
"""Which byte of a file Windows locks: one that is not there, because nobody can read a byte that is locked."""


def open_at_once(path: Path, flags: int, *, follows_links: bool = True) -> int:
    """Opens a file without waiting for the other end of a pipe, and returns its descriptor, for bytes.

    Args:
        path: of the file.
        flags: as of ``os.open``.
        follows_links: whether a symbolic link at ``path`` is followed.

    Raises:
        OSError: as of ``os.open``; ``ELOOP`` for a link that is not followed.
    """
    if not follows_links:
        flags |= _NO_LINK
        if not _NO_LINK and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | _PLAIN, 0o644)


def is_locked_now(descriptor: int) -> bool:
    """Locks an open file for this descriptor, unless another one has it; the lock ends when the descriptor is closed.

    Raises:
        OSError: the disk or the system knows no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _is_region_locked_now(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_region_locked_now(descriptor: int) -> bool:
    """`is_locked_now` on Windows, which locks bytes of a file."""
    try:
        msvcrt: Any = import_module("msvcrt")
    except ImportError as error:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from error
    os.lseek(descriptor, _BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return False
    return True


def close_and_delete(descriptor: int, path: Path) -> None:
    """Deletes a file that this process has open and locked, and closes it.

    It is deleted first, so that nobody locks a file that is about to go. Windows deletes no open file, and so neither
    one that another process opens between the two.
    """
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        os.close(descriptor)
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
    else:
        os.close(descriptor)


@contextmanager
def held_folder(folder: Path) -> Iterator[bool]:
    """Locks a folder, and says whether that is possible: another process may hold it, or there are no such locks.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        yield False
        return
    try:
        try:
            is_held = is_locked_now(descriptor)
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def command_line(pid: int) -> str:
    """How a process was started; empty where there is none, or nobody can tell.

    Containers often have no ``ps``, other systems than Linux no ``/proc``, and Windows neither.
    """
    if (_PROC / "self" / "cmdline").exists():
        try:
            return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    command = ["ps", "-ww", "-p", str(pid), "-o", "command="]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError:
        return ""


def hush() -> None:
    """Keeps libraries that are not loaded yet from warning of what concerns no user of a command."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def end_process(pid: int, *, at_once: bool = False) -> None:
    """Asks a process to end, or ends it; does nothing where there is none.

    Args:
        pid: of the process.
        at_once: end it without asking. Windows never asks.
    """
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kill if at_once else signal.SIGTERM)
