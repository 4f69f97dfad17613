"""Splits rows so that near-twins stay together: same prompt, same seed, or nearly the same picture."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Final

from dagkit.dataset.schema import SPLITS

RATIOS: Final = (0.7, 0.15, 0.15)
"""Shares of train, validation and test."""


def find_groups(keys: Sequence[str], links: Iterable[Mapping[str, Hashable]]) -> dict[str, str]:
    """Puts keys together that are linked, directly or through others.

    Args:
        keys: unique.
        links: each maps keys to a value; two keys with one value belong together. A key may be missing.

    Returns:
        Key -> name of its group, which is the smallest key in it.
    """
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for link in links:
        first: dict[Hashable, str] = {}
        for key in keys:
            if key not in link:
                continue
            a, b = sorted((root(key), root(first.setdefault(link[key], key))))
            parent[b] = a
    return {key: root(key) for key in keys}


def assign_splits(
    groups: Mapping[str, str],
    strata: Mapping[str, str],
    *,
    previous: Mapping[str, str] | None = None,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
) -> dict[str, str]:
    """Gives each group to one split, so that every stratum comes close to the ratios.

    Large groups are placed first; each goes where the sum of ``(count - target)^2 / target`` grows least. A group of
    which a row had a split before keeps it, so that test rows never become training rows when a dataset grows; where
    its rows had different ones, test wins over validation, and validation over train.

    Args:
        groups: key -> group.
        strata: key -> stratum, e.g. its label.
        previous: key -> split in an earlier version of the dataset.
        ratios: shares of train, validation and test, each > 0, summing to 1.
        seed: breaks ties between groups of one size.

    Returns:
        Key -> split.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for key, group in groups.items():
        members[group].append(key)
    totals = Counter(strata[key] for key in groups)
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    assigned: dict[str, str] = {}

    def place(group: str, split: str) -> None:
        assigned[group] = split
        counts[split].update(strata[key] for key in members[group])

    def growth(group: str, index: int) -> float:
        added = Counter(strata[key] for key in members[group])
        have = counts[SPLITS[index]]
        return sum(
            ((have[s] + n - ratios[index] * totals[s]) ** 2 - (have[s] - ratios[index] * totals[s]) ** 2)
            / (ratios[index] * totals[s])
            for s, n in added.items()
        )

    before = previous or {}
    for group, keys in members.items():
        kept = [before[key] for key in keys if before.get(key) in SPLITS]
        if kept:
            place(group, max(kept, key=SPLITS.index))
    open_groups = (group for group in members if group not in assigned)
    for group in sorted(open_groups, key=lambda name: (-len(members[name]), _draw(name, seed))):
        place(group, SPLITS[min(range(len(SPLITS)), key=lambda index: growth(group, index))])
    return {key: assigned[group] for key, group in groups.items()}


def _draw(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}-{name}".encode()).hexdigest()
