"""Detection scored by itself: a token's maps against masks that people have checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from dagkit import guidance
from dagkit.attention import resize
from dagkit.guard.dag import is_sure
from dagkit.metrics import detection_scores
from dagkit.models.sites import Detector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken, TokenRecord

LEVELS: Final = (0.9, 0.7, 0.5, 0.3, 0.1)


def score_detection(
    base_model: BaseModel,
    token: GuidelineToken,
    images: Sequence[Any],
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Noises annotated images to several levels and compares the token's detection maps with the masks.

    A pixel counts as detected from the token's own highlight threshold on at that level. Whether a guard would act in
    an image is what `dagkit.guard.Guard` itself asks: is it certain, at a noise level at which it acts at all? One
    denoiser call a level.

    Args:
        base_model: the token's.
        token: what detects.
        images: rows with ``image`` (RGB), ``mask`` ((H, W) bool; empty on a safe image) and ``prompt``, of one size.
        levels: noise levels in [0, 1].
        seed: of the noise.
        batch_size: images a denoiser call.

    Returns:
        One dictionary a level: ``level`` and the fields of `dagkit.metrics.DetectionScores`.
    """
    sites = base_model.family.sites(base_model.pipe, token.record.layers)
    detector = Detector(sites, token.sequence, token.num_tokens, token.head_weights)
    masks = [np.asarray(one.mask, bool) for one in images]
    rows = []
    for level in levels:
        maps: list[NDArray[np.float32]] = []
        acts: list[bool] = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            cam = _cam(base_model, detector, batch, level, seed + start)
            acts += _acts(token.record, cam, level)
            width, height = batch[0].image.size
            maps += [np.asarray(one, np.float32) for one in resize(cam, (height, width)).cpu().numpy()]
        threshold = token.record.thresholds.at(level)[1]
        rows.append({"level": level, **detection_scores(maps, masks, threshold, acts=acts).to_json()})
    return rows


def _acts(record: TokenRecord, cam: Tensor, level: float) -> list[bool]:
    """Whether a guard with the token's own constants would act on each map, had it not acted before."""
    limits, own = record.thresholds, record.guidance
    rules = guidance.FORMS[own.form]
    if rules.is_timed and not guidance.is_acting(level, (), own.max_level):
        return [False] * len(cam)
    sure: list[bool] = is_sure(
        rules, limits, level, cam.flatten(1).amax(1), guidance.score(cam, limits.min_area)
    ).tolist()
    return sure


@torch.no_grad()
def _cam(base_model: BaseModel, detector: Detector, batch: Sequence[Any], level: float, seed: int) -> Tensor:
    """(B, H, W) detection maps at the size of the latents, as a guard has them."""
    latents = base_model.latents([one.image for one in batch])
    levels = torch.full((len(batch),), level, dtype=torch.float64)
    condition = base_model.encode([one.prompt for one in batch])
    features = base_model.features(latents, levels, condition, seed=seed, sites=detector.sites)
    return detector(features, (latents.shape[-2], latents.shape[-1]))
