"""Tells at little cost whether weights are still those that were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from dagkit.models.quantised import stored

NUM_WATCHED: Final = 8
"""Values of each matrix that are compared. A LoRA that is fused changes nearly all of them, and tells nobody."""


class Seal:
    """A mark on the weights of some modules: which tensors they are, how often they were written, some of their values.

    Reading all weights takes a tenth of a second and more; this some ten-thousandths. Values are looked at because
    ``weight.data += ...`` (what fusing a LoRA does) leaves object and version counter of a parameter as they were.

    Args:
        modules: whose weights, those of LoRAs aside.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        links = [link for root in modules for link in _links(root)]
        self._holders = [(holder, name) for holder, name, _ in links]
        self._held = [child for _, _, child in links]
        self._weights = [child for child in self._held if isinstance(child, nn.Parameter)]
        self._parts = [weight for weight in self._weights if weight.dim() > 1 and not weight.is_meta]
        self._versions = self._read_versions()
        self._look_anew()
        self._values = [view.cpu() for view in self._views]
        self._expect()

    def is_whole(self) -> bool:
        """Whether nothing was replaced or written; weights that were only moved to another device are the same."""
        if any(holder.get(name) is not child for (holder, name), child in zip(self._holders, self._held, strict=True)):
            return False
        if self._read_versions() != self._versions:
            return False
        if self._pointers != [matrix.data_ptr() for matrix in self._matrices()]:
            if any(matrix.is_meta for matrix in self._matrices()):
                return False
            self._look_anew()
            self._expect()
        return all(
            bool(torch.equal(torch.cat([self._views[i] for i in group]).float(), expected))
            for group, expected in self._groups
        )

    def _read_versions(self) -> list[int]:
        return [-1 if weight.is_inference() else weight._version for weight in self._weights]

    def _look_anew(self) -> None:
        """Views of the watched values, in the weights' own memory."""
        matrices = self._matrices()
        self._pointers = [matrix.data_ptr() for matrix in matrices]
        self._views = [matrix.reshape(-1)[:: max(matrix.numel() // NUM_WATCHED, 1)] for matrix in matrices]

    def _matrices(self) -> list[Tensor]:
        """The plain tensors that the matrices lie in now."""
        return [matrix for weight in self._parts for matrix in stored(weight)]

    def _expect(self) -> None:
        """Which views are read together, and what they must hold."""
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, view in enumerate(self._views):
            groups.setdefault((view.device, view.dtype), []).append(index)
        self._groups = [
            (members, torch.cat([self._values[i].to(dtype) for i in members]).to(device, torch.float32))
            for (device, dtype), members in groups.items()
        ]


_Link = tuple[dict[str, object], str, "nn.Module | nn.Parameter"]


def _links(module: nn.Module) -> list[_Link]:
    """Every child and weight below a module with the dictionary that holds it, LoRA layers aside."""
    parameters, modules = module.__dict__["_parameters"], module.__dict__["_modules"]
    found: list[_Link] = [(parameters, name, weight) for name, weight in parameters.items() if weight is not None]
    for name, child in modules.items():
        if child is not None and not name.startswith("lora_"):
            found += [(modules, name, child), *_links(child)]
    return found
