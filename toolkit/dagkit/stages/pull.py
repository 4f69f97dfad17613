"""pull: Label Studio -> annotations/. What annotators made of the pre-masks, as masks with a state and a history."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from dagkit.concept import Concept
    from dagkit.labelstudio.answers import Answer, Consensus, Masks
    from dagkit.labelstudio.client import Client
    from dagkit.workspace import Workspace


def run(
    workspace: Workspace,
    concept: Concept,
    *,
    client: Client | None = None,
    url: str | None = None,
    consensus: Consensus | None = None,
    min_iou: float | None = None,
    review: bool = False,
    progress: base.Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> base.StageResult:
    """Fetches the answers that are new or changed since the last pull into ``annotations/<concept>/``.

    Writes masks and one row a task, ``agreement.json`` (of all tasks) and ``annotators.json`` (the server's user ids ->
    pseudonyms; the only place where both stand).

    Args:
        workspace: holds ``candidates/`` and ``labeling/``.
        concept: whose labels are expected.
        client: connection to use; None: `dagkit.labelstudio.access.connect` with ``url``.
        url: root of a team's server; None: the server to which the tasks were pushed.
        consensus: how several answers make one mask: ``majority``, ``union`` or ``intersection``; None: as at the last
            pull, or ``majority``.
        min_iou: two masks of one task with a lower IoU count as a disagreement; None: as at the last pull, or 0.7.
        review: send the tasks on which annotators disagree to a second project, ``... review``, with each one's masks
            to choose from. What a reviewer answers there decides, at this pull and all later ones.
        progress: shows progress; None for silence.
        tell: is given one line before each long step.

    Raises:
        LabelStudioError: the server is down or refuses; or answers cannot be used (the message says which and how to
            mend
            them: all others were fetched, and the next pull tries these again).
        WorkspaceError: nothing was pushed from this workspace.
    """
    from dagkit.errors import LabelStudioError, WorkspaceError
    from dagkit.labelstudio.access import connect
    from dagkit.labelstudio.agreement import agreement
    from dagkit.workspace import lock

    progress = progress or base.Progress(is_quiet=True)
    labeling, folder = workspace.stage("labeling", concept.name), workspace.stage("annotations", concept.name)
    if not labeling.has("project.json"):
        raise WorkspaceError(f"{labeling.path}: nothing was pushed from this workspace. Run `dagkit push` first.")
    project = labeling.read_json("project.json")
    problems: list[str] = []
    folder.claim("cursor.json")
    with lock(folder.path), ExitStack() as stack:
        client = client or stack.enter_context(connect(url or _pushed_to(project), tell))
        found = client.find_projects(project["title"])
        if not found:
            raise LabelStudioError(
                f"{client.url} has no project {project['title']!r}, to which this workspace was pushed. It was at "
                f"{project.get('url', 'no server yet')}: use that server, or push again."
            )
        cursor = folder.read_json("cursor.json") if folder.has("cursor.json") else {}
        before = cursor.get("settings", {})
        consensus = consensus or before.get("consensus") or "majority"
        min_iou = before.get("min_iou", 0.7) if min_iou is None else min_iou
        settings = {
            "project": project["title"],
            "consensus": consensus,
            "min_iou": min_iou,
            "labels": concept.labels.model_dump(),
            "reader": _READER,
        }
        if before != settings:  # all tasks are decided anew; a pull that is interrupted keeps to these settings
            cursor = {"settings": settings, "since": None}
            folder.write_json("cursor.json", cursor)
        reader = _Reader(workspace, concept, consensus, min_iou)
        review_project = client.find_projects(f"{project['title']} review")
        if review_project:
            problems += reader.take_reviews(_export_all(client, review_project[0]))
        since = cursor["since"]
        changed = client.changed_tasks(found[0], _with_margin(since))
        ids = sorted({task_id for task_id, _ in changed} | reader.newly_reviewed())
        num_done = 0
        total = -(-len(ids) // 100)
        for batch in progress.track(list(base.batches(ids, 100)), total=total, description="pull"):
            done, wrong = reader.take(batch, client.export(found[0], batch))
            num_done += done
            problems += wrong
        folder.write_json("agreement.json", agreement(reader.rows.values(), reader.labels))
        if problems:
            raise LabelStudioError(
                f"{problems[0]} ({len(problems)} of {len(ids)} tasks were left out; pull again then.)"
            )
        latest = max((updated for _, updated in changed), default=since)
        folder.write_json("cursor.json", {"settings": settings, "since": latest})
        num_to_review = _send_to_review(client, found[0], project["title"], reader) if review else 0
    rows = reader.rows.values()
    counts = {state: sum(row["state"] == state for row in rows) for state in sorted({row["state"] for row in rows})}
    shown = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.items()) or "no answers yet"
    num_open = len(labeling.keys() - reader.rows.keys())
    disagreements = sum(bool(row["reasons"]) for row in rows)
    sent = f", {num_to_review} sent to review" if review else ""
    return base.StageResult(
        "pull",
        num_done,
        len(rows) - num_done,
        f"{num_done} tasks new or changed, {len(rows)} in all ({shown}; {disagreements} in disagreement{sent}, "
        f"{num_open} open) -> {folder.path}",
        {
            "states": counts,
            "num_disagreements": disagreements,
            "num_sent_to_review": num_to_review,
            "num_open": num_open,
            "path": folder.path,
        },
    )


_READER: Final = 2
"""Which regions are understood. Another number than at the last pull, and all answers are read anew."""


class _Reader:
    """Turns exported tasks into rows and mask files; a task that says nothing new is left as it is.

    A task whose answers or review cannot be used has no row: what it said before is not what it says now.
    """

    def __init__(self, workspace: Workspace, concept: Concept, consensus: Consensus, min_iou: float) -> None:
        from dagkit.manifests import PulledAnnotation

        self.candidates = workspace.stage("candidates", concept.name)
        self.premasks = workspace.stage("premasks", concept.name)
        self.folder = workspace.stage("annotations", concept.name)
        self.images = {row["key"]: row["image"] for row in self.candidates.present_rows()}
        self.purged = self.candidates.purged()
        self.proposed = {row["key"]: row["masks"] for row in self.premasks.rows()}
        self.concept_labels = concept.labels
        self.labels = [*concept.labels.positive, *concept.labels.negative]
        self.consensus, self.min_iou = consensus, min_iou
        self.reviews: dict[str, Answer] = {}
        self.unusable_reviews: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in self.folder.rows(PulledAnnotation)}
        has_names = self.folder.has("annotators.json")
        self.names: dict[str, str] = self.folder.read_json("annotators.json") if has_names else {}

    def take_reviews(self, tasks: Iterable[Mapping[str, Any]]) -> list[str]:
        """Takes in what reviewers answered, and returns what could not be used, one line each."""
        from dagkit.errors import LabelStudioError

        problems = []
        for task in tasks:
            key = _key(task)
            if key in self.purged:
                continue
            # Measured against the pre-mask, not against the annotator's mask from which the reviewer started.
            bare = {**task, "annotations": [{**one, "prediction": None} for one in task["annotations"]]}
            try:
                answers = [answer for answer in self.answers(bare) if answer.state != "skipped"]
            except LabelStudioError as error:
                problems.append(f"review: {error}")
                self.unusable_reviews.add(key)
                continue
            if answers:
                self.reviews[key] = max(answers, key=lambda answer: answer.updated)
        return problems

    def newly_reviewed(self) -> set[int]:
        """Ids of tasks whose rows do not tell of their review as it is now."""
        now = {key: _reviewed(review) for key, review in self.reviews.items()}
        return {
            row["task_id"]
            for key, row in self.rows.items()
            if row["reviewed"] != now.get(key) or key in self.unusable_reviews
        }

    def answers(self, task: Mapping[str, Any]) -> list[Answer]:
        """Reads the answers to one exported task."""
        from dagkit.errors import LabelStudioError, quoted
        from dagkit.labelstudio.answers import read_answers

        key = _key(task)
        if key not in self.images:
            raise LabelStudioError(
                f"task {task['id']}: its key {quoted(key)} is no candidate of this workspace ({self.candidates.path}). "
                "Was it made by hand? Delete it in Label Studio."
            )
        return read_answers(task, self.concept_labels, self.size(key), self._pseudonym, self._premask(key))

    def size(self, key: str) -> tuple[int, int]:
        """Width and height of a candidate, pixels."""
        return self.candidates.read_image(self.images[key]).size

    def take(self, ids: Sequence[int], tasks: Any) -> tuple[int, list[str]]:
        """Takes in the answers to some tasks.

        Args:
            ids: of all tasks asked for; those that are not exported have no answers (any more).
            tasks: as exported.

        Returns:
            How many rows are new or changed, and what could not be used, one line each.
        """
        from dagkit.errors import LabelStudioError

        num_done, problems, answered = 0, [], set()
        unusable: set[str] = set()
        is_replaced = False
        for task in tasks:
            if not task["annotations"]:
                continue
            answered.add(task["id"])
            key = _key(task)
            if key in self.purged:
                continue
            try:
                row, masks = self._read(task)
            except LabelStudioError as error:
                problems.append(str(error))
                unusable.add(key)
                continue
            if key in self.unusable_reviews:
                unusable.add(key)
                continue
            before = self.rows.get(row["key"])
            if before == row:
                continue
            for label, mask in masks.items():
                self.folder.write_bytes(row["masks"][label], _png(mask))
            self.rows[row["key"]] = row
            num_done += 1
            if before is None:
                self.folder.append(row)
            else:
                is_replaced = True
        unanswered = set(ids) - answered
        withdrawn = [key for key, row in self.rows.items() if key in unusable or row["task_id"] in unanswered]
        for key in withdrawn:
            del self.rows[key]
        if is_replaced or withdrawn:
            lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in self.rows.values()]
            self.folder.write_bytes("manifest.jsonl", "".join(lines).encode())
        return num_done + len(withdrawn), problems

    def _read(self, task: Mapping[str, Any]) -> tuple[dict[str, Any], Masks]:
        from dagkit.labelstudio.answers import decide

        key = _key(task)
        answers = self.answers(task)
        facts: dict[str, Any] = {"premask": self._premask(key), "rule": self.consensus, "min_iou": self.min_iou}
        verdict = decide(answers, self.concept_labels, self.size(key), **facts)
        review = self.reviews.get(key)
        decided = decide([review], self.concept_labels, self.size(key), **facts) if review else verdict
        seconds = [answer.seconds for answer in answers if answer.seconds is not None]
        row: dict[str, Any] = {
            "key": key,
            "state": decided.state,
            "masks": {label: f"masks/{key}-{label}.png" for label in decided.masks},
            "iou_to_premask": decided.iou_to_premask,
            "annotators": [answer.annotator for answer in answers],
            "seconds": sum(seconds) if seconds else None,
            "created": min(answer.created for answer in answers),
            "updated": max(answer.updated for answer in answers),
            "task_id": task["id"],
            "reasons": [] if review else list(verdict.reasons),
            "reviewed": _reviewed(review) if review else None,
            "consensus": self.consensus,
            "pair_ious": [list(pair) for pair in verdict.pair_ious],
            "answers": [
                {
                    "annotator": answer.annotator,
                    "state": answer.state,
                    "labels": list(answer.masks),
                    "iou_to_premask": answer.iou_to_premask,
                    "seconds": answer.seconds,
                    "updated": answer.updated,
                }
                for answer in answers
            ],
        }
        return row, decided.masks

    def _premask(self, key: str) -> Masks | None:
        if key not in self.proposed:
            return None
        size = self.size(key)
        return {label: self.premasks.read_mask(found["path"], size) for label, found in self.proposed[key].items()}

    def _pseudonym(self, user_id: int) -> str:
        """Numbered in the order of appearance, and written down before a row uses it."""
        if str(user_id) not in self.names:
            self.names[str(user_id)] = f"annotator-{len(self.names) + 1}"
            self.folder.write_json("annotators.json", self.names)
        return self.names[str(user_id)]


def _key(task: Mapping[str, Any]) -> str:
    """Our own name of a task; empty where it has none."""
    key = task["data"].get("key")
    return key if isinstance(key, str) else ""


def _reviewed(review: Answer) -> dict[str, str]:
    return {"annotator": review.annotator, "updated": review.updated}


def _export_all(client: Client, project_id: int) -> Iterator[dict[str, Any]]:
    yield from client.export(project_id, [task_id for task_id, _ in client.changed_tasks(project_id, None)])


def _send_to_review(client: Client, project_id: int, title: str, reader: _Reader) -> int:
    """Sends the tasks in disagreement to the review project, and returns how many were new there."""
    from dagkit.errors import LabelStudioError
    from dagkit.labelstudio import tasks

    disputed = {
        row["task_id"]: row["key"] for row in reader.rows.values() if row["reasons"] and row["key"] in reader.images
    }
    if not disputed:
        return 0
    found_tasks = client.export(project_id, list(disputed))
    exported = {disputed[task["id"]]: task for task in found_tasks if task["id"] in disputed}
    config = client.project(project_id)["label_config"]
    found = client.find_projects(f"{title} review")
    description = "Tasks on which annotators disagree; the predictions are their answers."
    review_id = found[0] if found else client.create_project(f"{title} review", config, description, 1)

    def make(key: str) -> tasks.Task:
        votes = [answer for answer in reader.answers(exported[key]) if answer.masks]
        proposed = tuple(tasks.prediction(vote.masks, {}, model_version=vote.annotator) for vote in votes)
        image = exported[key]["data"].get("image")
        if not isinstance(image, str):
            raise LabelStudioError(f"{key}: its task does not say where its image is. Delete the task and push again.")
        return tasks.Task(key, image, *reader.size(key), proposed)

    return tasks.push(client, review_id, config, list(exported), make, lambda _: None)


def _with_margin(since: str | None) -> str | None:
    """A minute earlier: databases may show a change later than one that bears a later time."""
    from datetime import UTC, datetime, timedelta

    if since is None:
        return None
    try:
        earlier = datetime.fromisoformat(since).astimezone(UTC) - timedelta(minutes=1)
    except OverflowError:  # in the year 1 or 9999
        return None
    return earlier.strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the one form that the server's filters read


def _pushed_to(project: Mapping[str, Any]) -> str | None:
    """The server that holds the tasks, or None where that is the embedded one, which is then started.

    The embedded one may have been on another port then. Where `dagkit push` did not note which of the two it was, an
    address of its form is taken for its own, unless somebody named a token, as for a team's server.
    """
    import os

    from dagkit.labelstudio.access import TOKEN_VARIABLE
    from dagkit.labelstudio.server import EmbeddedServer

    login = EmbeddedServer().login()
    url: str | None = project.get("url")
    if login is None or url is None:
        return url
    looks_embedded = url.startswith("http://127.0.0.1:") and TOKEN_VARIABLE not in os.environ
    return None if login.is_at(url) or project.get("is_embedded", looks_embedded) else url


def _png(mask: Any) -> bytes:
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()
