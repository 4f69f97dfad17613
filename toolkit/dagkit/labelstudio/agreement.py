"""How far annotators agree, from the rows that `dagkit pull` writes.

Outlines: mean IoU of two annotators' masks, over the tasks in which at least one of them marked something. Presence:
Cohen's kappa of a label being marked or not, over the tasks
on which both voted.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from dagkit.metrics import cohen_kappa

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_VOTES = ("accepted", "changed", "empty")


def agreement(rows: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Sums up the rows of ``annotations/``.

    Args:
        rows: each with ``key``, ``state``, ``answers``, ``pair_ious`` and ``reasons``.
        labels: of the concept.

    Returns:
        ``num_tasks``, ``states`` (state -> count), ``num_answers`` (annotator -> state -> count), ``pairs`` (each with
        ``annotators``, ``num_tasks`` on which both voted, ``num_marked``, ``mean_iou`` or None, ``kappa``: label ->
        value or None), ``mean_iou`` and ``kappa`` over all pairs (weighted with their tasks), ``disagreements`` (each
        with ``key``, ``reasons``, ``min_iou``).
    """
    rows = list(rows)
    states: dict[str, int] = {}
    num_answers: dict[str, dict[str, int]] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + 1
        for answer in row["answers"]:
            counts = num_answers.setdefault(answer["annotator"], {})
            counts[answer["state"]] = counts.get(answer["state"], 0) + 1
    pairs = [_pair(rows, first, second, labels) for first, second in combinations(sorted(num_answers), 2)]
    pairs = [pair for pair in pairs if pair["num_tasks"]]
    return {
        "num_tasks": len(rows),
        "states": dict(sorted(states.items())),
        "num_answers": {name: dict(sorted(counts.items())) for name, counts in sorted(num_answers.items())},
        "mean_iou": _mean([(pair["mean_iou"], pair["num_marked"]) for pair in pairs]),
        "kappa": {name: _mean([(pair["kappa"][name], pair["num_tasks"]) for pair in pairs]) for name in labels},
        "pairs": pairs,
        "disagreements": [
            {"key": row["key"], "reasons": row["reasons"], "min_iou": _lowest(row["pair_ious"])}
            for row in rows
            if row["reasons"]
        ],
    }


def _pair(rows: Sequence[Mapping[str, Any]], first: str, second: str, labels: Sequence[str]) -> dict[str, Any]:
    marks: dict[str, list[tuple[bool, bool]]] = {name: [] for name in labels}
    ious: list[float] = []
    num_tasks = 0
    for row in rows:
        votes = {answer["annotator"]: answer["labels"] for answer in row["answers"] if answer["state"] in _VOTES}
        if first not in votes or second not in votes:
            continue
        num_tasks += 1
        for name in labels:
            marks[name].append((name in votes[first], name in votes[second]))
        ious += [value for one, two, value in row["pair_ious"] if {one, two} == {first, second} and value is not None]
    return {
        "annotators": [first, second],
        "num_tasks": num_tasks,
        "num_marked": len(ious),
        "mean_iou": sum(ious) / len(ious) if ious else None,
        "kappa": {
            name: cohen_kappa([one for one, _ in pairs], [two for _, two in pairs]) for name, pairs in marks.items()
        },
    }


def _mean(values: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in values if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _lowest(pair_ious: Sequence[Sequence[Any]]) -> float | None:
    return min((value for _, _, value in pair_ious if value is not None), default=None)
