"""The family protocol and the loaded base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dagkit import plugins
from dagkit.errors import ModelError
from dagkit.models.calls import Batched, Call, CallLayout, Condition
from dagkit.models.noise import NoiseSchedule, noise_schedule
from dagkit.models.quantised import weights_of
from dagkit.models.sites import Site, Sites, Tap
from dagkit.models.sketch import Sketch, sketch
from dagkit.models.words import own_embeddings


class Seen(NamedTuple):
    """An image as a denoiser gets it.

    Attributes:
        latents: (1, C, h, w) noised.
        timestep: () of the scheduler.
    """

    latents: Tensor
    timestep: Tensor


class Encoding(NamedTuple):
    """How a pipeline encodes the prompts of one run; None where it leaves it to the text encoder.

    Attributes:
        clip_skip: last layers of the text encoder that are left out.
        lora_scale: factor of all LoRA layers of the text encoder.
        max_sequence_length: rows of a text encoder that pads, such as T5.
    """

    clip_skip: int | None = None
    lora_scale: float | None = None
    max_sequence_length: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a pipeline's ``encode_prompt``: what is not left to it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


PLAIN: Final = Encoding()


class Family(ABC):
    """What differs between base models. One file each; registered in ``dagkit.plugins`` as kind ``families``.

    Only ``matches``, ``sites`` and ``encode_prompt`` must be written; the rest is what most pipelines of diffusers do.

    Attributes:
        name: of the family.
        stand_side_by_side: whether several texts may be one condition, as in cross-attention; where text and image
            share a softmax, more text would weigh more.
        text_sees_image: whether what the denoiser makes of a text depends on the image.
        has_start: whether the first row of every text is the same, that of a start-of-text token.
        drawing: arguments of the pipeline where dagkit draws, beside those that the user sets.
        takes_negative_prompt: whether its pipelines guide away from one as they are.
    """

    name: ClassVar[str]
    stand_side_by_side: ClassVar[bool] = True
    text_sees_image: ClassVar[bool] = False
    has_start: ClassVar[bool] = True
    drawing: ClassVar[Mapping[str, Any]] = {}
    takes_negative_prompt: ClassVar[bool] = True

    @abstractmethod
    def matches(self, pipe: Any) -> bool:
        """Whether this family knows the pipeline's denoiser, text encoder and batch layout."""

    def denoiser(self, pipe: Any) -> Any:
        """The module that predicts noise."""
        return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer

    @abstractmethod
    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        """Where a concept can be seen: the family's own choice, or exactly ``names`` (ModelError if one is missing)."""

    def calls(self, pipe: Any) -> CallLayout:
        """How the pipeline calls its denoiser: ``[unconditional; conditional]`` in one call."""
        return Batched()

    def arguments(self, how: Encoding) -> dict[str, Any]:
        """Of a pipeline's call where dagkit draws: ``drawing``, and what makes it encode prompts in a way."""
        length = how.max_sequence_length
        return {**self.drawing, **({} if length is None else {"max_sequence_length": length})}

    def noise(self, pipe: Any) -> NoiseSchedule:
        """How noisy latents are, by the pipeline's scheduler.

        Raises:
            ModelError: it does not tell.
        """
        return noise_schedule(pipe.scheduler)

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """Text-encoder output of each prompt, without classifier-free guidance."""

    def encoding(self, pipe: Any, call: Call) -> Encoding:
        """How the pipeline encoded the prompts of a call that is under way."""
        scale = call.lora_scale
        return Encoding(getattr(pipe, "clip_skip", None), None if scale == 1.0 else scale)

    def rows(self, pipe: Any, texts: list[str], how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(B, L, d) what the sites compare their features with, one row a token of each text; the first is its start.

        Args:
            pipe: the pipeline.
            texts: B.
            how: they are encoded.
            seen: an image that the texts are looked up in; families whose text does not depend on it take no notice.
        """
        return self.encode_prompt(pipe, texts, how).hidden_states

    def phrase_rows(self, pipe: Any, phrase: str, how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(n, d) rows of a phrase's own tokens, those that begin and end every text left out; see ``rows``."""
        ids = pipe.tokenizer(phrase, truncation=True).input_ids
        return self.rows(pipe, [phrase], how, seen)[0, 1 : max(len(ids) - 1, 2)]

    def start_of_text(self, pipe: Any, how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(1, d) first row of the empty prompt, with which a concept's rows compete where nothing is said.

        A text encoder without a start-of-text token (T5) has there what ends the text: the one row that the denoiser
        attends to when it is asked for nothing.
        """
        return self.rows(pipe, [""], how, seen)[0, :1]

    def text_rows(self, pipe: Any, texts: list[str], how: Encoding = PLAIN) -> Tensor:
        """(N, d) rows of some texts together, without the one that starts each and without padding that is masked."""
        condition, first = self.encode_prompt(pipe, texts, how), int(self.has_start)
        rows = condition.hidden_states[:, first:]
        return rows.flatten(0, 1) if condition.mask is None else rows[condition.mask[:, first:].bool()]

    def neutral_conditions(self, pipe: Any, how: Encoding = PLAIN) -> list[Condition]:
        """Conditions of one row each that ask for nothing in particular; the model's own unconditional one first."""
        return [self.encode_prompt(pipe, [""], how)]

    def latents(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, h, w): mode of the VAE's posterior, scaled as the denoiser expects it, in the VAE's dtype.

        Of an autoencoder without a posterior (Sana's) it is the one latent.

        A VAE with ``force_upcast`` (SDXL's overflows in float16) encodes in float32, as in diffusers' img2img.

        Args:
            pipe: the pipeline.
            images: RGB, of one size.

        Raises:
            ModelError: a latent is not finite.
        """
        vae = pipe.vae
        dtype = vae.dtype
        is_upcast = bool(getattr(vae.config, "force_upcast", False)) and dtype != torch.float32
        image = pixels(images)
        try:
            if is_upcast:
                vae.to(torch.float32)
            encoded = vae.encode(image.to(vae.device, vae.dtype))
            latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        finally:
            if is_upcast:
                vae.to(dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return finite(((latents - shift) * vae.config.scaling_factor).to(dtype))

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One plain forward pass of the denoiser without guidance.

        Args:
            pipe: the pipeline.
            latents: (B, C, h, w) noised.
            timesteps: (B,) of the scheduler.
            condition: of B prompts.

        Returns:
            (B, C, h, w).
        """
        denoiser, names = self.denoiser(pipe), self.calls(pipe).names
        steps = timesteps.to(latents.device)
        arguments: dict[str, Any] = {
            names.sample: names.packing.pack(latents.to(denoiser.dtype)),
            names.timestep: steps if names.timestep_unit == 1 else steps / names.timestep_unit,
            names.condition: condition.hidden_states,
        }
        if names.mask is not None and condition.mask is not None:
            arguments[names.mask] = condition.mask
        added = self.added_conditions(pipe, latents, condition)
        if added:
            arguments |= added if names.added is None else {names.added: added}
        prediction = names.packing.unpack(denoiser(**arguments, return_dict=False)[0], arguments)
        return prediction[:, : latents.shape[1]]

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Any]:
        """Further conditions of a plain forward pass by name; empty where the architecture has none."""
        return condition.added

    def side_multiple(self, pipe: Any) -> int:
        """Pixels of which both sides of an image must be a multiple, so that no layer rounds."""
        return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))

    def before_condition(self, pipe: Any) -> Sequence[nn.Module]:
        """Modules of the denoiser whose output depends on latents and timestep alone; empty where nobody can be sure.

        Each is called once in a forward pass and returns one tensor, rows first. Guards run them once for a denoiser
        call and its safety forwards.
        """
        return []

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """The text encoders whose outputs make ``encoder_hidden_states``."""
        return [pipe.text_encoder]

    def weighed(self, pipe: Any, sites: Mapping[str, Site]) -> dict[str, list[nn.Module]]:
        """The modules whose weights a token belongs to: ``text_encoder`` and ``key_projections``."""
        return {"text_encoder": self.text_encoders(pipe), "key_projections": [one.projection for one in sites.values()]}

    def fingerprints(self, pipe: Any, sites: Sites | None = None) -> dict[str, Sketch]:
        """Sketches of the weights that ``weighed`` names; compare them with ``sketch.mismatch``.

        LoRAs do not count, nor do the words that textual inversions added to a text encoder.

        Raises:
            ModelError: some weights are not there to be read, or stored in a way that is not known.
        """
        parts = self.weighed(pipe, sites or self.sites(pipe))
        if any(one.is_meta for modules in parts.values() for module in modules for one in module.parameters()):
            raise ModelError(
                "some weights are on the meta device (sequential offload). Attach the guard first, then enable "
                "offloading."
            )
        rows = own_embeddings(pipe)
        return {
            part: sketch(one for module in modules for one in weights_of(module, rows))
            for part, modules in parts.items()
        }


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model, ready for capture and sampling.

    Attributes:
        pipe: the diffusers pipeline in evaluation mode, gradients and progress bar off.
        family: what knows its parts.
        source: folder or Hub id that it was loaded from.
        fingerprint: ``sha256:...`` over the safetensors files of denoiser and text encoders.
        config: where a single file's configuration is from, as it was named; None otherwise.
        encoding: how prompts are encoded, here and where pictures are drawn.
    """

    pipe: Any
    family: Family
    source: str
    fingerprint: str
    config: str | None = None
    encoding: Encoding = PLAIN

    @property
    def sites(self) -> Sites:
        """Where a concept can be seen, the family's own choice."""
        return self.family.sites(self.pipe)

    @property
    def schedule(self) -> NoiseSchedule:
        """How noisy latents are."""
        return self.family.noise(self.pipe)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = next(self.family.denoiser(self.pipe).parameters()).device
        return device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text-encoder output of each prompt."""
        return self.family.encode_prompt(self.pipe, list(prompts), self.encoding)

    @torch.no_grad()
    def rows(self, texts: Sequence[str], seen: Seen | None = None) -> Tensor:
        """(B, L, d) what the sites compare their features with, one row a token of each text."""
        return self.family.rows(self.pipe, list(texts), self.encoding, seen)

    @torch.no_grad()
    def phrase_rows(self, phrase: str, seen: Seen | None = None) -> Tensor:
        """(n, d) rows of a phrase's own tokens."""
        return self.family.phrase_rows(self.pipe, phrase, self.encoding, seen)

    @torch.no_grad()
    def start_of_text(self, seen: Seen | None = None) -> Tensor:
        """(1, d) first row of the empty prompt."""
        return self.family.start_of_text(self.pipe, self.encoding, seen)

    @torch.no_grad()
    def text_rows(self, texts: Sequence[str]) -> Tensor:
        """(N, d) rows of some texts together, without the one that starts each and without padding that is masked."""
        return self.family.text_rows(self.pipe, list(texts), self.encoding)

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, h, w) latents of RGB images of one size."""
        return self.family.latents(self.pipe, images)

    @torch.no_grad()
    def noised(self, latents: Tensor, levels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Noised latents, as the denoiser gets them, and its timesteps (B,).

        Args:
            latents: (B, C, h, w).
            levels: (B,) noise levels in [0, 1].
            seed: of the noise, which depends on nothing else, not on the device.
        """
        schedule = self.schedule
        timesteps = schedule.timesteps(levels)
        return schedule.noised(latents, noise_like(latents, seed), timesteps), timesteps

    @torch.no_grad()
    def features(
        self, latents: Tensor, levels: Tensor, condition: Condition, *, seed: int, sites: Sites | None = None
    ) -> dict[str, Tensor]:
        """Noises latents, runs the denoiser once, and returns what its sites saw.

        Args:
            latents: (B, C, h, w).
            levels: (B,) noise levels in [0, 1].
            condition: of B prompts.
            seed: of the noise.
            sites: where to look; the family's own choice where not given.

        Returns:
            Name -> (B, h*w, channels), in the denoiser's dtype.
        """
        with Tap(sites or self.sites) as tap:
            tap.start()
            noised, timesteps = self.noised(latents, levels, seed)
            self.family.predict(self.pipe, noised, timesteps, condition)
            return tap.stop(len(latents), (latents.shape[-2], latents.shape[-1]))


def match(pipe: Any) -> Family:
    """Finds the family of a pipeline.

    Raises:
        ModelError: no registered family knows it.
    """
    for name in plugins.names("families"):
        family: Family = plugins.load("families", name)()
        if family.matches(pipe):
            return family
    denoiser = type(getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)).__name__
    raise ModelError(
        f"no family knows {type(pipe).__name__} with denoiser {denoiser}. Available families: "
        f"{', '.join(plugins.names('families'))}. Add one as described in dagkit/models."
    )


def finite(latents: Tensor) -> Tensor:
    """The same latents of a VAE.

    Raises:
        ModelError: one is not finite.
    """
    if not bool(torch.isfinite(latents).all()):
        raise ModelError(
            f"the VAE gives latents that are not finite in {str(latents.dtype).removeprefix('torch.')}. Load the model "
            "in float32, or with a VAE that is made for half precision (SDXL: sdxl-vae-fp16-fix)."
        )
    return latents


def noise_like(latents: Tensor, seed: int) -> Tensor:
    """Noise of unit variance in the shape of latents, the same on every device."""
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1] from RGB images of one size."""
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ModelError(f"images of one batch must have one size, but got {sorted(sizes)}.")
    stack = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1
