"""Engines: who does the work of a stage, here or in other processes.

A stage is cut in three. It **plans**: what its manifest does not hold yet becomes `Item`s. The **work** on an item is
pure: from its payload to rows and the bytes of files (`Made`), and no file is touched. It **commits**: the process that
planned is the only one that writes. An engine stands between plan and commit; it knows nothing of workspaces:

    with engines.open_engine(workers) as engine, closing(engine.results(items, work, build)) as results:
        for item, made in results:
            folder.commit(made.row, made.files)

Whatever the engine and the number of its workers, results come in the order of the plan, so manifests end the same. (A
picture's last bit depends on how many threads torch has, as it does from one machine to the next: a worker process has
one, the `Serial` engine all that the program has.)

One file adds an engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

Work = Callable[[Any], Any]
"""From an item's payload to its result, and no file is touched."""

Build = Callable[[], Work]
"""Makes the same work in another process, where it loads models for itself; can be pickled."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is worked on at once.

    Attributes:
        key: tells what it is from its content, the same in every run.
        payload: all that the work must know; can be pickled.
    """

    key: str
    payload: Any


@dataclass(frozen=True, slots=True)
class Made:
    """One row of a manifest and what belongs to it, not yet written.

    Attributes:
        row: with its ``key``.
        files: path in the stage's folder -> content.
    """

    row: dict[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Engine(Protocol):
    """Does work on items."""

    def results(
        self, items: Iterable[Item], work: Work, build: Build | None
    ) -> Generator[tuple[Item, Any], None, None]:
        """Works on items, and yields each with its result, in the order of ``items``.

        They are taken as they are needed. Where an item fails, those before it are yielded and its own error is raised.
        Warnings are given in this process. Close the iterator where it is not taken to its end.

        Args:
            items: what to work on.
            work: for engines that work in this process.
            build: makes it elsewhere; ``None`` where that cannot be.

        Raises:
            EngineError: a worker ended, or could not be started.
        """
        ...


def open_engine(workers: int = 1) -> AbstractContextManager[Engine]:
    """The engine for a number of workers: this process itself for one, else as many others, which end with the context.

    Args:
        workers: >= 1.
    """
    from dagkit.engines.processes import Processes
    from dagkit.engines.serial import Serial

    return Serial() if workers == 1 else Processes(workers)


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1
