"""From detection maps to thresholds: when is a pixel the concept, and when is the guard sure about an image?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dagkit.guidance import score
from dagkit.metrics import iou
from dagkit.token import Thresholds

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

MARGIN: Final = 0.1
"""Added to the calibrated number of standard deviations, because held-out images are few."""

GAP_SHARE: Final = 0.5
"""How far into the gap between safe and unsafe images the threshold goes, where there is one."""

RARE: Final = 0.05
"""Share of unsafe images that may lie below the gap's upper end."""

SHIFTS: Final = tuple(0.5 * k for k in range(-12, 13))
"""Points of the calibration curve: logits by which the chosen thresholds of certainty are moved, 0 among them."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds with the figures they reach on the data they were chosen on.

    Attributes:
        thresholds: for a token.
        metrics: by name; ``validation_iou`` is the mean over knots up to 0.7.
        curve: the trade-off around the chosen rule, by rising x. A point is the rule with
            ``certain' = sigmoid(logit(certain) + x)`` at every knot (1 stays 1: there the guard waits); it has
            ``logit_shift`` (x), ``certain`` (those thresholds, one a knot), ``false_trigger_rate`` and
            ``detection_rate`` (shares of safe and of unsafe images on which that rule acts at any knot) and
            ``is_chosen``, True at x = 0, whose rates are ``validation_false_trigger_rate`` and
            ``validation_detection_rate``.
    """

    thresholds: Thresholds
    metrics: dict[str, float]
    curve: list[dict[str, Any]]


def calibrate(
    cams: Tensor, masks: Tensor, is_unsafe: Tensor, levels: Tensor, images: Tensor, max_false_trigger_rate: float
) -> Calibration:
    """Chooses thresholds on detection maps of held-out unsafe images and of as many safe ones as there are.

    ``highlight`` has the best IoU at each knot, ``edit`` is half of it. ``certain`` bounds the share of safe images on
    which the guard acts at ANY knot: with the mean m and deviation s of the safe images' score logits at a knot, the
    threshold is ``sigmoid(m + z s)``, with one z for all knots; the smallest that keeps the stated rate. Where 95 % of
    the unsafe images lie above that at every knot up to 0.7, it goes to the middle of the gap that is left, the same
    for all: safe samples may score higher than the few safe images here. At knots where unsafe images lie less than
    one deviation above safe ones nothing can be told yet, and the guard waits. It never falls with the noise level:
    noised renderings are vaguer than samples, on which a low threshold would fire.

    Args:
        cams: (P, H, W) in [0, 1].
        masks: (P, H, W) in [0, 1].
        is_unsafe: (P,) bool, with both kinds at every knot.
        levels: (P,) float64 noise levels, all in ``KNOTS``.
        images: (P,) int64, which image a pair shows.
        max_false_trigger_rate: share of safe images in [0, 1].
    """
    candidates = [round(0.02 * k, 2) for k in range(2, 48)]
    highlight: list[float] = []
    metrics: dict[str, float] = {}
    for knot in KNOTS:
        unsafe, safe = (levels == knot) & is_unsafe, (levels == knot) & ~is_unsafe
        values = [float(iou(cams[unsafe] >= value, masks[unsafe] >= 0.5).mean()) for value in candidates]
        best = candidates[int(np.argmax(values))]
        highlight.append(
            best if knot <= DECIDED else max(best, highlight[-1])
        )  # noised renderings are vaguer than samples
        metrics[f"validation_iou_t{1000 * knot:.0f}"] = max(values)
        metrics[f"validation_false_area_t{1000 * knot:.0f}"] = float((cams[safe] >= highlight[-1]).float().mean())
    metrics["validation_iou"] = float(
        np.mean([metrics[f"validation_iou_t{1000 * knot:.0f}"] for knot in KNOTS if knot <= DECIDED])
    )
    rules = [_Rule.of(cams, area, is_unsafe, levels, images, max_false_trigger_rate) for area in AREAS]
    rule = max(rules, key=lambda rule: rule.early_rate)
    metrics["validation_false_trigger_rate"], metrics["validation_detection_rate"] = rule.rates
    thresholds = Thresholds(
        levels=(*KNOTS, TOO_EARLY),
        highlight=(*highlight, highlight[-1]),
        edit=tuple(value / 2 for value in (*highlight, highlight[-1])),
        certain=(*rule.certain, 1.0),
        min_area=rule.area,
    )
    curve = []
    for shift in SHIFTS:
        moved = rule if shift == 0 else rule.moved(shift, is_unsafe, levels, images)
        rates = {"false_trigger_rate": moved.rates[0], "detection_rate": moved.rates[1]}
        curve.append({"logit_shift": shift, "certain": moved.certain, **rates, "is_chosen": shift == 0})
    return Calibration(thresholds, metrics, curve)


@dataclass(frozen=True)
class _Rule:
    """An image-level decision: score of an area, standardised at each knot by the safe images."""

    area: float
    certain: list[float]
    scores: Tensor  # of all pairs
    rates: tuple[float, float]  # of safe and of unsafe images on which the guard acts at any knot
    early_rate: float  # share of unsafe pairs at levels >= 0.5 that are recognised: what tells rules apart

    @classmethod
    def of(cls, cams: Tensor, area: float, is_unsafe: Tensor, levels: Tensor, images: Tensor, rate: float) -> _Rule:
        scores = score(cams, area).clamp(1e-4, 1 - 1e-4)
        logits = scores.logit()
        standardised = torch.full_like(logits, -math.inf)
        statistics: list[tuple[float, float] | None] = []
        for knot in KNOTS:
            here = levels == knot
            safe = logits[here & ~is_unsafe]
            mean, spread = float(safe.mean()), max(float(safe.std(correction=0)), 0.1)
            if float(logits[here & is_unsafe].mean()) < mean + spread:
                statistics.append(None)
                continue
            statistics.append((mean, spread))
            standardised[here] = (logits[here] - mean) / spread
        peaks = _peaks(standardised, images, ~is_unsafe)
        allowed = math.floor(rate * len(peaks))  # of the safe images, this many may fire
        deviations = float(peaks.sort(descending=True).values[min(allowed, len(peaks) - 1)]) + MARGIN
        limits = [1.0 if found is None else _sigmoid(found[0] + deviations * found[1]) for found in statistics]
        certain = np.maximum.accumulate(limits)
        told = np.array([found is not None for found in statistics]) & (certain < 1)
        if told.any():
            lower = torch.tensor(float(certain[told].max())).logit()
            decided = [knot for knot, is_told in zip(KNOTS, told, strict=True) if is_told and knot <= DECIDED]
            quantiles = [logits[is_unsafe & (levels == knot)].quantile(RARE) for knot in decided]
            upper = min(quantiles, default=lower)
            middle = float((lower + GAP_SHARE * (upper - lower).clamp(min=0)).sigmoid())
            certain[told] = np.maximum(certain[told], middle)
        return cls.measured(area, certain.tolist(), scores, is_unsafe, levels, images)

    @classmethod
    def measured(
        cls, area: float, certain: list[float], scores: Tensor, is_unsafe: Tensor, levels: Tensor, images: Tensor
    ) -> _Rule:
        """The rule ``score >= certain``, with what it does on the data."""
        is_sure = scores >= torch.from_numpy(np.interp(levels.numpy(), KNOTS, certain)).to(scores)
        acts = [float(_peaks(is_sure.float(), images, kind).mean()) for kind in (~is_unsafe, is_unsafe)]
        early = float(is_sure[is_unsafe & (levels >= EARLY)].float().mean())
        return cls(area, certain, scores, (acts[0], acts[1]), early)

    def moved(self, shift: float, is_unsafe: Tensor, levels: Tensor, images: Tensor) -> _Rule:
        """The same rule with thresholds moved by ``shift`` logits; those at 1 stay there."""
        certain = [limit if limit >= 1 else _sigmoid(math.log(limit / (1 - limit)) + shift) for limit in self.certain]
        return self.measured(self.area, certain, self.scores, is_unsafe, levels, images)


def _peaks(values: Tensor, images: Tensor, kind: Tensor) -> Tensor:
    """Largest value of each image of a kind over its pairs."""
    found, position = torch.unique(images[kind], return_inverse=True)
    return values.new_full((len(found),), -math.inf).scatter_reduce(0, position, values[kind], "amax")


def summary(calibration: Calibration) -> dict[str, Any]:
    """Metrics and curve together, for the token's record."""
    return {**calibration.metrics, "calibration_curve": calibration.curve}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
