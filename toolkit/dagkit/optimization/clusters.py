"""Slices of a concept without named members: clusters of what the denoiser sees inside the masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from dagkit.errors import required
from dagkit.optimization.cache import QueryCache

CLUSTER_SIZE: Final = 8
"""Images a cluster should have on average: fewer say little about a rate."""

MOST_CLUSTERS: Final = 4


def cluster_names(caches: Sequence[QueryCache]) -> list[str | None]:
    """The cluster of each image of some caches, all made at the same noise levels; None for safe images.

    Args:
        caches: one after the other, each with its own images from 0.

    Returns:
        ``cluster 1``, the largest, ``cluster 2``, ...; None everywhere where the unsafe images are too few for two.
    """
    looks = torch.cat([_looks(cache) for cache in caches])
    is_unsafe = torch.cat([_of_images(cache.is_unsafe.float(), cache)[:, 0] > 0 for cache in caches])
    names: list[str | None] = [None] * len(is_unsafe)
    found = clusters(looks[is_unsafe], min(int(is_unsafe.sum()) // CLUSTER_SIZE, MOST_CLUSTERS))
    if len(set(found)) > 1:
        for image, number in zip(is_unsafe.nonzero()[:, 0].tolist(), found, strict=True):
            names[image] = f"cluster {number + 1}"
    return names


def clusters(points: Tensor, count: int) -> list[int]:
    """k-means on standardised coordinates: the cluster of each point, the largest first; all 0 where ``count`` < 2.

    Args:
        points: (N, d) float32.
        count: clusters at most.
    """
    if count < 2:
        return [0] * len(points)
    scaled = ((points - points.mean(0)) / points.std(0).clamp(min=1e-6)).double().numpy()
    _, labels = required("scipy.cluster.vq").kmeans2(scaled, count, minit="++", seed=0)
    order = torch.bincount(torch.from_numpy(labels).long(), minlength=count).argsort(descending=True, stable=True)
    place = {int(label): number for number, label in enumerate(order)}
    return [place[int(label)] for label in labels]


def _looks(cache: QueryCache) -> Tensor:
    """(images, d) float32: mean feature inside the mask, of the finest layers, over an image's pairs."""
    rows = []
    for part in cache.parts():
        batch = cache.take(part)
        inside = batch.masks.flatten(1)
        weight = (inside / inside.sum(1, keepdim=True).clamp(min=1e-6))[..., None]
        finest = [one for one in batch.features.values() if one.shape[1] == inside.shape[1]]
        rows.append(torch.cat([(one * weight).sum(1) for one in finest], 1).cpu())
    return _of_images(torch.cat(rows), cache)


def _of_images(values: Tensor, cache: QueryCache) -> Tensor:
    """(images, d) means of what pairs have."""
    values = values.reshape(len(values), -1)
    total = values.new_zeros((int(cache.images.max()) + 1, values.shape[1])).index_add(0, cache.images, values)
    return total / torch.bincount(cache.images)[:, None]
