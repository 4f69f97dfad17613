"""A Hugging Face Hub on loopback: the few endpoints that publishing and fetching use, as huggingface_hub speaks them.

Repositories have commits, a branch ``main`` and tags; files that git would keep in LFS take the LFS upload path.
Private repositories need the access token, commits may name the parent that they expect.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

ACCESS_TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".png", ".parquet")


@dataclass
class Repository:
    """One repository of a model or dataset: every commit is a whole tree."""

    is_private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        parts = [self.refs.get("main", "").encode(), *(name.encode() + data for name, data in sorted(files.items()))]
        oid = hashlib.sha1(b"\0".join(parts)).hexdigest()
        self.commits[oid] = files
        self.refs["main"] = oid
        return oid


class Failure(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """The server's state, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        self.url = ""

    def find(self, name: str, is_authorised: bool) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.is_private and not is_authorised):
            raise Failure(404 if is_authorised else 401, "RepoNotFound")
        return repository

    def tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            raise Failure(404, "RevisionNotFound")
        return oid, repository.commits[oid]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken and re.search(self.hub.broken, f"{self.command} {path}"):
                raise Failure(507, message="no space left")
            headers, data = self._route(path, body)
            status = 200
        except Failure as failure:
            status, headers, data = failure.status, {}, b"{}"
            if failure.code:
                headers["X-Error-Code"] = failure.code
            if failure.message:
                headers["X-Error-Message"] = failure.message
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _route(self, path: str, body: bytes) -> tuple[dict[str, str], bytes]:
        is_authorised = self.headers.get("Authorization") == f"Bearer {ACCESS_TOKEN}"
        path = path.removeprefix("/datasets").replace("/api/datasets/", "/api/models/")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(self.hub.find(match[1], is_authorised), match[2], match[3])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return _json(self._info(match[1], self.hub.find(match[1], is_authorised), "main"))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return _json(self._tree(self.hub.find(match[1], is_authorised), match[2], match[3] or ""))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            return _json(self._paths(self.hub.find(match[1], is_authorised), match[2], body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            return _json(self._info(match[1], self.hub.find(match[1], is_authorised), match[2]))
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self.hub.lfs[match[1]] = body
            return _json({})
        if not is_authorised:
            raise Failure(401)
        if path == "/api/repos/create":
            return _json(self._create(json.loads(body)))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return _json(self._batch(json.loads(body)))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/([^/]+)", path):
            repository = self.hub.find(match[1], is_authorised)
            return _json(getattr(self, f"_{match[2]}")(match[1], repository, match[3], body))
        raise Failure(404)

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise Failure(409)
        self.hub.repositories[name] = Repository(asked.get("private", asked.get("visibility") == "private"))
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}

    def _info(self, name: str, repository: Repository, revision: str) -> dict[str, Any]:
        oid, files = self.hub.tree(repository, revision)
        siblings = [{"rfilename": file} for file in sorted(files)]
        return {"id": name, "modelId": name, "sha": oid, "private": repository.is_private, "siblings": siblings}

    def _tree(self, repository: Repository, revision: str, folder: str) -> list[dict[str, Any]]:
        """All files below a folder, and the folders in between."""
        oid, files = self.hub.tree(repository, revision)
        inside = {name: data for name, data in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Failure(404, "EntryNotFound")
        folders = {name.rpartition("/")[0] for name in inside} - {"", folder}
        entries = [{"type": "directory", "oid": oid, "size": 0, "path": name} for name in sorted(folders)]
        return entries + [_entry(name, data) for name, data in sorted(inside.items())]

    def _paths(self, repository: Repository, revision: str, body: bytes) -> list[dict[str, Any]]:
        """Those of the asked paths that are there."""
        oid, files = self.hub.tree(repository, revision)
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = [_entry(name, files[name]) for name in asked if name in files]
        folders = [name for name in asked if any(file.startswith(f"{name}/") for file in files)]
        return found + [{"type": "directory", "oid": oid, "size": 0, "path": name} for name in folders]

    def _file(self, repository: Repository, revision: str, name: str) -> tuple[dict[str, str], bytes]:
        oid, files = self.hub.tree(repository, revision)
        if name not in files:
            raise Failure(404, "EntryNotFound")
        data = files[name]
        return {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data

    def _preupload(self, name: str, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        _, files = self.hub.tree(repository, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            old = files.get(path)
            digest = None
            if old is not None:
                git = hashlib.sha1(f"blob {len(old)}\0".encode() + old).hexdigest()
                digest = hashlib.sha256(old).hexdigest() if mode == "lfs" else git
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        return {"files": answers}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": upload}

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repository.refs["main"]):
            raise Failure(412, message="the branch has moved on")
        files = dict(repository.commits[repository.refs["main"]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                del files[value["path"]]
        oid = repository.commit(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "hookOutput": ""}

    def _tag(self, name: str, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        if self.command == "DELETE":
            del repository.refs[revision]
            return {}
        tag = json.loads(body)["tag"]
        if tag in repository.refs:
            raise Failure(409)
        repository.refs[tag] = self.hub.tree(repository, revision)[0]
        return {}

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


def _json(value: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    """A Hub that listens on 127.0.0.1 until the context ends."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
