"""From images and masks to tasks on a server: each exactly once, whatever happens on the way."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import LabelStudioError, WorkspaceError
from dagkit.labelstudio import codec
from dagkit.labelstudio.config import IMAGE_OBJECT, MASK_CONTROL, check_prediction
from dagkit.labelstudio.http import ServerUnavailableError, backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dagkit.labelstudio.api import Client

DEFAULT_BATCH_SIZE: Final = 100
_MAX_TRIES: Final = 6  # of one batch at a server that answers, but with errors


@dataclass(frozen=True)
class Task:
    """One image to be annotated.

    Attributes:
        key: our own name of it, unique in its project.
        image: where the server finds it (a path or URI), or the bytes of a PNG to upload.
        width: pixels.
        height: pixels.
        predictions: as made by `prediction`; the page shows the first one.
    """

    key: str
    image: bytes | str
    width: int
    height: int
    predictions: tuple[dict[str, Any], ...] = ()

    @property
    def file_name(self) -> str:
        """Name for the upload: with a hash, so that an upload found on the server is known to be of this very image."""
        content = self.image if isinstance(self.image, bytes) else self.image.encode()
        safe = "".join(character if character.isalnum() else "_" for character in self.key)
        return f"{safe}_{hashlib.sha256(content).hexdigest()[:12]}.png"


def prediction(
    masks: Mapping[str, NDArray[np.bool_]],
    scores: Mapping[str, float],
    *,
    model_version: str,
) -> dict[str, Any]:
    """A pre-mask as Label Studio's prediction: one brush region a label.

    Args:
        masks: label -> (H, W) bool.
        scores: label -> in [0, 1]; a label without one gets none.
        model_version: what made the masks, e.g. ``attention@1+sam@1``.

    Returns:
        ``{"model_version", "score", "result"}``; the score is the lowest of the regions'.
    """
    regions = []
    for label, mask in masks.items():
        region: dict[str, Any] = {
            "id": f"premask_{hashlib.sha256(label.encode()).hexdigest()[:8]}",
            "type": "brushlabels",
            "from_name": MASK_CONTROL,
            "to_name": IMAGE_OBJECT,
            "original_width": mask.shape[1],
            "original_height": mask.shape[0],
            "image_rotation": 0,
            "value": {"format": "rle", "rle": codec.encode(mask), "brushlabels": [label]},
        }
        if label in scores:
            region["score"] = float(scores[label])
        regions.append(region)
    whole: dict[str, Any] = {"model_version": model_version, "result": regions}
    if scores:
        whole["score"] = min(float(score) for score in scores.values())
    return whole


def push(
    client: Client,
    project_id: int,
    label_config: str,
    keys: Sequence[str],
    make_task: Callable[[str], Task],
    done: Callable[[Mapping[str, int]], None],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    track: Callable[[Iterable[int], int], Iterable[int]] = lambda starts, _: starts,
) -> int:
    """Sends those tasks that the project does not have yet, in batches, each in one transaction.

    A batch whose answer did not come is looked for on the server before it is sent again; should a slow server have
    taken it twice all the same, the copies without annotations are deleted. Images that an earlier, interrupted run
    uploaded are used again.

    Args:
        client: of the server.
        project_id: where to.
        label_config: the project's page, against which predictions are checked.
        keys: of all tasks that shall be there in the end, in this order.
        make_task: makes one when its turn comes.
        done: is told key -> task id of what is on the server: at first of what was there before, then of every batch.
        batch_size: tasks a request.
        track: wraps the batches (and is told their number), to show progress.

    Returns:
        How many tasks were sent.

    Raises:
        WorkspaceError, LabelStudioError: some tasks could not be made, or their predictions are invalid (the first one
            is named; all others were sent).
        LabelStudioError: the server refuses or stays away. What was sent before stays and is not sent again.
    """
    wanted = set(keys)
    there = _tidy(client, client.task_ids(project_id))
    done({key: task_id for key, task_id in there.items() if key in wanted})
    todo = [key for key in keys if key not in there]
    uploads = client.uploads(project_id) if todo else {}
    num_sent, was_interrupted = 0, False
    problems: list[WorkspaceError | LabelStudioError] = []
    starts = range(0, len(todo), batch_size)
    for start in track(starts, len(starts)):
        batch = []
        for key in todo[start : start + batch_size]:
            try:
                batch.append(_checked(make_task(key), label_config))
            except (WorkspaceError, LabelStudioError) as error:
                problems.append(error)
        num_sent += len(batch)
        pauses: Iterator[float] = backoff()
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                done(_send(client, project_id, batch, uploads))
                break
            except ServerUnavailableError:
                if attempt == _MAX_TRIES:
                    raise
                was_interrupted = True
                time.sleep(next(pauses))
                client.wait()
                found = client.task_ids(project_id)
                done({task.key: found[task.key][0] for task in batch if task.key in found})
                batch = [task for task in batch if task.key not in found]
                uploads = client.uploads(project_id)
    if was_interrupted:
        there = _tidy(client, client.task_ids(project_id))
        done({key: task_id for key, task_id in there.items() if key in wanted})
    if problems:
        first, others = problems[0], f"({len(problems)} of {len(keys)} tasks were not sent; all others are there.)"
        raise type(first)(f"{first} {others}") from first
    return num_sent


def _checked(task: Task, label_config: str) -> Task:
    for proposed in task.predictions:
        check_prediction(label_config, proposed, task.width, task.height, task.key)
    return task


def _send(client: Client, project_id: int, batch: Sequence[Task], uploads: dict[str, str]) -> dict[str, int]:
    if not batch:
        return {}
    files = {task.file_name: task.image for task in batch if isinstance(task.image, bytes)}
    uploads |= client.upload(project_id, {name: data for name, data in files.items() if name not in uploads})
    bodies = []
    for task in batch:
        place = task.image if isinstance(task.image, str) else uploads.get(task.file_name)
        if place is None:
            raise LabelStudioError(
                f"{task.key}: Label Studio at {client.url} took the image, but does not list it. Try again."
            )
        body: dict[str, Any] = {"data": {IMAGE_OBJECT: place, "key": task.key}}
        if task.predictions:
            body["predictions"] = list(task.predictions)
        bodies.append(body)
    ids = client.import_tasks(project_id, bodies)
    return {task.key: task_id for task, task_id in zip(batch, ids, strict=True)}


def _tidy(client: Client, found: dict[str, list[int]]) -> dict[str, int]:
    """Deletes copies of tasks that nobody has worked on, and returns key -> the one that is kept."""
    kept: dict[str, int] = {}
    for key, ids in found.items():
        worked_on = [task_id for task_id in ids if client.num_annotations(task_id)] if len(ids) > 1 else []
        kept[key] = worked_on[0] if worked_on else ids[0]
        for task_id in ids:
            if len(ids) > 1 and task_id != kept[key] and task_id not in worked_on:
                client.delete_task(task_id)
    return kept
