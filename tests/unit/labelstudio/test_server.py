"""The embedded server's files and refusals, without a server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dagkit import system
from dagkit.errors import LabelStudioError
from dagkit.labelstudio import access, server
from dagkit.labelstudio.server import EmbeddedServer, Login
from dagkit.stages import pull


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAGKIT_LABEL_STUDIO_VENV", "LABEL_STUDIO_API_KEY", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_folders_follow_the_desktop_conventions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert server.cache_folder() == tmp_path / ".cache/dagkit/label-studio" / server.VERSION
    assert server.data_folder() == tmp_path / ".local/share/dagkit/label-studio"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert server.cache_folder() == Path("/cache/dagkit/label-studio") / server.VERSION
    assert server.data_folder() == Path("/data/dagkit/label-studio")


def test_nothing_there_yet(tmp_path: Path) -> None:
    embedded = EmbeddedServer(tmp_path / "data", tmp_path / "cache")
    assert embedded.login() is None
    assert embedded.pid is None
    assert not embedded.is_installed
    assert not embedded.is_healthy()
    assert embedded.down() is False
    assert list(tmp_path.iterdir()) == []


def test_login_is_written_for_its_owner_only_and_shows_no_secret(tmp_path: Path) -> None:
    embedded = EmbeddedServer(tmp_path)
    login = Login("http://127.0.0.1:1", "someone", "very secret", "token")
    embedded._write_login(login)
    assert stat.S_IMODE(embedded.login_file.stat().st_mode) == 0o600
    assert embedded.login() == login
    assert "secret" not in repr(login)
    assert "token" not in repr(login)


ENTRY = {"url": "http://127.0.0.1:8080", "username": "u", "password": "p", "token": "t" * 40}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"url": "x"}',
        '{"url": ',
        "[" * 100_000,
        json.dumps(ENTRY | {"url": "http://team.example.org"}),
        json.dumps(ENTRY | {"url": "http://127.0.0.1:http"}),
        json.dumps(ENTRY | {"password": 5}),
        json.dumps(ENTRY | {"token": None}),
    ],
)
def test_damaged_login(tmp_path: Path, content: str) -> None:
    (tmp_path / "login.json").write_text(content)
    with pytest.raises(LabelStudioError, match=r"login.json: expected url, .* but it is damaged. Restore it") as caught:
        EmbeddedServer(tmp_path).login()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 5}', '{"is_with_aws": []}'])
def test_damaged_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(LabelStudioError, match=r"settings.json: expected files and is_with_aws .* Delete it"):
        EmbeddedServer(tmp_path).sharing()


@pytest.mark.parametrize("tool", ["/proc", "ps", "neither"])
def test_the_process_is_known_without_ps_or_without_proc(
    tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers often have no ``ps``; macOS has no ``/proc``."""
    if tool == "ps" and shutil.which("ps") is None:
        pytest.skip("this machine has no ps")
    if tool != "ps":
        monkeypatch.setenv("PATH", str(tmp_path))
    if tool != "/proc":
        monkeypatch.setattr(system, "_PROC", tmp_path / "no-proc")
    embedded = EmbeddedServer(tmp_path)
    code = "import time; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it runs, and has its command line
        (tmp_path / "server.pid").write_text(str(process.pid))
        assert embedded.pid == (None if tool == "neither" else process.pid)
        embedded._process = process  # its own child is known anyhow
        assert embedded.pid == process.pid
        assert embedded.down() is True
        assert process.poll() is not None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("content", ["", "no number", "1", "99999999", "-1", "0"])
def test_a_stale_process_number_is_not_taken_for_the_server(tmp_path: Path, content: str) -> None:
    """Number 1 is another process, which is never to be stopped."""
    (tmp_path / "server.pid").write_text(content)
    embedded = EmbeddedServer(tmp_path)
    assert embedded.pid is None
    assert embedded.down() is False
    assert not (tmp_path / "server.pid").exists()


def test_named_environment_without_an_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAGKIT_LABEL_STUDIO_VENV", str(tmp_path / "nowhere"))
    with pytest.raises(LabelStudioError, match=r"DAGKIT_LABEL_STUDIO_VENV: no interpreter at .*nowhere/bin/python"):
        EmbeddedServer(tmp_path, tmp_path / "cache").install()


def test_a_folder_of_somebody_else_is_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DAGKIT_LABEL_STUDIO_VENV", raising=False)
    note = tmp_path / "venv" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(LabelStudioError, match=r"venv was not made by dagkit.*Move it away"):
        EmbeddedServer(tmp_path, tmp_path).install()
    assert note.read_text() == "mine"


def test_an_unfinished_installation_does_not_count(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert not EmbeddedServer(tmp_path, tmp_path).is_installed
    (tmp_path / "venv/complete").touch()
    assert EmbeddedServer(tmp_path, tmp_path).is_installed


@pytest.mark.parametrize("place", ["cache/venv", "cache/template.partial", "data/data.partial"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_dagkit_did_not_begin_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, kind: str
) -> None:
    embedded = EmbeddedServer(tmp_path / "data", tmp_path / "cache")
    if not place.endswith("venv"):
        monkeypatch.setenv("DAGKIT_LABEL_STUDIO_VENV", sys.prefix)
    if place.startswith("data"):
        (tmp_path / "cache/template").mkdir(parents=True)
    path, thesis = tmp_path / place, tmp_path / "mine/thesis.txt"
    thesis.parent.mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        thesis = path / "thesis.txt"
        path.mkdir()
    elif kind == "file":
        thesis = path
    else:
        path.symlink_to(thesis.parent)
    thesis.write_text("years of work")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(LabelStudioError, match=rf"{re.escape(str(path))} was not made by dagkit.*: it .*Move it away"):
        embedded.up(port)
    assert thesis.read_text() == "years of work"
    assert path.is_symlink() == (kind == "link")


@pytest.mark.parametrize("mark", ["made_by_dagkit", "complete"])
def test_what_an_interrupted_installation_left_is_begun_anew(tmp_path: Path, mark: str) -> None:
    folder = tmp_path / "cache/venv"
    (folder / "lib").mkdir(parents=True)
    (folder / mark).touch()
    server._begin(folder)
    assert [one.name for one in folder.iterdir()] == ["made_by_dagkit"]


def test_a_taken_port_is_refused_with_another_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LabelStudioError, match=f"Port {port} on 127.0.0.1 cannot be used.*--port {port + 1}"):
            server._require_free(port)


def test_the_server_sees_no_settings_meant_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOST", "PORT", "CI", "DJANGO_DB", "LABEL_STUDIO_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    seen = server._environment(tmp_path)
    assert not {"HOST", "PORT", "CI", "DJANGO_DB", "LABEL_STUDIO_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & set(
        seen
    )
    assert seen["COLLECT_ANALYTICS"] == "false"
    assert seen["SENTRY_DSN"] == seen["FRONTEND_SENTRY_DSN"] == ""


def test_last_line_of_a_log_shows_no_secret(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nSECRET_KEY=abc password: hunter2 went wrong\n\n")
    assert server._last_line(log) == "SECRET_KEY=… password=… went wrong"
    log.write_text("")
    assert server._last_line(log) == "it printed nothing."


def test_a_team_server_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(LabelStudioError, match=r"no token for http://team.example.org: set LABEL_STUDIO_API_KEY"):
        access.connect("http://team.example.org/")


def test_the_embedded_servers_token_goes_to_no_other_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "dagkit/label-studio"
    folder.mkdir(parents=True)
    (folder / "login.json").write_text(json.dumps(ENTRY))
    with pytest.raises(LabelStudioError, match=r"no token for http://team.example.org"):
        access.connect("http://team.example.org")


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """The login of an embedded server that was on port 8080 and is on 8090 now."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    EmbeddedServer().folder.mkdir(parents=True)
    login = Login(**ENTRY | {"url": "http://127.0.0.1:8090"})
    EmbeddedServer()._write_login(login)
    return login


@pytest.mark.parametrize(
    ("project", "token", "expected"),
    [
        ({"url": "http://127.0.0.1:8090"}, None, None),
        ({"url": "http://127.0.0.1:8080", "is_embedded": True}, None, None),
        ({"url": "http://127.0.0.1:8080", "is_embedded": True}, "t", None),
        ({"url": "http://127.0.0.1:8080"}, None, None),  # noted by an older dagkit
        ({"url": "http://127.0.0.1:8080"}, "t", "http://127.0.0.1:8080"),
        ({"url": "http://127.0.0.1:8080", "is_embedded": False}, None, "http://127.0.0.1:8080"),
        ({"url": "https://team.example.org", "is_embedded": False}, None, "https://team.example.org"),
        ({}, None, None),
    ],
)
def test_tasks_are_found_after_the_embedded_server_has_moved(
    moved: Login, project: dict[str, object], token: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", token)
    assert pull._pushed_to(project) == expected


def test_the_old_address_of_the_embedded_server_is_told_from_a_teams(moved: Login) -> None:
    with pytest.raises(LabelStudioError, match=r"to use the embedded server, which is at http://127.0.0.1:8090 now"):
        access.connect("http://127.0.0.1:8080")
    assert moved.is_at("http://localhost:8090/")
    assert not moved.is_at("http://localhost:8080")


def test_the_last_port_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PORT_TIMEOUT_S", 0.0)
    with socket.create_server(("127.0.0.1", 65535)), pytest.raises(LabelStudioError, match=r"up --port 8080$"):
        server._require_free(65535)
