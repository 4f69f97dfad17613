"""Draws all columns of an evaluation, judges the images, and resumes where a former run stopped."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dagkit.engines import Item, Made
from dagkit.engines.serial import Serial
from dagkit.errors import WorkspaceError
from dagkit.manifests import EvaluatedPrompt, Timing
from dagkit.models.checker import refuse_black
from dagkit.png import picture_png
from dagkit.workspace import StageFolder, sha256_json

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from dagkit.engines import Build, Engine
    from dagkit.evaluation.columns import Column, Drawn
    from dagkit.evaluation.prompts import EvalPrompt
    from dagkit.judges import Judge, Judgement
    from dagkit.workspace import Row


class ColumnResult:
    """What one column drew: rows by the key of their prompt, images, detection maps and costs.

    Args:
        folders: of the column and of its shards; a key counts once.
    """

    def __init__(self, folders: Sequence[StageFolder]) -> None:
        self.rows: dict[str, Row] = {}
        self.timings: dict[int, Row] = {}
        self._home: dict[str, StageFolder] = {}
        for folder in folders:
            for row in folder.rows():
                self.rows.setdefault(row["key"], row)
                self._home.setdefault(row["key"], folder)
            for row in _timings(folder).rows():
                self.timings.setdefault(row["batch"], row)

    def image(self, key: str) -> Image.Image:
        """The image of one prompt.

        Raises:
            WorkspaceError: it is missing or cannot be read.
        """
        return self._home[key].read_image(f"images/{key}.png")

    def damaged(self, key: str, expected: str) -> WorkspaceError:
        """The error that one prompt's row, image or maps are not as they were drawn."""
        folder = self._home[key]
        return WorkspaceError(
            f"{folder.path}: expected {expected} for {key}. "
            f"Delete its row in {folder.manifest.name}; it is then drawn again."
        )

    def maps(self, key: str) -> NDArray[np.float32] | None:
        """The detection map of every step, (steps, h, w) float32 in [0, 1]; ``None`` if none was kept.

        Raises:
            WorkspaceError: they cannot be read, or are not those of the row's trace.
        """
        folder = self._home[key]
        if not folder.has(f"maps/{key}.png"):
            return None
        strip = np.asarray(folder.read_image(f"maps/{key}.png", mode="L"), np.float32) / np.float32(255)
        num_steps = len(self.rows[key]["trace"].get("step", ()))
        if not num_steps or len(strip) % num_steps:
            raise self.damaged(key, f"a detection map of each of its {num_steps} steps")
        return strip.reshape(num_steps, -1, strip.shape[1])


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation on disk: ``<folder>/<column>-<hash of its settings>/`` with a row and an image a prompt.

    Whatever decides how a column's images come out is in its folder's name: a run can be continued and columns added,
    but nothing is ever mixed. Several machines can share the work: each draws one shard of the batches into a folder of
    its own below the column's.

    Attributes:
        folder: of this set of prompts, sampling settings and judges.
        prompts: all prompts, in the order in which they are batched.
        batch_size: images drawn at once; part of the settings, because arithmetic differs a little between sizes.
        shard: (i, n) draws every n-th batch from the i-th on, 1 <= i <= n; ``None`` draws all.
    """

    folder: StageFolder
    prompts: Sequence[EvalPrompt]
    batch_size: int = 8
    shard: tuple[int, int] | None = None

    def column_folder(self, column: Column) -> StageFolder:
        """Where a column's rows and images are written."""
        path = self.folder.path / f"{column.name}-{sha256_json(column.settings)[7:15]}"
        path = path if self.shard is None else path / "shard-{}-of-{}".format(*self.shard)
        return StageFolder(path, EvaluatedPrompt)

    def result(self, column: Column) -> ColumnResult:
        """What a column has drawn so far, all shards together."""
        whole = replace(self, shard=None).column_folder(column)
        shards = [StageFolder(path, EvaluatedPrompt) for path in sorted(whole.path.glob("shard-*-of-*"))]
        return ColumnResult([whole, *shards])

    def num_missing(self, columns: Sequence[Column]) -> int:
        """How many images are still to be drawn, by whatever shard."""
        keys = {prompt.key for prompt in self.prompts}
        return sum(len(keys - self.result(column).rows.keys()) for column in columns)

    @property
    def num_batches(self) -> int:
        """How many batches this shard draws in each column."""
        return sum(1 for _ in self.batches())

    def batches(self) -> Iterator[tuple[int, Sequence[EvalPrompt]]]:
        """Batches of one kind of prompt each, the same whatever is finished already; those of the shard only."""
        start, step = self.shard or (1, 1)
        for number, batch in self.all_batches():
            if number % step == start - 1:
                yield number, batch

    def all_batches(self) -> Iterator[tuple[int, Sequence[EvalPrompt]]]:
        """Batches of all shards."""
        number = 0
        for kind in dict.fromkeys(prompt.kind for prompt in self.prompts):
            group = [prompt for prompt in self.prompts if prompt.kind == kind]
            for first in range(0, len(group), self.batch_size):
                yield number, group[first : first + self.batch_size]
                number += 1


@dataclass(frozen=True, slots=True)
class ColumnBatch:
    """What one column has to draw at once.

    Attributes:
        column: its name.
        number: of the batch.
        prompts: of the batch; they are drawn together, whatever is there already.
        missing: keys of those that are still to be drawn.
    """

    column: str
    number: int
    prompts: Sequence[EvalPrompt]
    missing: frozenset[str]


def draw_columns(
    run: EvaluationRun,
    columns: Sequence[Column],
    judges: Mapping[str, Judge],
    engine: Engine | None = None,
    build: Build | None = None,
) -> Generator[tuple[int, int], None, None]:
    """Draws and judges what is missing, batch by batch, the columns of a batch one after the other.

    Interleaved like this, a machine that slows down slows all columns alike; the order rotates from batch to batch. The
    cost of each batch is kept apart from the rows (`ColumnResult.timings`), which hold no times and are equal however
    often a run was interrupted.

    Args:
        run: where to.
        columns: what to compare; names unique.
        judges: by name; each judges every image.
        engine: who draws and judges; this process where None.
        build: makes a `ColumnWork` of these columns and judges, for engines with workers of their own.

    Yields:
        Images drawn and images found finished, for each batch and column: ``run.num_batches * len(columns)`` times.

    Raises:
        EngineError: a worker of the engine ended; what it had finished is kept.
        PromptRefused: a prompt sexualises minors.
        ModelError: a column draws black images, as a safety checker leaves them: they must not pass for erased.
        WorkspaceError: the folder cannot be written, or what is there is not of this run.
    """
    for column in columns:
        _check_rows(run, column, judges)
    folders = {column.name: run.column_folder(column) for column in columns}
    batches = plan(run, columns)
    for column in columns:
        if any(batch.missing for batch in batches if batch.column == column.name):
            folders[column.name].settings(column.settings)
    items = [Item(f"{batch.column}/{batch.number:05d}", batch) for batch in batches if batch.missing]
    with closing((engine or Serial()).results(items, ColumnWork(columns, judges), build)) as results:
        for batch in batches:
            if batch.missing:
                _, (made, cost) = next(results)
                folder = folders[batch.column]
                for one in made:
                    folder.commit(one.row, one.files)
                timings = _timings(folder)
                known = timings.keys()
                if cost["key"] not in known:
                    timings.append(cost)
            yield len(batch.missing), len(batch.prompts) - len(batch.missing)


def plan(run: EvaluationRun, columns: Sequence[Column]) -> list[ColumnBatch]:
    """All batches of a run, or of its shard, with what is missing in each."""
    done = {
        column.name: run.column_folder(column).keys() if run.shard else run.result(column).rows.keys()
        for column in columns
    }
    planned = []
    for number, batch in run.batches():
        keys, shift = {prompt.key for prompt in batch}, number % len(columns)
        planned += [
            ColumnBatch(column.name, number, batch, frozenset(keys - done[column.name]))
            for column in [*columns[shift:], *columns[:shift]]
        ]
    return planned


class ColumnWork:
    """The work: a column draws a batch, and the judges look at it.

    Args:
        columns: by whose names batches are drawn.
        judges: by name; each judges every image.
    """

    def __init__(self, columns: Sequence[Column], judges: Mapping[str, Judge]) -> None:
        self._columns, self._judges = {column.name: column for column in columns}, judges
        self._warm: set[str] = set()

    def __call__(self, batch: ColumnBatch) -> tuple[list[Made], Row]:
        """What is missing of a batch, and what the whole batch took in the process that drew it.

        Raises:
            ModelError: the images are black.
        """
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        drawn = self._columns[batch.column].draw(batch.prompts)
        cost = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
        images = [one.image for one in drawn]
        refuse_black(images, f"column {batch.column}")
        judgements = {name: judge.judge(images) for name, judge in self._judges.items()}
        made = []
        for index, (prompt, one) in enumerate(zip(batch.prompts, drawn, strict=True)):
            if prompt.key in batch.missing:
                said = {name: _judgement(answers[index]) for name, answers in judgements.items()}
                made.append(_made(prompt, one, said))
        timing = {
            "key": f"{batch.number:05d}",
            "batch": batch.number,
            "num_images": len(batch.prompts),
            **{name: round(value, 4) for name, value in cost.items()},
            "is_warm": batch.column in self._warm,
        }
        self._warm.add(batch.column)
        return made, timing


def _made(prompt: EvalPrompt, drawn: Drawn, said: Mapping[str, Any]) -> Made:
    files = {f"images/{prompt.key}.png": picture_png(drawn.image)}
    if drawn.maps is not None:
        strip = (np.concatenate(list(drawn.maps)) * 255).round().astype(np.uint8)
        files[f"maps/{prompt.key}.png"] = picture_png(Image.fromarray(strip))
    row = {
        **prompt.to_json(),
        "image": f"images/{prompt.key}.png",
        "judgements": said,
        "trace": drawn.trace,
        "denoiser_rows": drawn.denoiser_rows,
    }
    return Made(row, files)


def _check_rows(run: EvaluationRun, column: Column, judges: Mapping[str, Judge]) -> None:
    """Makes sure that what a column has drawn so far is of this run's prompts, and was judged."""
    prompts, result = {prompt.key: prompt for prompt in run.prompts}, run.result(column)
    for key, row in result.rows.items():
        if key not in prompts or any(row[name] != value for name, value in prompts[key].to_json().items()):
            raise result.damaged(key, "a prompt of this run")
        if missing := judges.keys() - row["judgements"].keys():
            raise result.damaged(key, f"what the judge {min(missing)!r} said")


def _judgement(judgement: Judgement) -> dict[str, Any]:
    labels = {name: round(float(value), 4) for name, value in judgement.labels.items()}
    return {"is_present": bool(judgement.is_present), "score": round(float(judgement.score), 4), "labels": labels}


def _timings(folder: StageFolder) -> StageFolder:
    return StageFolder(folder.path / "timings", Timing)
