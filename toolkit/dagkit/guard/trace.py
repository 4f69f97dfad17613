"""The audit trace of a guarded run: what was seen and done, per denoiser call and sample."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dagkit.png import picture_png
from dagkit.workspace import atomic_write


@dataclass(frozen=True)
class StepRecord:
    """One guard's decision on one sample in one denoiser call.

    Attributes:
        run: pipeline run while the guard was attached, from 0.
        step: denoiser call of the run, from 0 (a second-order scheduler makes two a step).
        timestep: the scheduler's.
        sample: position in the batch, from 0; several images of one prompt are neighbours.
        concept: ``concept@version`` of the token.
        is_firing: whether the guard is sure of the concept, so that mode ``stop`` would stop: now or earlier in this
            run, from the token's ``max_level`` down (then its gate may open); in the paper's form whether something
            is highlighted now (below that its gate may be open as well). ``strength`` tells whether the prediction
            was changed.
        reason: why, or why not.
        area: share of the image that is highlighted, in [0, 1].
        strength: largest factor, over the image, by which the push ``eps_cs - eps_0`` away from the safety condition
            was multiplied: gate, the token's strength and the guard's own, scalers and mask; 0 where the prediction
            was left alone.
        change: what was really changed: the L2 norm of what this guard added to the conditional prediction, as a share
            of the prediction's own; 0 where it was left alone.
        score: in [0, 1]; see ``dagkit.guidance.score``.
        level: noise level in [0, 1]; see `dagkit.models.noise`.
    """

    run: int
    step: int
    timestep: float
    sample: int
    concept: str
    is_firing: bool
    reason: str
    area: float
    strength: float
    score: float
    change: float = 0.0
    level: float = 0.0


@dataclass
class Trace:
    """All records of the runs made while a guard was attached; they add up until ``clear``.

    Attributes:
        steps: in the order of calls.
        maps: (run, step) -> (B, H, W) float32 detection maps, where the guard keeps them.
        blackened: run -> B flags of the pipeline's own safety checker, where one looked at the images: True where it
            drew one black, which says nothing about the guard.
    """

    steps: list[StepRecord] = field(default_factory=list)
    maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    blackened: dict[int, list[bool]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forgets all records and maps, e.g. after each image of a guard that stays attached; runs count on."""
        self.steps.clear()
        self.maps.clear()
        self.blackened.clear()

    def of(self, sample: int, run: int = 0) -> list[StepRecord]:
        """Records of one sample of one run."""
        return [record for record in self.steps if record.sample == sample and record.run == run]

    def summary(self, sample: int, run: int = 0) -> dict[str, Any]:
        """One sample at a glance.

        Returns:
            ``is_firing`` in any step, ``num_steps``, ``num_firing``, ``first_timestep`` of firing (or None), and the
            largest ``score``, ``area``, ``strength`` and ``change``; ``is_blackened`` by the pipeline's own safety
            checker.

        Raises:
            KeyError: the sample was not seen in this run.
        """
        records = self.of(sample, run)
        if not records:
            raise KeyError(
                f"no record of sample {sample} in run {run}; seen: {sorted({(r.run, r.sample) for r in self.steps})}"
            )
        firing = [record for record in records if record.is_firing]
        return {
            "is_firing": bool(firing),
            "num_steps": len(records),
            "num_firing": len(firing),
            "first_timestep": firing[0].timestep if firing else None,
            "score": max(record.score for record in records),
            "area": max(record.area for record in records),
            "strength": max(record.strength for record in records),
            "change": max(record.change for record in records),
            "is_blackened": sample < len(flags := self.blackened.get(run, [])) and flags[sample],
        }

    def to_json(self) -> str:
        """The records as JSON: ``{"schema_version": 1, "steps": [...]}``."""
        return json.dumps({"schema_version": 1, "steps": [asdict(record) for record in self.steps]}, indent=1) + "\n"

    def strip(self, sample: int, run: int = 0, *, side: int = 64) -> Image.Image:
        """Film strip of a sample's detection maps, first step at the left, white where CAM is 1.

        Args:
            sample: position in the batch.
            run: of the pipeline.
            side: pixels of the shorter side of each frame.

        Raises:
            KeyError: no maps were kept (``keep_maps=True``).
        """
        maps = [values[sample] for (index, _), values in sorted(self.maps.items()) if index == run]
        if not maps:
            raise KeyError(f"no detection maps of run {run} were kept; make the guard with keep_maps=True")
        height, width = maps[0].shape
        size = (round(side * width / min(height, width)), round(side * height / min(height, width)))
        frames = [
            Image.fromarray((values.clamp(0, 1).numpy() * 255).round().astype(np.uint8)).resize(
                size, Image.Resampling.NEAREST
            )
            for values in maps
        ]
        strip = Image.new("L", ((size[0] + 2) * len(frames) - 2, size[1]), 128)
        for i, frame in enumerate(frames):
            strip.paste(frame, (i * (size[0] + 2), 0))
        return strip

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``trace.json`` and, where maps were kept, a strip ``run<r>-sample<s>.png`` a sample."""
        folder = Path(folder)
        atomic_write(folder / "trace.json", self.to_json().encode())
        written = [folder / "trace.json"]
        for run in sorted({index for index, _ in self.maps}):
            for sample in sorted({record.sample for record in self.steps if record.run == run}):
                written.append(folder / f"run{run}-sample{sample}.png")
                atomic_write(written[-1], picture_png(self.strip(sample, run)))
        return written
