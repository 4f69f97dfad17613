import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from dagkit.errors import ModelError
from dagkit.models.noise import LEAST_SNR, level_of, log_snr_of, noise_schedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NAMES = sorted(
    {
        *(one.name for one in KarrasDiffusionSchedulers),
        *("LCMScheduler", "TCDScheduler", "SASolverScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"),
        *("EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    }
)


def make(name: str, **changes):
    cls = getattr(diffusers, name)
    known = cls().config
    return cls(**{key: value for key, value in {**STABLE_DIFFUSION, **changes}.items() if key in known})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DPMSolverSDEScheduler"])  # needs torchsde
def test_every_scheduler_tells_its_level(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(12)
    schedule = noise_schedule(scheduler)
    levels = [schedule.level(timestep) for timestep in scheduler.timesteps.tolist()]
    assert all(0 <= level <= 1 for level in levels)
    assert sorted(levels, reverse=True) == pytest.approx(levels, abs=2e-3)  # of a second-order one some come twice
    assert levels[0] > 0.9
    assert levels[-1] < 0.2


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_on_stable_diffusions_schedule_a_level_is_a_thousandth_of_the_timestep(name: str) -> None:
    schedule = noise_schedule(make(name))
    assert [schedule.level(timestep) for timestep in range(1000)] == [timestep / 1000 for timestep in range(1000)]
    assert [schedule.timestep(timestep / 1000) for timestep in range(1000)] == list(range(1000))
    assert schedule.level(333.25) == pytest.approx(0.33325)
    assert schedule.timesteps(torch.tensor([[0.1], [0.85]])).tolist() == [[100], [850]]


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "DDPMScheduler"])
def test_one_level_has_one_ratio_of_signal_to_noise(name: str) -> None:
    """What a denoiser sees of equal levels is equally noisy, but for its scale; signal and noise of unit variance."""
    scheduler = getattr(diffusers, name)(**({"sigma_data": 1.0} if name == "EDMEulerScheduler" else {}))
    schedule, zeros = noise_schedule(scheduler), torch.zeros(3, 1, 1, 1)
    timesteps = schedule.timesteps(torch.tensor([0.2, 0.5, 0.8]))
    signal = schedule.noised(zeros + 1, zeros, timesteps).flatten()
    noise = schedule.noised(zeros, zeros + 1, timesteps).flatten()
    expected = [log_snr_of(schedule.level(float(timestep))) for timestep in timesteps]
    torch.testing.assert_close(2 * (signal / noise).log(), torch.tensor(expected), atol=1e-3, rtol=1e-4)
    assert [round(schedule.level(float(timestep)), 2) for timestep in timesteps] == [0.2, 0.5, 0.8]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"prediction_type": "sample"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
        ("EDMEulerScheduler", {}),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
    ids=lambda one: one if isinstance(one, str) else "-".join(map(str, one.values())),
)
def test_a_denoiser_that_predicts_the_target_leads_to_the_clean_latents(name: str, changes: dict[str, str]) -> None:
    """Over the scheduler's own steps, from noise that it made itself."""
    scheduler = make(name, **changes)
    scheduler.set_timesteps(40)
    schedule = noise_schedule(scheduler)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    counts = torch.long if "DDIM" in name else torch.float
    sample = schedule.noised(clean, noise, scheduler.timesteps[:1].to(counts))
    if name in ("EDMEulerScheduler", "EulerDiscreteScheduler"):  # these scale what the denoiser sees
        sample = clean + noise * float(scheduler.sigmas[0])
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        steps = timestep[None].to(counts)
        torch.testing.assert_close(seen, schedule.noised(clean, noise, steps), atol=2e-2, rtol=2e-2)
        sample = scheduler.step(schedule.target(clean, noise, steps), timestep, sample).prev_sample
    torch.testing.assert_close(sample, clean, atol=0.05, rtol=0.05)


def test_levels_and_ratios_are_each_others_inverse() -> None:
    for level in (0.0, 0.123, 0.5, 0.9, 0.9995):
        assert level_of(log_snr_of(level)) == pytest.approx(level)
    assert level_of(-float("inf")) == 1.0  # no signal at all, as zero-terminal-SNR schedules begin
    assert level_of(float("inf")) == 0.0
    assert log_snr_of(1.0) == pytest.approx(float(torch.tensor(LEAST_SNR).log()))
    snr_free = noise_schedule(make("DDIMScheduler", rescale_betas_zero_snr=True))
    assert snr_free.level(999) == 1.0


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="CMStochasticIterativeScheduler does not tell how noisy its latents are"):
        noise_schedule(diffusers.CMStochasticIterativeScheduler())
    wrong = noise_schedule(make("DDIMScheduler", prediction_type="velocity"))
    with pytest.raises(ModelError, match="prediction_type 'velocity'; expected 'epsilon'"):
        wrong.target(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([5]))
    mixed = noise_schedule(make("DPMSolverMultistepScheduler", prediction_type="epsilon", use_flow_sigmas=True))
    with pytest.raises(ModelError, match="prediction_type 'epsilon'; expected 'flow_prediction'"):
        mixed.target(*torch.zeros(2, 1, 4, 8, 8), torch.tensor([500]))
