"""``hf://org/name``: a model repository on the Hugging Face Hub, with a tag ``v1.2.0`` for each version.

Credentials come from ``hf auth login`` or ``HF_TOKEN``, the server from ``HF_ENDPOINT``. Written are the files (one
commit), the tag, and last the index (one commit): readers go by the index, which pins the commit of every version.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of httpx or httpx2, as it uses
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    from huggingface_hub.errors import RemoteEntryNotFoundError
except ImportError:  # before 1.0 it was called so
    from huggingface_hub.errors import EntryNotFoundError as RemoteEntryNotFoundError  # type: ignore[assignment]

from dagkit.errors import PublishError
from dagkit.registry.index import (
    EXAMPLES,
    FIGURES_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    PAGE_FILE,
    SIGNATURE_FILE,
    Entry,
    Index,
    page,
    parse_index,
)
from dagkit.registry.locations.keyed import (
    ConflictError,
    MissingFileError,
    damaged_files,
    extend,
    has,
    refuse_strangers,
)
from dagkit.token import MAX_BYTES

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_MAIN: Final = "main"


class Hub:
    """A repository, private where it is made by us unless asked otherwise."""

    def __init__(self, url: str, *, is_public: bool = False) -> None:
        self.url = url
        self.is_public = is_public
        self._repo = url.removeprefix("hf://")

    def local_folder(self, entry: Entry) -> Path | None:
        """None: not on this disk."""
        return None

    def read_index(self) -> Index | None:
        """What is published, or None where there is no index or no repository that we may see."""
        with self._errors("read"):
            return self._index_or_none()

    def read(self, entry: Entry, name: str) -> bytes:
        """One file of a version, at the commit that the index pins."""
        with self._errors("read"):
            try:
                return self._download(name, entry.revision or f"v{entry.version}", entry.files[name].size)
            except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
                raise MissingFileError(
                    f"{self.url}: the index names {name} of {entry.version}, but it is not there. Publish it again."
                ) from error

    def publish(self, concept: str, entry: Entry, files: Mapping[str, bytes]) -> Index:
        """Writes the files, then the tag, then the index that names them.

        A version that is there and lacks files gets a new commit and tag. Where somebody else writes at the same time,
        it is looked whether they publish the very same.
        """
        with self._errors("read"):
            begun = self._index_or_none()
        for pause_s in (0.2, 0.5, None):
            try:
                return self._publish(concept, entry, files)
            except ConflictError:
                with self._errors("read"):
                    there = self._index_or_none()
                is_same = there is not None and has(there, concept, entry)
                if pause_s is None or not (is_same or there == begun):
                    raise
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _publish(self, concept: str, entry: Entry, files: Mapping[str, bytes]) -> Index:
        api = HfApi()
        with self._errors("written"):
            info = self._repository(api)
            before = self._index(info.sha or _MAIN)
            extend(before, concept, entry, self.url)
            if before is None:
                refuse_strangers(self)
            known = before.entry(entry.version) if before else None
            if before is not None and known is not None and not damaged_files(self, known):
                return before
            own = _names(info) if before is not None else ()
            stale = {name for name in own if name.startswith(EXAMPLES) or name == SIGNATURE_FILE} - set(files)
            commit = api.create_commit(
                self._repo,
                [
                    *(CommitOperationAdd(name, data) for name, data in files.items()),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                commit_message=f"Add {concept} {entry.version}",
                parent_commit=info.sha,
            )
            self._tag(api, f"v{entry.version}", commit.oid)
            index = (before or Index(concept=concept)).with_entry(
                (known or entry).model_copy(update={"revision": commit.oid})
            )
            api.create_commit(
                self._repo,
                [
                    CommitOperationAdd(INDEX_FILE, index.to_bytes()),
                    CommitOperationAdd(PAGE_FILE, page(index, self.url).encode()),
                ],
                commit_message=f"Publish {concept} {entry.version}",
                parent_commit=commit.oid,
            )
        return index

    def write_page(self, index: Index) -> None:
        """Writes ``INDEX.md`` anew."""
        with self._errors("written"):
            HfApi().create_commit(
                self._repo,
                [CommitOperationAdd(PAGE_FILE, page(index, self.url).encode())],
                commit_message="Write the index page anew",
            )

    def strangers(self) -> list[str]:
        """What lies there and is not dagkit's."""
        with self._errors("read"):
            try:
                info = HfApi().model_info(self._repo, revision=_MAIN)
            except (RevisionNotFoundError, RepositoryNotFoundError):
                return []
        return sorted(_names(info) - _own_names(info))

    def _repository(self, api: HfApi) -> ModelInfo:
        try:
            info = api.model_info(self._repo, revision=_MAIN)
        except RepositoryNotFoundError:
            api.create_repo(self._repo, private=not self.is_public, exist_ok=True)
            return api.model_info(self._repo, revision=_MAIN)
        if info.private is False and not self.is_public:
            raise PublishError(f"{self.url} is public. Add --public if everybody may have this token, or use another.")
        return info

    def _tag(self, api: HfApi, tag: str, revision: str) -> None:
        try:
            api.create_tag(self._repo, tag=tag, revision=revision)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if api.model_info(self._repo, revision=tag).sha == revision:
                return
            api.delete_tag(self._repo, tag=tag)  # left by a publish that was interrupted, or of files that are gone
            api.create_tag(self._repo, tag=tag, revision=revision)

    def _index_or_none(self) -> Index | None:
        try:
            return self._index(_MAIN)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return None

    def _index(self, revision: str) -> Index | None:
        try:
            data = self._download(INDEX_FILE, revision, MAX_INDEX_BYTES)
        except RemoteEntryNotFoundError:
            return None
        return parse_index(data, f"{self.url}/{INDEX_FILE}")

    def _download(self, name: str, revision: str, limit: int) -> bytes:
        url = hf_hub_url(self._repo, name, revision=revision)
        size = get_hf_file_metadata(url).size
        if size is not None and size > limit:
            raise MissingFileError(
                f"{self.url}: {name} has {size:,} bytes, but {limit:,} were expected. Do not use it."
            )
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(hf_hub_download(self._repo, name, revision=revision, local_dir=folder)).read_bytes()
            except (
                LocalEntryNotFoundError
            ) as error:  # the Hub was not reached, which before 1.0 passes for a missing file
                raise OSError(str(error)) from error

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RepositoryNotFoundError as error:
            raise PublishError(
                f"{self.url}: there is no such repository, or you may not see it. Log in with: hf auth login"
            ) from error
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, ValueError) as error:
            raise PublishError(f"{self.url} cannot be {what}: {_line(error)}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            advice = {
                401: "Log in with: hf auth login",
                403: "Your access token may not write there; make one that may.",
                409: "Somebody else published there at the same time. Run the same command again.",
                412: "Somebody else published there at the same time. Run the same command again.",
            }.get(status, "Try again later.")
            response: Any = error.response  # of httpx, or before 1.0 of requests
            reason = error.server_message or getattr(response, "reason_phrase", None) or response.reason
            kind = ConflictError if status in (409, 412) else PublishError
            raise kind(f"{self.url} cannot be {what}: HTTP {status} {_short(reason)}. {advice}") from error
        except RuntimeError as error:  # huggingface_hub and hf_xet, when an upload fails
            raise PublishError(
                f"{self.url} cannot be {what}: {_line(error.__cause__ or error)}. Run the same command again."
            ) from error
        except (HTTPError, OSError) as error:
            raise PublishError(
                f"{self.url} cannot be {what}: {_line(error)}. Check the network and HF_ENDPOINT."
            ) from error


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _own_names(info: ModelInfo) -> set[str]:
    """Files that a new repository has, or that an interrupted publish may have left."""
    fixed = {".gitattributes", *MAX_BYTES, SIGNATURE_FILE, FIGURES_FILE, PAGE_FILE}
    return {name for name in _names(info) if name in fixed or re.fullmatch(rf"{EXAMPLES}\d\d\.png", name)}


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _short("; ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)) or type(error).__name__


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."
