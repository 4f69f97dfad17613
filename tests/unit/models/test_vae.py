import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import ModelError


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]


def overflowing(dtype: torch.dtype) -> object:
    """A pipeline of SDXL's shape whose VAE leaves float16's range on the way, as SDXL's does, and comes back."""
    pipe = tiny.sdxl()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e5)
        pipe.vae.encoder.conv_in.weight.clamp_(-6e4, 6e4)
    return pipe.to(dtype=dtype)


def test_a_vae_that_overflows_in_float16_encodes_in_float32() -> None:
    pipe = overflowing(torch.float16)
    assert pipe.vae.config.force_upcast
    assert not torch.isfinite(pipe.vae.encode(torch.ones(1, 3, 32, 32).half()).latent_dist.mode()).all()
    weights = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    latents = models.match(pipe).latents(pipe, images())
    assert latents.dtype == torch.float16
    assert latents.isfinite().all()
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(value, weights[name]) for name, value in pipe.vae.state_dict().items())

    reference = models.match(pipe).latents(pipe.to(dtype=torch.float32), images())
    torch.testing.assert_close(latents.float(), reference, rtol=2e-3, atol=1e-4)


def test_latents_that_are_not_finite_are_refused() -> None:
    pipe = overflowing(torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.raises(
        ModelError, match=r"VAE gives latents that are not finite in float16. Load the model in float32, or with a VAE"
    ):
        models.match(pipe).latents(pipe, images())
    assert pipe.vae.dtype == torch.float16


def test_the_dtype_is_restored_when_encoding_fails() -> None:
    pipe = overflowing(torch.float16)
    pipe.vae.encoder.conv_in = torch.nn.Conv2d(5, 8, 3).half()
    with pytest.raises(RuntimeError, match="channels"):
        models.match(pipe).latents(pipe, images())
    assert pipe.vae.dtype == torch.float16
