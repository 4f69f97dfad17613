"""serial: one item after the other, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from dagkit.engines import Build, Item, Work


class Serial:
    """Works in this process, with the models that it has loaded and all threads that it has."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def results(
        self, items: Iterable[Item], work: Work, build: Build | None
    ) -> Generator[tuple[Item, Any], None, None]:
        """As `dagkit.engines.Engine.results`."""
        for item in items:
            yield item, work(item.payload)
