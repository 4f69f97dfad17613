"""Sites: where image positions meet text in a denoiser, and what a concept's rows score there.

A `Site` is one layer. It knows which module to listen to, what of it describes the image positions (*features*), how
these lie on a grid, and what rows of a concept score at each of them. Guards, optimisation, evaluation and proposers
call it and know no layer; a family (`dagkit.models.base.Family.sites`) says which sites a model has.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dagkit import attention
from dagkit.errors import GuardError


class Site(ABC):
    """One layer in which image positions meet text.

    Attributes:
        name: of the layer, unique in its model.
        reads: whether features are the output of the module that is tapped, or its first input.
    """

    reads: ClassVar[Literal["output", "input"]] = "output"
    name: str

    @property
    @abstractmethod
    def tapped(self) -> nn.Module:
        """The module to listen to, as it is now: a LoRA or a fusion may have replaced it since."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """How many maps the site has; a token may weigh each of them."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Values d of a concept's row here."""

    @abstractmethod
    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the image positions, for latents of a size (H, W)."""

    @abstractmethod
    def project(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        """What features are compared with: (heads, L, d_head), differentiable.

        Args:
            rows: (L, d) of a concept and its competitors.
            lora_scale: factor of LoRA layers, as of ``cross_attention_kwargs={"scale": ...}``. A denoiser sets it
                during its forward pass only, so features and keys would differ without it.
        """

    @abstractmethod
    def shares(self, features: Tensor, keys: Tensor) -> Tensor:
        """Each row's share of each image position: (B, heads, h*w, L) float32 in [0, 1], with sum 1 over the rows.

        Args:
            features: (B, h*w, channels).
            keys: as of ``project``.
        """

    def share(self, features: Tensor, keys: Tensor, num_guideline: int) -> Tensor:
        """Share of the last ``num_guideline`` rows together: (B, heads, h*w) float32 in [0, 1]."""
        return self.shares(features, keys)[..., -num_guideline:].sum(-1)

    def features(self, value: Tensor) -> Tensor:
        """(B, h*w, channels) of what was tapped."""
        return value

    def check(self) -> None:  # noqa: B027
        """Refuses a layer that would be misread; none where that cannot be.

        Raises:
            GuardError: it is none that this kind of site knows.
        """

    @property
    @abstractmethod
    def projection(self) -> nn.Module:
        """The module whose weights decide what rows mean here: a token for other ones sees something else."""

    @property
    def processor(self) -> str:
        """What the layer attends with, for messages."""
        return type(self.tapped).__name__

    def in_float32(self) -> Site:
        """The same site computing keys in float32, in which small gradients are not lost."""
        return self


class AttentionSite(Site):
    """A layer of attention: rows score ``softmax(<feature, key> * scale)`` head by head.

    Attributes:
        layer: the module, with ``heads`` and mostly a ``processor``.
    """

    layer: Any

    @property
    @abstractmethod
    def scale(self) -> float:
        """``1 / sqrt(d_head)``."""

    @property
    def num_heads(self) -> int:
        """Of the layer."""
        return int(self.layer.heads)

    def shares(self, features: Tensor, keys: Tensor) -> Tensor:
        """``softmax(<feature, key> * scale)``."""
        return attention.shares(attention.split_heads(features, self.num_heads), keys, self.scale)

    def share(self, features: Tensor, keys: Tensor, num_guideline: int) -> Tensor:
        """The same of the last rows together, with less memory."""
        queries = attention.split_heads(features, self.num_heads)
        return attention.attention_share(queries, keys, num_guideline, self.scale)

    @property
    def processor(self) -> str:
        """The class of the attention processor."""
        return type(getattr(self.layer, "processor", None)).__name__


class Sites(Mapping[str, Site]):
    """The sites of a model that a token reads, in the token's order.

    Args:
        sites: at least one.

    Raises:
        GuardError: there is none.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.name: site for site in sites}
        if not self._sites:
            raise GuardError("no layer was given in which a concept could be seen; expected at least one.")

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def num_heads(self) -> int:
        """Of all sites together."""
        return sum(site.num_heads for site in self.values())

    @property
    def width(self) -> int:
        """Values d of a concept's row."""
        return next(iter(self.values())).width

    def check(self) -> None:
        """Refuses layers that would be misread.

        Raises:
            GuardError: one is none that its site knows.
        """
        for site in self.values():
            site.check()

    def in_float32(self) -> Sites:
        """The same sites computing keys in float32."""
        return Sites(site.in_float32() for site in self.values())

    def finest_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the site with most image positions."""
        return max(site.grid(latent_size) for site in self.values())

    def project(self, rows: Tensor, lora_scale: float = 1.0) -> dict[str, Tensor]:
        """Each site's `Site.project` by name."""
        with attention.without_autocast(rows.device):
            return {name: site.project(rows, lora_scale) for name, site in self.items()}

    def detection_map(
        self,
        features: Mapping[str, Tensor],
        keys: Mapping[str, Tensor],
        num_guideline: int,
        *,
        size: tuple[int, int],
        latent_size: tuple[int, int] | None = None,
        head_weights: Tensor | None = None,
    ) -> Tensor:
        """Detection map: the guideline rows' share over heads and sites (DAG, detection).

        Mean (or weighted mean) over heads; bilinear resize; mean (or weighted mean) over sites. Sites of one grid are
        summed before they are resized.

        Args:
            features: name -> (B, h*w, channels).
            keys: as of ``project``.
            num_guideline: guideline rows at the end of the sequence.
            size: (H, W) of the result.
            latent_size: (H, W) of the latent, from which each site's grid follows; ``size`` where not given.
            head_weights: (heads over all sites,) float32 >= 0 that sum to 1; None for the paper's plain mean.

        Returns:
            (B, H, W) float32 in [0, 1].
        """
        heads = [site.num_heads for site in self.values()]
        if head_weights is None:
            head_weights = torch.cat([torch.full((count,), 1 / (count * len(heads))) for count in heads])
        weights = head_weights.to(next(iter(features.values())).device, torch.float32)
        pooled: dict[tuple[int, int], Tensor] = {}
        for (name, site), own in zip(self.items(), torch.split(weights, heads), strict=True):
            found = (site.share(features[name], keys[name], num_guideline) * own[:, None]).sum(1)
            cells = site.grid(latent_size or size)
            pooled[cells] = pooled[cells] + found if cells in pooled else found
        first, *rest = (attention.resize(found.reshape(-1, *cells), size) for cells, found in pooled.items())
        return sum(rest, first)


class Detector:
    """A concept's rows at the sites of a model, ready to look at features.

    Args:
        sites: where to look.
        rows: (L, d) ``[start of text, background.., guideline..]``.
        num_guideline: rows at the end that are the concept's.
        head_weights: (heads over all sites,), or None for the plain mean.
    """

    def __init__(self, sites: Sites, rows: Tensor, num_guideline: int, head_weights: Tensor | None = None) -> None:
        self.sites, self.num_guideline, self.head_weights = sites, num_guideline, head_weights
        self._rows = rows
        self._keys: dict[float, dict[str, Tensor]] = {}

    @torch.no_grad()
    def _projected(self, lora_scale: float, device: torch.device) -> dict[str, Tensor]:
        """The rows' keys, made once."""
        if lora_scale not in self._keys:
            self._keys[lora_scale] = self.sites.project(self._rows.to(device), lora_scale)
        return self._keys[lora_scale]

    def __call__(
        self,
        features: Mapping[str, Tensor],
        size: tuple[int, int],
        *,
        latent_size: tuple[int, int] | None = None,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """The detection map, (B, H, W) float32 in [0, 1]; see `Sites.detection_map`."""
        return self.sites.detection_map(
            features,
            self._projected(lora_scale, next(iter(features.values())).device),
            self.num_guideline,
            size=size,
            latent_size=latent_size,
            head_weights=self.head_weights,
        )


class _Store:
    """What the hooks write to."""

    def __init__(self) -> None:
        self.is_recording = False
        self.values: dict[str, Tensor] = {}
        self.num_calls: dict[str, int] = {}

    def keep(self, name: str, value: Tensor) -> None:
        if self.is_recording:
            self.values[name] = value
            self.num_calls[name] = self.num_calls.get(name, 0) + 1

    def clear(self) -> None:
        self.values, self.num_calls = {}, {}


_SLOTS: Final = {"output": "_dagkit_output", "input": "_dagkit_input"}
"""Attributes of a module that is listened to: a tensor (number, calls) each."""

_numbers = itertools.count()
_ears: dict[int, _Ear] = {}


@dataclass
class _Ear:
    """A hook on a module, and who listens."""

    module: weakref.ref[nn.Module]
    handle: RemovableHandle
    listeners: list[tuple[_Store, str]] = field(default_factory=list)


def _hear(value: Tensor, number: int, *, is_lent: bool = False) -> None:
    """Hands a value to who listens; a copy of one whose memory is used again."""
    ear = _ears.get(number)
    entries = [] if ear is None else [(store, name) for store, name in ear.listeners if store.is_recording]
    kept = value.clone() if is_lent and entries else value
    for store, name in entries:
        store.keep(name, kept)


@torch.library.custom_op("dagkit::hear", mutates_args=("slot",))
def _hear_compiled(value: Tensor, slot: Tensor) -> None:
    """The same in a compiled graph, which leaves the call in because ``slot`` is written."""
    slot[1] += 1
    _hear(value, int(slot[0]), is_lent=True)


@_hear_compiled.register_fake
def _(value: Tensor, slot: Tensor) -> None: ...


# One function for all layers, and a tensor that says which: it is an input of a compiled graph, so blocks of which each
# is compiled share one, and it stays valid for the next guard.
def _after(module: nn.Module, _args: Any, output: Tensor) -> None:
    slot = module.__dict__[_SLOTS["output"]]
    if torch.compiler.is_compiling():
        torch.ops.dagkit.hear(output, slot)
    else:
        _hear(output, slot.number)


def _before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    slot = module.__dict__[_SLOTS["input"]]
    if torch.compiler.is_compiling():
        torch.ops.dagkit.hear(args[0], slot)
    else:
        _hear(args[0], slot.number)


def _listen(module: nn.Module, reads: Literal["output", "input"], store: _Store, name: str) -> Callable[[], None]:
    """Lets a store hear a module; returns what ends it."""
    slot = module.__dict__.get(_SLOTS[reads])
    ear = None if slot is None else _ears.get(int(slot[0]))
    if slot is None or (ear is not None and ear.module() is not module):  # that of what it is a copy of
        with torch.inference_mode(mode=False):
            slot, ear = torch.tensor([next(_numbers), 0], device="cpu"), None
        setattr(slot, "number", int(slot[0]))  # noqa: B010 - calls that are not compiled read no tensor
        module.__dict__[_SLOTS[reads]] = slot
    if ear is None:
        is_output = reads == "output"
        handle = module.register_forward_hook(_after) if is_output else module.register_forward_pre_hook(_before)
        ear = _ears[int(slot[0])] = _Ear(weakref.ref(module), handle)
    ear.listeners.append((store, name))

    def stop() -> None:
        ear.listeners.remove((store, name))
        if not ear.listeners and not slot[1]:  # else a graph was compiled with it, which is not made anew without
            ear.handle.remove()
            del _ears[int(slot[0])], module.__dict__[_SLOTS[reads]]

    return stop


class Tap:
    """Keeps the features of some sites while it is open and recording.

    What the layers compute is untouched, so a tapped forward is bit-equal to a plain one. Works with SDPA, attention
    slicing, fused projections, LoRA layers, offloading, reduced precision and compiled blocks, because it hooks one
    module a site only. Where a graph was compiled with the hook, the hook stays, idle: without it torch would compile
    anew, and then no longer see that one is there again.

    Args:
        sites: to listen to; none is fine.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        for site in sites.values():
            site.check()
        self.sites = dict(sites)
        self._store = _Store()
        self._stops: dict[str, tuple[nn.Module, Callable[[], None]]] = {}

    def __enter__(self) -> Self:
        self._hook()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, stop in self._stops.values():
            stop()
        self._stops.clear()
        self._store.is_recording = False
        self._store.clear()

    def _hook(self) -> None:
        """Hooks every site; again where a LoRA layer or a fusion replaced the module since the last call."""
        for name, site in self.sites.items():
            tapped, known = site.tapped, self._stops.get(name)
            if known is not None and known[0] is tapped:
                continue
            if known is not None:
                known[1]()
            self._stops[name] = tapped, _listen(tapped, site.reads, self._store, name)

    def start(self) -> None:
        """Forgets old features and records those of the next forward pass."""
        self._hook()
        self._store.clear()
        self._store.is_recording = True

    def stop(self, batch: int, latent_size: tuple[int, int]) -> dict[str, Tensor]:
        """Ends recording and returns name -> features (B, h*w, channels), in the denoiser's dtype.

        Args:
            batch: B, rows of the denoiser call.
            latent_size: (H, W) of its latents.

        Raises:
            GuardError: a site was not seen, e.g. because a compiled graph from before the hooks was run; or what was
                seen cannot be the features of all rows at all positions of the image.
        """
        self._store.is_recording = False
        values, calls = self._store.values, self._store.num_calls
        self._store.clear()
        missing = [name for name in self.sites if name not in values]
        if missing:
            raise GuardError(
                f"queries of {len(missing)} of {len(self.sites)} layers were not seen (first: {missing[0]}). A "
                "model compiled before the guard was attached skips new hooks: call torch._dynamo.reset() and "
                "attach again."
            )
        features = {}
        for name, site in self.sites.items():
            height, width = site.grid(latent_size)
            shape, expected = tuple(values[name].shape), (batch, height * width)
            found = site.features(values[name]) if calls[name] == 1 and len(shape) >= 3 else None
            if found is None or found.dim() != 3 or tuple(found.shape[:2]) != expected:
                raise GuardError(
                    f"layer {name} with processor {site.processor} projected queries {calls[name]} times, last of "
                    f"shape {shape}; expected once, of shape ({expected[0]}, {expected[1]}, channels): all rows at all "
                    "positions of the image. What it attends with cannot be told, so it is not guarded. Use diffusers' "
                    "own attention processors, without token merging."
                )
            features[name] = found
        return features
