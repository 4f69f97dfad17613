"""Where the server finds the images: uploaded to it, in a folder that it shares with us, or in an S3 bucket.

Folders and buckets need a storage row in the project, which tells the server that it may serve from there. dagkit makes
it, without credentials: a server that serves from a bucket has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dagkit.errors import LabelStudioError

if TYPE_CHECKING:
    from dagkit.labelstudio.api import Client


class Storage(ABC):
    """How images get to where the server finds them."""

    @abstractmethod
    def prepare(self, client: Client, project_id: int, images: Path) -> None:
        """Makes the project's storage row, unless it is there.

        Args:
            client: of the server.
            project_id: which project.
            images: folder of all images to be placed.
        """

    @abstractmethod
    def place(self, image: Path) -> bytes | str:
        """Brings one image there and returns its path or URI, or its bytes where it is to be uploaded to the server."""


class Upload(Storage):
    """Uploads images to the server itself: nothing to set up, and whoever sees them must be logged in."""

    def prepare(self, client: Client, project_id: int, images: Path) -> None:
        """Needs nothing."""

    def place(self, image: Path) -> bytes | str:
        """The bytes of the image."""
        return image.read_bytes()


class LocalFiles(Storage):
    """Serves images from where they lie.

    Args:
        root: ``LOCAL_FILES_DOCUMENT_ROOT`` of the server (`dagkit label-studio up --serve-files ROOT`), as seen from
            here.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def prepare(self, client: Client, project_id: int, images: Path) -> None:
        """Allows the folder of the images."""
        self._relative(images)
        row = {"title": "dagkit", "path": str(images.resolve()), "use_blob_urls": True}
        _make_row(
            client, "localfiles", project_id, row, "path", "start it with `dagkit label-studio up --serve-files ROOT`"
        )

    def place(self, image: Path) -> bytes | str:
        """``/data/local-files/?d=<path below the root>``."""
        return f"/data/local-files/?d={quote(self._relative(image))}"

    def _relative(self, path: Path) -> str:
        if self.root not in path.resolve().parents:
            raise LabelStudioError(
                f"{path} is not below {self.root}, from which the server may serve files. Use a --workspace below it."
            )
        return path.resolve().relative_to(self.root).as_posix()


class S3(Storage):
    """Puts images into a bucket, with the credentials of the usual AWS settings; annotators get presigned links.

    Args:
        bucket: its name.
        prefix: folder in it, not empty.
        endpoint: of an S3-compatible store, e.g. ``https://minio.example.org``; None for AWS.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: str | None = None) -> None:
        try:
            boto3, exceptions = import_module("boto3"), import_module("botocore.exceptions")
        except ImportError as error:
            raise LabelStudioError(
                "--storage s3://... needs the package boto3. Install it: pip install boto3"
            ) from error
        self.bucket, self.prefix, self.endpoint = bucket, prefix.strip("/"), endpoint
        self._errors = (exceptions.BotoCoreError, exceptions.ClientError)
        self._s3: Any = boto3.client("s3", endpoint_url=endpoint)
        self._there: set[str] | None = None

    def prepare(self, client: Client, project_id: int, images: Path) -> None:
        """Puts a marker there, for the server refuses an empty folder, and allows the folder."""
        self._put("dagkit.txt", b"Images for annotation. See docs/annotation.md of dagkit.\n")
        row = {
            "title": "dagkit",
            "bucket": self.bucket,
            "prefix": self.prefix,
            "use_blob_urls": True,
            "presign": True,
            "s3_endpoint": self.endpoint,
        }
        advice = "give the server its own credentials for the bucket (environment or instance role)"
        _make_row(client, "s3", project_id, row, "bucket", advice)

    def place(self, image: Path) -> bytes | str:
        """``s3://bucket/prefix/name``, uploaded unless it is there already."""
        if self._there is None:
            self._there = self._list()
        if image.name not in self._there:
            self._put(image.name, image.read_bytes())
            self._there.add(image.name)
        return f"s3://{self.bucket}/{self.prefix}/{image.name}"

    def _list(self) -> set[str]:
        try:
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/")
            return {item["Key"].rpartition("/")[2] for page in pages for item in page.get("Contents", [])}
        except self._errors as error:
            raise self._failed("read", error) from error

    def _put(self, name: str, data: bytes) -> None:
        kind = "image/png" if name.endswith(".png") else "text/plain"
        try:
            self._s3.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=data, ContentType=kind)
        except self._errors as error:
            raise self._failed("written", error) from error

    def _failed(self, verb: str, error: Exception) -> LabelStudioError:
        return LabelStudioError(
            f"s3://{self.bucket}/{self.prefix} cannot be {verb}: {' '.join(str(error).split())}. Check the bucket's "
            "name and the "
            "AWS credentials of this shell."
        )


def parse_storage(text: str, endpoint: str | None = None) -> Storage:
    """Reads ``upload``, ``local:ROOT`` or ``s3://BUCKET/PREFIX``.

    Raises:
        LabelStudioError: it is none of these.
    """
    if text == "upload":
        return Upload()
    kind, _, place = text.partition(":")
    if kind == "local" and place and Path(place).is_dir():
        return LocalFiles(Path(place))
    bucket, _, prefix = place.removeprefix("//").partition("/")
    if kind == "s3" and bucket and prefix.strip("/"):
        return S3(bucket, prefix, endpoint)
    raise LabelStudioError(
        f"--storage {text!r}: expected upload, local:FOLDER (a folder that exists) or s3://BUCKET/FOLDER."
    )


def _make_row(client: Client, kind: str, project_id: int, row: dict[str, Any], name: str, advice: str) -> None:
    rows = client.storages(kind, project_id)
    if any(getattr(other, name) == row[name] and other.prefix == row.get("prefix") for other in rows):
        return
    try:
        client.request("POST", f"/api/storages/{kind}", json={"project": project_id, **row})
    except LabelStudioError as error:
        raise LabelStudioError(f"{error} So that the server may serve these images, {advice}.") from error
