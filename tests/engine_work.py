"""Work for engines that needs no models: it does what an item's payload says."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

from dagkit import errors


def work(payload: dict[str, Any]) -> Any:
    """Waits, warns, fails or dies, and returns a value or a fact of this process."""
    time.sleep(payload.get("seconds", 0))
    for text in payload.get("warnings", ()):
        warnings.warn(text, UserWarning, stacklevel=1)
    if "error" in payload:
        raise getattr(errors, payload["error"])("said of a payload")
    if payload.get("is_bug"):
        return {}["a bug"]
    if payload.get("is_killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if payload.get("asks_for_threads"):
        return os.environ["OMP_NUM_THREADS"]
    return payload.get("value", os.getpid())


def build() -> Callable[[Any], Any]:
    return work


def fail_to_build() -> Callable[[Any], Any]:
    raise errors.CheckpointError("no such weights")
