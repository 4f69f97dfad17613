"""What a Label Studio server answers, as far as dagkit reads it. Further fields may stand there.

A server may be old, new, behind a proxy or somebody else's: each answer is checked where it is read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints

from dagkit.manifests import Time

Id = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Reply(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)


class Package(Reply):
    """One package of the server."""

    version: str | None = None


class Versions(Reply):
    """``/api/version``."""

    package: Package = Field(alias="label-studio-os-package")


class AccessToken(Reply):
    """``/api/token/refresh/``."""

    access: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]+$", max_length=16_384)]


class WithId(Reply):
    """What was made."""

    id: Id


class ListedProject(WithId):
    """A project in a list."""

    title: str


class Projects(Reply):
    """A page of ``/api/projects``."""

    results: list[ListedProject]
    count: Count = 0


class Project(Reply):
    """``/api/projects/<id>``; all that it holds is kept."""

    model_config = ConfigDict(extra="allow")

    label_config: str
    maximum_annotations: Count


class TaskData(WithId):
    """A task with its data."""

    data: dict[str, Any]


class Tasks(Reply):
    """A page of ``/api/tasks`` with the tasks' data."""

    tasks: list[TaskData]
    total: Count = 0


class ChangedTask(WithId):
    """A task with the time of its last change."""

    updated_at: Time


class ChangedTasks(Reply):
    """A page of ``/api/tasks`` with the tasks' times."""

    tasks: list[ChangedTask]
    total: Count = 0


class TaskWork(Reply):
    """``/api/tasks/<id>``: what was done there."""

    annotations: list[Any]
    drafts: list[Any]


class Uploads(RootModel[list["UploadedFile"]]):
    """``/api/projects/<id>/file-uploads``."""

    model_config = ConfigDict(strict=True)


class UploadedFile(Reply):
    """One upload."""

    file: str


class UploadIds(Reply):
    """``/api/projects/<id>/import`` of files."""

    file_upload_ids: list[Id]


class TaskIds(Reply):
    """``/api/projects/<id>/import`` of tasks; without ids where it imports in the background."""

    task_ids: list[Id] | None = None


class StorageRow(Reply):
    """One storage of a project."""

    path: str | None = None
    bucket: str | None = None
    prefix: str | None = None


class Storages(RootModel[list[StorageRow]]):
    """``/api/storages/<kind>``."""

    model_config = ConfigDict(strict=True)


class ExportedTask(TaskData):
    """One task of an export; its annotations are checked one task at a time, by `Annotation`."""

    annotations: list[dict[str, Any]]


class Export(RootModel[list[ExportedTask]]):
    """``/api/projects/<id>/export``."""

    model_config = ConfigDict(strict=True)


class Region(Reply):
    """One region or choice of a result."""

    id: str | None = None
    type: Annotated[str, StringConstraints(max_length=200)]
    value: dict[str, Any] | None = None
    original_width: float | None = None
    original_height: float | None = None
    image_rotation: float | None = None


class Snapshot(Reply):
    """The prediction from which an annotation was made; empty where there was none."""

    result: list[Region] | None = None


class User(Reply):
    """Who annotated, in long."""

    id: Id


class Annotation(WithId):
    """One annotation of an exported task. Who made it is None once the account was deleted."""

    completed_by: Id | User | None
    result: list[Region] | None
    was_cancelled: bool
    created_at: Time
    updated_at: Time
    lead_time: float | None = None
    prediction: Snapshot | Id | None = None

    @property
    def user_id(self) -> int:
        """Id of the account; negative, and another one for each annotation, where it was deleted."""
        if self.completed_by is None:
            return -self.id
        return self.completed_by.id if isinstance(self.completed_by, User) else self.completed_by
