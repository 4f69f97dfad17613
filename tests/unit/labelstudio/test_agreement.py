"""Agreement of annotators, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from dagkit.labelstudio.agreement import agreement


def row(key: str, answers: dict[str, tuple[str, list[str]]], pair_ious: list, reasons: list[str] | None = None) -> dict:
    return {
        "key": key,
        "state": "changed",
        "answers": [{"annotator": who, "state": state, "labels": labels} for who, (state, labels) in answers.items()],
        "pair_ious": pair_ious,
        "reasons": reasons or [],
    }


def test_agreement_of_three_annotators() -> None:
    rows = [
        row("1", {"a": ("changed", ["x"]), "b": ("accepted", ["x"])}, [["a", "b", 0.5]], ["outline"]),
        row("2", {"a": ("changed", ["x"]), "b": ("empty", [])}, [["a", "b", 0.0]], ["presence"]),
        row("3", {"a": ("empty", []), "b": ("empty", [])}, [["a", "b", None]]),
        row("4", {"a": ("skipped", []), "b": ("changed", ["x"])}, []),
        row("5", {"b": ("changed", ["x"]), "c": ("changed", ["x", "y"])}, [["b", "c", 0.9]]),
        row("6", {"c": ("cannot_tell", [])}, []),
    ]
    found = agreement(rows, ["x", "y"])
    assert found["num_tasks"] == 6
    assert found["states"] == {"changed": 6}
    assert found["num_answers"] == {
        "a": {"changed": 2, "empty": 1, "skipped": 1},
        "b": {"accepted": 1, "changed": 2, "empty": 2},
        "c": {"cannot_tell": 1, "changed": 1},
    }
    ab, bc = found["pairs"]
    assert (ab["annotators"], ab["num_tasks"], ab["num_marked"], ab["mean_iou"]) == (["a", "b"], 3, 2, 0.25)
    assert ab["kappa"] == {"x": pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9)), "y": None}
    assert (bc["annotators"], bc["num_tasks"], bc["mean_iou"], bc["kappa"]) == (
        ["b", "c"],
        1,
        0.9,
        {"x": None, "y": 0.0},
    )
    assert found["mean_iou"] == pytest.approx((0.5 + 0.0 + 0.9) / 3)
    assert found["kappa"] == {"x": pytest.approx(0.4), "y": 0.0}
    assert found["disagreements"] == [
        {"key": "1", "reasons": ["outline"], "min_iou": 0.5},
        {"key": "2", "reasons": ["presence"], "min_iou": 0.0},
    ]


def test_no_rows() -> None:
    found = agreement([], ["x"])
    assert found == {
        "num_tasks": 0,
        "states": {},
        "num_answers": {},
        "mean_iou": None,
        "kappa": {"x": None},
        "pairs": [],
        "disagreements": [],
    }
