"""What pipelines do to finished pictures: safety checkers that draw them black, watermarkers that mark them.

A black picture shows no concept, so whoever counts it counts an erasure that nobody made. Where dagkit draws, neither
runs: `left_out` when a model is loaded, `taken_off` while a pipeline of the user's own draws. A picture that is black
all the same is refused: `pictures`. Where a guard is attached to a user's pipeline, `watched` tells what is blackened.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from PIL import Image

from dagkit.errors import ModelError

LEFT_OUT: Final[Mapping[str, Any]] = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
}
"""Arguments of diffusers' pipelines that leave both out."""

Tell = Callable[[Sequence[bool]], None]


def left_out(index: Mapping[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` must be told so that a pipeline comes without checker and watermarker.

    Args:
        index: of the model, its ``model_index.json``.
    """
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    known = inspect.signature(cls.__init__).parameters if inspect.isclass(cls) else {}
    told = {key: value for key, value in LEFT_OUT.items() if key in known}
    if "safety_checker" in told and not any(index.get("image_encoder") or ()):
        told["feature_extractor"] = None  # of the checker alone; transformers knows some old ones no more
    return told


@contextmanager
def taken_off(pipe: Any) -> Iterator[None]:
    """A pipeline without its safety checker and watermarker inside the context; they are back after it."""
    own = vars(pipe)  # past diffusers' own setting of attributes, which would forget the parts in the pipeline's config
    parts = {name: own[name] for name in ("safety_checker", "watermark", "watermarker") if name in own}
    own.update(dict.fromkeys(parts))
    try:
        yield
    finally:
        own.update(parts)


def pictures(output: Any) -> list[Image.Image]:
    """The pictures of a pipeline's output, none of them blackened.

    Args:
        output: with ``images`` (PIL), and ``nsfw_content_detected`` where a safety checker ran.

    Raises:
        ModelError: a checker that cannot be taken off flagged some, or some are entirely black.
    """
    images = list(output.images)
    flagged = _flags(getattr(output, "nsfw_content_detected", None))
    if any(flagged):
        raise ModelError(
            f"a safety checker inside the pipeline blackens {sum(flagged)} of {len(images)} images, so nothing can "
            "be read from them. Use a pipeline without one (safety_checker=None)."
        )
    refuse_black(images)
    return images


def refuse_black(images: Sequence[Image.Image], where: str = "the pipeline") -> None:
    """Refuses pictures that are black in every pixel: a checker or an overflow made them, never the prompt.

    Args:
        images: of any mode.
        where: what to call their maker in the message.

    Raises:
        ModelError: some are.
    """
    num_black = sum(image.convert("RGB").getbbox() is None for image in images)
    if num_black:
        raise ModelError(
            f"{where}: {num_black} of {len(images)} images are black in every pixel. A safety checker does that, and "
            "numbers that overflow in half precision; counted, they would pass for safe images. Draw without the "
            "checker, or in float32."
        )


@contextmanager
def watched(pipe: Any, tell: Tell) -> Iterator[None]:
    """Tells what a pipeline's own safety checker blackens inside the context, and warns of it.

    The checker does its work as before. Any number of contexts may be open for one pipeline and end in any order.

    Args:
        pipe: any diffusers pipeline; one without a safety checker is left alone.
        tell: called at the end of each call in which a checker looked at the images, with B flags, True where it
            blackened one; images of one prompt are neighbours.
    """
    if getattr(pipe, "run_safety_checker", None) is None:
        yield
        return
    watch = _Watch.of(pipe)
    watch.listeners.append(tell)
    try:
        yield
    finally:
        watch.leave(tell)


class _Watch:
    """Stands before a pipeline's ``run_safety_checker``; one a pipeline, shared by all listeners."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.listeners = pipe, list[Tell]()
        self.plain: Any = vars(pipe).get("run_safety_checker")
        pipe.run_safety_checker = self

    @classmethod
    def of(cls, pipe: Any) -> _Watch:
        """The pipeline's watch, made where it has none yet."""
        watch = vars(pipe).get("run_safety_checker")
        return watch if isinstance(watch, cls) and watch.pipe is pipe else cls(pipe)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plain is not None:
            result = self.plain(*args, **kwargs)
        else:
            result = type(self.pipe).run_safety_checker(self.pipe, *args, **kwargs)
        flags = _flags(result[1])
        if any(flags):
            warnings.warn(
                f"the safety checker of {type(self.pipe).__name__} draws {sum(flags)} of {len(flags)} images black. "
                "They say nothing about the guard: do not count them as erased.",
                stacklevel=2,
            )
        for tell in self.listeners if flags else ():
            tell(flags)
        return result

    def leave(self, tell: Tell) -> None:
        """Lets go of a listener, and with the last one of the pipeline."""
        self.listeners.remove(tell)
        if not self.listeners and vars(self.pipe).get("run_safety_checker") is self:
            del self.pipe.run_safety_checker
            if self.plain is not None:
                self.pipe.run_safety_checker = self.plain


def _flags(flags: Any) -> list[bool]:
    """B flags from what a checker returns beside the images: a list, an array, or None where there is no checker."""
    return [] if flags is None else [bool(flag) for flag in flags]
