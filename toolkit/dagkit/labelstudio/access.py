"""Which server to talk to, and with which token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from dagkit.errors import LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.http import checked_url
from dagkit.labelstudio.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN_VARIABLE: Final = "LABEL_STUDIO_API_KEY"  # noqa: S105 - a name, no secret


def connect(url: str | None = None, tell: Callable[[str], None] = lambda _: None) -> Client:
    """Connects to a team's server, or to the embedded one, which is installed and started if need be.

    The token comes from ``LABEL_STUDIO_API_KEY`` or, for the embedded server, from its login file; from nowhere else.

    Args:
        url: root of a server; None for the embedded one.
        tell: is given one line before each long step.

    Raises:
        LabelStudioError: no token, or the server is down, another web site, or does not take the token.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    embedded = EmbeddedServer().login() if url is not None and token is None else None
    if url is None:
        login = EmbeddedServer().up(tell=tell)
        url, token = login.url, login.token
    elif embedded is not None and embedded.is_at(checked_url(url)):
        token = embedded.token
    if token is None:
        use = "leave --label-studio out to use the embedded server"
        if embedded is not None:
            use += f", which is at {embedded.url} now"
        raise LabelStudioError(
            f"There is no token for {checked_url(url)}: set {TOKEN_VARIABLE} to a personal access token (Account & "
            f"Settings > Personal Access Token), or {use}."
        )
    client = Client(url, token)
    client.check()
    return client
