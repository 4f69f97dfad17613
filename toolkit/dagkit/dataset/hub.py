"""Datasets on the Hugging Face Hub, fetched as plain files: nothing in a repository says what else is to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dagkit.dataset.pictures import first_line
from dagkit.dataset.replacing import MARKER
from dagkit.dataset.summary import SUMMARY
from dagkit.errors import DatasetError
from dagkit.provenance import is_repository
from dagkit.workspace import listed

_SCHEME: Final = "hf://"
_FILES: Final = [SUMMARY, "data/*.parquet", "dataset_dict.json", "*/state.json", "*/data-*.arrow"]


def is_url(place: str | Path) -> bool:
    """Whether a place is on the Hub."""
    return str(place).startswith(_SCHEME)


def download(url: str) -> Path:
    """Fetches the newest commit of a dataset into the Hub's cache.

    Returns:
        Its folder there, to be read only.

    Raises:
        DatasetError: there is none, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx, httpx2 or requests, as it uses

    repository = _repository(url)
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=_FILES))
    except (OSError, ValueError, HTTPError) as error:
        raise DatasetError(f"{url}: cannot be fetched from the Hub: {first_line(error)}. Check the name.") from error


def upload(folder: Path, url: str, *, private: bool) -> None:
    """Brings a dataset to the Hub in one commit, in place of an older one if there is one.

    Args:
        folder: of the dataset, in the Hub's layout.
        url: where; the repository is made if there is none.
        private: whether a new repository is private.

    Raises:
        DatasetError: the Hub refused, or the repository holds something that is no dataset of dagkit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    repository, api = _repository(url), HfApi()
    try:
        if not api.repo_exists(repository, repo_type="dataset"):
            api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        names = [name for name in api.list_repo_files(repository, repo_type="dataset") if name != ".gitattributes"]
        if names and SUMMARY not in names:
            raise DatasetError(
                f"{url}: not replaced: dagkit did not make this repository, and it holds {listed(names)}. "
                "Choose another name."
            )
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[MARKER],
            delete_patterns=["data/*.parquet"],
            commit_message="Dataset by dagkit",
        )
    except HfHubHTTPError as error:
        raise DatasetError(
            f"{url}: the Hub refused ({error.response.status_code}). Is the name right, and are you logged in? "
            "See: hf auth login"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise DatasetError(f"{url}: cannot be brought to the Hub: {first_line(error)}. Try again.") from error


def _repository(url: str) -> str:
    name = url.removeprefix(_SCHEME)
    if not is_repository(name):
        raise DatasetError(f"{url!r:.200}: expected hf://owner/name.")
    return name
