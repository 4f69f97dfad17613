"""import: pictures from elsewhere -> candidates/, and the masks that came with them -> premasks/.

Later stages take them as they take what generate and premask made: annotators can correct the masks, and export takes
them as they are, in the review state ``imported``.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from dagkit.stages import base

if TYPE_CHECKING:
    from dagkit.concept import Concept
    from dagkit.exchange import Entry, Fitted, LabelNames, Source
    from dagkit.workspace import Row, StageFolder, Workspace

Kind = Literal["unsafe", "safe"]

_KEY_DIGITS: Final = 16
"""Of a picture's hash, in its key."""


@dataclass
class _Report:
    """What became of each entry: (entry, reason) of those that were not taken, (entry, note) of others."""

    taken: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def written(self, source: Source, unmet: list[str]) -> dict[str, Any]:
        """As it is kept beside the candidates."""
        return {
            "format": source.format,
            "source": source.version,
            "taken": self.taken,
            "there_already": self.there,
            "not_taken": [{"entry": entry, "reason": reason} for entry, reason in self.refused],
            "notes": [{"entry": entry, "note": note} for entry, note in self.notes],
            "labels_never_met": unmet,
        }


def run(
    workspace: Workspace,
    concept: Concept,
    source: Source,
    *,
    names: LabelNames | None = None,
    kind: Kind = "unsafe",
    is_masked: bool = True,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Takes pictures into ``candidates/<concept>/``, as large as those that the base model draws, and their masks.

    What cannot be taken is left out and named; what is there already is not taken again. The whole report is kept as
    ``candidates/<concept>/imports/<format>-<hash>.json``.

    Args:
        workspace: where to write.
        concept: whose labels and size of images to use.
        source: as from `dagkit.exchange.find_source` or `pictures_of`.
        names: what the source was read with, for labels that were never met; None where it has none.
        kind: what pictures without masks show: ``unsafe`` are looked at by `premask`, ``safe`` ones are not.
        is_masked: whether the source says what the concept is in its pictures; else only candidates are written.
        progress: shows progress; None for silence.

    Returns:
        ``data`` holds ``refused`` and ``notes``, (entry, text) each, and the path of the ``report``.

    Raises:
        DatasetError: nothing could be taken; the first reasons are in the message.
        WorkspaceError: the workspace cannot be written.
    """
    from dagkit.errors import DatasetError
    from dagkit.workspace import lock, sha256_json

    candidates, premasks = (workspace.stage(name, concept.name) for name in ("candidates", "premasks"))
    progress, report = progress or base.Progress(is_quiet=True), _Report()
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for folder in (candidates, premasks) if is_masked else (candidates,):
            folder.claim("settings.json")
            stack.enter_context(lock(folder.path))
        drawn, masked = {row["key"]: row for row in candidates.rows()}, {row["key"]: row for row in premasks.rows()}
        origins = {key: row.get("source") for key, row in drawn.items()}
        seen: list[str] = []
        with progress.bar("import") as show:
            for index, entry in enumerate(source.entries):
                show(index, None)
                seen.append(entry.name)
                taken = _read(entry, concept, report)
                if taken is None:
                    continue
                key, fitted = taken
                origin = f"{source.format}: {entry.name}"[:1000]
                if key in origins:
                    is_same = not is_masked or key not in masked or _is_marked_so(premasks, masked[key], fitted)
                    _again(key, entry, origin, origins[key], is_same, report)
                if key in drawn and (key in masked or not is_masked):
                    continue
                row = _row(key, concept, origin, fitted, kind if not is_masked else None)
                if is_masked and key not in masked:  # first, for no candidate may look as if nobody had marked it
                    masked[key] = _commit_masks(premasks, row, fitted, concept, source, origin)
                if key not in drawn:
                    _commit_picture(candidates, row, fitted)
                    drawn[key], origins[key] = row, origin
                    report.taken.append(entry.name)
                    report.notes += [(entry.name, note) for note in fitted.notes]
                counts[row["kind"]] += 1
        unmet = names.unmet if names is not None else []
        written = report.written(source, unmet)
        if not (report.taken or report.there):
            first = "; ".join(f"{entry}: {reason}" for entry, reason in report.refused[:3])
            more = f"; and {len(report.refused) - 3} more" if len(report.refused) > 3 else ""
            raise DatasetError(
                f"nothing was taken from {source.format} {source.version}: {first or 'it is empty'}{more}."
            )
        name = f"imports/{source.format}-{sha256_json([source.format, source.version, seen])[7:15]}.json"
        path = candidates.write_json(name, written)
    shown = ", ".join(f"{count} {one}" for one, count in counts.items())
    message = (
        f"{len(report.taken)} pictures taken{f' ({shown})' if shown else ''}, {len(report.there)} were there already, "
        f"{len(report.refused)} not taken -> {candidates.path}; report: {path}"
    )
    data = {"refused": report.refused, "notes": report.notes, "labels_never_met": unmet, "counts": dict(counts)}
    return base.StageResult(
        "import", len(report.taken), len(report.there), message, {**data, "report": path, "path": candidates.path}
    )


def _read(entry: Entry, concept: Concept, report: _Report) -> tuple[str, Fitted] | None:
    """Key and picture of an entry; None where it cannot be taken, which is noted."""
    from dagkit.errors import DagkitError, MissingPackage
    from dagkit.exchange import fit
    from dagkit.workspace import sha256_json

    size = (concept.sampling.width, concept.sampling.height)
    try:
        marked = entry.read()
        fitted = fit(marked, size, concept.labels.positive)
    except MissingPackage:
        raise
    except DagkitError as error:
        report.refused.append((entry.name, str(error)))
        return None
    digest = sha256_json([marked.picture.digest, *size]).removeprefix("sha256:")
    return f"i{digest[:_KEY_DIGITS]}", fitted


def _is_marked_so(premasks: StageFolder, row: Row, fitted: Fitted) -> bool:
    """Whether the masks of a row are those of a picture; of one that others proposed masks for, nobody asks."""
    import numpy as np

    if row.get("source") is None:
        return True
    if row["masks"].keys() != fitted.masks.keys():
        return False
    return all(
        np.array_equal(premasks.read_mask(row["masks"][label]["path"], fitted.image.size), mask)
        for label, mask in fitted.masks.items()
    )


def _again(key: str, entry: Entry, origin: str, before: str | None, is_same: bool, report: _Report) -> None:
    """Notes a picture that is there already: as of an earlier run, or as another entry of the source."""
    if not is_same:
        report.refused.append(
            (
                entry.name,
                f"the same picture as {before or key}, with other masks, and those stay. Correct them in Label Studio "
                "(dagkit push), or import into another --workspace",
            )
        )
    elif before == origin and entry.name not in report.taken:
        report.there.append(entry.name)
    else:
        report.refused.append((entry.name, f"the same picture as {before or key}: a duplicate"))


def _row(key: str, concept: Concept, origin: str, fitted: Fitted, kind: Kind | None) -> Row:
    """The candidate's row."""
    from dagkit.manifests import IMPORTED
    from dagkit.seeds import imported_seed

    shows = any(label in fitted.masks for label in concept.labels.positive)
    kind = kind or ("unsafe" if shows else "safe")
    return {
        "key": key,
        "image": f"images/{key}.png",
        "prompt": "",
        "kind": kind,
        "prompt_kind": kind,
        "seed": imported_seed(key[1:]),
        "model": IMPORTED,
        "model_fingerprint": "",
        "settings": {"width": fitted.image.width, "height": fitted.image.height},
        "source": origin,
        "window": [round(side, 2) for side in fitted.window],
    }


def _commit_picture(candidates: StageFolder, row: Row, fitted: Fitted) -> None:
    from dagkit.png import picture_png

    candidates.commit(row, {row["image"]: picture_png(fitted.image)})


def _commit_masks(
    premasks: StageFolder, row: Row, fitted: Fitted, concept: Concept, source: Source, origin: str
) -> Row:
    from dagkit.png import mask_png

    paths = {label: f"masks/{row['key']}-{label}.png" for label in fitted.masks}
    masks = {
        label: {"path": path, "score": 1.0, "is_positive": label in concept.labels.positive}
        for label, path in paths.items()
    }
    marked: Row = {
        "key": row["key"],
        "masks": masks,
        "proposers": [{"name": source.format, "version": source.version}],
        "score": 1.0 if row["kind"] == "unsafe" else 0.0,
        "source": origin,
    }
    premasks.commit(marked, {paths[label]: mask_png(mask) for label, mask in fitted.masks.items()})
    return marked
