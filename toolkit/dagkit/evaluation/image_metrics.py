"""Figures of images that need a network of their own: CLIP score, FID, Fréchet distance, LPIPS. None is on by default.

Where weights are missing, the error says where they are published and where to put them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from dagkit import metrics
from dagkit.errors import CheckpointError, PluginError
from dagkit.judges.clip import DEFAULT_CHECKPOINT as CLIP_CHECKPOINT
from dagkit.judges.clip import load_clip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from dagkit.judges import Judge
    from dagkit.metrics import Estimate

INCEPTION_URL: Final = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
ALEXNET_URL: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
NAMES: Final = ("clip_score", "fid", "frechet", "lpips", "ssim")


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt's image of a column beside the unguarded one.

    Attributes:
        text: the prompt.
        before: RGB, unguarded.
        after: RGB, of the column.
    """

    text: str
    before: Image
    after: Image


class ImageMetric(Protocol):
    """A figure of a set of images.

    Attributes:
        name: of the figure.
        title: in the report, with the direction that is better.
        is_relative: measured against the unguarded images, so that these have none of their own.
    """

    name: str
    title: str
    is_relative: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with it must state."""
        ...

    def rows(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """(N, k): what is kept of each image."""
        ...

    def estimate(self, rows: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate:
        """The figure from the rows of a column and those of the unguarded images."""
        ...


class ClipScore:
    """Mean of ``max(100 cos(image, prompt), 0)`` over images (Hessel et al. 2021, arXiv 2104.08718, as torchmetrics).

    Args:
        model: a ``CLIPModel``.
        processor: its ``CLIPProcessor``; longer prompts than it takes are cut.
        checkpoint: where the model is from, for the record.
        device: torch device.
    """

    name = "clip_score"
    title = "CLIP score (higher fits the prompt better)"
    is_relative = False

    def __init__(self, model: Any, processor: Any, checkpoint: str = CLIP_CHECKPOINT, device: str = "cpu") -> None:
        self._model, self._processor, self._device = model.float().eval().to(device), processor, device
        self.settings: dict[str, Any] = {"checkpoint": checkpoint}

    @classmethod
    def load(cls, source: str | None, device: str) -> ClipScore:
        """From a folder or the Hub."""
        checkpoint = source or CLIP_CHECKPOINT
        advice = f"Download it with `hf download {checkpoint}`, or name a folder: --metrics clip_score=FOLDER."
        return cls(*load_clip(checkpoint, "metric clip_score", advice), checkpoint, device)

    @torch.inference_mode()
    def rows(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """(N, 1) scores in [0, 100]."""
        texts = self._processor(
            text=[pair.text for pair in pairs], return_tensors="pt", padding=True, truncation=True
        ).to(self._device)
        pixels = self._processor(images=[pair.after.convert("RGB") for pair in pairs], return_tensors="pt").pixel_values
        said = self._model(
            input_ids=texts.input_ids, attention_mask=texts.attention_mask, pixel_values=pixels.to(self._device)
        )
        cosine = torch.nn.functional.cosine_similarity(said.image_embeds, said.text_embeds, dim=-1)
        return (100 * cosine).clamp_min(0).double().cpu().numpy()[:, None]

    def estimate(self, rows: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate:
        """Mean with a bootstrap over images."""
        return metrics.bootstrap_mean(rows[:, 0].tolist())


class Lpips:
    """Mean LPIPS distance from the unguarded image (Zhang et al. 2018, arXiv 1801.03924): AlexNet, version 0.1.

    Args:
        alexnet: state dictionary of torchvision's AlexNet; only its ``features`` are used.
        device: torch device.
    """

    name = "lpips"
    title = "LPIPS (lower is nearer to the unguarded image)"
    is_relative = True

    def __init__(self, alexnet: Mapping[str, torch.Tensor], device: str = "cpu") -> None:
        module = _optional("torchmetrics.functional.image.lpips", "lpips")
        network = module._NoTrainLpips(net="alex", pnet_rand=True)  # heads ship with torchmetrics
        slices = {key.rpartition(".")[0]: key for key in network.net.state_dict()}
        own: dict[str, torch.Tensor] = {}
        for path in slices:
            layer = path.rpartition(".")[2]
            own |= {f"{path}.{part}": alexnet[f"features.{layer}.{part}"] for part in ("weight", "bias")}
        network.net.load_state_dict(own)
        self._network, self._device = network.eval().to(device), device
        self.settings: dict[str, Any] = {"network": "alex", "version": "0.1"}

    @classmethod
    def load(cls, source: str | None, device: str) -> Lpips:
        """From a file of torchvision's weights."""
        _optional("torchmetrics.functional.image.lpips", "lpips")
        data = _weights("lpips", source, ALEXNET_URL)
        try:
            return cls(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), device)
        except (KeyError, RuntimeError, pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise CheckpointError(
                f"metric lpips: expected torchvision's AlexNet weights, but {error}. Download {ALEXNET_URL} again."
            ) from error

    @torch.inference_mode()
    def rows(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """(N, 1) distances, 0 for equal images."""
        before, after = (
            _pixels([getattr(pair, side) for pair in pairs]).to(self._device) / 127.5 - 1
            for side in ("before", "after")
        )
        distances = self._network(before, after)
        return np.asarray(distances.flatten().double().cpu().numpy()[:, None])

    def estimate(self, rows: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate:
        """Mean with a bootstrap over images."""
        return metrics.bootstrap_mean(rows[:, 0].tolist())


class Frechet:
    """Fréchet distance between the features of a column's images and of the unguarded ones, same prompts and seeds.

    Args:
        features: images to an (N, d) tensor.
        name: ``fid`` for the standard Inception network only, else ``frechet_<network>``.
        settings: what the figure must state.
    """

    is_relative = True

    def __init__(self, features: Any, name: str, settings: Mapping[str, Any]) -> None:
        self._features, self.name, self.settings = features, name, dict(settings)
        self.title = f"{'FID' if name == 'fid' else name.replace('_', ' ').capitalize()} (lower is nearer to unguarded)"

    @classmethod
    def of_inception(cls, source: str | None, device: str) -> Frechet:
        """FID as torch-fidelity computes it: the 2,048 pooled features of the network of Heusel et al."""
        _optional("torch_fidelity.feature_extractor_inceptionv3", "fid")
        data = _weights("fid", source, INCEPTION_URL)
        digest, wanted = hashlib.sha256(data).hexdigest(), INCEPTION_URL.rpartition("-")[2].removesuffix(".pth")
        if not digest.startswith(wanted):
            raise CheckpointError(
                f"metric fid: {source or Path(INCEPTION_URL).name} is not the standard Inception network: expected a "
                f"SHA-256 that begins with {wanted}, but got {digest[:8]}. Download {INCEPTION_URL} again; "
                "distances by other networks are called frechet."
            )
        return cls(InceptionFeatures(data, device), "fid", {"network": f"inception-2015-12-05-{wanted}", "width": 2048})

    @classmethod
    def of_judge(cls, name: str, judge: Judge) -> Frechet:
        """By the features of a judge's own network.

        Raises:
            PluginError: the judge has none.
        """
        if judge.features is None:
            raise PluginError(
                f"metric frechet: the judge {name} has no features to compare. Name the judge clip or demo first."
            )
        return cls(judge.features, f"frechet_{name}", {"network": name, **judge.settings})

    def rows(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """(N, d) features of the column's images."""
        return np.asarray(self._features([pair.after for pair in pairs]).double().cpu().numpy())

    def estimate(self, rows: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate:
        """See `dagkit.metrics.frechet_distance`."""
        return metrics.frechet_distance(baseline, rows)


class InceptionFeatures:
    """torch-fidelity's Inception network: RGB images of any size to (N, 2048) features.

    Args:
        weights: bytes of a ``.pth`` file that holds tensors only.
        device: torch device.
    """

    def __init__(self, weights: bytes, device: str = "cpu") -> None:
        module = _optional("torch_fidelity.feature_extractor_inceptionv3", "fid")
        try:  # torch-fidelity reads any pickle, so the same bytes are first read as tensors only
            torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=io.BytesIO(weights)
            )
        except (KeyError, RuntimeError, pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise CheckpointError(
                f"metric fid: expected the Inception network's weights, but {error}. Download {INCEPTION_URL} again."
            ) from error
        self._network, self._device = network.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> torch.Tensor:
        """(N, 2048) float32."""
        found: torch.Tensor = self._network(_pixels(images).to(torch.uint8).to(self._device))[0]
        return found


def load_image_metrics(requests: Sequence[str], judges: Mapping[str, Judge], device: str = "cpu") -> list[ImageMetric]:
    """Builds metrics by name.

    Args:
        requests: of `NAMES`, each with ``=PATH`` behind it where its weights lie elsewhere than usual. ``ssim`` needs
            nothing and is always measured.
        judges: the first one's features are those of ``frechet``.
        device: torch device.

    Raises:
        PluginError: an unknown name, or a package is missing.
        CheckpointError: weights are missing or of something else.
    """
    found: dict[str, ImageMetric] = {}
    for request in requests:
        name, _, source = request.partition("=")
        match name:
            case "clip_score":
                found[name] = ClipScore.load(source or None, device)
            case "lpips":
                found[name] = Lpips.load(source or None, device)
            case "fid":
                found[name] = Frechet.of_inception(source or None, device)
            case "frechet":
                found[name] = Frechet.of_judge(*next(iter(judges.items())))
            case "ssim":
                pass
            case _:
                raise PluginError(f"{name!r} is not a metric of images. Available: {', '.join(NAMES)}.")
    return list(found.values())


def _weights(metric: str, source: str | None, url: str) -> bytes:
    path = Path(source) if source else Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"metric {metric}: its network's weights are not at {path} ({error.strerror}). Download {url} to there, or "
            f"name the file: --metrics {metric}=FILE."
        ) from error


def _optional(module: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise PluginError(
            f"metric {metric} needs {module.split('.')[0]}: {error}. pip install 'dagkit[metrics]'."
        ) from error


def _pixels(images: Sequence[Image]) -> torch.Tensor:
    """(N, 3, H, W) float32 in [0, 255]."""
    stack = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)
