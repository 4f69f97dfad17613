"""What all stages share: what a stage did, how far it is, and batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        stage: its name.
        done: items made by this run.
        skipped: items that an earlier run had already made.
        message: one line for the terminal, without the stage's name.
        data: further facts for ``--json``.
    """

    stage: str
    done: int
    skipped: int
    message: str
    data: dict[str, Any] = field(default_factory=dict)


class Progress:
    """A progress bar on a terminal; silent elsewhere, in CI, and when asked.

    Args:
        is_quiet: never show a bar.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet or not sys.stderr.isatty() or bool(os.environ.get("CI"))

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        """Yields ``items`` and moves the bar by one for each."""
        if self.is_quiet:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, total=total, description=description, console=Console(stderr=True), transient=True)

    @contextmanager
    def bar(self, description: str) -> Iterator[Callable[..., None]]:
        """A bar that is told its state: yields a function of (done, total, note=""), the last shown beside its name."""
        if self.is_quiet:
            yield lambda *_: None
            return
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(description)
            yield lambda done, total, note="": bars.update(
                task, completed=done, total=total, description=f"{description} {note}".rstrip()
            )


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Cuts a list into lists of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
