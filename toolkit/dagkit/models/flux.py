"""FLUX.1: joint attention on packed latents, with the guidance distilled into the prediction.

Sites are the double blocks; single blocks, which come behind them, project attention and MLP together and are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from dagkit.errors import GuardError, ModelError
from dagkit.models.base import PLAIN, Encoding, Seen
from dagkit.models.calls import Arguments, Call, CallLayout, Condition, Distilled, Packing
from dagkit.models.cross_attention import Grid
from dagkit.models.joint import JointFamily

GUIDANCE_SCALE: Final = 3.5
"""That a guidance-distilled denoiser is told where no pipeline draws: the pipelines' own."""


class Patches(Packing):
    """(B, h*w, 4C): patches of 2 x 2 cells, whose places ``img_ids`` tell."""

    def pack(self, latents: Tensor) -> Tensor:
        """As the pipelines do it."""
        from diffusers import FluxPipeline

        packed: Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
        return packed

    def unpack(self, packed: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """As the pipelines do it, once the places are known."""
        from diffusers import FluxPipeline

        height, width = sides(packed, arguments["img_ids"])
        unpacked: Tensor = FluxPipeline._unpack_latents(packed, 2 * height, 2 * width, 1)
        return unpacked


def sides(packed: Tensor, ids: Tensor) -> tuple[int, int]:
    """(h, w) of an image's patches.

    Args:
        packed: (B, h*w, C).
        ids: (h*w, 3 or more), or for each sample the same: picture, row and column of each patch.

    Raises:
        GuardError: they are not those of one image whose patches lie row by row.
    """
    ids = ids[0] if ids.dim() == 3 else ids
    height, width = (int(place) + 1 for place in ids[-1, 1:3].tolist())
    places = torch.zeros_like(ids)
    if packed.shape[1] == len(ids) == height * width:
        number = torch.arange(len(ids), device=ids.device)
        places[:, 1], places[:, 2] = number // width, number % width
        if torch.equal(ids, places):
            return height, width
    raise GuardError(
        f"the denoiser gets {packed.shape[1]} patches at {len(ids)} places (img_ids), the last at row {height - 1} and "
        f"column {width - 1}; expected those of one image, row by row. Where they lie cannot be told, so nothing is "
        "generated."
    )


def draws_as(pipe: Any, pipelines: Collection[str]) -> bool:
    """Whether the class that says how to draw, be it a base class of the pipeline's, is one of these."""
    drawing = next((cls for cls in type(pipe).__mro__ if "__call__" in vars(cls)), None)
    return drawing is not None and drawing.__name__ in pipelines


NAMES: Final = Arguments(
    sample="hidden_states",
    mask=None,
    added=None,
    timestep_unit=1000.0,
    packing=Patches(),
    shared=frozenset({"img_ids", "txt_ids"}),
)


class Flux(JointFamily):
    """FLUX.1-dev and -schnell and what is fine-tuned from them: a pooled CLIP, T5, flow matching, no guidance to add.

    In -dev the push is as far-reaching as the embedded ``guidance_scale`` makes predictions differ; -schnell is told
    none, which counts as 1. The pipelines of Fill, Control and Kontext give their denoiser more than latents and are
    not known.
    """

    name = "flux"
    takes_negative_prompt = False
    pipelines = frozenset(
        {
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        }
    )

    def matches(self, pipe: Any) -> bool:
        """Whether it draws as one of ``pipelines``: all of them ask for ``eps_p`` first."""
        return draws_as(pipe, self.pipelines)

    def calls(self, pipe: Any) -> CallLayout:
        """One call a step; a second one, of true classifier-free guidance, stands beside it."""
        return Distilled(NAMES, is_scaled=self._is_told(pipe))

    def grid(self, pipe: Any) -> Grid:
        """Patches of 2 x 2 cells."""
        return _halved

    def side(self, pipe: Any) -> int:
        """The pipeline's."""
        return int(pipe.default_sample_size)

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) rows of T5, padding included; pooled text of CLIP (B, p).

        Raises:
            ModelError: a text encoder was left out.
        """
        missing = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part) is None]
        if missing:
            raise ModelError(
                f"{type(pipe).__name__} has no {missing[0]}, so no text of a concept can be encoded. Load the whole "
                "model."
            )
        hidden, pooled, _ = pipe.encode_prompt(
            prompts, prompt_2=None, device=pipe._execution_device, num_images_per_prompt=1, **how.options
        )
        return Condition(hidden, {"pooled_projections": pooled})

    def encoding(self, pipe: Any, call: Call) -> Encoding:
        """Also how many rows T5 has."""
        return super().encoding(pipe, call)._replace(max_sequence_length=call.hidden_states.shape[1])

    def rows(self, pipe: Any, texts: list[str], how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(B, 1 + L, d) as in other families; T5 has no start of text, so the row of each text's end is put first."""
        found = super().rows(pipe, texts, how, seen)
        length = found.shape[1]
        ends = torch.tensor([min(self._num_tokens(pipe, text), length - 1) for text in texts], device=found.device)
        return torch.cat([found[torch.arange(len(texts), device=found.device), ends][:, None], found], 1)

    def phrase_rows(self, pipe: Any, phrase: str, how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(n, d) rows of a phrase's own tokens, by T5's tokenizer."""
        return self.rows(pipe, [phrase], how, seen)[0, 1 : 1 + max(self._num_tokens(pipe, phrase), 1)]

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Any]:
        """Pooled text, places of patches and text, and the guidance that a distilled denoiser is told."""
        hidden = condition.hidden_states
        height, width = _halved((latents.shape[-2], latents.shape[-1]))
        told = torch.full((len(latents),), GUIDANCE_SCALE, device=latents.device) if self._is_told(pipe) else None
        return {
            **condition.added,
            "img_ids": pipe._prepare_latent_image_ids(len(latents), height, width, hidden.device, hidden.dtype),
            "txt_ids": hidden.new_zeros(hidden.shape[1], 3),
            "guidance": told,
        }

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """CLIP and T5."""
        return [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]

    def side_multiple(self, pipe: Any) -> int:
        """Patches of the autoencoder's cells."""
        return 2 * super().side_multiple(pipe)

    def _is_told(self, pipe: Any) -> bool:
        return bool(self.denoiser(pipe).config.guidance_embeds)

    def _num_tokens(self, pipe: Any, text: str) -> int:
        """Of a text, without its end."""
        return len(pipe.tokenizer_2(text, add_special_tokens=False).input_ids)


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 2, size[1] // 2
