"""push: premasks/ -> labeling/. Candidates and their pre-masks become tasks in Label Studio, each exactly once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dagkit.concept import Concept
    from dagkit.dataset.selection import Selection
    from dagkit.labelstudio.api import Client
    from dagkit.labelstudio.storage import Storage
    from dagkit.labelstudio.tasks import Task
    from dagkit.models import BaseModel
    from dagkit.proposers.token import TokenProposer
    from dagkit.workspace import StageFolder, Workspace


def run(
    workspace: Workspace,
    concept: Concept,
    *,
    client: Client | None = None,
    url: str | None = None,
    label_config: str | None = None,
    num_annotators: int | None = None,
    batch_size: int | None = None,
    keys: Sequence[str] | None = None,
    storage: Storage | None = None,
    progress: base.Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> base.StageResult:
    """Sends to Label Studio what it does not have yet, and notes the ids of its tasks in ``labeling/<concept>/``.

    The project is found again by its title, which is made once for a workspace; so a run that was killed, or whose
    server died, is finished by running it again, and nothing is there twice.

    Args:
        workspace: holds ``candidates/`` and ``premasks/``.
        concept: whose labels to offer.
        client: connection to use; None: `dagkit.labelstudio.access.connect` with ``url``.
        url: root of a team's server; None for the embedded one.
        label_config: XML of the labelling page; None: as before, or rendered from the concept (or ``<concept>.xml``
            beside its file).
        num_annotators: how many are to answer each task, >= 1; None: as before, or 1.
        batch_size: tasks a request; None for the default.
        keys: which candidates to send, and in which order; None for all that are pre-masked.
        storage: how the server gets the images; None: they are uploaded to it.
        progress: shows progress; None for silence.
        tell: is given one line before each long step.

    Raises:
        LabelStudioError: the server is down, refuses, or a prediction is invalid. What was sent before stays.
        WorkspaceError: nothing to send, or images or masks are unreadable; all others were sent.
    """
    from dagkit.errors import WorkspaceError
    from dagkit.labelstudio import tasks
    from dagkit.labelstudio.access import connect
    from dagkit.labelstudio.config import check_page
    from dagkit.labelstudio.storage import Upload
    from dagkit.workspace import lock

    candidates, premasks = workspace.stage("candidates", concept.name), workspace.stage("premasks", concept.name)
    images = {row["key"]: row["image"] for row in candidates.present_rows()}
    rows = {row["key"]: row for row in premasks.rows() if row["key"] in images}
    if not rows:
        raise WorkspaceError(
            f"{premasks.path}: expected pre-masked candidates, but there are none. Run `dagkit premask` first."
        )
    if keys is not None:
        if unknown := [key for key in keys if key not in rows]:
            raise WorkspaceError(
                f"{premasks.path}: {unknown[0]!r} is no pre-masked candidate. Run `dagkit premask` first."
            )
        rows = {key: rows[key] for key in keys}
    storage = storage or Upload()
    if label_config is None:
        page(concept)  # tried before anything is sent
    else:
        check_page(label_config, concept, "the labelling page")
    progress = progress or base.Progress(is_quiet=True)
    folder = workspace.stage("labeling", concept.name)
    folder.claim("project.json")
    with lock(folder.path), ExitStack() as stack:
        client = client or stack.enter_context(connect(url, tell))
        project_id, config = find_project(client, folder, concept, label_config, num_annotators)
        storage.prepare(client, project_id, candidates.path / "images")
        noted = folder.keys()

        def make(key: str) -> Task:
            return _task(key, images[key], rows[key], candidates, premasks, storage)

        def done(ids: Mapping[str, int]) -> None:
            for key in (key for key in rows if key in ids and key not in noted):
                folder.append({"key": key, "task_id": ids[key]})
                noted.add(key)

        num_sent = tasks.push(
            client,
            project_id,
            config,
            list(rows),
            make,
            done,
            batch_size=batch_size or tasks.DEFAULT_BATCH_SIZE,
            track=lambda batches, total: progress.track(batches, total=total, description="push"),
        )
    address = f"{client.url}/projects/{project_id}/data"
    return base.StageResult(
        "push",
        num_sent,
        len(rows) - num_sent,
        f"{num_sent} tasks sent, {len(rows) - num_sent} were there already -> {address}",
        {"url": address, "project_id": project_id, "path": folder.path},
    )


def choose(
    workspace: Workspace,
    concept: Concept,
    selection: Selection | None,
    num_tasks: int | None,
    *,
    base_model: BaseModel | None = None,
    token: str | None = None,
) -> list[str] | None:
    """Which candidates to send, first things first, without near-duplicates; None for all, where nothing is asked for.

    Args:
        workspace: holds ``candidates/`` and ``premasks/``.
        concept: whose.
        selection: as for `dagkit.dataset.choose_candidates`.
        num_tasks: how many at most.
        base_model: for ``diverse``, and for a token.
        token: as for `token_proposer`.

    Raises:
        UsageError, TokenError: as by `token_proposer`.
        WorkspaceError: an image or a mask cannot be read.
    """
    from dagkit.dataset import choose_candidates

    proposer = token_proposer(workspace, concept, selection, token, base_model)
    if selection is None and num_tasks is None:
        return None
    chosen = choose_candidates(
        workspace, concept, selection or "all", num=num_tasks, base_model=base_model, token=proposer
    )
    return chosen.keys


def token_proposer(
    workspace: Workspace, concept: Concept, selection: Selection | None, token: str | None, base_model: BaseModel | None
) -> TokenProposer | None:
    """The token that says what is ``uncertain``; None where none is asked for.

    Args:
        workspace: where tokens are looked for first.
        concept: whose first positive label the token stands for.
        selection: must be ``uncertain`` if there is a token.
        token: its reference (name@version, folder or URL), or None.
        base_model: the model that drew the images; a token needs it.

    Raises:
        UsageError: a token, but not ``uncertain``.
        TokenError: no base model, no such token, or it was made for another model.
    """
    from dagkit.errors import TokenError
    from dagkit.proposers.token import TokenProposer
    from dagkit.registry import load_token

    if token is None:
        return None
    if selection != "uncertain":
        raise TokenError("--token says what is uncertain: add --select uncertain, or leave it out.")
    if base_model is None:
        raise TokenError(
            f"token {token!r}: it sees images through the base model that drew them, but none was given. "
            "Give the base model, too (--model), or leave the token out."
        )
    return TokenProposer(base_model, load_token(token, workspace=workspace.root), concept.labels.positive[0])


def page(concept: Concept) -> str:
    """The labelling page of a concept: its own ``<name>.xml`` where there is one, else rendered."""
    from dagkit.labelstudio.config import labelling_page

    return labelling_page(concept)


def find_project(
    client: Client, folder: StageFolder, concept: Concept, label_config: str | None, num_annotators: int | None
) -> tuple[int, str]:
    """Finds this workspace's project on a server, or makes it, and brings its page up to date.

    Its title is written down before the project is made, so a run that dies in between makes no second one. A page that
    was edited in Label Studio, or given with an earlier push, is left alone until the concept's own page changes.

    Returns:
        The project's id and the XML of its page.

    Raises:
        LabelStudioError: the workspace belongs to a project on another server, or the project was deleted.
    """
    import secrets

    from dagkit.errors import LabelStudioError
    from dagkit.labelstudio.server import EmbeddedServer
    from dagkit.workspace import sha256_bytes

    if not folder.has("project.json"):
        folder.write_json("project.json", {"title": f"dagkit {concept.name} {secrets.token_hex(4)}"})
    saved = folder.read_json("project.json")
    found = client.find_projects(saved["title"])
    if not found and "project_id" in saved:
        raise LabelStudioError(
            f"{folder.path}: its tasks are in project {saved['project_id']} at {saved['url']}, but {client.url} has "
            "no such "
            f"project. Use that server; or, if the project was deleted, delete {folder.path} and push again."
        )
    wanted = label_config or page(concept)
    if not found:
        description = f"Mark {', '.join(concept.labels.positive)}: {concept.summary}"
        found = [client.create_project(saved["title"], wanted, description, num_annotators or 1)]
    project_id = int(saved.get("project_id") if saved.get("project_id") in found else found[0])
    before = client.project(project_id)
    changed: dict[str, Any] = {}
    is_new_page = label_config is not None or sha256_bytes(page(concept).encode()) != saved.get("page")
    if is_new_page and before["label_config"] != wanted:
        changed["label_config"] = wanted
    if num_annotators not in (None, before["maximum_annotations"]):
        changed["maximum_annotations"] = num_annotators
    if changed:
        client.update_project(project_id, **changed)
    login = EmbeddedServer().login()
    saved |= {
        "url": client.url,
        "is_embedded": login is not None and login.is_at(client.url),
        "project_id": project_id,
        "page": sha256_bytes(page(concept).encode()),
    }
    folder.write_json("project.json", saved)
    return project_id, str(changed.get("label_config", before["label_config"]))


def _task(
    key: str,
    image: str,
    row: Mapping[str, Any],
    candidates: StageFolder,
    premasks: StageFolder,
    storage: Storage,
) -> Task:
    from dagkit.labelstudio.tasks import Task, prediction

    size = candidates.read_image(image).size
    masks, scores = {}, {}
    for label, found in row["masks"].items():
        masks[label] = premasks.read_mask(found["path"], size)
        scores[label] = found["score"]
    makers = [*row.get("proposers", []), *([row["segmenter"]] if row.get("segmenter") else [])]
    version = "+".join(f"{maker['name']}@{maker['version']}" for maker in makers) or "dagkit"
    proposed = (prediction(masks, scores, model_version=version),) if masks else ()
    return Task(key, storage.place(candidates.inside(image)), *size, proposed)
