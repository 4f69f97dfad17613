"""How noisy a latent is, whatever the scheduler counts in.

A *noise level* is a number in [0, 1] that rises with the noise: 0.3 is as noisy as timestep 300 of the 1000 of Stable
Diffusion's training schedule, that is, has the same ratio of signal to noise. It tells the same to DDPM, EDM and
flow-matching schedulers, and evenly spaced levels are evenly spaced steps of a usual run, which the standard deviation
of the noise is not: that has passed 0.9 when half of a run is still to come.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagkit.errors import ModelError

LEAST_SNR: Final = 1e-12
"""Ratio of signal to noise that counts as none."""


class NoiseSchedule(ABC):
    """What a scheduler makes of latents ``z`` and noise ``e``, and what it wants a denoiser to predict.

    Args:
        scheduler: of diffusers.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.prediction_type = str(scheduler.config.get("prediction_type", "epsilon"))

    @abstractmethod
    def level(self, timestep: float) -> float:
        """Noise level in [0, 1] at a timestep of the scheduler; nan at one that is none of this schedule."""

    @abstractmethod
    def timestep(self, level: float) -> float:
        """The timestep that a denoiser gets at a noise level, the nearest one where only some were trained on."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser gets to see.

        Args:
            latents: (B, C, h, w) clean.
            noise: (B, C, h, w) of unit variance.
            timesteps: (B,), as of ``timesteps``.
        """

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict for ``noised(latents, noise, timesteps)``, (B, C, h, w)."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """The timesteps of some noise levels, of the same shape; float32, or int64 where the schedule counts."""
        values = [self.timestep(level) for level in levels.flatten().tolist()]
        return torch.tensor(values, dtype=torch.float32).reshape(levels.shape)

    def _unknown_prediction(self, expected: str = "'epsilon', 'v_prediction' or 'sample'") -> ModelError:
        return ModelError(
            f"{type(self.scheduler).__name__} has prediction_type {self.prediction_type!r}; expected {expected}. Set "
            "the one that the model was trained with."
        )


class DiscreteSchedule(NoiseSchedule):
    """``sqrt(a_t) z + sqrt(1 - a_t) e`` with a table of ``a_t``, ``alphas_cumprod`` (DDPM and its kin)."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        alphas = scheduler.alphas_cumprod.double().cpu().numpy()
        self._log_snr = _log(alphas / np.maximum(1 - alphas, LEAST_SNR))
        self._steps = np.arange(len(alphas), dtype=np.float64)

    def level(self, timestep: float) -> float:
        """That of the table, interpolated between whole timesteps."""
        if not 0 <= timestep < len(self._steps):
            return math.nan
        return level_of(float(np.interp(timestep, self._steps, self._log_snr)))

    def timestep(self, level: float) -> float:
        """The nearest whole timestep."""
        return float(round(float(np.interp(-log_snr_of(level), -self._log_snr, self._steps))))

    def timesteps(self, levels: Tensor) -> Tensor:
        """Whole timesteps, int64."""
        return super().timesteps(levels).long()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(a_t) z + sqrt(1 - a_t) e``."""
        alpha = self._alphas(latents, timesteps)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, the velocity ``sqrt(a_t) e - sqrt(1 - a_t) z``, or the latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type != "v_prediction":
            raise self._unknown_prediction()
        alpha = self._alphas(latents, timesteps)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def _alphas(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        table: Tensor = self.scheduler.alphas_cumprod.to(latents)
        return table[timesteps.to(latents.device)][:, None, None, None]


class FlowSchedule(NoiseSchedule):
    """``(1 - s) z + s e`` with timestep ``1000 s`` (flow matching)."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._num = float(scheduler.config.num_train_timesteps)

    def level(self, timestep: float) -> float:
        """By the ratio ``((1 - s) / s)^2``."""
        share = timestep / self._num
        if not 0 <= share <= 1:
            return math.nan
        return level_of(2 * (_ln(1 - share) - _ln(share)))

    def timestep(self, level: float) -> float:
        """``1000 s``, any number."""
        return self._num / (1 + math.exp(log_snr_of(level) / 2))

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``(1 - s) z + s e``."""
        share = _column(timesteps / self._num, latents)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity ``e - z``."""
        if self.scheduler.config.get("use_flow_sigmas") and self.prediction_type != "flow_prediction":
            raise self._unknown_prediction("'flow_prediction'")
        return noise - latents


class EDMSchedule(NoiseSchedule):
    """``(z + sigma e) / sqrt(sigma^2 + sigma_data^2)`` with timestep ``ln(sigma) / 4`` (Karras et al., 2206.00364)."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._data = float(scheduler.config.get("sigma_data", 1.0))

    def level(self, timestep: float) -> float:
        """By the ratio ``(sigma_data / sigma)^2``."""
        return level_of(2 * (math.log(self._data) - 4 * timestep))

    def timestep(self, level: float) -> float:
        """``ln(sigma) / 4``."""
        return (math.log(self._data) - log_snr_of(level) / 2) / 4

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``(z + sigma e) / sqrt(sigma^2 + sigma_data^2)``."""
        sigma = _column((4 * timesteps.double()).exp(), latents)
        return (latents + sigma * noise) / (sigma**2 + self._data**2).sqrt()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the preconditioning makes the clean latents of: ``(z - c_skip x) / c_out``."""
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise self._unknown_prediction()
        sigma = _column((4 * timesteps.double()).exp(), latents)
        whole = sigma**2 + self._data**2
        skip, scale = self._data**2 / whole, sigma * self._data / whole.sqrt()
        clean = (latents - skip * (latents + sigma * noise)) / scale
        return clean if self.prediction_type == "epsilon" else -clean


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The noise schedule of a scheduler of diffusers.

    Raises:
        ModelError: it is of no kind that dagkit knows, so nobody can tell how noisy its latents are.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if hasattr(scheduler, "precondition_noise") or config.get("timestep_type") == "continuous":
        return EDMSchedule(scheduler)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return FlowSchedule(scheduler)
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return DiscreteSchedule(scheduler)
    raise ModelError(
        f"{name} does not tell how noisy its latents are: it has neither alphas_cumprod nor the timesteps of EDM or "
        "flow matching. Use DDIM, DPM++, Euler or another scheduler of this model."
    )


def level_of(log_snr: float) -> float:
    """Noise level in [0, 1] of a logarithm of the ratio of signal to noise variance."""
    ratios, levels = _clock()
    return float(np.interp(-log_snr, -ratios, levels))


def log_snr_of(level: float) -> float:
    """The inverse of `level_of`."""
    ratios, levels = _clock()
    return float(np.interp(level, levels, ratios))


@cache
def _clock() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Falling logarithms of the signal-to-noise ratio and rising levels: Stable Diffusion's schedule, and no signal."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0).double().numpy()
    ratios = np.append(_log(alphas / (1 - alphas)), math.log(LEAST_SNR))
    return ratios, np.arange(1001) / 1000


def _log(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    logarithm: NDArray[np.float64] = np.log(np.maximum(ratio, LEAST_SNR))
    return logarithm


def _ln(value: float) -> float:
    return math.log(max(value, LEAST_SNR))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), in another tensor's dtype and on its device."""
    return values.to(like)[:, None, None, None]
