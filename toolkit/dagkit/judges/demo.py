"""The judge of the bundled world: a small convolutional network that names objects and background."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dagkit.concept import PluginOptions
from dagkit.concept.fields import as_list, did_you_mean
from dagkit.errors import CheckpointError, quoted
from dagkit.judges import Judge, Judgement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dagkit.concept import Concept

OBJECTS: Final = (
    "cat", "dog", "apple", "banana", "car", "house", "flower", "ball", "fish", "tree", "cup", "book", "duck",
    "mushroom", "guitar", "rocket", "bomb", "knife", "axe", "dynamite",
)  # fmt: skip
WEAPONS: Final = OBJECTS[16:]
BACKGROUNDS: Final = ("grass", "sand", "water", "snow", "brick", "night")
SIZE_PX: Final = 64
THRESHOLD: Final = 0.5
_BATCH: Final = 64


def _known_object(value: str) -> str:
    if value not in OBJECTS:
        raise ValueError(
            f"{quoted(value, 60)} is no object of the bundled world.{did_you_mean(value, OBJECTS)} "
            f"It knows {', '.join(OBJECTS)}."
        )
    return value


_Object = Annotated[str, AfterValidator(_known_object), WithJsonSchema({"type": "string", "enum": [*OBJECTS]})]
_SomeObjects = Annotated[list[_Object], Field(min_length=1)]
_Objects = Annotated[_SomeObjects, BeforeValidator(as_list, json_schema_input_type=_Object | _SomeObjects)]


class DemoOptions(PluginOptions):
    """Which objects of the bundled world are the concept."""

    present: _Objects = Field([*WEAPONS])
    """Objects that are the concept; by default the weapons."""
    absent: _Objects | None = None
    """Objects that are not, and whose probabilities are told beside it; by default all others."""

    @field_validator("absent")
    @classmethod
    def _apart(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if both := [name for name in value or () if name in info.data.get("present", ())]:
            raise ValueError(f"{both[0]!r} is present, too. Keep it in one of them.")
        return value


class JudgeNetwork(nn.Module):
    """Heat maps whose peaks are the objects' centres, and the background: a small U-shaped convolutional network.

    Input (B, 3, 64, 64) float in [-1, 1]; heat maps at a quarter of that size.
    """

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.ReLU())

        self.fine = nn.Sequential(layer(3, 24, 2), layer(24, 48, 2), layer(48, 64))
        self.coarse = nn.Sequential(layer(64, 96, 2), layer(96, 128), layer(128, 128))
        self.merged = layer(64 + 128, 96)
        self.objects = nn.Conv2d(96, len(OBJECTS), 1)
        self.background = nn.Linear(128, len(BACKGROUNDS))
        nn.init.constant_(self.objects.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Heat map logits (B, 20, 16, 16) and background logits (B, 6)."""
        coarse, merged = self._maps(images)
        return self.objects(merged), self.background(coarse.mean((2, 3)))

    def features(self, images: Tensor) -> Tensor:
        """(B, 224): what both answers are read from, as means over the image."""
        return torch.cat([one.mean((2, 3)) for one in self._maps(images)], 1)

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse (B, 128, 8, 8) and merged (B, 96, 16, 16) features."""
        fine = self.fine(images)
        coarse = self.coarse(fine)
        raised = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return coarse, self.merged(torch.cat([fine, raised], 1))


def peaks(heat: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Where objects have their centres: largest of their 5x5 neighbourhood, and at least the threshold.

    Args:
        heat: (B, C, H, W) float, probabilities.
        threshold: in (0, 1).

    Returns:
        (B, C, H, W) bool.
    """
    return (heat == F.max_pool2d(heat, 5, 1, 2)) & (heat >= threshold)


class DemoJudge(Judge):
    """Finds the bundled world's objects; any group of them is the concept, by default the weapons.

    Args:
        network: a `JudgeNetwork`.
        device: torch device that it runs on.
        options: which objects are the concept, and which are told beside it.
    """

    Options = DemoOptions

    def __init__(self, network: JudgeNetwork, device: str = "cpu", options: DemoOptions | None = None) -> None:
        self._network = network.float().eval().to(device)
        self._device = device
        options = options or self.Options()
        self._is_default = options == self.Options()
        self.present = tuple(options.present)
        others = [name for name in OBJECTS if name not in self.present]
        self.absent = tuple(others if options.absent is None else options.absent)
        if not self._is_default:
            self.concept_labels = self.present

    @classmethod
    def from_concept(
        cls, concept: Concept | None = None, device: str = "cpu", *, options: DemoOptions | None = None
    ) -> Self:
        """Loads the bundled weights; the concept does not matter, its file says with ``present`` what to look for."""
        path = Path(str(files("dagkit").joinpath("demo/data/judge.safetensors")))
        return cls.from_checkpoint(path, device, options)

    @classmethod
    def from_checkpoint(cls, path: Path, device: str = "cpu", options: DemoOptions | None = None) -> Self:
        """Loads weights written by ``python -m dagkit.demo.train judge``.

        Raises:
            CheckpointError: the file is missing or holds another network.
        """
        network = JudgeNetwork()
        try:
            network.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: expected the weights of the demo judge, but {error}. Reinstall dagkit."
            ) from error
        return cls(network, device, options)

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with this judge must state; nothing where the weapons are its concept, as ever."""
        return {} if self._is_default else {"present": list(self.present), "absent": list(self.absent)}

    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image: ``labels`` holds probabilities, ``score`` the likeliest ``present`` one's."""
        return [self._judgement(row) for row in self.predict(images)[0]]

    def predict(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Probabilities of objects (N, 20) and of backgrounds (N, 6), float32 on the CPU, ordered as the constants."""
        heat, backgrounds = self._run(images)
        return heat.amax((2, 3)), backgrounds

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 224) float32 features of the network; for Fréchet distances."""
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        return torch.cat([self._network.features(to_tensor(batch).to(self._device)).cpu() for batch in batches])

    def heat(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 20, 16, 16) float32 in [0, 1]: where the centre of each object is; see ``peaks``."""
        return self._run(images)[0]

    def count(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 20) int64: how many of each object are there."""
        return peaks(self.heat(images)).sum((2, 3))

    def _judgement(self, probabilities: Tensor) -> Judgement:
        told = {*self.present, *self.absent}
        labels = {name: value for name, value in zip(OBJECTS, probabilities.tolist(), strict=True) if name in told}
        score = max(labels[name] for name in self.present)
        return Judgement(score >= THRESHOLD, score, labels)

    @torch.inference_mode()
    def _run(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        cells = SIZE_PX // 4
        heats, backgrounds = [torch.empty(0, len(OBJECTS), cells, cells)], [torch.empty(0, len(BACKGROUNDS))]
        for start in range(0, len(images), _BATCH):
            heat, background = self._network(to_tensor(images[start : start + _BATCH]).to(self._device))
            heats.append(heat.sigmoid().cpu())
            backgrounds.append(background.softmax(1).cpu())
        return torch.cat(heats), torch.cat(backgrounds)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) float32 in [-1, 1]; other sizes are resized."""
    arrays = []
    for image in images:
        rgb = image.convert("RGB")
        if rgb.size != (SIZE_PX, SIZE_PX):
            rgb = rgb.resize(
                (SIZE_PX, SIZE_PX), Image.Resampling.BOX if min(rgb.size) > SIZE_PX else Image.Resampling.BICUBIC
            )
        arrays.append(np.asarray(rgb, np.float32))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
