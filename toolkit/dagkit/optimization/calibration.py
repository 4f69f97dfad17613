"""From detection maps to thresholds: when is a pixel the concept, and when is the guard sure about an image?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dagkit.guidance import score
from dagkit.metrics import iou
from dagkit.token import Guidance, Thresholds

KNOTS: Final = (0.1, 0.3, 0.5, 0.7, 0.85)
"""Noise levels at which thresholds are calibrated."""

TOO_EARLY: Final = 0.93
"""From here on the guard never acts: no mode is decided, and what the queries tell comes from the prompt."""

AREAS: Final = (0.012, 0.02, 0.032, 0.048)
"""Candidates for the share of the image that must be highlighted before the guard acts."""

EARLY: Final = 0.5
"""Noise level from which on a rule is judged: there the layout is decided, so recognising the concept matters most."""

DECIDED: Final = 0.7
"""Noise level up to which maps are sharp: the mean IoU counts these knots, and unsafe images should be told there."""

ACTING: Final = Guidance().max_level
"""Noise level from which down a guard acts; what it would see before is no trigger."""

AS_GOOD: Final = 0.97
"""Share of the best IoU from which a threshold of highlight is as good as the best: IoU hardly changes around it."""

HIGHEST: Final = 0.5
"""No threshold of highlight need be higher: there a pixel is the concept as likely as not."""

EDIT_SHARE: Final = 0.6
"""The threshold of editing, as a share of that of highlight."""

MARGIN: Final = 0.1
"""Logits by which a threshold stays above safe images, because they are few."""

GAP_SHARE: Final = 0.7
"""How far into the gap between safe images and the weakest slice the threshold goes, where there is one: nearer to the
slice, for there are more safe things than the safe images show."""

CLEAR: Final = 1.0
"""Logits by which the weakest slice must lie above the safe images at a knot before certainty stays below it there."""

RARE: Final = 0.05
"""Share of a slice's images that may lie below the gap's upper end."""

MOST_OVERLAPPING: Final = 3
"""Safe images that are named for a slice that they overlap with."""

SHIFTS: Final = tuple(0.5 * k for k in range(-12, 13))
"""Points of the calibration curve: logits by which the chosen thresholds of certainty are moved, 0 among them."""


@dataclass(frozen=True)
class Slice:
    """How well a rule sees the images of one member of the concept, or of one cluster.

    Attributes:
        count: images, those that were learned from included.
        num_held_out: of them, kept apart from training.
        iou: mean at the thresholds of highlight, over knots up to 0.7.
        detection_rate: share of the images on which the rule acts at any knot.
        early_rate: share on which it acts at 0.5 at the latest, while most is still to be drawn.
        overlaps: up to three safe images that score higher than the slice's weakest ones, the highest first; empty
            where there is a gap between them.
    """

    count: int
    num_held_out: int
    iou: float
    detection_rate: float
    early_rate: float
    overlaps: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """Thresholds with the figures they reach on the data they were chosen on.

    Attributes:
        thresholds: for a token.
        metrics: by name; ``validation_iou`` is the mean over knots up to 0.7.
        curve: the trade-off around the chosen rule, by rising x. A point is the rule with
            ``certain' = sigmoid(logit(certain) + x)`` at every knot (1 stays 1: there the guard waits); it has
            ``logit_shift`` (x), ``certain`` (those thresholds, one a knot), ``false_trigger_rate`` and
            ``detection_rate`` (shares of safe and of held-out unsafe images on which that rule acts at any knot from
            ``Guidance.max_level`` down) and ``is_chosen``, True at x = 0, whose rates are
            ``validation_false_trigger_rate`` and ``validation_detection_rate``.
        slices: by name, the weakest first; empty where no image belongs to one.
    """

    thresholds: Thresholds
    metrics: dict[str, float]
    curve: list[dict[str, Any]]
    slices: dict[str, Slice]


def calibrate(
    cams: Tensor,
    masks: Tensor,
    is_unsafe: Tensor,
    levels: Tensor,
    images: Tensor,
    max_false_trigger_rate: float,
    *,
    slices: Sequence[str | None] = (),
    num_held_out: int | None = None,
) -> Calibration:
    """Chooses thresholds on detection maps of unsafe images and of as many safe ones as there are.

    ``highlight`` is, of the thresholds with nearly the best IoU at a knot, the highest up to 0.5, so that other objects
    are left alone; ``edit`` is 0.6 of it. ``certain`` bounds the share of safe images on which the guard acts at ANY
    knot from ``Guidance.max_level`` down: as many as that allows, those with the highest scores, are left out, and at
    each knot the threshold lies above all others, well into the gap between them and the weakest slice. That is the one
    of which the weakest images, a twentieth, score lowest: at their better one of the knots 0.5 and 0.7, for seen then
    they are seen in time, and at any knot at which they are clear of the safe images. Where no gap is left the
    threshold stays just above the safe images, and the slice says which of them it overlaps with. At knots where unsafe
    images lie less than one deviation above safe ones nothing can be told yet, and the guard waits. ``certain`` never
    falls with the noise level: noised renderings are vaguer than samples, on which a low threshold would fire.

    Args:
        cams: (P, H, W) in [0, 1].
        masks: (P, H, W) in [0, 1].
        is_unsafe: (P,) bool, with both kinds at every knot.
        levels: (P,) float64 noise levels, all in ``KNOTS``.
        images: (P,) int64, which image a pair shows, numbered from 0.
        max_false_trigger_rate: share of safe images in [0, 1].
        slices: the slice of each image, None for one that belongs to none; all unsafe images are one slice where not
            given, or where none belongs to any.
        num_held_out: images before this number were kept apart from training, unsafe ones among them: the figures of
            unsafe images and ``highlight`` come from those; all where not given.
    """
    is_held_out = images < (len(images) if num_held_out is None else num_held_out)
    highlight: list[float] = []
    metrics: dict[str, float] = {}
    for knot in KNOTS:
        unsafe, safe = (levels == knot) & is_unsafe & is_held_out, (levels == knot) & ~is_unsafe
        best = _highlight(cams[unsafe], masks[unsafe])
        highlight.append(
            best if knot <= DECIDED else max(best, highlight[-1])
        )  # noised renderings are vaguer than samples
        overlap = iou(cams[unsafe] >= highlight[-1], masks[unsafe] >= 0.5)
        metrics[f"validation_iou_t{1000 * knot:.0f}"] = float(overlap.mean())
        metrics[f"validation_false_area_t{1000 * knot:.0f}"] = float((cams[safe] >= highlight[-1]).float().mean())
    metrics["validation_iou"] = float(
        np.mean([metrics[f"validation_iou_t{1000 * knot:.0f}"] for knot in KNOTS if knot <= DECIDED])
    )
    data = _Data(is_unsafe, levels, images, is_held_out, _members(slices, is_unsafe, images))
    rules = [_Rule.of(score(cams, area), area, data, max_false_trigger_rate) for area in AREAS]
    rule = max(rules, key=lambda rule: (min(rule.early_rates.values()), sum(rule.early_rates.values()), -rule.rates[0]))
    metrics["validation_false_trigger_rate"], metrics["validation_detection_rate"] = rule.rates
    thresholds = Thresholds(
        levels=(*KNOTS, TOO_EARLY),
        highlight=(*highlight, highlight[-1]),
        edit=tuple(EDIT_SHARE * value for value in (*highlight, highlight[-1])),
        certain=(*rule.certain, 1.0),
        min_area=rule.area,
    )
    curve = []
    for shift in SHIFTS:
        moved = rule if shift == 0 else rule.moved(shift, data)
        rates = {"false_trigger_rate": moved.rates[0], "detection_rate": moved.rates[1]}
        curve.append({"logit_shift": shift, "certain": moved.certain, **rates, "is_chosen": shift == 0})
    limits = torch.from_numpy(np.interp(levels.numpy(), KNOTS, highlight)).to(cams)[:, None, None]
    overlap = iou(cams >= limits, masks >= 0.5)
    found = {name: rule.slice_of(name, overlap, data) for name in data.members if name}
    weakest_first = sorted(found.items(), key=lambda one: (one[1].early_rate, one[1].detection_rate, one[1].iou))
    return Calibration(thresholds, metrics, curve, dict(weakest_first))


@dataclass(frozen=True)
class _Data:
    """What is known of all pairs, whatever their maps are; see ``calibrate``."""

    is_unsafe: Tensor
    levels: Tensor
    images: Tensor
    is_held_out: Tensor
    members: dict[str, Tensor]  # name of a slice -> (P,) bool


@dataclass(frozen=True)
class _Rule:
    """An image-level decision by the score of an area."""

    area: float
    certain: list[float]
    scores: Tensor  # of all pairs
    rates: tuple[float, float]  # of safe and of held-out unsafe images on which the guard acts at any knot
    early_rates: dict[str, float]  # of each slice's images, on which it acts in time: what tells rules apart

    @classmethod
    def of(cls, scores: Tensor, area: float, data: _Data, rate: float) -> _Rule:
        logits = _logits(scores)
        standardised = torch.full_like(logits, -math.inf)
        told = []
        for knot in KNOTS:
            here = data.levels == knot
            safe = logits[here & ~data.is_unsafe]
            mean, spread = float(safe.mean()), max(float(safe.std(correction=0)), 0.1)
            told.append(float(logits[here & data.is_unsafe].mean()) >= mean + spread)
            if told[-1] and knot <= ACTING:
                standardised[here] = (logits[here] - mean) / spread
        kept = _kept_silent(standardised, data, rate)
        ceilings = [
            float(logits[kept & (data.levels == knot)].max()) + MARGIN if is_told else -math.inf
            for knot, is_told in zip(KNOTS, told, strict=True)
        ]
        lower = np.maximum.accumulate(ceilings).tolist()
        upper = _reached(logits, data, lower[KNOTS.index(DECIDED)] + CLEAR)
        certain = [
            _sigmoid(low + GAP_SHARE * max(upper - low, 0)) if is_told else 1.0
            for low, is_told in zip(lower, told, strict=True)
        ]
        return cls.measured(area, np.maximum.accumulate(certain).tolist(), scores, data)

    @classmethod
    def measured(cls, area: float, certain: list[float], scores: Tensor, data: _Data) -> _Rule:
        """The rule ``score >= certain``, with what it does on the data."""
        is_sure = _is_sure(scores, certain, data).float()
        kinds = (~data.is_unsafe, data.is_unsafe & data.is_held_out)
        acts = [float(_peaks(is_sure, data.images, kind).mean()) for kind in kinds]
        in_time = data.levels >= EARLY
        early = {
            name: float(_peaks(is_sure, data.images, here & in_time).mean()) for name, here in data.members.items()
        }
        return cls(area, certain, scores, (acts[0], acts[1]), early)

    def moved(self, shift: float, data: _Data) -> _Rule:
        """The same rule with thresholds moved by ``shift`` logits; those at 1 stay there."""
        certain = [limit if limit >= 1 else _sigmoid(math.log(limit / (1 - limit)) + shift) for limit in self.certain]
        return self.measured(self.area, certain, self.scores, data)

    def slice_of(self, name: str, overlap: Tensor, data: _Data) -> Slice:
        """What the rule does on the images of a slice; ``overlap`` is the IoU of each pair."""
        here, logits = data.members[name], _logits(self.scores)
        in_time = (data.levels >= EARLY) & (data.levels <= DECIDED)
        safe = torch.unique(data.images[~data.is_unsafe])
        peaks = _peaks(logits, data.images, ~data.is_unsafe & in_time)
        order = [int(row) for row in peaks.argsort(descending=True)[:MOST_OVERLAPPING]]
        floor = _weakest(logits, data, name)
        return Slice(
            count=len(torch.unique(data.images[here])),
            num_held_out=len(torch.unique(data.images[here & data.is_held_out])),
            iou=float(overlap[here & (data.levels <= DECIDED)].mean()),
            detection_rate=float(_peaks(_is_sure(self.scores, self.certain, data).float(), data.images, here).mean()),
            early_rate=self.early_rates[name],
            overlaps=tuple(int(safe[row]) for row in order if peaks[row] > floor),
        )


def _highlight(cams: Tensor, masks: Tensor) -> float:
    """The threshold of highlight at one knot: the highest up to 0.5 whose IoU is at least 0.97 of the best one.

    IoU hardly changes around its best threshold, but what is highlighted of other objects does, and is drawn anew.

    Args:
        cams: (N, H, W) maps of unsafe images.
        masks: (N, H, W) in [0, 1].
    """
    candidates = [round(0.02 * k, 2) for k in range(2, 48)]
    overlaps = [float(iou(cams >= value, masks >= 0.5).mean()) for value in candidates]
    as_good = [value for value, one in zip(candidates, overlaps, strict=True) if one >= AS_GOOD * max(overlaps)]
    return max((value for value in as_good if value <= HIGHEST), default=as_good[0])


def _members(slices: Sequence[str | None], is_unsafe: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Pairs of each slice, by name; those of all unsafe images where there are no slices."""
    names = sorted({slices[image] or "" for image in torch.unique(images[is_unsafe])} - {""}) if slices else []
    rows = torch.tensor([names.index(name) if name in names else -1 for name in slices])
    return {name: is_unsafe & (rows[images] == row) for row, name in enumerate(names)} or {"": is_unsafe}


def _is_sure(scores: Tensor, certain: Sequence[float], data: _Data) -> Tensor:
    """(P,) bool, whether the guard acts on a pair."""
    limits = torch.from_numpy(np.interp(data.levels.numpy(), KNOTS, certain)).to(scores)
    return (scores >= limits) & (data.levels <= ACTING)


def _kept_silent(standardised: Tensor, data: _Data, rate: float) -> Tensor:
    """(P,) bool, the safe images on which the guard must not act: all but those with the highest scores, a share."""
    safe = torch.unique(data.images[~data.is_unsafe])
    order = _peaks(standardised, data.images, ~data.is_unsafe).argsort(stable=True)
    allowed = min(math.floor(rate * len(safe)), len(safe) - 1)
    return torch.isin(data.images, safe[order[: len(safe) - allowed]])


def _reached(logits: Tensor, data: _Data, clear: float) -> float:
    """What the weakest slice reaches in time, and at each knot at which it is clear of the safe images as well."""
    at_knots = [
        min(float(logits[here & (data.levels == knot)].quantile(RARE)) for here in data.members.values())
        for knot in KNOTS
        if knot <= DECIDED
    ]
    in_time = min(_weakest(logits, data, name) for name in data.members)
    return min([in_time, *(one for one in at_knots if one >= clear)])


def _weakest(logits: Tensor, data: _Data, name: str) -> float:
    """What all but a few images of a slice reach at the better one of the knots at which they are seen in time."""
    in_time = (data.levels >= EARLY) & (data.levels <= DECIDED)
    return float(_peaks(logits, data.images, data.members[name] & in_time).quantile(RARE))


def _logits(scores: Tensor) -> Tensor:
    return scores.clamp(1e-4, 1 - 1e-4).logit()


def _peaks(values: Tensor, images: Tensor, kind: Tensor) -> Tensor:
    """Largest value of each image of a kind over its pairs."""
    found, position = torch.unique(images[kind], return_inverse=True)
    return values.new_full((len(found),), -math.inf).scatter_reduce(0, position, values[kind], "amax")


def summary(calibration: Calibration) -> dict[str, Any]:
    """Metrics, curve and slices together, for the token's record; which images a slice overlaps with stays out."""
    slices = {name: asdict(one) for name, one in calibration.slices.items()}
    for one in slices.values():
        del one["overlaps"]
    return {**calibration.metrics, "calibration_curve": calibration.curve, "slices": slices}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
