"""Types of fields: what concept files and plugins' options are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from dagkit.errors import quoted

Item = TypeVar("Item")

MAX_PROMPT_LENGTH: Final = 1000


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


def as_list(value: Any) -> Any:
    """A text as a list of one; anything else as it is."""
    return [value] if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
SlotName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,63}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_LENGTH)]
_ONCE: Final = {"uniqueItems": True}
Names = Annotated[list[Name], Field(max_length=100, json_schema_extra=_ONCE), AfterValidator(_once)]
Texts = Annotated[list[Text], Field(max_length=2000, json_schema_extra=_ONCE), AfterValidator(_once)]
_SomeTexts = Annotated[list[Text], Field(min_length=1)]
OneOrMoreTexts = Annotated[_SomeTexts, BeforeValidator(as_list, json_schema_input_type=Text | _SomeTexts)]
"""A text, or a list of texts."""

NO_FLAG: Final = BeforeValidator(_no_flag)
"""Of numbers: yes and no are none, though Python takes them. It stands behind the bounds, so that schemas show them."""

Share = Annotated[float, Field(ge=0, le=1), NO_FLAG]


class Strict(BaseModel):
    """No other keys, no infinite numbers; the text below a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` where one of the known names is near, else nothing."""
    near = difflib.get_close_matches(name[:64], list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
