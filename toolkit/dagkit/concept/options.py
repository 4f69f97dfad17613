"""Plugins as concept files name them, and their options: a pydantic model that each plugin declares.

A proposer, segmenter or judge has a class attribute ``Options``, a `PluginOptions` with bounds and a text below each
field. What ``concept show`` checks, what an editor knows of a file and what a plugin is built with is that one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import CoreSchema

from dagkit import plugins
from dagkit.concept.fields import Name, Strict, did_you_mean
from dagkit.errors import ConceptError, brief, quoted

if TYPE_CHECKING:
    from dagkit.concept.schema import Concept


MARK: Final = "dagkit:plugin"


class Plugin(BaseModel):
    """A plugin by name, with its options: ``nudenet`` or ``{name: nudenet, threshold: 0.4}``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name

    @property
    def options(self) -> dict[str, Any]:
        """All that the file says beside the name."""
        return dict(self.model_extra or {})


class PluginOptions(Strict):
    """What a concept file may say beside a plugin's name; this one has no options."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class OfKind:
    """Marks a `Plugin` in a schema for editors: it is one of the plugins of this kind, see `dagkit.concept.editor`."""

    kind: plugins.Kind

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {MARK: self.kind}


def _as_plugin(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_plugins(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


ProposerPlugin = Annotated[Plugin, BeforeValidator(_as_plugin), OfKind("proposers")]
SegmenterPlugin = Annotated[Plugin, BeforeValidator(_as_plugin), OfKind("segmenters")]
JudgePlugin = Annotated[Plugin, BeforeValidator(_as_plugin), OfKind("judges")]
_SomeProposers = Annotated[list[ProposerPlugin], Field(min_length=1, max_length=20)]
ProposerPlugins = Annotated[
    _SomeProposers, BeforeValidator(_as_plugins, json_schema_input_type=ProposerPlugin | _SomeProposers)
]


def _known_label(value: str, info: ValidationInfo) -> str:
    if info.context is not None:
        try:
            info.context.labels.is_positive(value)
        except ConceptError as error:
            raise ValueError(str(error)) from error
    return value


Label = Annotated[str, AfterValidator(_known_label)]
"""A label of the concept whose file has the options."""


def find_plugin(kind: plugins.Kind, plugin: Plugin, concept: Concept) -> tuple[Any, Any]:
    """Imports a plugin that a concept names and reads its options.

    Returns:
        Its class, and an instance of the class's ``Options``.

    Raises:
        PluginError: as of `dagkit.plugins.load`.
        ConceptError: options that it does not have, or values that are none for it: a line for each.
    """
    found = plugins.load(kind, plugin.name)
    try:
        return found, found.Options.model_validate(plugin.options, context=concept)
    except ValidationError as error:
        where = f"concept {concept.name!r}: {plugins.singular(kind)} {plugin.name}"
        lines = [f"{where}: {_explain(one, found.Options)}" for one in error.errors(include_url=False)]
        raise ConceptError("\n".join(lines)) from None


def _explain(problem: Any, schema: type[PluginOptions]) -> str:
    """What is wrong with one option: its name, what was expected, what came, what to do."""
    path = [str(part) for part in problem["loc"] if part != "[key]"]
    option, given, fields = brief(".".join(path), 60), quoted(problem["input"], 60), schema.model_fields
    match problem["type"]:
        case "extra_forbidden":
            known = ", ".join(fields) or "none"
            return f"unknown option {option!r}.{did_you_mean(option, fields)} It takes {known}."
        case "missing" if len(path) == 1:
            return f"the option {option} is missing. Add it: {fields[option].description}"
        case "value_error":
            return f"{option}: {problem['ctx']['error']}"
        case "literal_error":
            allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            near = did_you_mean(str(problem["input"]), allowed.split(", "))
            return f"{option}: expected one of {allowed}, but got {given}.{near or ' Mend it.'}"
    return f"{option}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but got {given}. Mend it."
