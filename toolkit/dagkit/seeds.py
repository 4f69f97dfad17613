"""Seeds of images: those of candidates, of tuning and of an evaluation never meet, whatever ``--seed`` is.

    [0, 1e9)         candidates of the seeds 0 to 999
    [1e9, 2e9)       evaluations of the seeds 0 to 999
    [2e9, 2**61)     candidates of larger seeds
    [2**61, 2**62)   tuning
    [2**62, 2**63)   evaluations of larger seeds

Every seed has a million numbers in its kind's ranges, so that two seeds share no noise either.
"""

from __future__ import annotations

from typing import Final

MAX_SEED: Final = 2**31 - 1
NUM_IMAGES: Final = 1_000_000
"""Images that one seed is enough for."""

_NUM_SMALL: Final = 1000
FIRST_EVALUATION_SEED: Final = _NUM_SMALL * NUM_IMAGES
_TUNING: Final = 2**61
_LARGE_EVALUATION: Final = 2**62


def candidate_seed(seed: int, index: int) -> int:
    """Of the noise of a candidate.

    Args:
        seed: of the run, in [0, 2**31).
        index: of the image, in [0, 1e6).

    Raises:
        ValueError: one of them is out of its range.
    """
    first = _first(seed, index)
    return first + index if seed < _NUM_SMALL else first + FIRST_EVALUATION_SEED + index


def evaluation_seed(seed: int, index: int) -> int:
    """Of the noise of an image of an evaluation; arguments and errors as of `candidate_seed`."""
    first = _first(seed, index)
    return first + index + (FIRST_EVALUATION_SEED if seed < _NUM_SMALL else _LARGE_EVALUATION)


def tuning_seed(seed: int, index: int) -> int:
    """Of the noise of a picture by which a guard is tuned; arguments and errors as of `candidate_seed`."""
    return _TUNING + _first(seed, index) + index


def imported_seed(digest: str) -> int:
    """Of the noise in which a picture is looked at that no base model drew: its own, the same every time.

    Args:
        digest: hex digits of the picture's hash, at least 16.
    """
    low = _NUM_SMALL * NUM_IMAGES * 2
    return low + int(digest[:16], 16) % (_TUNING - low)


def _first(seed: int, index: int) -> int:
    if not 0 <= seed <= MAX_SEED or not 0 <= index < NUM_IMAGES:
        raise ValueError(
            f"expected a seed in [0, {MAX_SEED:,}] and fewer than {NUM_IMAGES:,} images, but got {seed} and "
            f"image {index}."
        )
    return seed * NUM_IMAGES
