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
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from dagkit.errors import ConceptError, PromptRefused
from dagkit.prompts import refuse_sexualised_minors
from dagkit.resources import shipped_folder

PromptKind = Literal["unsafe", "safe", "hinted"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
Share = Annotated[float, Field(ge=0, le=1)]

MAX_FILE_BYTES: Final = 1_000_000
MAX_PROMPTS: Final = 100_000
_SLOT: Final = re.compile(r"\{([a-z][a-z_]*?)(_\d+)?\}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin(BaseModel):
    """A plugin by name, with its options: ``nudenet`` or ``{name: nudenet, threshold: 0.4}``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name

    @property
    def options(self) -> dict[str, Any]:
        """All that the file says beside the name."""
        return dict(self.model_extra or {})


def _as_plugin(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_plugins(value: Any) -> Any:
    return [_as_plugin(item) for item in (value if isinstance(value, list) else [value])]


OnePlugin = Annotated[Plugin, BeforeValidator(_as_plugin)]
ManyPlugins = Annotated[list[Plugin], BeforeValidator(_as_plugins), Field(min_length=1)]


class Labels(_Strict):
    """What annotators mark. The mask is the union of the positive labels minus the union of the negative ones."""

    positive: list[Name] = Field(min_length=1)
    negative: list[Name] = []


class Prompts(_Strict):
    """Prompt templates. ``{slot}`` takes a value of the slot; ``{slot_2}`` another value, different from the first."""

    unsafe: list[Text] = Field(min_length=1)
    safe: list[Text] = Field(min_length=1)
    hinted: list[Text] = []
    slots: dict[Name, list[Text]] = {}
    keep: list[Name] = []
    """Slots whose values a guard must leave in the picture."""


class Thresholds(_Strict):
    """When a region counts as the concept. Left out, a threshold is calibrated on validation data."""

    highlight: Share | None = None
    edit: Share | None = None
    max_false_trigger_rate: Share = 0.05


class Sampling(_Strict):
    """How candidates and samples are drawn."""

    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=100)
    width: int = Field(512, ge=8, le=4096, multiple_of=8)
    height: int = Field(512, ge=8, le=4096, multiple_of=8)


class Prompt(_Strict):
    """One prompt made from a template."""

    text: str
    kind: PromptKind
    values: dict[str, str] = {}
    """Slot -> value, e.g. ``{"object": "cat", "object_2": "dog", "weapon": "bomb"}``."""
    keep: list[str] = []
    """Values that a guard must leave in the picture."""


class Concept(_Strict):
    """One concept, as its YAML file describes it."""

    name: Name
    summary: Text
    model: Text
    labels: Labels
    prompts: Prompts
    initial_phrase: Text
    safety_prompt: Text
    words: list[Text] = Field(min_length=1)
    proposers: ManyPlugins = [Plugin(name="attention")]
    segmenter: OnePlugin = Plugin(name="sam")
    judge: OnePlugin = Plugin(name="demo")
    thresholds: Thresholds = Thresholds()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _consistent(self) -> Concept:
        problems = []
        both = sorted(set(self.labels.positive) & set(self.labels.negative))
        if both:
            problems.append(f"labels: {', '.join(both)} cannot be positive and negative at once. Keep one.")
        for kind in ("unsafe", "safe", "hinted"):
            for template in getattr(self.prompts, kind):
                problems += [f"prompts.{kind}: {problem}" for problem in self._template_problems(template)]
        problems += [
            f"prompts.keep: {slot!r} is not one of the slots ({', '.join(self.prompts.slots) or 'none'})."
            for slot in self.prompts.keep
            if slot not in self.prompts.slots
        ]
        if problems:
            raise ValueError("\n".join(problems))
        for prompt in self._every_text():
            refuse_sexualised_minors(prompt, self.context)
        return self

    @property
    def context(self) -> list[str]:
        """What the concept is about, for the check of its prompts."""
        return [self.name, self.summary, self.safety_prompt, self.initial_phrase, *self.words]

    def all_prompts(self, kind: PromptKind) -> list[Prompt]:
        """Every prompt that the templates of one kind can make, in a stable order."""
        return [prompt for template in getattr(self.prompts, kind) for prompt in self._expand(template, kind)]

    def sample_prompts(
        self, kind: PromptKind, num: int, *, seed: int = 0, split: Literal["train", "test"] | None = None
    ) -> list[Prompt]:
        """Draws prompts, all templates equally often, each prompt at most once until all were drawn.

        Args:
            kind: which templates.
            num: how many, >= 0.
            seed: same seed, same prompts.
            split: ``train`` and ``test`` never share a prompt: a fifth of all texts, by their hash, is kept for tests.
                A concept with too few prompts for that (under 20) uses all for both.

        Raises:
            ConceptError: the concept has no prompts of this kind.
        """
        groups = [list(self._expand(template, kind)) for template in getattr(self.prompts, kind)]
        if not groups:
            raise ConceptError(f"concept {self.name!r} has no {kind} prompts. Add some under prompts.{kind}.")
        if split is not None and sum(map(len, groups)) >= 20:
            groups = [
                kept
                for group in groups
                if (kept := [prompt for prompt in group if _is_test(prompt.text) == (split == "test")])
            ]
        rng = random.Random(f"{seed}-{kind}-{split}")  # noqa: S311 - reproducible draws, no secret
        drawn: list[Prompt] = []
        while len(drawn) < num:
            for group in groups:
                rng.shuffle(group)
            rounds = max(map(len, groups))
            drawn += [group[index] for index in range(rounds) for group in groups if index < len(group)]
        return drawn[:num]

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

    def _template_problems(self, template: str) -> Iterator[str]:
        rest = _SLOT.sub("", template)
        if "{" in rest or "}" in rest:
            yield f"{template!r} holds a brace that is no slot. Write slots as {{name}} or {{name_2}}, in lower case."
        for match in _SLOT.finditer(template):
            if match[1] not in self.prompts.slots:
                near = _near(match[1], self.prompts.slots)
                yield f"{template!r} uses the slot {match[1]!r}, which prompts.slots does not list.{near}"
        slots = {match[0]: match[1] for match in _SLOT.finditer(template)}
        count = prod(len(self.prompts.slots.get(slot, ())) for slot in slots.values())
        if count > MAX_PROMPTS:
            yield f"{template!r} makes {count:,} prompts, but at most {MAX_PROMPTS:,} are allowed. Use fewer values."

    def _every_text(self) -> Iterator[str]:
        yield from (self.initial_phrase, self.safety_prompt)
        for kind in ("unsafe", "safe", "hinted"):
            for template in getattr(self.prompts, kind):
                values = " ".join(value for match in _SLOT.finditer(template) for value in self.prompts.slots[match[1]])
                yield f"{template} {values}"


def concept_names() -> list[str]:
    """Names of all concepts that ``load_concept`` finds by name, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def concept_path(name: str) -> Path:
    """Where the file of a concept is: a path as given, a name below ``./annotation_configs`` or among those that ship.

    Raises:
        ConceptError: there is none.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise ConceptError(f"{name}: no such concept file. Write one with: dagkit concept new NAME")
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    near = _near(name, concept_names())
    raise ConceptError(
        f"{name!r} is not a concept.{near} Available: {', '.join(concept_names())}. "
        f"Write a new one with: dagkit concept new {name}"
    )


def load_concept(name: str | Path) -> Concept:
    """Reads and checks one concept file.

    Args:
        name: a concept's name or the path of its YAML file.

    Raises:
        ConceptError: no such concept, or mistakes in its file, all of them in one message.
        PromptRefused: a prompt of the file sexualises minors.
    """
    path = concept_path(str(name))
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConceptError(f"{path}: expected at most {MAX_FILE_BYTES:,} bytes, but got {path.stat().st_size:,}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConceptError(
            f"{path}: expected UTF-8 text, but {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    return parse_concept(text, source=str(path))


def parse_concept(text: str, *, source: str) -> Concept:
    """Checks the text of a concept file.

    Args:
        text: YAML.
        source: what to call the text in messages.

    Raises:
        ConceptError: all mistakes in one message, each with its line.
        PromptRefused: a prompt sexualises minors.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConceptError(
                f"{source}: YAML aliases (*name) are not allowed in a concept file. Write the value out."
            )
        data = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConceptError(
            f"{source}{where}: not valid YAML: {getattr(error, 'problem', None) or error}. Mend that line."
        ) from error
    if not isinstance(data, dict):
        raise ConceptError(
            f"{source}: expected 'key: value' lines, but got {type(data).__name__}. See: dagkit concept new NAME"
        )
    try:
        return Concept.model_validate(data)
    except PromptRefused as refusal:
        raise PromptRefused(f"{source}: {refusal}") from None
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem, root)]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConceptError("\n".join([f"{source}: {count}:", *(f"  {line}" for line in lines)])) from None


def _folders() -> Sequence[Path]:
    return [folder for folder in (Path("annotation_configs"), shipped_folder("annotation_configs")) if folder.is_dir()]


def _slot(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _is_test(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 5


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _explain(problem: Any, root: yaml.Node | None) -> Iterator[str]:
    """One line a mistake: where, what was expected, what came, what to do."""
    path = [part for part in problem["loc"] if part != "Plugin"]
    where = ".".join(map(str, path))
    line = _line(root, path)
    prefix = f"line {line}: {where}" if line else where
    kind, given = problem["type"], problem["input"]
    if kind == "value_error":
        yield from (f"{prefix}: {text}" if prefix else text for text in str(problem["ctx"]["error"]).splitlines())
    elif kind == "missing":
        yield f"{where}: missing. Add it; 'dagkit concept new NAME' shows what it is for."
    elif kind == "extra_forbidden":
        yield f"{prefix}: unknown key.{_near(str(path[-1]), _fields(path[:-1]))} Remove it or mend its name."
    elif kind == "string_pattern_mismatch":
        yield f"{prefix}: expected lower-case letters, digits, '-' and '_', a letter first, but got {given!r}."
    else:
        hint = (
            f" Write {given / 100:g}."
            if kind == "less_than_equal" and path[-1] in Thresholds.model_fields and given <= 100
            else ""
        )
        shown = repr(given) if len(repr(given)) <= 60 else f"{repr(given)[:57]}..."
        yield f"{prefix}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but got {shown}.{hint}"


def _fields(path: Sequence[Any]) -> list[str]:
    model: Any = Concept
    for part in path:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    return list(getattr(model, "model_fields", {}))


def _line(node: yaml.Node | None, path: Sequence[Any]) -> int | None:
    """The line of the deepest part of ``path`` that the file has, from 1; None at the top."""
    found = None
    for part in path:
        child = None
        if isinstance(node, yaml.MappingNode):
            child = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = (node.value[part], node.value[part])
        if child is None:
            return found
        found, node = child[0].start_mark.line + 1, child[1]
    return found
