"""What Label Studio can be asked for: projects, tasks, annotations, files and storages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from dagkit.labelstudio import replies
from dagkit.labelstudio.http import Schema, ServerUnavailableError, Transport, not_label_studio

Item = TypeVar("Item", bound=replies.WithId)

MAX_FILES_PER_UPLOAD: Final = 50  # the server refuses more than 100
_PAGE_SIZE: Final = 1000
_EXPORT_SIZE: Final = 100
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


class Client(Transport):
    """Talks to one Label Studio server; made like a `Transport`."""

    def check(self) -> str:
        """Makes sure that a Label Studio server answers and takes the token, and returns its version.

        Raises:
            LabelStudioError: it is down, another web site, or does not know the token.
        """
        answer = self.send("GET", "/api/version", auth=None)
        try:
            versions = replies.Versions.model_validate(answer)
        except ValidationError:
            raise not_label_studio(self.url) from None
        self.send("GET", "/api/current-user/whoami")
        return versions.package.version or "unknown"

    def wait(self) -> None:
        """Waits until the server answers again.

        Raises:
            ServerUnavailableError: it is still away after ``patience_s``.
        """
        self.request("GET", "/api/current-user/whoami")

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
                raise self.odd("GET", path, "a task is there twice")
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
                raise self.odd("GET", path, f"page {page} is one that was there before")
            yield items
            seen, page = seen | new, page + 1
            if not items or len(seen) >= total:  # the page after the last one answers 404
                return


def _uploaded_name(path: str) -> str:
    """``upload/1/f5c06c05-name.png`` -> ``name.png``: the server puts eight hex digits before a file's name."""
    return path.rpartition("/")[2].partition("-")[2]
