"""Tells at little cost whether weights are still those that were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

NUM_WATCHED: Final = 8
"""Values of each tensor that are compared. A LoRA that is fused changes all of them, and tells nobody."""


class Seal:
    """A mark on the weights of some modules: which tensors they are, how often they were written, some of their values.

    Reading all weights takes a tenth of a second and more; this takes well below a thousandth. Values are looked at
    because ``weight.data += ...`` (what fusing a LoRA does) leaves object and version counter of a parameter as they
    were.

    Args:
        modules: whose weights, those of LoRAs aside.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._links = [(module, name, child) for root in modules for module, name, child in _links(root)]
        self._weights = [child for _, _, child in self._links if isinstance(child, nn.Parameter)]
        self._versions = [_version(weight) for weight in self._weights]
        self._values = self._look()

    def is_whole(self) -> bool:
        """Whether nothing was replaced or written."""
        if any(_child(module, name) is not child for module, name, child in self._links):
            return False
        if any(_version(weight) != version for weight, version in zip(self._weights, self._versions, strict=True)):
            return False
        now = self._look()
        return len(now) == len(self._values) and all(map(torch.equal, now, self._values))

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        """The watched values, one tensor a device and dtype."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for weight in self._weights:
            groups.setdefault((weight.device, weight.dtype), []).append(weight.detach().reshape(-1)[:: _stride(weight)])
        return [torch.cat(parts) for parts in groups.values()]


def _stride(weight: Tensor) -> int:
    return max(weight.numel() // NUM_WATCHED, 1)


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _links(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module | nn.Parameter]]:
    """Every child and weight below a module with who holds it, LoRA layers aside."""
    found: list[tuple[nn.Module, str, nn.Module | nn.Parameter]] = [
        (module, name, weight) for name, weight in module._parameters.items() if weight is not None
    ]
    for name, child in module._modules.items():
        if child is not None and not name.startswith("lora_"):
            if not hasattr(child, "base_layer"):
                found.append((module, name, child))
            found += _links(child)
    return found


def _child(module: nn.Module, name: str) -> object:
    return module._parameters.get(name) if name in module._parameters else module._modules.get(name)
