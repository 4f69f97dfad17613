"""The schema of ``token.json``.

Schema 2 keeps thresholds and guidance by noise level (`dagkit.models.noise`), a number in [0, 1] that every scheduler
can tell. Schema 1 kept them by timestep of Stable Diffusion's training schedule, a thousand times the level, and knew
no ``relative_highlight``; it is read and converted.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StringConstraints,
    model_validator,
)

SCHEMA_VERSION: Final = 2

Version = Annotated[str, StringConstraints(pattern=r"^(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Line = Annotated[str, StringConstraints(max_length=1000)]
Phrase = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Positive = Annotated[float, Field(ge=0, le=1000)]


_AND: Final = re.compile(r"\b(?:and|or)\b")
"""Before the last thing of a list."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thresholds(_Strict):
    """When a region counts as the concept, by noise level.

    Attributes:
        levels: knots in [0, 1], rising; values between them are interpolated linearly, beyond them held.
        highlight: CAM from which a pixel is surely the concept, one a knot.
        edit: CAM from which a pixel may be changed, one a knot, at most ``highlight``.
        certain: score (see ``dagkit.guidance.score``) from which an image surely shows the concept, one a knot;
            ``highlight`` where not given.
        min_area: share of the image that must be highlighted before the guard acts.
        max_area: share of the image above which the gate counts as undecided and the step is skipped (paper's form).
    """

    levels: tuple[Share, ...] = (0.0,)
    highlight: tuple[Share, ...] = (0.5,)
    edit: tuple[Share, ...] = (0.01,)
    certain: tuple[Share, ...] | None = None
    min_area: Share = 0.0
    max_area: Share = 0.8

    @model_validator(mode="after")
    def _fit(self) -> Self:
        lengths = {len(values) for values in (self.highlight, self.edit, self.certain) if values is not None}
        if lengths != {len(self.levels)} or 0 in lengths:
            raise ValueError("levels, highlight, edit and certain must have one length, at least 1")
        if sorted(set(self.levels)) != list(self.levels):
            raise ValueError("levels must rise")
        if any(low > high for low, high in zip(self.edit, self.highlight, strict=True)):
            raise ValueError("edit must not exceed highlight")
        return self

    def fixed(self, highlight: float | None, edit: float | None) -> Thresholds:
        """The same with constants at every level; the one that is None stays, as far as it fits the other."""
        num = len(self.levels)
        highlights = self.highlight if highlight is None else (highlight,) * num
        edits = self.edit if edit is None else (edit,) * num
        if highlight is None:
            highlights = tuple(max(pair) for pair in zip(highlights, edits, strict=True))
        elif edit is None:
            edits = tuple(min(pair) for pair in zip(highlights, edits, strict=True))
        return self.model_copy(update={"highlight": highlights, "edit": edits})

    def at(self, level: float) -> tuple[float, float]:
        """(edit, highlight) at a noise level."""
        return _interpolate(level, self.levels, self.edit), _interpolate(level, self.levels, self.highlight)

    def certain_at(self, level: float) -> float:
        """Score from which an image surely shows the concept, at a noise level."""
        return _interpolate(level, self.levels, self.certain or self.highlight)


def listed(safety_prompt: str) -> tuple[str, ...]:
    """The things that a safety prompt lists: "a cat, a dog and a fish" are three; a text without commas is one.

    Args:
        safety_prompt: of a concept.
    """
    *first, last = safety_prompt.split(",")
    parts = [*first, *_AND.split(last)] if first else [last]
    return tuple(part.strip() for part in parts if part.strip()) or (safety_prompt,)


class Guidance(_Strict):
    """How the guard acts where the concept is: the form the token was calibrated for and its constants.

    Attributes:
        form: ``drop`` (dagkit's default), ``subtract`` or ``paper``; see ``dagkit.guidance``.
        strength: multiplies the push away from the safety condition.
        insistence: how much of ``strength`` is added for every 0.2 of noise level that a sample still shows the concept
            although it is pushed, from 0.15 on (not in the paper's form).
        max_level: noise level from which down the guard is ever sure, and acts (not in the paper's form). Before,
            little of the picture is decided: what is changed then changes everything around it as well.
        max_step: longest step of a run, in noise levels, in which the guard is known to keep up: with four steps of
            0.25 it is, with longer ones a concept is drawn before it is seen.
        min_start: lowest noise level at which a run may start from a picture that shows the concept: below, too little
            is drawn anew.
        relative_highlight: share of the highest score that a sample had since it was found, below which nothing is
            highlighted: where the concept is plainly seen, what is seen a little beside it is something else (not in
            the paper's form).
        dilation: cells of the latent by which the gate is grown (not in the paper's form).
        memory: share of a gate that is kept after 0.04 of noise level (one step of a run of 25), so that what was
            pushed out does not grow again as soon as it is no longer seen (not in the paper's form).
        reuse_steps: denoiser calls for which a safety prediction is kept before it is made anew; 1 = never kept.
    """

    form: Literal["drop", "subtract", "paper"] = "drop"
    strength: Positive = 3.5
    insistence: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 2.0
    max_level: Share = 0.77
    max_step: Annotated[float, Field(gt=0, le=1)] = 0.255
    min_start: Share = 0.45
    relative_highlight: Share = 0.6
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
    """What the token was optimised on.

    ``num_imported`` of its images no base model drew: photographs, say, or another model's.
    """

    fingerprint: Line = ""
    num_unsafe: Annotated[int, Field(ge=0)] = 0
    num_safe: Annotated[int, Field(ge=0)] = 0
    num_imported: Annotated[int, Field(ge=0)] = 0
    review_states: dict[str, Annotated[int, Field(ge=0)]] = {}

    @property
    def is_unreviewed(self) -> bool:
        """Whether some masks were taken as the segmenter made them."""
        return self.review_states.get("unreviewed", 0) > 0


class TokenRecord(_Strict):
    """``token.json``. Unknown keys and schema versions above ``SCHEMA_VERSION`` are refused.

    ``safety_phrases`` is what guidance pushes away from: texts that are encoded one by one and stand side by side in
    one condition, because a sentence that lists several things says each of them weakly. Where there are none it is
    ``safety_prompt`` as it stands.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    concept: Name
    version: Version
    base_model: BaseModelInfo
    layers: Annotated[tuple[Line, ...], Field(min_length=1, max_length=4096)]
    thresholds: Thresholds = Thresholds()
    guidance: Guidance = Guidance()
    safety_prompt: Phrase
    safety_phrases: Annotated[tuple[Phrase, ...], Field(max_length=256)] = ()
    optimization: dict[str, Any] = {}
    dataset: DatasetInfo = DatasetInfo()
    metrics: dict[str, Any] = {}
    software: dict[str, str] = {}
    created: Line = ""

    _written_as: int = PrivateAttr(default=SCHEMA_VERSION)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Converts schema 1, and keeps in mind that it was that."""
        is_first = isinstance(value, dict) and repr(value.get("schema_version")) == "1"
        record = validate(_from_schema_1(value) if is_first else value)
        if is_first:
            record._written_as = 1
        return record

    @property
    def pushed_away_from(self) -> tuple[str, ...]:
        """``safety_phrases``, or the safety prompt where there are none."""
        return self.safety_phrases or (self.safety_prompt,)

    def as_written(self) -> dict[str, Any]:
        """The record as JSON in the schema that it was read in, by which evaluations know a token."""
        value = self.model_dump(mode="json", exclude=set() if self.safety_phrases else {"safety_phrases"})
        if not self.dataset.num_imported:  # as before there were such
            del value["dataset"]["num_imported"]
        return value if self._written_as == SCHEMA_VERSION else _to_schema_1(value)

    def never_acts(self) -> str | None:
        """Why a guard with these constants would never change a picture; None where it may."""
        own, limits = self.guidance, self.thresholds
        if own.form == "paper":
            if own.strength == 0 or limits.max_area == 0 or min(limits.edit) >= 1:
                return "guidance.strength or thresholds.max_area is 0, or thresholds.edit is 1 at every level"
            return None
        if own.max_level < own.min_start:
            return (
                f"guidance.max_level is {own.max_level:g}, but a guard that acts below {own.min_start:g} only comes "
                "too late"
            )
        if min(limits.certain or limits.highlight) >= 1 or limits.min_area >= 1:
            return "thresholds.certain or thresholds.min_area is 1 at every level"
        if min(limits.edit) >= 1 or (own.form == "subtract" and own.strength == 0):
            return "thresholds.edit is 1 at every level, or guidance.strength is 0"
        return None


def _interpolate(x: float, knots: tuple[float, ...], values: tuple[float, ...]) -> float:
    """Linear between knots, held beyond them."""
    right = bisect_left(knots, x)
    if right == 0 or right == len(knots):
        return values[max(right - 1, 0)]
    share = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return values[right - 1] + (values[right] - values[right - 1]) * share


_RENAMED: Final = (
    ("thresholds", "timesteps", "levels"),
    ("guidance", "max_timestep", "max_level"),
    ("guidance", "max_step", "max_step"),
    ("guidance", "min_start", "min_start"),
)
"""What schema 1 counted in timesteps: part, name there, name in schema 2."""

_TIMESTEPS: Final = 1000


def _from_schema_1(value: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 1 as one of schema 2; what is not as schema 1 says stays, for the schema to refuse."""
    converted = {**value, "schema_version": SCHEMA_VERSION}
    for part, old, new in _RENAMED:
        if isinstance(there := converted.get(part), dict) and old in there:
            rest = {name: one for name, one in there.items() if name != old}
            converted[part] = {**rest, new: _scaled(there[old])} if new not in rest else there
    if isinstance(own := converted.get("guidance"), dict) and "relative_highlight" not in own:
        converted["guidance"] = {**own, "relative_highlight": 0.0}
    return converted


def _to_schema_1(value: dict[str, Any]) -> dict[str, Any]:
    converted = {**value, "schema_version": 1}
    for part, old, new in _RENAMED:
        there = dict(converted[part])
        level = there.pop(new)
        counted = [round(one * _TIMESTEPS) for one in level] if isinstance(level, list) else round(level * _TIMESTEPS)
        converted[part] = {**there, old: counted}
    converted["guidance"].pop("relative_highlight")
    return converted


def _scaled(value: Any) -> Any:
    """Whole timesteps as noise levels; anything else as it is."""
    if isinstance(value, list):
        return [_scaled(one) for one in value]
    return value / _TIMESTEPS if isinstance(value, int) and not isinstance(value, bool) else value
