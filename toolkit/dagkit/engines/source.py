"""How a base model is found again in another process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from dagkit import demo
from dagkit.errors import ModelError

if TYPE_CHECKING:
    from dagkit.models import BaseModel, Encoding


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is from, and what it must be like when it is loaded again.

    Attributes:
        name: ``demo``, a folder, a single file or a Hub id.
        config: of a single file.
        device: where it is loaded to.
        encoding: how prompts are encoded.
        looks: JSON of what can be compared at little cost: fingerprint, scheduler, precision and layers.
    """

    name: str
    config: str | None
    device: str
    encoding: Encoding
    looks: str

    @classmethod
    def of(cls, base_model: BaseModel) -> Self:
        """The source of a model that is loaded."""
        looks = json.dumps(_looks(base_model))
        return cls(base_model.source, base_model.config, str(base_model.device), base_model.encoding, looks)

    def load(self) -> BaseModel:
        """The model, loaded once a process.

        Raises:
            ModelError: it cannot be loaded, or is not what it was: somebody has changed the folder, or the scheduler,
                precision or layers of the loaded one.
        """
        return _load(self)


@lru_cache(maxsize=1)
def _load(source: ModelSource) -> BaseModel:
    base_model = demo.load_model(source.name, source.device, source.config)
    there, here = json.loads(source.looks), json.loads(json.dumps(_looks(base_model)))
    different = [name for name in there if there[name] != here[name]]
    if different:
        raise ModelError(
            f"{source.name}: a worker loads a model with another {different[0]} than the one that is in use. Use 1 "
            "worker, or save the model as it is (pipe.save_pretrained) and name that folder."
        )
    return replace(base_model, encoding=source.encoding)


def _looks(base_model: BaseModel) -> dict[str, Any]:
    pipe = base_model.pipe
    layers = [
        (part, name, list(parameter.shape))
        for part, module in sorted(pipe.components.items())
        if isinstance(module, nn.Module)
        for name, parameter in module.named_parameters()
    ]
    scheduler = {key: value for key, value in dict(pipe.scheduler.config).items() if not key.startswith("_")}
    return {
        "fingerprint": base_model.fingerprint,
        "scheduler": [type(pipe.scheduler).__name__, json.dumps(scheduler, default=str, sort_keys=True)],
        "precision": str(base_model.family.denoiser(pipe).dtype),
        "set of layers": hashlib.sha256(json.dumps(layers).encode()).hexdigest(),
    }
