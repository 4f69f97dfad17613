"""Prints the tables of docs/benchmarks.md that have a row a concept, a member and a setting, from build/bench.json.

python tests/benchmarks/bench_tables.py [build/bench.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import OUT

from dagkit.metrics.intervals import wilson


def tables(figures: dict[str, Any]) -> str:
    """Markdown: concepts, their members, settings."""
    concepts = names(figures, "concepts.", ".untouched")
    members = [(name, word) for name in concepts for word in names(figures, f"concepts.{name}.slice.", ".erase")]
    parts = [
        table(
            ("concept", "erased", "others kept", "safe, bit-equal", "kept on safe"),
            [
                (
                    name,
                    *both(figures, f"concepts.{name}"),
                    shown(figures.get(f"concepts.{name}.untouched")),
                    shown(figures.get(f"concepts.{name}.preserve_safe")),
                )
                for name in concepts
            ],
        ),
        table(
            ("member", "erased"),
            [(f"{word} ({name})", both(figures, f"concepts.{name}.slice.{word}")[0]) for name, word in members],
        ),
        table(
            ("setting", "erased", "others kept", "refused"),
            [
                (name, *both(figures, f"robust.{name}"), shown(figures.get(f"robust.{name}.refused")))
                for name in names(figures, "robust.", ".num_drawn")
            ],
        ),
    ]
    return "\n\n".join(parts)


def names(figures: dict[str, Any], before: str, after: str) -> list[str]:
    """What stands between two parts of a key, in the order of the keys."""
    found = (key.removeprefix(before).removesuffix(after) for key in figures if key.startswith(before))
    return [name for name in dict.fromkeys(found) if name != "worst" and f"{before}{name}{after}" in figures]


def both(figures: dict[str, Any], prefix: str) -> tuple[str, str]:
    """Erase rate with its count and interval, and preservation with its count."""
    erase, drawn = figures.get(f"{prefix}.erase"), figures.get(f"{prefix}.num_drawn", 0)
    kept, others = figures.get(f"{prefix}.preserve"), figures.get(f"{prefix}.num_others", 0)
    erased = ""
    if erase is not None and drawn:
        low, high = wilson(round(erase * drawn), drawn)
        erased = f"{erase:.3f} ({round(erase * drawn)} of {drawn}; {low:.2f} to {high:.2f})"
    return erased, "" if kept is None else f"{kept:.3f} ({round(kept * others)} of {others})"


def shown(value: float | None) -> str:
    """A share, or nothing."""
    return "" if value is None else f"{value:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else OUT).read_text())))
