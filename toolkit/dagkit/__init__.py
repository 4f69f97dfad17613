"""Annotate a concept, train a guideline token, guard any diffusers pipeline (Detect-and-Guide, arXiv 2503.15197).

The public names are imported on first use, so that ``import dagkit`` and ``dagkit --help`` stay light::

    import dagkit

    guard = dagkit.load_token("runs/tokens/weapon/1.0.0").guard()
    with guard.attach(pipe) as trace:
        image = pipe("a cat and a bomb on grass").images[0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dagkit._version import __version__

if TYPE_CHECKING:
    from dagkit.concept import Concept, load_concept
    from dagkit.guard import Guard
    from dagkit.registry import load_token
    from dagkit.token import GuidelineToken

__all__ = ["Concept", "Guard", "GuidelineToken", "__version__", "load_concept", "load_token"]

_HOME = {
    "Concept": "dagkit.concept",
    "Guard": "dagkit.guard",
    "GuidelineToken": "dagkit.token",
    "load_concept": "dagkit.concept",
    "load_token": "dagkit.registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dagkit' has no attribute {name!r}")
