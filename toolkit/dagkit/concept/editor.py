"""The JSON schema of a concept file, with the options of all plugins that are installed, for editors."""

from __future__ import annotations

from typing import Any, Final

from dagkit import plugins
from dagkit.concept.options import MARK
from dagkit.concept.schema import Concept

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_KINDS: Final[tuple[plugins.Kind, ...]] = ("proposers", "segmenters", "judges")


def json_schema() -> dict[str, Any]:
    """What a concept file may hold; what depends on other parts of the file, such as its labels, is not in it.

    Raises:
        PluginError: a plugin does not import.
    """
    whole = Concept.model_json_schema()
    definitions = whole.pop("$defs")
    for kind in _KINDS:
        named = {name: _options(kind, name, definitions) for name in plugins.names(kind)}
        definitions |= {f"{plugins.singular(kind)}_{name}": schema for name, schema in named.items()}
        references = [{"$ref": f"#/$defs/{plugins.singular(kind)}_{name}"} for name in named]
        bare = [name for name, schema in named.items() if schema["required"] == ["name"]]
        definitions[kind] = {
            "oneOf": [{"enum": bare}, *references],
            "discriminator": {
                "propertyName": "name",
                "mapping": {name: reference["$ref"] for name, reference in zip(named, references, strict=True)},
            },
        }
    schema: dict[str, Any] = _linked({"$schema": _DIALECT, **whole, "$defs": definitions})
    return schema


def _options(kind: plugins.Kind, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one plugin with its name beside its options; what these refer to goes into ``definitions``."""
    schema: dict[str, Any] = plugins.load(kind, name).Options.model_json_schema()
    definitions |= schema.pop("$defs", {})
    schema["title"] = f"{plugins.singular(kind)} {name}"
    schema["properties"] = {"name": {"const": name}, **schema["properties"]}
    schema["required"] = ["name", *schema.get("required", [])]
    return schema


def _linked(part: Any) -> Any:
    """A part of the schema in which each mark of `dagkit.concept.options.OfKind` refers to the plugins of its kind."""
    if isinstance(part, dict):
        kept = {key: _linked(value) for key, value in part.items() if key != MARK}
        return {"$ref": f"#/$defs/{part[MARK]}", **kept} if MARK in part else kept
    return [_linked(item) for item in part] if isinstance(part, list) else part
