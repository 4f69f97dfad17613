"""What a concept is: labels, prompts, plugins, thresholds, and that all of it fits together."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from dagkit.concept.fields import (
    MAX_PROMPT_LENGTH,
    NO_FLAG,
    Name,
    Names,
    Share,
    SlotName,
    Strict,
    Text,
    Texts,
    did_you_mean,
)
from dagkit.concept.options import JudgePlugin, Plugin, ProposerPlugins, SegmenterPlugin
from dagkit.errors import ConceptError, brief, quoted
from dagkit.refusal import refuse_sexualised_minors

PromptKind = Literal["unsafe", "safe", "hinted"]
PROMPT_KINDS: Final[tuple[PromptKind, ...]] = ("unsafe", "safe", "hinted")

MAX_PROMPTS: Final = 100_000
"""Prompts that the templates of one kind can make."""

MAX_CHECKED: Final = 150_000
"""Characters of all templates, each with the values of its slots: the check for minors reads all of it."""

MIN_SPLIT: Final = 20
"""Prompts of a kind from which on a part of them is kept for tests; fewer are too few to be divided."""

MAX_MISTAKES: Final = 20
"""Mistakes of a file that are shown; of the others only their number is."""

_SLOT: Final = re.compile(r"\{([a-z][a-z_]*?)(_\d+)?\}")


class Labels(Strict):
    """What annotators mark. The mask is the union of the positive labels minus the union of the negative ones."""

    positive: Names = Field(min_length=1)
    """What annotators mark."""
    negative: Names = Field([])
    """What is cut out of the mask."""

    def is_positive(self, label: str) -> bool:
        """Whether a label is a positive one.

        Raises:
            ConceptError: there is no such label.
        """
        known = [*self.positive, *self.negative]
        if label not in known:
            raise ConceptError(
                f"{quoted(label, 60)} is not a label of the concept ({brief(', '.join(known))}). Add it under labels."
            )
        return label in self.positive


class Prompts(Strict):
    """Prompt templates. ``{slot}`` takes a value of the slot; ``{slot_2}`` another value, different from the first."""

    unsafe: Texts = Field(min_length=1)
    """These show the concept."""
    safe: Texts = Field(min_length=1)
    """These do not; above all its neighbours, which must not fire."""
    hinted: Texts = Field([])
    """These bring the concept about without naming it."""
    slots: dict[SlotName, Annotated[Texts, Field(min_length=1)]] = Field(
        {}, max_length=100, json_schema_extra={"additionalProperties": False}
    )
    """What may stand in place of each ``{slot}``."""
    keep: Names = Field([])
    """Slots whose values a guard must leave in the picture."""


class ThresholdSettings(Strict):
    """When a region counts as the concept. Left out, ``highlight`` and ``edit`` are calibrated on validation data.

    A threshold that is given here is the token's at every timestep, see `dagkit.token.Thresholds`.
    """

    highlight: Share | None = None
    """Detection from which a pixel is surely the concept."""
    edit: Share | None = None
    """Detection from which a pixel may be changed, at most ``highlight``."""
    max_false_trigger_rate: Share = 0.05
    """Share of safe images in which the guard may act."""

    @model_validator(mode="after")
    def _ordered(self) -> ThresholdSettings:
        if self.highlight is not None and self.edit is not None and self.edit > self.highlight:
            raise ValueError(f"edit ({self.edit:g}) must not exceed highlight ({self.highlight:g}). Lower it.")
        return self


Side = Annotated[int, Field(ge=8, le=4096, multiple_of=8), NO_FLAG]


class Sampling(Strict):
    """How candidates and samples are drawn."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000), NO_FLAG] = 50
    guidance_scale: Annotated[float, Field(ge=1, le=100), NO_FLAG] = 7.5
    width: Side = 512
    height: Side = 512
    max_sequence_length: Annotated[int | None, Field(ge=1, le=512), NO_FLAG] = None
    """Rows of a text encoder that pads (T5 in SD3 and FLUX); the pipeline's own where not given."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if value is not None}


class Prompt(Strict):
    """One prompt made from a template."""

    text: str
    kind: PromptKind
    values: dict[str, str] = Field({})
    """Slot -> value, e.g. ``{"object": "cat", "object_2": "dog", "weapon": "bomb"}``."""
    keep: list[str] = Field([])
    """Values that a guard must leave in the picture."""


Mistake = tuple[tuple[str | int, ...], str]
_MOST_PROMPTS: Final = f"at most {MAX_PROMPTS:,} are allowed. Use fewer values."


class Mistakes(ValueError):
    """Mistakes of a whole, each with where it is and what it is."""

    def __init__(self, found: Sequence[Mistake]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, path))}: {text}" for path, text in found))
        self.found = found


class Concept(Strict):
    """One concept, as its YAML file describes it."""

    name: Name
    """Names its folders, its Label Studio project and its tokens."""
    summary: Text
    """One sentence on what must not appear, and where the border is."""
    model: Text
    """The base model that is guarded, never changed: ``demo``, a diffusers folder, or a Hub id."""
    labels: Labels
    prompts: Prompts
    initial_phrase: Text
    """Where the guideline token starts."""
    safety_prompt: Text
    """What guidance pushes away from."""
    words: Texts = Field(min_length=1)
    """Looked up in the base model's own attention, to propose boxes."""
    proposers: ProposerPlugins = Field([Plugin(name="attention")])
    """What says where the concept may be; one or several."""
    segmenter: SegmenterPlugin = Plugin(name="sam")
    """What outlines it."""
    judge: JudgePlugin = Plugin(name="demo")
    """What says whether an image shows it, for ``dagkit evaluate``."""
    thresholds: ThresholdSettings = ThresholdSettings()
    sampling: Sampling = Sampling()
    _file: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Concept:
        texts, context = list(self._every_text()), self.context
        num_checked = sum(map(len, texts)) + len(texts) * sum(map(len, context)) // 10
        if num_checked > MAX_CHECKED:
            text = f"the templates, each with the values of its slots and the words, come to {num_checked:,} characters"
            advice = f"but at most {MAX_CHECKED:,} are allowed. Use fewer or shorter ones."
            raise Mistakes([(("prompts",), f"{text}, {advice}")])
        for text in texts:
            refuse_sexualised_minors(text, context)
        problems = list(islice(self._problems(), MAX_MISTAKES + 1))
        if problems:
            raise Mistakes(problems)
        return self

    @property
    def file(self) -> Path | None:
        """The file that it was read from; None where there is none."""
        return self._file

    @property
    def context(self) -> list[str]:
        """What the concept is about, for the check of its prompts."""
        return [self.name, self.summary, self.safety_prompt, self.initial_phrase, *self.words]

    @property
    def members(self) -> list[str]:
        """What the concept is made of, each once: the values of the slots of unsafe prompts that stand for it.

        A slot stands for the concept where one of its values is among ``words``, or where no safe prompt has it; never
        where its values must be kept. Empty where the prompts have no such slot.
        """
        unsafe, safe = self._slots_of("unsafe"), self._slots_of("safe")
        words = {word.casefold() for word in self.words}
        found: dict[str, str] = {}
        for slot in unsafe:
            values = self.prompts.slots[slot]
            is_named = any(value.casefold() in words for value in values)
            if slot not in self.prompts.keep and (is_named or slot not in safe):
                found |= {value.casefold(): value for value in values if value.casefold() not in found}
        return list(found.values())

    def member_of(self, prompt: str) -> str | None:
        """The member that a prompt names, as a whole word; None where it names none, or several."""
        members = {member.casefold(): member for member in self.members}
        longest_first = "|".join(map(re.escape, sorted(members, key=len, reverse=True)))
        named = set(re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", prompt.casefold())) if members else set()
        return members[named.pop()] if len(named) == 1 else None

    def all_prompts(self, kind: PromptKind) -> list[Prompt]:
        """Every prompt that the templates of one kind can make, each once, in a stable order."""
        found: dict[str, Prompt] = {}
        for template in self._templates(kind):
            for prompt in self._expand(template, kind):
                found.setdefault(prompt.text, prompt)
        return list(found.values())

    def test_texts(self, kind: PromptKind) -> frozenset[str]:
        """Texts of one kind that are kept for tests: a fifth, by their hash; none where they are fewer than 20."""
        texts = sorted({prompt.text for prompt in self.all_prompts(kind)}, key=_digest)
        if len(texts) < MIN_SPLIT:
            return frozenset()
        return frozenset([text for text in texts[:-1] if _is_test(text)] or texts[:1])

    def sample_prompts(
        self,
        kind: PromptKind,
        num: int,
        *,
        seed: int = 0,
        split: Literal["train", "test"] | None = None,
        member: str | None = None,
    ) -> list[Prompt]:
        """Draws prompts, all templates equally often, each of a template at most once until all of them were drawn.

        Args:
            kind: which templates.
            num: how many, >= 0.
            seed: same seed, same prompts.
            split: ``train`` and ``test`` never share a prompt: `test_texts` are kept for tests. A kind with too few
                prompts for that uses all for both.
            member: only prompts that name this one of `members` and no other; None for all.

        Raises:
            ConceptError: the concept has no prompts of this kind, or none that names the member.
        """
        groups = [list(self._expand(template, kind)) for template in self._templates(kind)]
        if split is not None and (kept := self.test_texts(kind)):
            groups = [[prompt for prompt in group if (prompt.text in kept) == (split == "test")] for group in groups]
        if member is not None:
            groups = [[prompt for prompt in group if self.member_of(prompt.text) == member] for group in groups]
        groups = [group for group in groups if group]
        if not groups:  # else each round below draws one prompt at least
            lack = "" if member is None else f" that name {quoted(member, 60)} alone"
            raise ConceptError(f"concept {self.name!r} has no {kind} prompts{lack}. Add some under prompts.{kind}.")
        draw = f"{seed}-{kind}-{split}" + ("" if member is None else f"-{member}")
        rng = random.Random(draw)  # noqa: S311 - reproducible draws, no secret
        drawn: list[Prompt] = []
        while len(drawn) < num:
            for group in groups:
                rng.shuffle(group)
            rounds = max(map(len, groups))
            drawn += [group[index] for index in range(rounds) for group in groups if index < len(group)]
        return drawn[:num]

    def _slots_of(self, kind: PromptKind) -> list[str]:
        """Slots that the templates of a kind use, each once, in order."""
        return list(dict.fromkeys(match[1] for one in self._templates(kind) for match in _SLOT.finditer(one)))

    def _templates(self, kind: PromptKind) -> list[str]:
        templates: list[str] = getattr(self.prompts, kind)
        return templates

    def _expand(self, template: str, kind: PromptKind) -> Iterator[Prompt]:
        names = list(dict.fromkeys(match[0][1:-1] for match in _SLOT.finditer(template)))
        slots = [_slot(name) for name in names]
        for values in product(*(self.prompts.slots[slot] for slot in slots)):
            used = list(zip(slots, values, strict=True))
            if len(set(used)) < len(used):
                continue
            text = template
            for name, value in zip(names, values, strict=True):
                text = text.replace(f"{{{name}}}", value)
            keep = [value for slot, value in used if slot in self.prompts.keep]
            yield Prompt(text=text, kind=kind, values=dict(zip(names, values, strict=True)), keep=keep)

    def _problems(self) -> Iterator[Mistake]:
        """What does not fit together; what needs all prompts to be seen is looked for only where they are few."""
        both = sorted(set(self.labels.positive) & set(self.labels.negative))
        if both:
            yield ("labels",), f"{brief(', '.join(both))} cannot be positive and negative at once. Keep one."
        for slot in self.prompts.keep:
            if slot not in self.prompts.slots:
                known = brief(", ".join(self.prompts.slots)) or "none"
                yield ("prompts", "keep"), f"{slot!r} is not one of the slots ({known})."
        broken = list(self._template_problems())
        yield from broken
        if not broken:
            yield from self._shared_texts()

    def _template_problems(self) -> Iterator[Mistake]:
        used: set[str] = set()
        for kind in PROMPT_KINDS:
            total = 0
            for index, template in enumerate(self._templates(kind)):
                found = list(self._problems_of(template))
                yield from ((("prompts", kind, index), problem) for problem in found)
                slots = {match[0]: match[1] for match in _SLOT.finditer(template)}
                used |= set(slots.values())
                if not found:
                    total += prod(len(self.prompts.slots[slot]) for slot in slots.values())
            if total > MAX_PROMPTS:
                yield ("prompts", kind), f"the templates make {total:,} prompts, but {_MOST_PROMPTS}"
        for slot, values in self.prompts.slots.items():
            for index, value in enumerate(values):
                if "{" in value or "}" in value:
                    text = f"{quoted(value, 100)} holds a brace, but a value cannot have slots of its own. Remove it."
                    yield ("prompts", "slots", slot, index), text
            if slot not in used:
                text = f"no template uses it. Write {{{slot}}} in a template, or remove the slot."
                yield ("prompts", "slots", slot), text

    def _problems_of(self, template: str) -> Iterator[str]:
        shown = quoted(template, 100)
        rest = _SLOT.sub("", template)
        if "{" in rest or "}" in rest:
            yield f"{shown} holds a brace that is no slot. Write slots as {{name}} or {{name_2}}, in lower case."
        slots = {match[0]: match[1] for match in _SLOT.finditer(template)}
        names = list(slots.values())
        unknown = [slot for slot in dict.fromkeys(names) if slot not in self.prompts.slots]
        for slot in unknown:
            near = did_you_mean(slot, self.prompts.slots)
            yield f"{shown} uses the slot {quoted(slot, 60)}, which prompts.slots does not list.{near}"
        if unknown:
            return
        for slot in dict.fromkeys(names):
            if len(self.prompts.slots[slot]) < names.count(slot):
                yield (
                    f"{shown} needs {names.count(slot)} different values of {slot!r}, but the slot has "
                    f"{len(self.prompts.slots[slot])}. Add values, or use it less often."
                )
        count = 1
        for slot in names:
            count *= len(self.prompts.slots[slot])
            if count > MAX_PROMPTS**2:  # far too many: the exact number may have thousands of digits
                break
        if count > MAX_PROMPTS:
            yield f"{shown} makes {'over ' if count > MAX_PROMPTS**2 else ''}{count:,} prompts, but {_MOST_PROMPTS}"
        longest = len(rest) + sum(
            max(map(len, self.prompts.slots[slot])) for slot in (match[1] for match in _SLOT.finditer(template))
        )
        if longest > MAX_PROMPT_LENGTH:
            yield f"{shown} makes prompts of {longest:,} characters, but at most {MAX_PROMPT_LENGTH:,} are allowed."

    def _shared_texts(self) -> Iterator[Mistake]:
        """Prompts that are of two kinds at once: no judge and no mask could be right for both."""
        first: dict[str, str] = {}
        for kind in PROMPT_KINDS:
            for index, template in enumerate(self._templates(kind)):
                for prompt in self._expand(template, kind):
                    other = first.setdefault(prompt.text, kind)
                    if other != kind:
                        text = f"{quoted(prompt.text, 100)} is made by prompts.{other}, too. Keep it in one of them."
                        yield ("prompts", kind, index), text
                        break

    def _every_text(self) -> Iterator[str]:
        yield from (self.initial_phrase, self.safety_prompt)
        for kind in PROMPT_KINDS:
            for template in self._templates(kind):
                slots = [self.prompts.slots.get(match[1], []) for match in _SLOT.finditer(template)]
                yield " ".join([template, *chain.from_iterable(slots)])


def _slot(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_test(text: str) -> bool:
    return _digest(text)[0] < 256 // 5
