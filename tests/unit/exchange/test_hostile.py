"""Files of others with any value in the place of any other: an entry is read, or named with what is wrong with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import foreign_data as foreign
from dagkit.concept import Labels
from dagkit.errors import DagkitError
from dagkit.exchange import LabelNames, find_source, fit
from foreign_data import put, scenes

LABELS = Labels(positive=["weapon"], negative=["harmless"])
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**70,
    1e300,
    0.5,
    "",
    "x",
    "\ud800",
    "a\0b",
    "../..",
    [],
    [[]],
    {},
    {"id": []},
    [None],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all parts of a JSON value; of long lists the first ones."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    whole = copy.deepcopy(value)
    part = whole
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return whole


@pytest.mark.parametrize(
    ("writer", "file", "kind"),
    [
        (foreign.as_labelme, "json/p00.json", "labelme"),
        (foreign.as_coco, "instances.json", "coco"),
        (foreign.as_label_studio, "project-4.json", "label-studio"),
    ],
)
def test_nothing_but_named_errors(writer: Callable[..., Path], file: str, kind: str, tmp_path: Path):
    if kind == "coco":
        pytest.importorskip("pycocotools")
    source = writer(tmp_path / "theirs", scenes(1, 0))
    good = json.loads((source / file).read_text())
    num_read = num_named = 0
    for path in places(good):
        for new in WRONG:
            put(source, {file: changed(good, path, new)})
            try:
                entries = list(find_source(str(source), LabelNames(LABELS), format=kind).entries)
            except DagkitError:
                num_named += 1
                continue
            for entry in entries:
                assert entry.name.isprintable()
                try:
                    fit(entry.read(), (64, 64), LABELS.positive)
                    num_read += 1
                except DagkitError:
                    num_named += 1
    assert num_read > 20
    assert num_named > 100
