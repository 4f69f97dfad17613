"""Folders of pictures and masks.

images/a.jpg   masks/a.png            one mask a picture, of the concept's first positive label
images/a.jpg   masks/LABEL/a.png      one a label
a.jpg          a_mask.png             side by side
safe/b.jpg                            pictures without the concept, which need no mask
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from dagkit.errors import DatasetError
from dagkit.exchange.entries import SUFFIXES, Entry, LabelNames, Marked, Source, SourceFolder, printable, united
from dagkit.exchange.pictures import read_mask, read_picture
from dagkit.provenance import public_name

if TYPE_CHECKING:
    from pathlib import Path

FORMAT: Final = "folder"
SAFE: Final = "safe"
_IMAGES, _MASKS, _BESIDE = "images", "masks", "_mask"


def read_folder(path: Path, names: LabelNames) -> Source:
    """A folder of pictures with masks, laid out as above.

    Args:
        path: of the folder.
        names: what the names of folders in ``masks`` mean.
    """
    return Source(FORMAT, printable(public_name(str(path.resolve())), 200), _entries(SourceFolder(path), names))


def pictures_of(path: Path) -> Source:
    """A folder of pictures about which nothing is known, those in its folders included."""
    folder = SourceFolder(path)
    entries = (Entry(printable(name), partial(_bare, folder, name)) for name in folder.files(SUFFIXES))
    return Source("pictures", printable(public_name(str(path.resolve())), 200), entries)


def _bare(folder: SourceFolder, name: str) -> Marked:
    return Marked(read_picture(folder.read(folder.inside(name))), {})


def _entries(folder: SourceFolder, names: LabelNames) -> Iterator[Entry]:
    everything = folder.files(SUFFIXES)
    is_split = (folder.path / _IMAGES).is_dir()
    safe = [name for name in everything if name.startswith(f"{SAFE}/")]
    masks = [name for name in everything if name not in safe and _is_mask(name, is_split)]
    pictures = [name for name in everything if name not in safe and name not in masks]
    if is_split:
        pictures = [name for name in pictures if name.startswith(f"{_IMAGES}/")]
    stems = Counter(_stem(name, is_split) for name in pictures)
    found: dict[str, list[tuple[str, str]]] = {}
    first = names.labels.positive[0]
    for mask in masks:
        for stem, label in _meanings(mask, is_split, first):
            if stem in stems:
                found.setdefault(stem, []).append((mask, label))
                break
        else:
            yield Entry(printable(mask), partial(_refused, "there is no picture for this mask"))
    for picture in pictures:
        stem = _stem(picture, is_split)
        if stems[stem] > 1:
            reason = f"{stems[stem]} pictures are called {printable(stem)!r}, and nobody can tell whose its mask is"
            yield Entry(printable(picture), partial(_refused, reason))
        else:
            yield Entry(printable(picture), partial(_marked, folder, names, picture, found.get(stem, [])))
    for picture in safe:
        yield Entry(printable(picture), partial(_bare, folder, picture))


def _is_mask(name: str, is_split: bool) -> bool:
    return name.startswith(f"{_MASKS}/") if is_split else PurePosixPath(name).stem.endswith(_BESIDE)


def _stem(name: str, is_split: bool) -> str:
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return stem.removeprefix(f"{_IMAGES}/") if is_split else stem


def _meanings(mask: str, is_split: bool, first: str) -> Iterator[tuple[str, str]]:
    """Stem of the picture and label that a mask's name may mean."""
    stem = PurePosixPath(mask).with_suffix("").as_posix()
    if not is_split:
        yield stem.removesuffix(_BESIDE), first
        return
    stem = stem.removeprefix(f"{_MASKS}/")
    yield stem, first
    yield stem.removesuffix(_BESIDE), first
    label, _, rest = stem.partition("/")
    yield rest, label


def _marked(folder: SourceFolder, names: LabelNames, picture: str, masks: list[tuple[str, str]]) -> Marked:
    if not masks:
        raise DatasetError(
            f"there is no mask for it. Add one (black where nothing is), or put the picture into {SAFE}/ if it does "
            "not show the concept"
        )
    read = read_picture(folder.read(folder.inside(picture)))
    marked = []
    for name, theirs in masks:
        try:
            marked.append((names.ours(theirs), read.upright(read_mask(folder.read(folder.inside(name))))))
        except DatasetError as error:
            raise DatasetError(f"{printable(name)}: {error}") from error
    united_masks = united(marked)
    return Marked(read, united_masks, () if united_masks else ("its mask is empty: it counts as safe",))


def _refused(reason: str) -> Marked:
    raise DatasetError(reason)
