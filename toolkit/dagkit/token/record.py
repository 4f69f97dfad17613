"""The schema of ``token.json``."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION: Final = 1

Version = Annotated[str, StringConstraints(pattern=r"^(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Line = Annotated[str, StringConstraints(max_length=1000)]
Positive = Annotated[float, Field(ge=0, le=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thresholds(_Strict):
    """When a region counts as the concept, by timestep.

    Attributes:
        timesteps: knots in [0, 1000), rising; values between them are interpolated linearly, beyond them held.
        highlight: CAM from which a pixel is surely the concept, one a knot.
        edit: CAM from which a pixel may be changed, one a knot, at most ``highlight``.
        certain: score (see ``dagkit.guidance.score``) from which an image surely shows the concept, one a knot;
            ``highlight`` where not given.
        min_area: share of the image that must be highlighted before the guard acts.
        max_area: share of the image above which the gate counts as undecided and the step is skipped (paper's form).
    """

    timesteps: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] = (0,)
    highlight: tuple[Share, ...] = (0.5,)
    edit: tuple[Share, ...] = (0.01,)
    certain: tuple[Share, ...] | None = None
    min_area: Share = 0.0
    max_area: Share = 0.8

    @model_validator(mode="after")
    def _fit(self) -> Self:
        lengths = {len(values) for values in (self.highlight, self.edit, self.certain) if values is not None}
        if lengths != {len(self.timesteps)} or 0 in lengths:
            raise ValueError("timesteps, highlight, edit and certain must have one length, at least 1")
        if sorted(set(self.timesteps)) != list(self.timesteps):
            raise ValueError("timesteps must rise")
        if any(low > high for low, high in zip(self.edit, self.highlight, strict=True)):
            raise ValueError("edit must not exceed highlight")
        return self

    def fixed(self, highlight: float | None, edit: float | None) -> Thresholds:
        """The same with constants at every timestep; the one that is None stays, as far as it fits the other."""
        num = len(self.timesteps)
        highlights = self.highlight if highlight is None else (highlight,) * num
        edits = self.edit if edit is None else (edit,) * num
        if highlight is None:
            highlights = tuple(max(pair) for pair in zip(highlights, edits, strict=True))
        elif edit is None:
            edits = tuple(min(pair) for pair in zip(highlights, edits, strict=True))
        return self.model_copy(update={"highlight": highlights, "edit": edits})

    def at(self, timestep: float) -> tuple[float, float]:
        """(edit, highlight) at a timestep."""
        return _interpolate(timestep, self.timesteps, self.edit), _interpolate(timestep, self.timesteps, self.highlight)

    def certain_at(self, timestep: float) -> float:
        """Score from which an image surely shows the concept, at a timestep."""
        return _interpolate(timestep, self.timesteps, self.certain or self.highlight)


class Guidance(_Strict):
    """How the guard acts where the concept is: the form the token was calibrated for and its constants.

    Attributes:
        form: ``drop`` (dagkit's default), ``subtract`` or ``paper``; see ``dagkit.guidance``.
        strength: multiplies the push away from the safety condition.
        insistence: how much of ``strength`` is added for every 200 timesteps that a sample still shows the concept
            although it is pushed, from 150 timesteps on (not in the paper's form).
        max_timestep: from here down the guard is ever sure, and acts (not in the paper's form). Before, little of the
            picture is decided: what is changed then changes everything around it as well.
        max_step: longest step of a run, in timesteps, in which the guard is known to keep up: with four steps of 250 it
            is, with longer ones a concept is drawn before it is seen.
        min_start: lowest timestep at which a run may start from a picture that shows the concept: below, too little is
            drawn anew.
        dilation: cells of the latent by which the gate is grown (not in the paper's form).
        memory: share of a gate that is kept after 40 timesteps (one step of a run of 25), in [0, 1], so that what was
            pushed out does not grow again as soon as it is no longer seen (not in the paper's form).
        reuse_steps: denoiser calls for which a safety prediction is kept before it is made anew; 1 = never kept.
    """

    form: Literal["drop", "subtract", "paper"] = "drop"
    strength: Positive = 2.5
    insistence: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    max_timestep: Annotated[int, Field(ge=0, le=1000)] = 770
    max_step: Annotated[int, Field(ge=1, le=1000)] = 255
    min_start: Annotated[int, Field(ge=0, le=1000)] = 450
    dilation: Annotated[int, Field(ge=0, le=64)] = 0
    memory: Share = 0.9
    reuse_steps: Annotated[int, Field(ge=1, le=1000)] = 2


class BaseModelInfo(_Strict):
    """The base model a token belongs to.

    Attributes:
        id: folder name or Hub id.
        revision: of the Hub repository, where known.
        architecture: the family's name, e.g. ``sd`` or ``sdxl``.
        fingerprint: ``sha256:`` of the weight files.
        text_encoder: sketch of the text encoders' weights (see ``dagkit.models.sketch``).
        key_projections: sketch of the layers' ``to_k`` weights.
    """

    id: Line
    revision: Line | None = None
    architecture: Name
    fingerprint: Line
    text_encoder: str
    key_projections: str


class DatasetInfo(_Strict):
    """What the token was optimised on."""

    fingerprint: Line = ""
    num_unsafe: Annotated[int, Field(ge=0)] = 0
    num_safe: Annotated[int, Field(ge=0)] = 0
    review_states: dict[str, Annotated[int, Field(ge=0)]] = {}

    @property
    def is_unreviewed(self) -> bool:
        """Whether some masks were taken as the segmenter made them."""
        return self.review_states.get("unreviewed", 0) > 0


class TokenRecord(_Strict):
    """``token.json``. Unknown keys and schema versions above ``SCHEMA_VERSION`` are refused."""

    schema_version: Literal[1] = SCHEMA_VERSION
    concept: Name
    version: Version
    base_model: BaseModelInfo
    layers: Annotated[tuple[Line, ...], Field(min_length=1, max_length=4096)]
    thresholds: Thresholds = Thresholds()
    guidance: Guidance = Guidance()
    safety_prompt: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    optimization: dict[str, Any] = {}
    dataset: DatasetInfo = DatasetInfo()
    metrics: dict[str, Any] = {}
    software: dict[str, str] = {}
    created: Line = ""

    def never_acts(self) -> str | None:
        """Why a guard with these constants would never change a picture; None where it may."""
        own, limits = self.guidance, self.thresholds
        if own.form == "paper":
            if own.strength == 0 or limits.max_area == 0 or min(limits.edit) >= 1:
                return "guidance.strength or thresholds.max_area is 0, or thresholds.edit is 1 at every timestep"
            return None
        if own.max_timestep < own.min_start:
            return (
                f"guidance.max_timestep is {own.max_timestep}, but a guard that acts below {own.min_start} only comes "
                "too late"
            )
        if min(limits.certain or limits.highlight) >= 1 or limits.min_area >= 1:
            return "thresholds.certain or thresholds.min_area is 1 at every timestep"
        if min(limits.edit) >= 1 or (own.form == "subtract" and own.strength == 0):
            return "thresholds.edit is 1 at every timestep, or guidance.strength is 0"
        return None


def _interpolate(x: float, knots: tuple[int, ...], values: tuple[float, ...]) -> float:
    for (left, low), (right, high) in zip(
        zip(knots, values, strict=True), list(zip(knots, values, strict=True))[1:], strict=False
    ):
        if x <= right:
            return low + (high - low) * max(x - left, 0) / (right - left)
    return values[-1]
