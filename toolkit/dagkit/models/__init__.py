"""Families of base models: what differs between them, behind one protocol.

base = models.load("runwayml/stable-diffusion-v1-5")
base.family.name                      # "sd"
condition = base.encode(["a cat"])    # text-encoder output
queries = base.queries(latents, timesteps, condition, seed=0)
"""

from __future__ import annotations

from dagkit.models.base import BaseModel, Encoding, Family, match
from dagkit.models.calls import Condition
from dagkit.models.loading import is_cached, is_hub_id, load

__all__ = ["BaseModel", "Condition", "Encoding", "Family", "is_cached", "is_hub_id", "load", "match"]
