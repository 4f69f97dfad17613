"""Detection scored by itself: a token's maps against masks that people have checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from dagkit.attention import cross_attention_map, project_keys, resize
from dagkit.metrics import detection_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken

TIMESTEPS: Final = (900, 700, 500, 300, 100)


def score_detection(
    base_model: BaseModel,
    token: GuidelineToken,
    images: Sequence[Any],
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Noises annotated images to several timesteps and compares the token's detection maps with the masks.

    A pixel counts as detected from the token's own highlight threshold on at that timestep; a safe image counts as
    triggered from its smallest area on. So the figures are those of the guard, one denoiser call a timestep.

    Args:
        base_model: the token's.
        token: what detects.
        images: rows with ``image`` (RGB), ``mask`` ((H, W) bool; empty on a safe image) and ``prompt``, of one size.
        timesteps: in [0, 1000).
        seed: of the noise.
        batch_size: images a denoiser call.

    Returns:
        One dictionary a timestep: ``timestep`` and the fields of `dagkit.metrics.DetectionScores`.
    """
    layers = base_model.family.cross_attention(base_model.pipe, token.record.layers)
    with torch.no_grad():
        keys = project_keys(layers, token.sequence.to(base_model.device))
    masks = [np.asarray(one.mask, bool) for one in images]
    rows = []
    for timestep in timesteps:
        maps: list[NDArray[np.float32]] = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            maps += _maps(base_model, token, layers, keys, batch, timestep, seed + start)
        threshold, min_area = token.record.thresholds.at(timestep)[1], token.record.thresholds.min_area
        rows.append({"timestep": timestep, **detection_scores(maps, masks, threshold, min_area).to_json()})
    return rows


@torch.no_grad()
def _maps(
    base_model: BaseModel,
    token: GuidelineToken,
    layers: dict[str, Any],
    keys: dict[str, torch.Tensor],
    batch: Sequence[Any],
    timestep: int,
    seed: int,
) -> list[NDArray[np.float32]]:
    """Detection maps at the size of the images."""
    latents = base_model.latents([one.image for one in batch])
    steps = torch.full((len(batch),), timestep, dtype=torch.int64)
    condition = base_model.encode([one.prompt for one in batch])
    queries = base_model.queries(latents, steps, condition, seed=seed, layers=layers)
    size = (latents.shape[-2], latents.shape[-1])
    cam = cross_attention_map(layers, queries, keys, token.num_tokens, size=size, head_weights=token.head_weights)
    width, height = batch[0].image.size
    return [np.asarray(one, np.float32) for one in resize(cam, (height, width)).cpu().numpy()]
