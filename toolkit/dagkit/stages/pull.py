"""pull: Label Studio -> annotations/. What annotators made of the pre-masks, as masks with a state and a history."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dagkit.concept import Concept
    from dagkit.labelstudio.answers import Consensus
    from dagkit.labelstudio.api import Client
    from dagkit.labelstudio.reading import AnswerReader
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
    from dagkit.labelstudio.reading import READER_VERSION, AnswerReader
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
            "reader": READER_VERSION,
        }
        if before != settings:  # all tasks are decided anew; a pull that is interrupted keeps to these settings
            cursor = {"settings": settings, "since": None}
            folder.write_json("cursor.json", cursor)
        reader = AnswerReader(workspace, concept, consensus, min_iou)
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


def _export_all(client: Client, project_id: int) -> Iterator[dict[str, Any]]:
    yield from client.export(project_id, [task_id for task_id, _ in client.changed_tasks(project_id, None)])


def _send_to_review(client: Client, project_id: int, title: str, reader: AnswerReader) -> int:
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
