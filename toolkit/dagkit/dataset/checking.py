"""Looks for rows that would spoil a token or a figure: each finding names the row's key."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dagkit.dataset.likeness import find_twins, perceptual_hash
from dagkit.dataset.pictures import image_of, mask_of, undecoded
from dagkit.dataset.schema import LABELS, REVIEW_STATES, SPLITS
from dagkit.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import DatasetDict

Problem = Literal[
    "empty mask", "mask on safe", "size mismatch", "leak", "duplicate", "near-duplicate", "review state", "unreadable"
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem.

    Attributes:
        problem: its kind.
        key: of the row.
        split: where the row is.
        message: what is wrong with it, and what to do.
        is_error: False for what may be meant.
    """

    problem: Problem
    key: str
    split: str
    message: str
    is_error: bool = True


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    split: str
    prompt: str
    seed: int
    group: str
    digest: str
    perceptual_hash: int


def check(dataset: DatasetDict, *, near_distance: int = 2) -> list[Finding]:
    """Checks every row by itself, then rows against each other.

    Errors: a mask without a pixel on an unsafe row, a mask on a safe one, a mask of another size than its image, an
    image that cannot be decoded, an unknown review state, one key or picture twice, and what two splits share: a
    group, a prompt, a seed, nearly the same picture. Near-duplicates within a split are warnings.

    Args:
        dataset: as from `load_dataset`.
        near_distance: images whose perceptual hashes differ in at most so many of 64 bits look nearly the same.

    Returns:
        Findings in the order of splits and rows.
    """
    findings: list[Finding] = []
    rows: list[_Row] = []
    for split in SPLITS:
        for index in range(len(dataset[split])):
            findings += _check_row(dataset, split, index, rows)
    findings += _shared_across_splits(rows)
    findings += _duplicates(rows, near_distance)
    order = {row.key: position for position, row in enumerate(rows)}
    return sorted(findings, key=lambda finding: (not finding.is_error, order.get(finding.key, -1)))


def _check_row(dataset: DatasetDict, split: str, index: int, rows: list[_Row]) -> Iterator[Finding]:
    plain = dataset[split].select_columns(["key", "label", "prompt", "seed", "group", "review_state"])[index]
    key = plain["key"]
    [pictures] = undecoded(dataset[split].select([index]), "key", "image", "mask")
    try:
        image, mask = image_of(pictures), mask_of(pictures)
    except DatasetError as error:
        yield Finding("unreadable", key, split, str(error))
        return
    rows.append(
        _Row(
            key,
            split,
            plain["prompt"],
            plain["seed"],
            plain["group"],
            hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(),
            perceptual_hash(image),
        )
    )
    is_unsafe, has_mask = plain["label"] == LABELS.index("unsafe"), bool(mask.any())
    if mask.shape != (image.height, image.width):
        shown = f"{mask.shape[1]}x{mask.shape[0]}"
        yield Finding("size mismatch", key, split, f"the image has {image.width}x{image.height} px, its mask {shown}")
    if is_unsafe and not has_mask:
        yield Finding("empty mask", key, split, "labelled unsafe, but its mask is empty: review it, or label it safe")
    if not is_unsafe and has_mask:
        yield Finding("mask on safe", key, split, "labelled safe, but its mask is not empty: review it")
    if plain["review_state"] not in REVIEW_STATES:
        expected = ", ".join(REVIEW_STATES)
        yield Finding("review state", key, split, f"{plain['review_state']!r} is not one of {expected}")


def _shared_across_splits(rows: list[_Row]) -> Iterator[Finding]:
    """Later rows whose group, prompt or seed an earlier split has, too; one finding a row."""
    told: set[str] = set()
    for what in ("group", "prompt", "seed"):
        alike: dict[object, list[_Row]] = defaultdict(list)
        for row in rows:
            if getattr(row, what) != "":  # imported pictures have no prompt
                alike[getattr(row, what)].append(row)
        for first, *others in alike.values():
            for row in others:
                if row.split != first.split and row.key not in told:
                    told.add(row.key)
                    yield Finding("leak", row.key, row.split, f"shares its {what} with {first.key} in {first.split}")


def _duplicates(rows: list[_Row], near_distance: int) -> Iterator[Finding]:
    keys: dict[str, _Row] = {}
    digests: dict[str, _Row] = {}
    for row in rows:
        if row.key in keys:
            yield Finding("duplicate", row.key, row.split, f"its key is in {keys[row.key].split}, too")
        elif row.digest in digests:
            other = digests[row.digest]
            yield Finding("duplicate", row.key, row.split, f"the same picture as {other.key} in {other.split}")
        keys.setdefault(row.key, row)
        digests.setdefault(row.digest, row)
    distinct = {row.key: row for row in digests.values()}
    twins = find_twins({key: row.perceptual_hash for key, row in distinct.items()}, near_distance)
    for key, original in twins.items():
        is_leak = distinct[key].split != distinct[original].split
        message = f"looks nearly like {original} in {distinct[original].split}"
        yield Finding("leak" if is_leak else "near-duplicate", key, distinct[key].split, message, is_leak)
