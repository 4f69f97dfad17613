"""A Label Studio server over HTTP: one request function, in which every failure becomes one clear line.

The SDK's client is not used for transport: it repeats failed imports by itself, which duplicates tasks; it has no file
upload; it copies every number of a brush mask through Python twice; and its errors print response headers with session
cookies. Its `LabelInterface` checks what is sent (`dagkit.labelstudio.config`).
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from dagkit.errors import LabelStudioError, quoted
from dagkit.labelstudio import replies
from dagkit.manifests import explain, parse_json

Schema = TypeVar("Schema", bound=BaseModel)
Item = TypeVar("Item", bound=replies.WithId)

MAX_FILES_PER_UPLOAD: Final = 50  # the server refuses more than 100
_FAILING_PATIENCE_S: Final = 10.0
_PAGE_SIZE: Final = 1000
_EXPORT_SIZE: Final = 100
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_ADVICE: Final = (
    "Make one under Account & Settings > Personal Access Token and set LABEL_STUDIO_API_KEY (legacy tokens are off by "
    "default)."
)


class ServerUnavailableError(LabelStudioError):
    """The server did not answer, or said that it cannot answer now: trying again later may succeed.

    Args:
        message: the error's line.
        is_failing: it answers, but with an error of its own (HTTP 500): a locked database, or a defect that stays.
    """

    def __init__(self, message: str, *, is_failing: bool = False) -> None:
        super().__init__(message)
        self.is_failing = is_failing


class Client:
    """Talks to one Label Studio server.

    Args:
        url: root of the server, e.g. ``http://localhost:8080``.
        token: personal access token or legacy token; white space around it is dropped.
        timeout_s: how long one request may take.
        patience_s: how long reading requests, and `wait`, go on trying while the server is away.

    Raises:
        LabelStudioError: the address or the token cannot be one.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0, patience_s: float = 120.0) -> None:
        self.url = checked_url(url)
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self._http = httpx.Client(
            auth=_Authorization(self.url, checked_token(token)),
            timeout=timeout_s,
            trust_env=httpx.URL(self.url).host not in _LOOPBACK,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def check(self) -> str:
        """Makes sure that a Label Studio server answers and takes the token, and returns its version.

        Raises:
            LabelStudioError: it is down, another web site, or does not know the token.
        """
        answer = self._send("GET", "/api/version", auth=None)
        try:
            versions = replies.Versions.model_validate(answer)
        except ValidationError:
            raise _not_label_studio(self.url) from None
        self._send("GET", "/api/current-user/whoami")
        return versions.package.version or "unknown"

    def wait(self) -> None:
        """Waits until the server answers again.

        Raises:
            ServerUnavailableError: it is still away after ``patience_s``.
        """
        self.request("GET", "/api/current-user/whoami")

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Sends one request and returns the parsed answer. GETs are repeated while the server is away.

        Args:
            method: HTTP method.
            path: begins with ``/``.
            **options: as for ``httpx.request``.

        Raises:
            ServerUnavailableError: no answer (for a GET: within ``patience_s``), or 429, 500, 502, 503, 504.
            LabelStudioError: any other refusal.
        """
        start = time.monotonic()
        for pause in backoff():
            try:
                return self._send(method, path, **options)
            except ServerUnavailableError as error:
                patience_s = min(self.patience_s, _FAILING_PATIENCE_S) if error.is_failing else self.patience_s
                if method != "GET" or time.monotonic() + pause > start + patience_s:
                    raise
                time.sleep(pause)
        raise AssertionError("backoff() has no end")

    def ask(self, schema: type[Schema], method: str, path: str, **options: Any) -> Schema:
        """As `request`, with an answer that is as its schema says.

        Raises:
            ServerUnavailableError, LabelStudioError: as for `request`.
            LabelStudioError: the answer is something else.
        """
        answer = self.request(method, path, **options)
        try:
            return schema.model_validate(answer)
        except ValidationError as error:
            raise self._odd(method, path, explain(error)) from error

    def find_projects(self, title: str) -> list[int]:
        """Ids of the projects with exactly this title, oldest first."""
        found: list[int] = []
        query = {"title": title, "include": "id,title"}
        for page in self._pages(replies.Projects, "/api/projects", query, lambda page: (page.results, page.count)):
            found += [project.id for project in page if project.title == title]
        return sorted(found)

    def create_project(self, title: str, label_config: str, description: str, num_annotators: int) -> int:
        """Makes a project whose data manager shows no image column, and returns its id.

        Args:
            title: at least three characters; the server allows several projects of one title.
            label_config: XML of the labelling page.
            description: one line.
            num_annotators: after how many annotations a task counts as done.
        """
        settings = {
            "title": title,
            "label_config": label_config,
            "description": description,
            "maximum_annotations": num_annotators,
            "show_collab_predictions": True,
            "enable_empty_annotation": True,
            "color": "#d81b60",
        }
        project_id = self.ask(replies.WithId, "POST", "/api/projects", json=settings).id
        hidden = [f"tasks:{column}" for column in _HIDDEN_COLUMNS]
        view = {
            "title": "Default",
            "type": "list",
            "target": "tasks",
            "hiddenColumns": {"explore": hidden, "labeling": hidden},
        }
        self.request("POST", "/api/dm/views", json={"project": project_id, "data": view})
        return project_id

    def project(self, project_id: int) -> dict[str, Any]:
        """``label_config`` and ``maximum_annotations`` of one project."""
        return self.ask(replies.Project, "GET", f"/api/projects/{project_id}").model_dump()

    def update_project(self, project_id: int, **settings: Any) -> None:
        """Changes settings of one project."""
        self.request("PATCH", f"/api/projects/{project_id}", json=settings)

    def task_ids(self, project_id: int) -> dict[str, list[int]]:
        """Keys of a project's tasks -> their ids, oldest first; tasks without a key of ours are left out."""
        found: dict[str, list[int]] = {}
        query = {"project": project_id, "fields": "task_only", "include": "id,data"}
        for page in self._pages(replies.Tasks, "/api/tasks", query, lambda page: (page.tasks, page.total)):
            for task in page:
                if "key" in task.data:
                    found.setdefault(str(task.data["key"]), []).append(task.id)
        return {key: sorted(ids) for key, ids in found.items()}

    def changed_tasks(self, project_id: int, since: str | None) -> list[tuple[int, str]]:
        """Ids and times of tasks that changed at or after a moment, in the order of the ids.

        Args:
            project_id: of which project.
            since: server time as the server writes it, or None for all.
        """
        query: dict[str, Any] = {"project": project_id, "fields": "task_only", "include": "id,updated_at"}
        if since:
            item = {
                "filter": "filter:tasks:updated_at",
                "operator": "greater_or_equal",
                "type": "Datetime",
                "value": since,
            }
            query["query"] = json.dumps({"filters": {"conjunction": "and", "items": [item]}})
        pages = self._pages(replies.ChangedTasks, "/api/tasks", query, lambda page: (page.tasks, page.total))
        return sorted((task.id, task.updated_at) for page in pages for task in page)

    def export(self, project_id: int, task_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Annotated tasks among the given ones: ``id``, ``data``, ``annotations``, as the JSON export writes them."""
        for start in range(0, len(task_ids), _EXPORT_SIZE):
            query = {
                "exportType": "JSON",
                "download_all_tasks": "false",
                "ids[]": list(task_ids[start : start + _EXPORT_SIZE]),
            }
            path = f"/api/projects/{project_id}/export"
            tasks = self.ask(replies.Export, "GET", path, params=query).root
            if len({task.id for task in tasks}) < len(tasks):
                raise self._odd("GET", path, "a task is there twice")
            for task in sorted(tasks, key=lambda task: task.id):
                yield {"id": task.id, "data": task.data, "annotations": task.annotations}

    def uploads(self, project_id: int) -> dict[str, str]:
        """Names under which files were uploaded to a project -> their paths on the server."""
        return self._uploads(project_id, {"all": "true"})

    def upload(self, project_id: int, files: Mapping[str, bytes]) -> dict[str, str]:
        """Uploads files, without making tasks of them, and returns their names -> paths on the server."""
        found: dict[str, str] = {}
        names = list(files)
        for start in range(0, len(names), MAX_FILES_PER_UPLOAD):
            part = [
                (f"file{index}", (name, files[name], "image/png"))
                for index, name in enumerate(names[start : start + MAX_FILES_PER_UPLOAD])
            ]
            path = f"/api/projects/{project_id}/import"
            ids = self.ask(replies.UploadIds, "POST", path, params={"commit_to_project": "false"}, files=part)
            found |= self._uploads(project_id, {"ids": json.dumps(ids.file_upload_ids)})
        return found

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Makes tasks in one transaction of the server and returns their ids, in the same order.

        Raises:
            ServerUnavailableError: the answer did not come; the tasks may be there or not: look before trying again.
        """
        path, query = f"/api/projects/{project_id}/import", {"return_task_ids": "true"}
        ids = self.ask(replies.TaskIds, "POST", path, params=query, json=list(tasks)).task_ids
        if ids is None or len(ids) != len(tasks):
            raise ServerUnavailableError(
                f"Label Studio at {self.url} imports in the background; look for the tasks later."
            )
        return ids

    def delete_task(self, task_id: int) -> None:
        """Deletes one task with all that belongs to it."""
        self.request("DELETE", f"/api/tasks/{task_id}")

    def num_annotations(self, task_id: int) -> int:
        """How many annotations, skips and drafts a task has."""
        task = self.ask(replies.TaskWork, "GET", f"/api/tasks/{task_id}")
        return len(task.annotations) + len(task.drafts)

    def storages(self, kind: str, project_id: int) -> list[replies.StorageRow]:
        """Storages of one kind (``localfiles``, ``s3``) that a project has."""
        return self.ask(replies.Storages, "GET", f"/api/storages/{kind}", params={"project": project_id}).root

    def _uploads(self, project_id: int, query: dict[str, str]) -> dict[str, str]:
        rows = self.ask(replies.Uploads, "GET", f"/api/projects/{project_id}/file-uploads", params=query).root
        return {_uploaded_name(row.file): "/data/" + row.file for row in rows}

    def _pages(
        self,
        schema: type[Schema],
        path: str,
        query: dict[str, Any],
        content: Callable[[Schema], tuple[list[Item], int]],
    ) -> Iterator[list[Item]]:
        """Pages of a list; ``content`` takes a page apart into its items and the number of all."""
        seen: set[int] = set()
        page = 1
        while True:
            answer = self.ask(schema, "GET", path, params={**query, "page": page, "page_size": _PAGE_SIZE})
            items, total = content(answer)
            new = {item.id for item in items} - seen
            if items and not new:
                raise self._odd("GET", path, f"page {page} is one that was there before")
            yield items
            seen, page = seen | new, page + 1
            if not items or len(seen) >= total:  # the page after the last one answers 404
                return

    def _odd(self, method: str, path: str, problem: str) -> LabelStudioError:
        return LabelStudioError(
            f"Label Studio at {self.url} answered {method} {path} with something else than expected: {problem}. Is it "
            "a Label Studio server, and of a version like the one that `dagkit label-studio status` shows?"
        )

    def _send(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, self.url + path, **options)
        except httpx.TimeoutException as error:
            raise ServerUnavailableError(
                f"Label Studio at {self.url} did not answer within {self.timeout_s:g} s ({method} {path}). Try again; "
                "if it stays "
                "slow, send smaller batches."
            ) from error
        except httpx.RequestError as error:
            reason = quoted(" ".join(str(error).split()) or type(error).__name__)[1:-1]
            raise ServerUnavailableError(
                f"Label Studio at {self.url} cannot be reached ({reason}). Start it "
                "(`dagkit label-studio up`) or mend the address, then run the same command again."
            ) from error
        return self._parsed(method, path, response)

    def _parsed(self, method: str, path: str, response: httpx.Response) -> Any:
        status, where = response.status_code, f"Label Studio at {self.url}"
        if status in (429, 500, 502, 503, 504):
            raise ServerUnavailableError(
                f"{where} cannot answer now (HTTP {status} to {method} {path}). Look into its log, try again.",
                is_failing=status == 500,
            )
        if status == 401:
            raise LabelStudioError(f"{where} does not take the token. {_ADVICE}")
        if status == 403:
            raise LabelStudioError(
                f"{where} forbids {method} {path} to this account: {_detail(_json(response))}. "
                "Ask its administrator for a role or setting that allows it."
            )
        if status == 413:
            raise LabelStudioError(f"{where} finds the request too large. Use a smaller --batch-size.")
        if response.is_redirect:
            raise LabelStudioError(
                f"{where} redirects to {quoted(response.headers.get('location', 'nowhere'))[1:-1]}. Use that server's "
                "address."
            )
        if status == 204 or (response.is_success and not response.content):
            return None
        try:
            answer = parse_json(response.content)
        except ValueError:
            raise _not_label_studio(self.url) from None
        if response.is_success:
            return answer
        raise LabelStudioError(f"{where} refused {method} {path} (HTTP {status}): {_detail(answer)}")


def checked_url(url: str) -> str:
    """A server's address without a slash at its end.

    Raises:
        LabelStudioError: it has no scheme or host, or holds a password.
    """
    example = "Write e.g. http://localhost:8080"
    shown = quoted(re.sub(r"//[^/]*@", "//...@", url))
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise LabelStudioError(f"{shown} is not the address of a server: {error}. {example}.") from error
    if parsed.userinfo:
        raise LabelStudioError(f"Leave user and password out of the address. {example}, and set LABEL_STUDIO_API_KEY.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise LabelStudioError(
            f"{shown} is not the address of a server: expected http:// or https:// and a host. {example}."
        )
    return str(parsed).split("?")[0].split("#")[0].rstrip("/")


def checked_token(token: str) -> str:
    """A token without white space around it.

    Raises:
        LabelStudioError: it is empty or cannot be one. The message does not show it.
    """
    token = token.strip()
    if not token:
        raise LabelStudioError(f"There is no token for Label Studio: LABEL_STUDIO_API_KEY is empty. {_ADVICE}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise LabelStudioError(
            f"LABEL_STUDIO_API_KEY holds characters that no token has (spaces, letters beyond ASCII). {_ADVICE}"
        )
    return token


def backoff(first_s: float = 0.25, largest_s: float = 10.0) -> Iterator[float]:
    """Pauses between tries, seconds: doubling, without end."""
    pause = first_s
    while True:
        yield pause
        pause = min(2 * pause, largest_s)


class _Authorization(httpx.Auth):
    """Legacy tokens as they are; personal access tokens are exchanged for short-lived ones whenever one has expired."""

    requires_response_body = True

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._is_personal = _claims(token).get("token_type") == "refresh"
        scheme = "Bearer" if _claims(token) else "Token"
        self._header = "" if self._is_personal else f"{scheme} {token}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._is_personal and not self._header:
            yield from self._refresh()
        request.headers["Authorization"] = self._header
        response = yield request
        if response.status_code == 401 and self._is_personal:
            yield from self._refresh()
            request.headers["Authorization"] = self._header
            yield request

    def _refresh(self) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield httpx.Request("POST", f"{self._url}/api/token/refresh/", json={"refresh": self._token})
        if answer.status_code >= 500 or answer.status_code == 429:
            raise ServerUnavailableError(
                f"Label Studio at {self._url} cannot answer now (HTTP {answer.status_code} to a login)."
            )
        try:
            answer_body = parse_json(answer.content)
        except ValueError:
            raise _not_label_studio(self._url) from None
        try:
            self._header = f"Bearer {replies.AccessToken.model_validate(answer_body).access}"
        except ValidationError:  # says nothing of what it holds
            raise LabelStudioError(f"Label Studio at {self._url} does not take the token. {_ADVICE}") from None


def _claims(token: str) -> dict[str, Any]:
    """What a JSON web token says of itself, unverified; empty for other tokens."""
    try:
        middle = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (IndexError, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _not_label_studio(url: str) -> LabelStudioError:
    return LabelStudioError(
        f"{url} is not the address of a Label Studio server: something else answers there. Give the server's root, "
        "e.g. http://localhost:8080, without /api or /projects."
    )


def _json(response: httpx.Response) -> Any:
    try:
        return parse_json(response.content)
    except ValueError:
        return {}


def _detail(answer: Any) -> str:
    """The telling part of an error that the server sent, on one line."""
    if isinstance(answer, dict):
        answer = answer.get("validation_errors") or answer.get("detail") or "no reason given"
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _uploaded_name(path: str) -> str:
    """``upload/1/f5c06c05-name.png`` -> ``name.png``: the server puts eight hex digits before a file's name."""
    return path.rpartition("/")[2].partition("-")[2]


_HIDDEN_COLUMNS: Final = (
    "data.image",
    "inner_id",
    "annotations_results",
    "predictions_results",
    "file_upload",
    "storage_filename",
    "created_at",
    "updated_at",
    "updated_by",
    "avg_lead_time",
    "draft_exists",
    "annotations_ids",
    "predictions_model_versions",
)
