"""Where images go: how it is written on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dagkit.errors import LabelStudioError
from dagkit.labelstudio.storage import LocalFiles, Upload, parse_storage


def test_upload_sends_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"image")
    storage = parse_storage("upload")
    assert isinstance(storage, Upload)
    assert storage.place(tmp_path / "x.png") == b"image"


def test_local_files_are_named_below_their_root(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    storage = parse_storage(f"local:{tmp_path}")
    assert storage.place(tmp_path / "a b" / "x#1.png") == "/data/local-files/?d=a%20b/x%231.png"
    with pytest.raises(LabelStudioError, match=r"/elsewhere/x.png is not below .*Use a --workspace below it"):
        storage.place(Path("/elsewhere/x.png"))
    with pytest.raises(LabelStudioError, match=r"is not below"):
        LocalFiles(tmp_path).place(tmp_path / ".." / "x.png")


@pytest.mark.parametrize(
    "text", ["", "local:", "local:/not/there", "s3://bucket", "s3://bucket/", "s3:///x", "gs://b/x", "up"]
)
def test_what_is_no_storage(text: str) -> None:
    with pytest.raises(LabelStudioError, match=r"expected upload, local:FOLDER .* or s3://BUCKET/FOLDER"):
        parse_storage(text)


def test_a_bucket_needs_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(LabelStudioError, match=r"needs the package boto3. Install it: pip install boto3"):
        parse_storage("s3://bucket/folder")
