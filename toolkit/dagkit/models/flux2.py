"""FLUX.2 [klein]: joint attention on packed latents, a Qwen3 as text encoder, two calls a step or distilled guidance.

Cells of latents are the patches that the denoiser gets, 16 pixels wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from dagkit.models.base import PLAIN, Encoding, Seen, finite, pixels
from dagkit.models.calls import Arguments, Call, CallLayout, Condition, Distilled, Packing, Paired
from dagkit.models.cross_attention import Grid
from dagkit.models.flux import draws_as, sides
from dagkit.models.joint import JointFamily


class Cells(Packing):
    """(B, h*w, C): cells row by row, whose places ``img_ids`` (B, h*w, 4) tell."""

    def pack(self, latents: Tensor) -> Tensor:
        """Row by row."""
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Row by row, once the places are known."""
        height, width = sides(packed, arguments["img_ids"])
        return packed.transpose(1, 2).reshape(len(packed), -1, height, width)


NAMES: Final = Arguments(sample="hidden_states", mask=None, added=None, timestep_unit=1000.0, packing=Cells())


class Flux2Klein(JointFamily):
    """FLUX.2 [klein], base and distilled: conditional, then unconditional call; one alone where guidance is distilled.

    The distilled one is told no guidance scale, which counts as 1. Texts are encoded from the layers of the text
    encoder that the pipeline takes by itself.
    """

    name = "flux2-klein"
    pipelines = frozenset({"Flux2KleinPipeline"})
    takes_negative_prompt = False

    def matches(self, pipe: Any) -> bool:
        """Whether it draws as one of ``pipelines``."""
        return draws_as(pipe, self.pipelines)

    def calls(self, pipe: Any) -> CallLayout:
        """Two calls a step, or one."""
        return Distilled(NAMES, is_scaled=False) if pipe.config.is_distilled else Paired("conditional", NAMES)

    def grid(self, pipe: Any) -> Grid:
        """The cells."""
        return _as_it_is

    def side(self, pipe: Any) -> int:
        """Half of the pipeline's, whose cells are those of the autoencoder."""
        return int(pipe.default_sample_size) // 2

    def channels(self, pipe: Any) -> int:
        """Of the denoiser."""
        return int(self.denoiser(pipe).config.in_channels)

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) rows of three layers side by side, template and padding included."""
        hidden, _ = pipe.encode_prompt(prompts, pipe._execution_device, **self.arguments(how))
        return Condition(hidden)

    def encoding(self, pipe: Any, call: Call) -> Encoding:
        """How many rows there are; a LoRA's scale is the denoiser's alone."""
        return Encoding(max_sequence_length=call.hidden_states.shape[1])

    def phrase_rows(self, pipe: Any, phrase: str, how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(n, d) rows of a phrase's own tokens, without those of the template around it."""
        empty, whole = self._tokens(pipe, ""), self._tokens(pipe, phrase)
        start = next((i for i, (one, other) in enumerate(zip(empty, whole, strict=False)) if one != other), 0)
        return self.rows(pipe, [phrase], how, seen)[0, start : start + max(len(whole) - len(empty), 1)]

    def _tokens(self, pipe: Any, text: str) -> list[int]:
        """Of a text in its template, as the pipeline writes it."""
        messages = [{"role": "user", "content": text}]
        written = pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids: list[int] = pipe.tokenizer(written).input_ids
        return ids

    def latents(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, h, w): mode of the VAE's posterior in patches, each channel normalised as the denoiser expects it."""
        image = pixels(images).to(pipe.vae.device, pipe.vae.dtype)
        encoded: Tensor = pipe._encode_vae_image(image, None)
        return finite(encoded)

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Any]:
        """Places of cells and text."""
        device = condition.hidden_states.device
        return {
            "img_ids": pipe._prepare_latent_ids(latents).to(device),
            "txt_ids": pipe._prepare_text_ids(condition.hidden_states).to(device),
            "guidance": None,
        }

    def side_multiple(self, pipe: Any) -> int:
        """Patches of the autoencoder's cells."""
        return 2 * super().side_multiple(pipe)

    def text_encoders(self, pipe: Any) -> list[torch.nn.Module]:
        """The one."""
        return [pipe.text_encoder]


def _as_it_is(size: tuple[int, int]) -> tuple[int, int]:
    return size
