"""The training loop of the bundled models: seeded, resumable, and safe against being killed at any moment."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from dagkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from dagkit.demo.recipe import Schedule

CHECKPOINT_NAME = "checkpoint.safetensors"
BANK_NAME = "bank.safetensors"


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, flat, cosine decay; at step 0, 1, ..., ``num_steps - 1``."""
    done = step / schedule.num_steps
    rate = schedule.learning_rate * min(1.0, (step + 1) / schedule.num_warmup_steps)
    if done <= schedule.flat_share:
        return rate
    cosine = 0.5 + 0.5 * math.cos(math.pi * (done - schedule.flat_share) / (1 - schedule.flat_share))
    return rate * (schedule.final_share + (1 - schedule.final_share) * cosine)


def _itself(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class _Steps:
    """The batch of each step, by the step's number."""

    draw: Callable[[np.random.Generator], Any]
    seed: int

    def __getitem__(self, step: int) -> Any:
        return self.draw(np.random.default_rng((self.seed, step)))


class Training:
    """One network in training: weights, their average, the optimiser's state and the step, in one checkpoint file.

    Args:
        network: what is trained; parameters without ``requires_grad`` stay as they are.
        schedule: how.
        folder: where ``checkpoint.safetensors`` is written.
        is_resumed: go on from the checkpoint in ``folder`` where there is one.

    Raises:
        CheckpointError: the checkpoint is of another network, or damaged.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, folder: Path, is_resumed: bool = True) -> None:
        self.network, self.schedule, self.folder, self.step = network, schedule, folder, 0
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=0.0, betas=schedule.betas, weight_decay=schedule.weight_decay
        )
        self._ema = {name: value.detach().clone() for name, value in self._averaged().items()}
        if is_resumed and (folder / CHECKPOINT_NAME).exists():
            self._load()

    def _averaged(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.network.state_dict().items() if value.is_floating_point()}

    def run(
        self,
        loss: Callable[[Any], Tensor],
        *,
        draw: Callable[[np.random.Generator], Any] = _itself,
        num_workers: int = 0,
        export: Callable[[], None] | None = None,
        checkpoint_every_s: float = 240.0,
        export_every_s: float = 600.0,
        log_every: int = 50,
        stop_after: int | None = None,
    ) -> None:
        """Trains to the end of the schedule.

        Args:
            loss: returns the scalar loss of a batch, which it draws from a generator itself where no ``draw`` is given.
            draw: draws a batch.
            num_workers: processes that draw batches ahead; 0 draws in this one.
            export: writes what ships; called with the averaged weights in place, now and then and at the end.
            checkpoint_every_s: seconds between checkpoints; the last one is written at the end in any case.
            export_every_s: seconds between exports.
            log_every: steps between lines of the log.
            stop_after: stop before this step, as if the time were up.
        """
        saved = exported = started = time.monotonic()
        first, recent = self.step, []
        end = min(self.schedule.num_steps, stop_after or self.schedule.num_steps)
        steps: Any = _Steps(draw, self.schedule.seed)
        batches = DataLoader(
            steps, batch_size=None, sampler=range(self.step, end), num_workers=num_workers, collate_fn=_itself
        )
        for batch in batches:
            recent.append(self._advance(loss, batch))
            if self.step % log_every == 0:
                per_step = (time.monotonic() - started) / (self.step - first)
                rate = learning_rate(self.step - 1, self.schedule)
                mean = float(torch.stack(recent).mean())
                print(f"{self.step} loss {mean:.5f} lr {rate:.1e} {per_step:.3f} s/step", flush=True)  # noqa: T201
                recent = []
            if time.monotonic() - saved > checkpoint_every_s:
                self.save()
                saved = time.monotonic()
            if export is not None and time.monotonic() - exported > export_every_s:
                self.export(export)
                exported = time.monotonic()
        self.save()
        if export is not None:
            self.export(export)

    def _advance(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.schedule)
        value = loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.schedule.gradient_clip)
        self._optimizer.step()
        self.step += 1
        decay = min(self.schedule.ema_decay, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            current = self._averaged()
            torch._foreach_lerp_(list(self._ema.values()), [current[name] for name in self._ema], 1 - decay)
        return value.detach()

    def use_average(self) -> None:
        """Puts the averaged weights into the network for good."""
        with torch.no_grad():
            for name, value in self._averaged().items():
                value.copy_(self._ema[name])

    def export(self, write: Callable[[], None]) -> None:
        """Calls ``write`` while the network holds the averaged weights."""
        backup = {name: value.clone() for name, value in self._averaged().items()}
        self.use_average()
        write()
        with torch.no_grad():
            for name, value in self._averaged().items():
                value.copy_(backup[name])

    def save(self) -> None:
        """Writes the checkpoint; whoever reads it sees the old one or the new one, whole."""
        tensors: dict[str, Tensor] = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self._ema.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        metadata = {"step": str(self.step), "schedule": json.dumps(asdict(self.schedule))}
        save_tensors(
            {key: value.detach().contiguous().clone() for key, value in tensors.items()},
            self.folder / CHECKPOINT_NAME,
            metadata,
        )

    def _load(self) -> None:
        path = self.folder / CHECKPOINT_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                self.step = int(file.metadata()["step"])
            self.network.load_state_dict(_below("network.", tensors))
            ema = _below("ema.", tensors)
            for name, value in self._ema.items():
                value.copy_(ema[name])
            for name, parameter in self._parameters.items():
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                layout: Any = torch.preserve_format
                self._optimizer.state[parameter] = {
                    key: value if value.ndim == 0 else torch.empty_like(parameter, memory_format=layout).copy_(value)
                    for key, value in state.items()
                }
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: expected a checkpoint of this network, but {error}. Remove the file to start again."
            ) from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors by a temporary file beside the target, so that the target is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
