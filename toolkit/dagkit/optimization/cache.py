"""Features of the frozen denoiser, one forward pass for each (image, noise level), in memory or on disk."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from dagkit.errors import WorkspaceError
from dagkit.models import BaseModel
from dagkit.models.sites import Sites
from dagkit.optimization.data import Example, coarse_mask

KEPT_SHARE: Final = 1 / 2
"""Of the memory: for queries that are kept between steps, in all caches together."""

TAKEN_SHARE: Final = 1 / 8
"""Of the memory: for the float32 queries of a micro-batch. Its gradient needs about twice as much once more."""


@dataclass(frozen=True)
class Batch:
    """Some pairs, ready for a loss.

    Attributes:
        features: site -> (B, positions, channels) float32.
        masks: (B, H, W) float32 in [0, 1].
        is_unsafe: (B,) bool.
        levels: (B,) float64 noise levels.
        latent_size: (H, W) of the latents.
    """

    features: dict[str, Tensor]
    masks: Tensor
    is_unsafe: Tensor
    levels: Tensor
    latent_size: tuple[int, int]


class _Store(Protocol):
    def write(self, start: int, rows: Tensor) -> None: ...

    def read(self, index: Tensor) -> Tensor: ...


class _Memory:
    """Rows of one layer in memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.rows = torch.empty(shape, dtype=dtype)

    def write(self, start: int, rows: Tensor) -> None:
        self.rows[start : start + len(rows)] = rows.to(self.rows)

    def read(self, index: Tensor) -> Tensor:
        return self.rows[index].float()


class _Disk:
    """Rows of one layer in a file. Reads copy rows and map nothing, so that memory stays bounded."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape[1:], dtype
        self.row_bytes = torch.empty(self.shape, dtype=dtype).nbytes
        self.file = path.open("w+b", buffering=0)

    def write(self, start: int, rows: Tensor) -> None:
        data = rows.to("cpu", self.dtype).contiguous().view(torch.uint8)
        self.file.seek(start * self.row_bytes)
        left = data.numpy().reshape(-1).data
        while len(left):  # an unbuffered write may be partial
            left = left[self.file.write(left) :]

    def read(self, index: Tensor) -> Tensor:
        rows = torch.empty((len(index), *self.shape), dtype=self.dtype)
        for row, number in zip(rows, index.tolist(), strict=True):
            self.file.seek(number * self.row_bytes)
            self.file.readinto(row.view(torch.uint8).numpy().data)
        return rows.float()


class QueryCache:
    """Features of P (image, noise level) pairs with what they are compared to; made by ``cache_queries``.

    Attributes:
        masks: (P, H, W) float32 in [0, 1] at the finest layer's grid.
        is_unsafe: (P,) bool.
        levels: (P,) float64 noise levels.
        images: (P,) int64, the example of each pair.
        latent_size: (H, W) of the latents.
        num_bytes: of memory in which queries are kept; 0 where they are on disk.
        micro_batch_size: pairs that may be taken at a time.
        device: of the batches; what is kept stays on the CPU.
    """

    def __init__(
        self,
        stores: Mapping[str, _Store],
        masks: Tensor,
        is_unsafe: Tensor,
        levels: Tensor,
        images: Tensor,
        latent_size: tuple[int, int],
        *,
        num_bytes: int,
        micro_batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._stores = dict(stores)
        self.masks, self.is_unsafe, self.levels, self.images = masks, is_unsafe, levels, images
        self.latent_size, self.device = latent_size, torch.device(device)
        self.num_bytes, self.micro_batch_size = num_bytes, micro_batch_size

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def is_on_disk(self) -> bool:
        """Whether the queries were larger than the memory they may take."""
        return not self.num_bytes

    def digest(self) -> str:
        """``sha256:`` of what the queries are of: masks, kinds, noise levels and images of all pairs, in order."""
        found = hashlib.sha256()
        for part in (self.masks, self.is_unsafe, self.levels, self.images):
            found.update(repr(tuple(part.shape)).encode())
            found.update(part.contiguous().numpy().tobytes())
        return f"sha256:{found.hexdigest()}"

    def take(self, index: Tensor) -> Batch:
        """The pairs at ``index`` (B,) int64; takes memory for all of them, see ``parts``."""
        features = {name: store.read(index).to(self.device) for name, store in self._stores.items()}
        masks, is_unsafe = self.masks[index].to(self.device), self.is_unsafe[index].to(self.device)
        return Batch(features, masks, is_unsafe, self.levels[index], self.latent_size)

    def parts(self, index: Tensor | None = None, batch_size: int | None = None) -> Sequence[Tensor]:
        """Cuts all pairs, or those at ``index``, into runs of at most ``batch_size`` that fit into memory."""
        index = torch.arange(len(self)) if index is None else index
        size = self.micro_batch_size
        return torch.split(index, size if batch_size is None else min(size, batch_size))

    def batches(self, batch_size: int, index: Tensor | None = None) -> Iterator[Batch]:
        """All pairs (or those at ``index``) in order, at most ``batch_size`` at a time."""
        for part in self.parts(index, batch_size):
            yield self.take(part)


Predict = Callable[[int, int], dict[str, Tensor]]


@contextmanager
def cache_queries(
    base: BaseModel,
    examples: Sequence[Example],
    levels: Tensor,
    *,
    seed: int,
    sites: Sites | None = None,
    dtype: torch.dtype = torch.float32,
    memory_bytes: int = 2 << 30,
    beside: Sequence[QueryCache] = (),
    batch_size: int = 8,
) -> Iterator[QueryCache]:
    """Runs the frozen denoiser once for each (example, noise level) pair and keeps what its sites saw while it is open.

    Args:
        base: the base model.
        examples: E annotated images of one size.
        levels: (D, E) float64 noise levels, D draws an example.
        seed: of the noise.
        sites: where to look; the family's own where not given.
        dtype: in which queries are kept.
        memory_bytes: for queries. Half of it may be kept; where these queries and those of ``beside`` would take more,
            these go to a temporary file. The rest is for a micro-batch (at least one pair) and its gradient. What a
            forward pass makes comes on top while the cache is filled.
        beside: caches that are open as well, with which this one shares ``memory_bytes``.
        batch_size: pairs a forward pass.

    Raises:
        WorkspaceError: the temporary file cannot be written.
    """
    sites = sites or base.sites
    parts = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    latents = torch.cat([base.latents([example.image for example in part]) for part in parts])
    size = (latents.shape[-2], latents.shape[-1])
    condition = base.encode([example.prompt for example in examples])
    images = torch.arange(len(examples)).repeat(len(levels))
    flat = levels.flatten()

    def predict(start: int, stop: int) -> dict[str, Tensor]:
        index = images[start:stop]
        return base.features(latents[index], flat[start:stop], condition[index], seed=seed + start, sites=sites)

    free = int(KEPT_SHARE * memory_bytes) - sum(cache.num_bytes for cache in beside)
    with _stored(predict, len(images), batch_size, dtype, free) as (stores, shapes, num_bytes):
        masks = torch.stack([coarse_mask(example, sites.finest_grid(size)) for example in examples])
        is_unsafe = torch.tensor([example.is_unsafe for example in examples])
        yield QueryCache(
            stores,
            masks[images],
            is_unsafe[images],
            flat,
            images,
            size,
            num_bytes=num_bytes,
            micro_batch_size=max(int(TAKEN_SHARE * memory_bytes) // (4 * sum(map(math.prod, shapes))), 1),
            device=base.device,
        )


@contextmanager
def _stored(
    predict: Predict, count: int, batch_size: int, dtype: torch.dtype, free_bytes: int
) -> Iterator[tuple[dict[str, _Store], list[tuple[int, ...]], int]]:
    """Fills one store a layer with what ``predict(start, stop)`` returns for pairs ``[start, stop)``.

    Yields:
        Layer -> store, (positions, channels) of each layer, and bytes of memory taken: 0 where the stores are files.

    Raises:
        WorkspaceError: a temporary file cannot be written.
    """
    first = predict(0, min(batch_size, count))
    shapes = {name: (count, *rows.shape[1:]) for name, rows in first.items()}
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    is_on_disk = total > free_bytes
    with tempfile.TemporaryDirectory(prefix="dagkit-queries-") as folder:
        stores: dict[str, _Store] = {
            name: _Disk(Path(folder) / f"{number}.bin", shape, dtype) if is_on_disk else _Memory(shape, dtype)
            for number, (name, shape) in enumerate(shapes.items())
        }
        try:
            _fill(stores, first, predict, count, batch_size, Path(folder), total)
            yield stores, [shape[1:] for shape in shapes.values()], 0 if is_on_disk else total
        finally:
            for store in stores.values():
                if isinstance(store, _Disk):
                    store.file.close()


def _fill(
    stores: Mapping[str, _Store],
    first: dict[str, Tensor],
    predict: Predict,
    count: int,
    batch_size: int,
    folder: Path,
    num_bytes: int,
) -> None:
    """Writes what ``predict`` returns, block by block, and lets go of it; ``first`` is the first block."""
    try:
        for start in range(0, count, batch_size):
            block = predict(start, min(start + batch_size, count)) if start else first
            for name, store in stores.items():
                store.write(start, block.pop(name))
    except OSError as error:
        raise WorkspaceError(
            f"{folder}: {num_bytes >> 20} MiB of queries cannot be written: {error}. Free some space, set TMPDIR to "
            "another folder, or use fewer draws."
        ) from error
