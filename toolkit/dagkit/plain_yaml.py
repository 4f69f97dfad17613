"""YAML as far as a file of settings needs it: mappings, lists and plain values, with the line of each.

There are no tags, anchors, aliases and merge keys, no key twice, and no value that another program would read
otherwise: keys are text, numbers are finite, and what looks like a date is the text that stands there. Whatever is in
the file, reading it takes time and memory in proportion to its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.resolver import Resolver

from dagkit.errors import CONTROL, quoted, reason

MAX_DEPTH: Final = 20
"""Levels of mappings and lists inside each other."""

MAX_DIGITS: Final = 40
"""Characters of a number."""

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG: Final = "tag:yaml.org,2002:"

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """What a text says.

    Attributes:
        value: dictionaries with text keys, lists, str, int, float, bool and None; None of an empty text.
        lines: where in the text each part of it begins, from 1, by the keys and numbers that lead to it.
        mistakes: what YAML allows and dagkit does not, each with its line; ``value`` is of no use where there are any.
    """

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of the deepest part of ``path`` that the text has; None at the top."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def read_yaml(text: str) -> Document:
    """Reads one document.

    Raises:
        ValueError: it is not YAML, or nested too deeply; the message is one line that begins with the line's number.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if found := CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"line {line}: the character {found[0]!r} cannot stand in a text. Remove it.")
    reader = _Reader()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            reader.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None)
        raise ValueError(f"{where}not valid YAML: {problem or reason(error)}. Mend that line.") from error
    return Document(reader.value, reader.lines, reader.mistakes)


@dataclass
class _Open:
    """A mapping or list that is being read."""

    value: dict[str, Any] | list[Any]
    path: Path
    first_line: dict[str, int] = field(default_factory=dict)
    key: str | None = None
    is_key_next: bool = True


class _Reader:
    """Builds the value from the parser's events, without recursion."""

    def __init__(self) -> None:
        self.value: Any = None
        self.lines: dict[Path, int] = {}
        self.mistakes: list[str] = []
        self._stack: list[_Open] = []
        self._num_documents = 0

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                raise ValueError(f"line {line}: a second document begins here (---). Write one a file.")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._stack.pop()
        elif isinstance(event, yaml.AliasEvent):
            self._refuse(line, "aliases (*name) are not allowed. Write the value out.")
            self._put(None, line, is_text=False)
        elif isinstance(event, yaml.NodeEvent):
            self._take_node(event, line)

    def _take_node(self, event: Any, line: int) -> None:
        if event.anchor is not None:
            self._refuse(line, "anchors (&name) are not allowed. Remove it.")
        if event.tag is not None:
            shown = quoted(event.tag.replace(_TAG, "!!"), 60)
            self._refuse(line, f"tags are not allowed, but there is {shown}. Remove it.")
        if isinstance(event, yaml.ScalarEvent):
            if found := CONTROL.search(event.value):
                self._refuse(line, f"the character {found[0]!r} cannot stand in a text. Remove it.")
            is_plain = event.implicit[0] and event.tag is None
            is_key = self._is_at_key()
            value = event.value if not is_plain else self._scalar(event.value, line)
            if is_key and not isinstance(value, str):
                shown = quoted(event.value, 60)
                self._refuse(line, f"the key {shown} means {_kind(value)}. Put it in quotes if it is a name.")
                value = event.value
            self._put(value, line)
            return
        value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if len(self._stack) >= MAX_DEPTH:
            raise ValueError(f"line {line}: more than {MAX_DEPTH} levels inside each other. Write it flat.")
        path = self._put(value, line, is_text=False)
        self._stack.append(_Open(value, path))

    def _is_at_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].value, dict) and self._stack[-1].is_key_next

    def _put(self, value: Any, line: int, *, is_text: bool = True) -> Path:
        """Puts a key or a value where it belongs, and returns its path."""
        if not self._stack:
            self.value = value
            return ()
        into = self._stack[-1]
        if isinstance(into.value, list):
            into.value.append(value)
            path = (*into.path, len(into.value) - 1)
            self.lines[path] = line
            return path
        if into.is_key_next:
            self._put_key(into, value, line, is_text)
            return (*into.path, str(into.key))
        into.is_key_next = True
        path = (*into.path, str(into.key))
        if into.key is not None:
            into.value[into.key] = value
        return path

    def _put_key(self, into: _Open, value: Any, line: int, is_text: bool) -> None:
        into.is_key_next = False
        if not is_text:
            self._refuse(line, "a key is a name, not a mapping, a list or an alias. Write a name.")
            into.key = None
            return
        first = into.first_line.setdefault(value, line)
        if value == "<<":
            self._refuse(line, "merge keys (<<) are not allowed. Write the keys out.")
        elif value in into.value:
            shown = quoted(value, 60)
            self._refuse(line, f"the key {shown} stands in line {first} already, and only one can count. Remove one.")
        into.key = value
        self.lines.setdefault((*into.path, value), line)

    def _refuse(self, line: int, what: str) -> None:
        self.mistakes.append(f"line {line}: not valid YAML here: {what}")

    def _scalar(self, text: str, line: int) -> Any:
        """What a plain, unquoted scalar means."""
        tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))
        kind = tag.removeprefix(_TAG)
        if kind not in ("int", "float", "bool", "null"):
            return text
        node = yaml.ScalarNode(tag, text)
        if kind == "null":
            return None
        if kind == "bool":
            return _CONSTRUCTOR.construct_yaml_bool(node)
        if len(text) > MAX_DIGITS:
            self._refuse(line, f"a number of {len(text):,} characters. Write at most {MAX_DIGITS}.")
            return None
        if ":" in text:  # YAML 1.1 would read 12:30 as 750
            return text
        try:
            number = _CONSTRUCTOR.construct_yaml_int(node) if kind == "int" else _CONSTRUCTOR.construct_yaml_float(node)
        except (ValueError, ConstructorError):
            return text
        if not isfinite(number):
            self._refuse(line, f"expected a finite number, but got {text!r}. Write a number.")
            return None
        return number


def _kind(value: Any) -> str:
    return {bool: "a yes or no", type(None): "nothing"}.get(type(value), "a number")


_RESOLVER: Final[Any] = Resolver()
_CONSTRUCTOR: Final = SafeConstructor()


def flow(text: str) -> str:
    """A text as it can stand anywhere in YAML, in lists in brackets too: quoted where it must be."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=10**9).strip()[1:-1]
