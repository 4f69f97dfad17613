"""Where tests publish: a folder, a real S3 server (moto), the Hub's client against a loopback server."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from huggingface_hub import HfApi

from dagkit.registry.locations.bucket import Bucket
from dagkit.workspace import sha256_json
from loopback_hub import ACCESS_TOKEN, LoopbackHub, running_hub


class Place(Protocol):
    """A location as its owner sees it, behind dagkit's back."""

    url: str
    writes: tuple[tuple[type | object, str], ...]

    def files(self) -> dict[str, bytes]: ...
    def write(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class FolderPlace:
    writes = ((os, "fsync"),)

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, f"file://{root}"

    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def write(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()


class BucketPlace:
    writes = ((Bucket, "_put"), (Bucket, "_replace"))

    def __init__(self, bucket: str) -> None:
        import boto3

        self.s3, self.bucket, self.url = boto3.client("s3"), bucket, f"s3://{bucket}/team/weapon"
        self.s3.create_bucket(Bucket=bucket)

    def files(self) -> dict[str, bytes]:
        found = self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        return {
            one["Key"].removeprefix("team/weapon/"): self.s3.get_object(Bucket=self.bucket, Key=one["Key"])[
                "Body"
            ].read()
            for one in found
        }

    def write(self, name: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=f"team/weapon/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.s3.delete_object(Bucket=self.bucket, Key=f"team/weapon/{name}")


class HubPlace:
    writes = ((HfApi, "create_repo"), (HfApi, "create_commit"), (HfApi, "create_tag"))

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub, self.url, self.name = hub, "hf://acme/weapon", "acme/weapon"

    def files(self) -> dict[str, bytes]:
        repository = self.hub.repositories.get(self.name)
        return {} if repository is None else dict(repository.commits[repository.refs["main"]])

    def write(self, name: str, data: bytes) -> None:
        for files in self.hub.repositories[self.name].commits.values():
            if name in files:
                files[name] = data

    def remove(self, name: str) -> None:
        for files in self.hub.repositories[self.name].commits.values():
            files.pop(name, None)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        default = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = hub.url + default.removeprefix(huggingface_hub.constants.ENDPOINT)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # as HF_ENDPOINT does
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # what diffusers asks
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("HF_TOKEN", ACCESS_TOKEN)
        yield hub


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketPlace:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-that-must-not-be-shown")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    return BucketPlace(f"tokens-{sha256_json(str(tmp_path))[7:19]}")


@pytest.fixture(params=["folder", "bucket", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "published")
    return request.getfixturevalue("bucket") if request.param == "bucket" else HubPlace(request.getfixturevalue("hub"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fetched tokens lie: nothing that this user has fetched before."""
    monkeypatch.setenv("DAGKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
