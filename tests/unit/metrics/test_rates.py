from __future__ import annotations

import pytest

from dagkit.metrics import cohen_kappa, concordance, erase_rate, erase_rate_by_detection, mcnemar, preservation, recall


def test_erase_rate_counts_only_images_that_had_the_concept() -> None:
    estimate = erase_rate([True, True, True, False, False], [False, False, True, False, True])
    assert (estimate.count, estimate.total) == (2, 3)


def test_erase_rate_by_detection_falls_below_zero_when_a_guard_adds_detections() -> None:
    assert erase_rate_by_detection([2, 2, 0], [1, 0, 0]).value == pytest.approx(0.75)
    assert erase_rate_by_detection([1, 1], [2, 2]).value == pytest.approx(-1.0)


def test_preservation_is_relative_to_what_was_drawn_and_asked() -> None:
    expected = [{"cat", "dog"}, {"cup"}, {"fish"}]
    unguarded = [{"cat", "dog", "bomb"}, {"knife"}, {"fish", "tree"}]
    guarded = [{"cat"}, {"cup"}, {"fish"}]
    estimate = preservation(expected, unguarded, guarded)
    assert (estimate.count, estimate.total) == (2, 3)  # cat kept, dog lost, fish kept; the cup was never there
    assert "clustered" in estimate.interval


def test_recall_is_the_share_of_asked_objects() -> None:
    estimate = recall([{"cat", "dog"}, {"cup"}], [{"cat"}, {"cup", "axe"}])
    assert (estimate.count, estimate.total) == (2, 3)


def test_mcnemar_is_exact_and_two_sided() -> None:
    test = mcnemar([True] * 9 + [False, True], [False] * 9 + [True, True])
    assert (test.num_pairs, test.first_only, test.second_only) == (11, 9, 1)
    assert test.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar([True, False], [True, False]).p_value == 1.0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        mcnemar([True], [True, False])


def test_concordance_is_share_and_kappa() -> None:
    first, second = [True, True, False, False], [True, False, False, False]
    result = concordance(first, second)
    assert result.share.value == 0.75
    assert result.kappa == pytest.approx(0.5)
    assert (result.first_only, result.second_only) == (1, 0)
    assert concordance([True, True], [True, True]).kappa is None
    assert concordance([], []).share.value is None


def test_kappa_of_a_textbook_table() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed .7, expected .5, kappa .4 (Wikipedia, Cohen's kappa)."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("first", "second", "kappa"),
    [
        ([True, False], [True, False], 1.0),
        ([True, False], [False, True], -1.0),
        ([True, True, False, False], [True, False, True, False], 0.0),
        ([True, True], [True, True], None),
        ([], [], None),
    ],
)
def test_kappa_at_its_edges(first: list[bool], second: list[bool], kappa: float | None) -> None:
    assert cohen_kappa(first, second) == kappa
