"""The figures of a report as a flat table."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FIELDS = ("section", "kind", "column", "figure", "value", "low", "high", "count", "total", "interval")


def to_csv(figures: Mapping[str, Any]) -> str:
    """One line an estimate: ``section, kind, column, figure, value, low, high, count, total, interval``.

    Args:
        figures: as `dagkit.evaluation.compute` returns them.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_lines(figures))
    return buffer.getvalue()


def _lines(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, gate in figures["gate"].items():
        for name in ("concept", "keep"):
            yield {"section": "gate", "kind": kind, "column": "none", "figure": name, **gate[name]}
    for kind, columns in figures["results"].items():
        for column, result in columns.items():
            for name, value in result.items():
                if "interval" in value:
                    yield {"section": "results", "kind": kind, "column": column, "figure": name, **value}
            for other, test in result.get("paired", {}).items():
                yield {
                    "section": "paired",
                    "kind": kind,
                    "column": column,
                    "figure": f"p against {other}",
                    "value": test["p_value"],
                    "count": test["first_only"] + test["second_only"],
                    "total": test["num_pairs"],
                    "interval": "McNemar, exact",
                }
    for member, columns in figures.get("members", {}).items():
        for column, result in columns.items():
            for name, value in result.items():
                yield {"section": "members", "kind": member, "column": column, "figure": name, **value}
    for column, cost in figures["cost"].items():
        for name, value in cost.items():
            if "interval" in value:
                yield {"section": "cost", "kind": "all", "column": column, "figure": name, **value}
        for kind, value in cost["relative_by_kind"].items():
            yield {"section": "cost", "kind": kind, "column": column, "figure": "relative", **value}
    for kind, columns in figures["sweep"].items():
        for column, points in columns.items():
            for point in points:
                name = f"erase_rate at judge threshold {point['threshold']}"
                yield {"section": "sweep", "kind": kind, "column": column, "figure": name, **point}
