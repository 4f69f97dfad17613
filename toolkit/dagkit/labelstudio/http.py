"""A Label Studio server over HTTP: one request function, in which every failure becomes one clear line.

The SDK's client is not used for transport: it repeats failed imports by itself, which duplicates tasks; it has no file
upload; it copies every number of a brush mask through Python twice; and its errors print response headers with session
cookies. Its `LabelInterface` checks what is sent (`dagkit.labelstudio.config`).
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Generator, Iterator
from typing import Any, Final, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from dagkit.errors import LabelStudioError, quoted
from dagkit.labelstudio import replies
from dagkit.manifests import explain, parse_json

Schema = TypeVar("Schema", bound=BaseModel)

_FAILING_PATIENCE_S: Final = 10.0
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_ADVICE: Final = (
    "Make one under Account & Settings > Personal Access Token and set LABEL_STUDIO_API_KEY (legacy tokens are off by "
    "default)."
)


class ServerUnavailableError(LabelStudioError):
    """The server did not answer, or said that it cannot answer now: trying again later may succeed.

    Args:
        message: the error's line.
        is_failing: it answers, but with an error of its own (HTTP 500): a locked database, or a defect that stays.
    """

    def __init__(self, message: str, *, is_failing: bool = False) -> None:
        super().__init__(message)
        self.is_failing = is_failing


class Transport:
    """Sends requests to one Label Studio server.

    Args:
        url: root of the server, e.g. ``http://localhost:8080``.
        token: personal access token or legacy token; white space around it is dropped.
        timeout_s: how long one request may take.
        patience_s: how long reading requests go on trying while the server is away.

    Raises:
        LabelStudioError: the address or the token cannot be one.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0, patience_s: float = 120.0) -> None:
        self.url = checked_url(url)
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self._http = httpx.Client(
            auth=_Authorization(self.url, checked_token(token)),
            timeout=timeout_s,
            trust_env=httpx.URL(self.url).host not in _LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Sends one request and returns the parsed answer. GETs are repeated while the server is away.

        Args:
            method: HTTP method.
            path: begins with ``/``.
            **options: as for ``httpx.request``.

        Raises:
            ServerUnavailableError: no answer (for a GET: within ``patience_s``), or 429, 500, 502, 503, 504.
            LabelStudioError: any other refusal.
        """
        start = time.monotonic()
        for pause in backoff():
            try:
                return self.send(method, path, **options)
            except ServerUnavailableError as error:
                patience_s = min(self.patience_s, _FAILING_PATIENCE_S) if error.is_failing else self.patience_s
                if method != "GET" or time.monotonic() + pause > start + patience_s:
                    raise
                time.sleep(pause)
        raise AssertionError("backoff() has no end")

    def ask(self, schema: type[Schema], method: str, path: str, **options: Any) -> Schema:
        """As `request`, with an answer that is as its schema says.

        Raises:
            ServerUnavailableError, LabelStudioError: as for `request`.
            LabelStudioError: the answer is something else.
        """
        answer = self.request(method, path, **options)
        try:
            return schema.model_validate(answer)
        except ValidationError as error:
            raise self.odd(method, path, explain(error)) from error

    def odd(self, method: str, path: str, problem: str) -> LabelStudioError:
        """The error for an answer that is something else than expected."""
        return LabelStudioError(
            f"Label Studio at {self.url} answered {method} {path} with something else than expected: {problem}. Is it "
            "a Label Studio server, and of a version like the one that `dagkit label-studio status` shows?"
        )

    def send(self, method: str, path: str, **options: Any) -> Any:
        """As `request`, once and no more."""
        try:
            response = self._http.request(method, self.url + path, **options)
        except httpx.TimeoutException as error:
            raise ServerUnavailableError(
                f"Label Studio at {self.url} did not answer within {self.timeout_s:g} s ({method} {path}). Try again; "
                "if it stays "
                "slow, send smaller batches."
            ) from error
        except httpx.RequestError as error:
            reason = quoted(" ".join(str(error).split()) or type(error).__name__)[1:-1]
            raise ServerUnavailableError(
                f"Label Studio at {self.url} cannot be reached ({reason}). Start it "
                "(`dagkit label-studio up`) or mend the address, then run the same command again."
            ) from error
        return self._parsed(method, path, response)

    def _parsed(self, method: str, path: str, response: httpx.Response) -> Any:
        status, where = response.status_code, f"Label Studio at {self.url}"
        if status in (429, 500, 502, 503, 504):
            raise ServerUnavailableError(
                f"{where} cannot answer now (HTTP {status} to {method} {path}). Look into its log, try again.",
                is_failing=status == 500,
            )
        if status == 401:
            raise LabelStudioError(f"{where} does not take the token. {_ADVICE}")
        if status == 403:
            raise LabelStudioError(
                f"{where} forbids {method} {path} to this account: {_detail(_json(response))}. "
                "Ask its administrator for a role or setting that allows it."
            )
        if status == 413:
            raise LabelStudioError(f"{where} finds the request too large. Use a smaller --batch-size.")
        if response.is_redirect:
            raise LabelStudioError(
                f"{where} redirects to {quoted(response.headers.get('location', 'nowhere'))[1:-1]}. Use that server's "
                "address."
            )
        if status == 204 or (response.is_success and not response.content):
            return None
        try:
            answer = parse_json(response.content)
        except ValueError:
            raise not_label_studio(self.url) from None
        if response.is_success:
            return answer
        raise LabelStudioError(f"{where} refused {method} {path} (HTTP {status}): {_detail(answer)}")


def checked_url(url: str) -> str:
    """A server's address without a slash at its end.

    Raises:
        LabelStudioError: it has no scheme or host, or holds a password.
    """
    example = "Write e.g. http://localhost:8080"
    shown = quoted(re.sub(r"//[^/]*@", "//...@", url))
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise LabelStudioError(f"{shown} is not the address of a server: {error}. {example}.") from error
    if parsed.userinfo:
        raise LabelStudioError(f"Leave user and password out of the address. {example}, and set LABEL_STUDIO_API_KEY.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise LabelStudioError(
            f"{shown} is not the address of a server: expected http:// or https:// and a host. {example}."
        )
    return str(parsed).split("?")[0].split("#")[0].rstrip("/")


def checked_token(token: str) -> str:
    """A token without white space around it.

    Raises:
        LabelStudioError: it is empty or cannot be one. The message does not show it.
    """
    token = token.strip()
    if not token:
        raise LabelStudioError(f"There is no token for Label Studio: LABEL_STUDIO_API_KEY is empty. {_ADVICE}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise LabelStudioError(
            f"LABEL_STUDIO_API_KEY holds characters that no token has (spaces, letters beyond ASCII). {_ADVICE}"
        )
    return token


def backoff(first_s: float = 0.25, largest_s: float = 10.0) -> Iterator[float]:
    """Pauses between tries, seconds: doubling, without end."""
    pause = first_s
    while True:
        yield pause
        pause = min(2 * pause, largest_s)


class _Authorization(httpx.Auth):
    """Legacy tokens as they are; personal access tokens are exchanged for short-lived ones whenever one has expired."""

    requires_response_body = True

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._is_personal = _claims(token).get("token_type") == "refresh"
        scheme = "Bearer" if _claims(token) else "Token"
        self._header = "" if self._is_personal else f"{scheme} {token}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._is_personal and not self._header:
            yield from self._refresh()
        request.headers["Authorization"] = self._header
        response = yield request
        if response.status_code == 401 and self._is_personal:
            yield from self._refresh()
            request.headers["Authorization"] = self._header
            yield request

    def _refresh(self) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield httpx.Request("POST", f"{self._url}/api/token/refresh/", json={"refresh": self._token})
        if answer.status_code >= 500 or answer.status_code == 429:
            raise ServerUnavailableError(
                f"Label Studio at {self._url} cannot answer now (HTTP {answer.status_code} to a login)."
            )
        try:
            answer_body = parse_json(answer.content)
        except ValueError:
            raise not_label_studio(self._url) from None
        try:
            self._header = f"Bearer {replies.AccessToken.model_validate(answer_body).access}"
        except ValidationError:  # says nothing of what it holds
            raise LabelStudioError(f"Label Studio at {self._url} does not take the token. {_ADVICE}") from None


def _claims(token: str) -> dict[str, Any]:
    """What a JSON web token says of itself, unverified; empty for other tokens."""
    try:
        middle = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (IndexError, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}


def not_label_studio(url: str) -> LabelStudioError:
    """The error for an address at which something else answers."""
    return LabelStudioError(
        f"{url} is not the address of a Label Studio server: something else answers there. Give the server's root, "
        "e.g. http://localhost:8080, without /api or /projects."
    )


def _json(response: httpx.Response) -> Any:
    try:
        return parse_json(response.content)
    except ValueError:
        return {}


def _detail(answer: Any) -> str:
    """The telling part of an error that the server sent, on one line."""
    if isinstance(answer, dict):
        answer = answer.get("validation_errors") or answer.get("detail") or "no reason given"
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
