"""Guards: hooks on a pipeline's denoiser that detect a concept while it is drawn and steer away from it.

    bound = token.guard().bind(pipe)  # checks everything once
    with bound.run() as trace:
        image = pipe("...").images[0]

``token.guard().attach(pipe)`` is the short form of both.

A guard changes the conditional half of the denoiser's output and nothing else, so it works with any scheduler and
prediction type, and samples in which it does not fire stay bit-equal. What it cannot guard it refuses: it never
silently does nothing.
"""

from __future__ import annotations

from dagkit.guard.bind import BoundGuard, PipelineGuard
from dagkit.guard.dag import ConceptFound, Guard
from dagkit.guard.peers import SEGAGuard, SLDGuard
from dagkit.guard.session import Change, Context
from dagkit.guard.trace import StepRecord, Trace
from dagkit.guidance import score

__all__ = [
    "BoundGuard",
    "Change",
    "ConceptFound",
    "Context",
    "Guard",
    "PipelineGuard",
    "SEGAGuard",
    "SLDGuard",
    "StepRecord",
    "Trace",
    "score",
]
