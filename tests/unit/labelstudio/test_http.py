"""What the client makes of servers that misbehave: real sockets, scripted answers."""

from __future__ import annotations

import json
import socket

import pytest

from dagkit.errors import LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.http import ServerUnavailableError, checked_token, checked_url
from loopback import Answer, answer, site

LEGACY = "0123456789abcdef0123456789abcdef01234567"


def one_line(caught: pytest.ExceptionInfo[LabelStudioError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert LEGACY not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8080", "expected http:// or https:// and a host"),
        ("ftp://host", "expected http:// or https:// and a host"),
        ("http://", "expected http:// or https:// and a host"),
        ("", "expected http:// or https:// and a host"),
        ("http://host:port", "is not the address of a server"),
        ("http://me:secret@host", "Leave user and password out of the address"),
        ("http://me:secret@[::1", "'http://...@[::1' is not the address of a server"),
        ("http://" + "x" * 70_000, "is not the address of a server: URL too long"),
    ],
)
def test_addresses_that_cannot_be(url: str, expected: str) -> None:
    with pytest.raises(LabelStudioError) as caught:
        checked_url(url)
    assert expected in one_line(caught)
    assert "secret" not in str(caught.value)
    assert "Write e.g. http://localhost:8080" in str(caught.value)


def test_addresses_are_tidied() -> None:
    assert checked_url(" https://label.example.org/team/?page=1#top ") == "https://label.example.org/team"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("tökén", "characters that no token has"),
        ("a b", "characters that no token has"),
    ],
)
def test_tokens_that_cannot_be(token: str, expected: str) -> None:
    with pytest.raises(LabelStudioError) as caught:
        Client("http://localhost", token)
    assert expected in one_line(caught)
    assert "LABEL_STUDIO_API_KEY" in str(caught.value)
    assert "tök" not in str(caught.value)


def test_white_space_around_tokens_is_dropped() -> None:
    assert checked_token(f"  {LEGACY}\n") == LEGACY


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"), "something else answers there"),
        (answer(200, {"hello": "world"}), "something else answers there"),
        (answer(200, ["hello"]), "something else answers there"),
        ((404, {"Content-Type": "text/html"}, b"<html>" + b"x" * 170_000), "something else answers there"),
        ((302, {"Location": "https://elsewhere.example.org/"}, b""), "redirects to https://elsewhere.example.org/"),
        (answer(401, {"detail": "Invalid token."}, **{"Set-Cookie": "sessionid=secret"}), "does not take the token"),
        (answer(403, {"detail": "no"}), "forbids GET /api/version to this account: no. Ask"),
        (answer(413, {}), "too large. Use a smaller --batch-size"),
        (answer(400, {"validation_errors": {"title": ["too\nshort"]}}), '(HTTP 400): {"title": ["too\\nshort"]}'),
        (answer(400, {"detail": "x" * 1000}), "x..."),
        (answer(400, {}), "no reason given"),
        (answer(503, {}), "cannot answer now (HTTP 503 to GET /api/version)"),
        (answer(500, {"detail": "secret"}), "cannot answer now (HTTP 500 to GET /api/version)"),
    ],
)
def test_every_refusal_is_one_clear_line(given: Answer, expected: str) -> None:
    with (
        site(lambda *_: given) as url,
        Client(url, LEGACY) as client,
        pytest.raises(LabelStudioError) as caught,
    ):
        client.check()
    assert expected in one_line(caught)
    assert "secret" not in str(caught.value)


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with Client(f"http://127.0.0.1:{port}", LEGACY) as client, pytest.raises(ServerUnavailableError) as caught:
            client.check()
    assert "cannot be reached" in one_line(caught)
    assert "dagkit label-studio up" in str(caught.value)


def test_unknown_host() -> None:
    with (
        Client("http://nobody.invalid", LEGACY) as client,
        pytest.raises(ServerUnavailableError, match="cannot be reached"),
    ):
        client.check()


def test_slow_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, LEGACY, timeout_s=0.1) as client, pytest.raises(ServerUnavailableError) as caught:
            client.check()
    assert "did not answer within 0.1 s (GET /api/version)" in one_line(caught)


def test_reading_is_repeated_while_the_server_is_away_and_writing_is_not() -> None:
    seen: list[str] = []

    def respond(method: str, path: str, headers: dict[str, str]) -> Answer:
        seen.append(method)
        return answer(503, {}) if len(seen) < 3 else answer(200, {"ok": True})

    with site(respond) as url, Client(url, LEGACY, patience_s=30) as client:
        assert client.request("GET", "/api/projects/1") == {"ok": True}
        assert seen == ["GET"] * 3
        seen.clear()
        with pytest.raises(ServerUnavailableError, match="HTTP 503"):
            client.request("POST", "/api/projects/1/import", json=[])
        assert seen == ["POST"]


def test_patience_ends() -> None:
    with (
        site(lambda *_: answer(502, {})) as url,
        Client(url, LEGACY, patience_s=0.5) as client,
        pytest.raises(ServerUnavailableError, match="HTTP 502"),
    ):
        client.request("GET", "/api/tasks")


def personal(kind: str) -> str:
    import base64

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part({'token_type': kind, 'exp': 1})}.c2lnbmF0dXJl"


def test_personal_tokens_are_exchanged_and_renewed_when_they_expire() -> None:
    given = [0]
    seen: list[str] = []

    def respond(method: str, path: str, headers: dict[str, str]) -> Answer:
        if path == "/api/token/refresh/":
            given[0] += 1
            return answer(200, {"access": f"short-{given[0]}"})
        seen.append(headers["Authorization"])
        is_current = headers["Authorization"] == f"Bearer short-{given[0]}" and len(seen) != 2
        return answer(200, {}) if is_current else answer(401, {"detail": "expired"})

    with site(respond) as url, Client(url, personal("refresh")) as client:
        client.request("GET", "/api/a")
        client.request("GET", "/api/b")
    assert seen == ["Bearer short-1", "Bearer short-1", "Bearer short-2"]


@pytest.mark.parametrize(
    ("token", "header"), [(LEGACY, f"Token {LEGACY}"), (personal("access"), f"Bearer {personal('access')}")]
)
def test_other_tokens_are_sent_as_they_are(token: str, header: str) -> None:
    seen: list[str] = []

    def respond(method: str, path: str, headers: dict[str, str]) -> Answer:
        seen.append(headers["Authorization"])
        return answer(200, {})

    with site(respond) as url, Client(url, token) as client:
        client.request("GET", "/api/a")
    assert seen == [header]


@pytest.mark.parametrize(
    ("given", "expected", "kind"),
    [
        (answer(401, {"detail": "Token is blacklisted"}), "does not take the token", LabelStudioError),
        ((404, {}, b"<html>"), "something else answers there", LabelStudioError),
        (answer(503, {}), "cannot answer now", ServerUnavailableError),
    ],
)
def test_personal_token_that_cannot_be_exchanged(given: Answer, expected: str, kind: type[Exception]) -> None:
    with (
        site(lambda *_: given) as url,
        Client(url, personal("refresh"), patience_s=0) as client,
        pytest.raises(kind) as caught,
    ):
        client.request("GET", "/api/a")
    assert expected in one_line(caught)
