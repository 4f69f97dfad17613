"""Queries of the frozen denoiser, one forward pass for each (image, timestep), in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dagkit.attention import grid
from dagkit.errors import WorkspaceError
from dagkit.families import BaseModel
from dagkit.optimization.data import Example, coarse_mask


@dataclass(frozen=True)
class Batch:
    """Some pairs, ready for a loss.

    Attributes:
        queries: layer -> (B, positions, channels) float32.
        masks: (B, H, W) float32 in [0, 1].
        is_unsafe: (B,) bool.
        timesteps: (B,) int64.
        latent_size: (H, W) of the latents.
    """

    queries: dict[str, Tensor]
    masks: Tensor
    is_unsafe: Tensor
    timesteps: Tensor
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
    """Queries for P (image, timestep) pairs with what they are compared to; made by ``cache_queries``.

    Attributes:
        masks: (P, H, W) float32 in [0, 1] at the finest layer's grid.
        is_unsafe: (P,) bool.
        timesteps: (P,) int64.
        images: (P,) int64, the example of each pair.
        latent_size: (H, W) of the latents.
        is_on_disk: whether the queries were larger than the memory they may take.
        device: of the batches; what is kept stays on the CPU.
    """

    def __init__(
        self,
        stores: Mapping[str, _Store],
        masks: Tensor,
        is_unsafe: Tensor,
        timesteps: Tensor,
        images: Tensor,
        latent_size: tuple[int, int],
        *,
        is_on_disk: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._stores = dict(stores)
        self.masks, self.is_unsafe, self.timesteps, self.images = masks, is_unsafe, timesteps, images
        self.latent_size, self.is_on_disk, self.device = latent_size, is_on_disk, torch.device(device)

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, index: Tensor) -> Batch:
        """The pairs at ``index`` (B,) int64."""
        queries = {name: store.read(index).to(self.device) for name, store in self._stores.items()}
        masks, is_unsafe, timesteps = (
            part[index].to(self.device) for part in (self.masks, self.is_unsafe, self.timesteps)
        )
        return Batch(queries, masks, is_unsafe, timesteps, self.latent_size)

    def batches(self, batch_size: int, index: Tensor | None = None) -> Iterator[Batch]:
        """All pairs (or those at ``index``) in order, ``batch_size`` at a time."""
        index = torch.arange(len(self)) if index is None else index
        for part in torch.split(index, batch_size):
            yield self.take(part)


Predict = Callable[[int, int], dict[str, Tensor]]


@contextmanager
def cache_queries(
    base: BaseModel,
    examples: Sequence[Example],
    timesteps: Tensor,
    *,
    seed: int,
    layers: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_bytes: int = 2 << 30,
    batch_size: int = 8,
) -> Iterator[QueryCache]:
    """Runs the frozen denoiser once for each (example, timestep) pair and keeps the queries while the context is open.

    Args:
        base: the base model.
        examples: E annotated images of one size.
        timesteps: (D, E) int64, D noise draws an example.
        seed: of the noise.
        layers: chosen layers; the family's own where not given.
        dtype: in which queries are kept.
        memory_bytes: where all queries would take more, they go to a temporary file, and only batches are in memory.
        batch_size: pairs a forward pass.

    Raises:
        WorkspaceError: the temporary file cannot be written.
    """
    layers = layers or base.layers
    parts = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    latents = torch.cat([base.latents([example.image for example in part]) for part in parts])
    size = (latents.shape[-2], latents.shape[-1])
    condition = base.encode([example.prompt for example in examples])
    images = torch.arange(len(examples)).repeat(len(timesteps))
    steps = timesteps.flatten()

    def predict(start: int, stop: int) -> dict[str, Tensor]:
        index = images[start:stop]
        return base.queries(latents[index], steps[start:stop], condition[index], seed=seed + start, layers=layers)

    with stored(predict, len(images), batch_size, dtype, memory_bytes) as (stores, positions, is_on_disk):
        finest = max(grid(count, *size) for count in positions)
        masks = torch.stack([coarse_mask(example, finest) for example in examples])
        is_unsafe = torch.tensor([example.is_unsafe for example in examples])
        yield QueryCache(
            stores, masks[images], is_unsafe[images], steps, images, size, is_on_disk=is_on_disk, device=base.device
        )


@contextmanager
def stored(
    predict: Predict, count: int, batch_size: int, dtype: torch.dtype, memory_bytes: int
) -> Iterator[tuple[dict[str, _Store], list[int], bool]]:
    """Fills one store a layer with what ``predict(start, stop)`` returns for pairs ``[start, stop)``.

    Yields:
        Layer -> store, positions of each layer, and whether the stores are files.

    Raises:
        WorkspaceError: a temporary file cannot be written.
    """
    first = predict(0, min(batch_size, count))
    shapes = {name: (count, *rows.shape[1:]) for name, rows in first.items()}
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * torch.empty((), dtype=dtype).element_size()
    is_on_disk = total > memory_bytes
    with tempfile.TemporaryDirectory(prefix="dagkit-queries-") as folder:
        stores: dict[str, _Store] = {
            name: _Disk(Path(folder) / f"{number}.bin", shape, dtype) if is_on_disk else _Memory(shape, dtype)
            for number, (name, shape) in enumerate(shapes.items())
        }
        try:
            _fill(stores, first, predict, count, batch_size, Path(folder), total)
            yield stores, [shape[1] for shape in shapes.values()], is_on_disk
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
    """Writes what ``predict`` returns, block by block; ``first`` is the first block."""
    try:
        for start in range(0, count, batch_size):
            block = predict(start, min(start + batch_size, count)) if start else first
            for name, store in stores.items():
                store.write(start, block[name])
    except OSError as error:
        raise WorkspaceError(
            f"{folder}: {num_bytes >> 20} MiB of queries cannot be written: {error}. Free some space, set TMPDIR to "
            "another folder, or use fewer draws."
        ) from error
