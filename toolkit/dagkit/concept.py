"""The schema of a concept file: everything that dagkit must be told about one concept, in one YAML file.

A concept file names what must not appear, the prompts that show it and those that do not, how it is labelled, and
which plugins find, outline and judge it. ``dagkit concept new NAME`` writes a commented one. All mistakes of a file are
reported at once, each with its line.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from dagkit.errors import ConceptError, PromptRefused, brief, quoted, reason
from dagkit.plain_yaml import Document, read_yaml
from dagkit.refusal import refuse_sexualised_minors
from dagkit.resources import exists, is_file, shipped_folder

PromptKind = Literal["unsafe", "safe", "hinted"]
PROMPT_KINDS: Final[tuple[PromptKind, ...]] = ("unsafe", "safe", "hinted")
Item = TypeVar("Item")

MAX_FILE_BYTES: Final = 1_000_000
MAX_PROMPTS: Final = 100_000
"""Prompts that the templates of one kind can make."""

MAX_PROMPT_LENGTH: Final = 1000
MAX_CHECKED: Final = 150_000
"""Characters of all templates, each with the values of its slots: the check for minors reads all of it."""

MIN_SPLIT: Final = 20
"""Prompts of a kind from which on a part of them is kept for tests; fewer are too few to be divided."""

MAX_MISTAKES: Final = 20
"""Mistakes of a file that are shown; of the others only their number is."""


def _once(items: list[Item]) -> list[Item]:
    seen: set[Item] = set()
    for item in items:
        if item in seen:
            raise ValueError(f"{quoted(item, 60)} stands there twice. Remove one.")
        seen.add(item)
    return items


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, but got {str(value).lower()}. Write a number.")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
SlotName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,63}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_LENGTH)]
Names = Annotated[list[Name], Field(max_length=100), AfterValidator(_once)]
Texts = Annotated[list[Text], Field(max_length=2000), AfterValidator(_once)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_no_flag)]
Number = Annotated[float, BeforeValidator(_no_flag)]
Count = Annotated[int, BeforeValidator(_no_flag)]
_SLOT: Final = re.compile(r"\{([a-z][a-z_]*?)(_\d+)?\}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Plugin(BaseModel):
    """A plugin by name, with its options: ``nudenet`` or ``{name: nudenet, threshold: 0.4}``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name

    @property
    def options(self) -> dict[str, Any]:
        """All that the file says beside the name."""
        return dict(self.model_extra or {})


class PluginOptions(_Strict):
    """What a concept file may say beside a plugin's name; each plugin has a schema of its own, this one has none."""


Options = TypeVar("Options", bound=PluginOptions)


def checked_options(where: str, options: Mapping[str, Any], schema: type[Options]) -> Options:
    """Reads the options of a plugin.

    Args:
        where: how to name the plugin in an error.
        options: as of `Plugin.options`.
        schema: the plugin's own.

    Raises:
        ConceptError: an option that the plugin does not have, or a value that is none for it.
    """
    try:
        return schema.model_validate(dict(options))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name, given = brief(".".join(map(str, problem["loc"])), 60), quoted(problem["input"], 60)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(schema.model_fields) or "none"
        raise ConceptError(f"{where}: unknown option {name!r}.{_near(name, schema.model_fields)} It takes {known}.")
    raise ConceptError(f"{where}: {name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but got {given}. Mend it.")


def _as_plugin(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_plugins(value: Any) -> Any:
    return [_as_plugin(item) for item in (value if isinstance(value, list) else [value])]


def _as_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


OneOrMoreTexts = Annotated[list[Text], BeforeValidator(_as_texts)]
"""A text, or a list of texts."""

OnePlugin = Annotated[Plugin, BeforeValidator(_as_plugin)]
ManyPlugins = Annotated[list[Plugin], BeforeValidator(_as_plugins), Field(min_length=1, max_length=20)]


class Labels(_Strict):
    """What annotators mark. The mask is the union of the positive labels minus the union of the negative ones."""

    positive: Names = Field(min_length=1)
    negative: Names = []


class Prompts(_Strict):
    """Prompt templates. ``{slot}`` takes a value of the slot; ``{slot_2}`` another value, different from the first."""

    unsafe: Texts = Field(min_length=1)
    safe: Texts = Field(min_length=1)
    hinted: Texts = []
    slots: dict[SlotName, Annotated[Texts, Field(min_length=1)]] = Field({}, max_length=100)
    keep: Names = []
    """Slots whose values a guard must leave in the picture."""


class Thresholds(_Strict):
    """When a region counts as the concept. Left out, ``highlight`` and ``edit`` are calibrated on validation data.

    A threshold that is given here is the token's at every timestep, see `dagkit.token.Thresholds`.
    """

    highlight: Share | None = None
    edit: Share | None = None
    max_false_trigger_rate: Share = 0.05

    @model_validator(mode="after")
    def _ordered(self) -> Thresholds:
        if self.highlight is not None and self.edit is not None and self.edit > self.highlight:
            raise ValueError(f"edit ({self.edit:g}) must not exceed highlight ({self.highlight:g}). Lower it.")
        return self


class Sampling(_Strict):
    """How candidates and samples are drawn."""

    num_inference_steps: Count = Field(50, ge=1, le=1000)
    guidance_scale: Number = Field(7.5, ge=1, le=100)
    width: Count = Field(512, ge=8, le=4096, multiple_of=8)
    height: Count = Field(512, ge=8, le=4096, multiple_of=8)


class Prompt(_Strict):
    """One prompt made from a template."""

    text: str
    kind: PromptKind
    values: dict[str, str] = {}
    """Slot -> value, e.g. ``{"object": "cat", "object_2": "dog", "weapon": "bomb"}``."""
    keep: list[str] = []
    """Values that a guard must leave in the picture."""


_Mistake = tuple[tuple[str | int, ...], str]
_MOST_PROMPTS: Final = f"at most {MAX_PROMPTS:,} are allowed. Use fewer values."


class _Mistakes(ValueError):
    """Mistakes of a whole, each with where it is and what it is."""

    def __init__(self, found: Sequence[_Mistake]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, path))}: {text}" for path, text in found))
        self.found = found


class Concept(_Strict):
    """One concept, as its YAML file describes it."""

    name: Name
    summary: Text
    model: Text
    labels: Labels
    prompts: Prompts
    initial_phrase: Text
    safety_prompt: Text
    words: Texts = Field(min_length=1, max_length=100)
    proposers: ManyPlugins = [Plugin(name="attention")]
    segmenter: OnePlugin = Plugin(name="sam")
    judge: OnePlugin = Plugin(name="demo")
    thresholds: Thresholds = Thresholds()
    sampling: Sampling = Sampling()
    _file: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Concept:
        texts, context = list(self._every_text()), self.context
        num_checked = sum(map(len, texts)) + len(texts) * sum(map(len, context)) // 10
        if num_checked > MAX_CHECKED:
            text = f"the templates, each with the values of its slots and the words, come to {num_checked:,} characters"
            advice = f"but at most {MAX_CHECKED:,} are allowed. Use fewer or shorter ones."
            raise _Mistakes([(("prompts",), f"{text}, {advice}")])
        for text in texts:
            refuse_sexualised_minors(text, context)
        problems = list(islice(self._problems(), MAX_MISTAKES + 1))
        if problems:
            raise _Mistakes(problems)
        return self

    @property
    def file(self) -> Path | None:
        """The file that it was read from; None where there is none."""
        return self._file

    @property
    def context(self) -> list[str]:
        """What the concept is about, for the check of its prompts."""
        return [self.name, self.summary, self.safety_prompt, self.initial_phrase, *self.words]

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
        self, kind: PromptKind, num: int, *, seed: int = 0, split: Literal["train", "test"] | None = None
    ) -> list[Prompt]:
        """Draws prompts, all templates equally often, each of a template at most once until all of them were drawn.

        Args:
            kind: which templates.
            num: how many, >= 0.
            seed: same seed, same prompts.
            split: ``train`` and ``test`` never share a prompt: `test_texts` are kept for tests. A kind with too few
                prompts for that uses all for both.

        Raises:
            ConceptError: the concept has no prompts of this kind.
        """
        groups = [list(self._expand(template, kind)) for template in self._templates(kind)]
        if split is not None and (kept := self.test_texts(kind)):
            groups = [[prompt for prompt in group if (prompt.text in kept) == (split == "test")] for group in groups]
        groups = [group for group in groups if group]
        if not groups:  # else each round below draws one prompt at least
            raise ConceptError(f"concept {self.name!r} has no {kind} prompts. Add some under prompts.{kind}.")
        rng = random.Random(f"{seed}-{kind}-{split}")  # noqa: S311 - reproducible draws, no secret
        drawn: list[Prompt] = []
        while len(drawn) < num:
            for group in groups:
                rng.shuffle(group)
            rounds = max(map(len, groups))
            drawn += [group[index] for index in range(rounds) for group in groups if index < len(group)]
        return drawn[:num]

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

    def _problems(self) -> Iterator[_Mistake]:
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

    def _template_problems(self) -> Iterator[_Mistake]:
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
            near = _near(slot, self.prompts.slots)
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

    def _shared_texts(self) -> Iterator[_Mistake]:
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


def concept_names() -> list[str]:
    """Names of all concepts that ``load_concept`` finds by name, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml") if is_file(path)})


def concept_path(name: str) -> Path:
    """Where the file of a concept is: a path as given, a name below ``./annotation_configs`` or among those that ship.

    Raises:
        ConceptError: there is none.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if is_file(Path(name)):
            return Path(name)
        what = "not a plain file, as a concept is" if exists(Path(name)) else "no such concept file"
        raise ConceptError(f"{brief(name)}: {what}. Write one with: dagkit concept new NAME")
    for folder in _folders():
        if is_file(folder / f"{name}.yaml"):
            return folder / f"{name}.yaml"
    near = _near(name, concept_names())
    raise ConceptError(
        f"{quoted(name)} is not a concept.{near} Available: {', '.join(concept_names())}. "
        f"Write a new one with: dagkit concept new {brief(name, 64)}"
    )


def page_path(concept: Concept) -> Path | None:
    """The user's own labelling page: ``<name>.xml`` beside the concept's file, or where named concepts lie.

    Returns:
        A path at which there is something, or None.
    """
    beside = [concept.file.parent] if concept.file is not None else []
    paths = (folder / f"{concept.name}.xml" for folder in [*beside, *_folders()])
    return next(filter(exists, paths), None)


def load_concept(name: str | Path) -> Concept:
    """Reads and checks one concept file.

    Args:
        name: a concept's name or the path of its YAML file.

    Raises:
        ConceptError: no such concept, or mistakes in its file, all of them in one message.
        PromptRefused: a prompt of the file sexualises minors.
    """
    path = concept_path(str(name))
    concept = parse_concept(read_text(path), source=brief(str(path)))
    concept._file = path
    return concept


def read_text(path: Path) -> str:
    """The text of a file that a user wrote.

    Raises:
        ConceptError: it is no plain file, cannot be read, is larger than ``MAX_FILE_BYTES`` or no UTF-8.
    """
    where = brief(str(path))
    try:
        if not is_file(path):
            raise ConceptError(f"{where}: expected a plain file. Put a text file there.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConceptError(f"{where}: expected at most {MAX_FILE_BYTES:,} bytes, but got {path.stat().st_size:,}.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConceptError(
            f"{where}: expected UTF-8 text, but {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise ConceptError(f"{where}: cannot be read: {error.strerror}. Check the file and its permissions.") from error


def parse_concept(text: str, *, source: str) -> Concept:
    """Checks the text of a concept file.

    Args:
        text: YAML, see `dagkit.plain_yaml`.
        source: what to call the text in messages.

    Raises:
        ConceptError: mistakes, each with its line; of many the first ones, and how many there are.
        PromptRefused: a prompt sexualises minors.
    """
    try:
        document = read_yaml(text)
    except ValueError as error:
        raise ConceptError(f"{source}: {reason(error)}") from error
    if document.mistakes:
        raise _as_error(source, document.mistakes, len(document.mistakes))
    if not isinstance(document.value, dict):
        got = "nothing" if document.value is None else type(document.value).__name__
        raise ConceptError(f"{source}: expected 'key: value' lines, but got {got}. See: dagkit concept new NAME")
    try:
        return Concept.model_validate(document.value)
    except PromptRefused as refusal:
        raise PromptRefused(f"{source}: {refusal}") from None
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = list(islice(chain.from_iterable(_explain(one, document) for one in problems), MAX_MISTAKES + 1))
        raise _as_error(source, lines, max(len(problems), len(lines))) from None


def _as_error(source: str, lines: Sequence[str], num: int) -> ConceptError:
    if num == 1:
        return ConceptError(f"{source}: {lines[0]}")
    more = [f"... and {num - MAX_MISTAKES:,} more"] if num > MAX_MISTAKES else []
    shown = [f"  {line}" for line in [*lines[:MAX_MISTAKES], *more]]
    return ConceptError("\n".join([f"{source}: {num:,} mistakes:", *shown]))


def _folders() -> Sequence[Path]:
    return [folder for folder in (Path("annotation_configs"), shipped_folder("annotation_configs")) if folder.is_dir()]


def _slot(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_test(text: str) -> bool:
    return _digest(text)[0] < 256 // 5


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name[:64], list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _explain(problem: Any, document: Document) -> Iterator[str]:
    """One line a mistake: where, what was expected, what came, what to do."""
    path = tuple(part for part in problem["loc"] if part not in ("Plugin", "[key]"))
    kind, given = problem["type"], problem["input"]
    prefix = _prefix(path, document)
    if kind == "value_error":
        error = problem["ctx"]["error"]
        for inner, text in error.found if isinstance(error, _Mistakes) else [((), str(error))]:
            yield f"{_prefix((*path, *inner), document)}: {text}"
    elif kind == "missing":
        yield f"{prefix}: missing. Add it; 'dagkit concept new NAME' shows what it is for."
    elif kind == "extra_forbidden":
        yield f"{prefix}: unknown key.{_near(str(path[-1]), _fields(path[:-1]))} Remove it or mend its name."
    elif kind == "string_pattern_mismatch":
        allowed = "letters and '_'" if path[:2] == ("prompts", "slots") else "letters, digits, '-' and '_'"
        yield f"{prefix}: expected lower-case {allowed}, a letter first, but got {quoted(given, 60)}."
    else:
        hint = ""
        if kind == "less_than_equal" and path[-1] in Thresholds.model_fields:
            hint = f" Write {given / 100:g}." if isinstance(given, (int, float)) and given <= 100 else ""
        elif kind == "string_type" and isinstance(given, (bool, int, float, type(None))):
            hint = " Put it in quotes if it is meant as text."
        yield f"{prefix}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but got {quoted(given, 60)}.{hint}"


def _prefix(path: Sequence[Any], document: Document) -> str:
    """``line 3: prompts.unsafe.0``, as far as the file has it."""
    line = document.line(tuple(path))
    where = brief(".".join(map(str, path)), 100)
    return f"line {line}: {where}" if line else where


def _fields(path: Sequence[Any]) -> list[str]:
    model: Any = Concept
    for part in path:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    return list(getattr(model, "model_fields", {}))
