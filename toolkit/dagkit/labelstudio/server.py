"""The embedded Label Studio server: installed on first use, on loopback only, and it phones nobody.

It lives in a virtual environment of its own (its dependencies clash with those of a diffusion toolkit) in the user's
cache; its data are no cache and lie in the user's data folder::

    <cache>/dagkit/label-studio/<version>/venv/       1 GB; DAGKIT_LABEL_STUDIO_VENV names another one
    <cache>/dagkit/label-studio/<version>/template/   a migrated, empty database: a new server starts in seconds
    <data>/dagkit/label-studio/data/                  images, annotations: back this up
    <data>/dagkit/label-studio/login.json             address, user, password, token; mode 0600
    <data>/dagkit/label-studio/settings.json          what else it may serve, see `Sharing`
    <data>/dagkit/label-studio/server.log, server.pid

Nothing secret is passed on a command line (other users see those), printed or logged.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import httpx
from pydantic import Field, TypeAdapter

from dagkit import system
from dagkit.errors import LabelStudioError, WorkspaceError
from dagkit.manifests import parse_json
from dagkit.resources import expanded, user_cache_folder
from dagkit.workspace import atomic_write, lock, open_plain

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION: Final = "1.23.2"
"""The release of Label Studio that dagkit installs and is tested with."""

DEFAULT_PORT: Final = 8080
_BEGUN: Final = "made_by_dagkit"  # in a folder that dagkit began: an interrupted one may be deleted
_COMPLETE: Final = "complete"  # in a virtual environment that dagkit made, in the end
_USERNAME: Final = "dagkit@localhost"
_START_TIMEOUT_S: Final = 300.0  # a slow disk migrates for more than a minute
_STOP_TIMEOUT_S: Final = 10.0
_PORT_TIMEOUT_S: Final = 3.0


@dataclass(frozen=True)
class Login:
    """Where the embedded server is and how to get in. The secrets are left out of its ``repr``."""

    url: Annotated[str, Field(pattern=r"^http://127\.0\.0\.1:[1-9]\d{0,4}$")]
    username: str
    password: str = field(repr=False)
    token: str = field(default="", repr=False)

    @property
    def port(self) -> int:
        """TCP port on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    def is_at(self, url: str) -> bool:
        """Whether an address is this server's, by whichever name of this machine."""
        return url.replace("://localhost:", "://127.0.0.1:").rstrip("/") == self.url


@dataclass(frozen=True)
class Sharing:
    """What the server may serve beside uploads; kept for later starts.

    Attributes:
        files: folder whose files it may serve to those who are logged in, or None.
        is_with_aws: whether it gets the ``AWS_...`` variables of the shell that starts it, to sign links to a bucket.
    """

    files: str | None = None
    is_with_aws: bool = False


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dagkit/label-studio/<version>``, by default under ``~/.cache``."""
    return user_cache_folder() / "label-studio" / VERSION


def data_folder() -> Path:
    """``$XDG_DATA_HOME/dagkit/label-studio``, by default under ``~/.local/share``."""
    given = os.environ.get("XDG_DATA_HOME")
    return (Path(given) if given else expanded("~/.local/share", "the user's data")) / "dagkit" / "label-studio"


class EmbeddedServer:
    """One Label Studio server of this user.

    Args:
        folder: where its data, login and log lie; default: `data_folder`.
        cache: where the virtual environment and the template lie; default: `cache_folder`.
    """

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        self.folder = folder or data_folder()
        self.cache = cache or cache_folder()
        self.login_file = self.folder / "login.json"
        self.log = self.folder / "server.log"
        self._pid_file = self.folder / "server.pid"
        self._process: subprocess.Popen[bytes] | None = None  # where this very object started it

    @property
    def python(self) -> Path:
        """The interpreter of the server's virtual environment, there or not."""
        named = os.environ.get("DAGKIT_LABEL_STUDIO_VENV")
        return (Path(named) if named else self.cache / "venv") / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether the virtual environment is complete."""
        is_named = bool(os.environ.get("DAGKIT_LABEL_STUDIO_VENV"))
        return self.python.exists() and (is_named or (self.cache / "venv" / _COMPLETE).exists())

    @property
    def pid(self) -> int | None:
        """Process id of the running server, or None. Another process that inherited the number is not taken for it."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        if self._process is not None and self._process.poll() is None and self._process.pid == pid:
            return pid  # polled, else it would stay a zombie and look alive
        return pid if pid > 0 and str(self.folder / "data") in system.command_line(pid) else None

    def login(self) -> Login | None:
        """The saved login, or None before the first start."""
        try:
            return _LOGIN.validate_python(_read_json(self.login_file))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:  # says nothing of what it holds: that is secret
            raise LabelStudioError(
                f"{self.login_file}: expected url, username, password and token as JSON, but it is damaged. Restore "
                "it from a backup, or delete it and run `dagkit label-studio up`: a second account is then made."
            ) from (error if isinstance(error, OSError) else None)

    def sharing(self) -> Sharing:
        """What the server was allowed to serve at its last start."""
        path = self.folder / "settings.json"
        try:
            return _SHARING.validate_python(_read_json(path))
        except FileNotFoundError:
            return Sharing()
        except (ValueError, OSError) as error:
            raise LabelStudioError(
                f"{path}: expected files and is_with_aws as JSON, but it is damaged. Delete it, and say again what the "
                "server may serve: dagkit label-studio up --serve-files FOLDER"
            ) from error

    def is_healthy(self) -> bool:
        """Whether the process lives and answers."""
        login = self.login()
        if login is None or self.pid is None:
            return False
        try:
            return httpx.get(f"{login.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def install(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Installs the server and its migrated template, unless they are there.

        Args:
            tell: is given one line before each long step.

        Raises:
            LabelStudioError: ``venv`` or ``pip`` failed, and the message holds the last line that it printed; or what
                stands in the place of a folder is not dagkit's to replace.
        """
        template = self.cache / "template"
        if self.is_installed and template.exists():
            return
        with lock(self.cache):
            if not self.is_installed:
                if os.environ.get("DAGKIT_LABEL_STUDIO_VENV"):
                    raise LabelStudioError(
                        f"DAGKIT_LABEL_STUDIO_VENV: no interpreter at {self.python}. Name a virtual environment that "
                        "has "
                        "Label Studio, or unset the variable and let dagkit install its own."
                    )
                tell(f"Installing Label Studio {VERSION} into {self.cache / 'venv'} (1 GB, a few minutes, once)")
                venv = self.cache / "venv"
                _begin(venv)
                _run(
                    [sys.executable, "-m", "venv", str(venv)],
                    "Install your system's venv package (Debian: python3-venv).",
                )
                pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
                _run([*pip, f"label-studio=={VERSION}"], "Check the network and the package index, then run it again.")
                (venv / _COMPLETE).touch()
            if not template.exists():
                tell("Preparing its database (about a minute, once)")
                partial = self.cache / "template.partial"
                _begin(partial)
                command = [str(self.python), "-m", "label_studio.server", "version", "--data-dir", str(partial)]
                _run(command, "Delete the server's virtual environment and run it again.", _environment(partial))
                (partial / ".env").unlink(missing_ok=True)  # its secret key: every data folder gets one of its own
                (partial / _BEGUN).unlink()
                partial.rename(template)

    def up(
        self,
        port: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
        sharing: Sharing | None = None,
    ) -> Login:
        """Starts the server, unless it runs, and returns its login.

        Args:
            port: TCP port on 127.0.0.1; default: that of the last start, or 8080.
            tell: is given one line before each long step.
            sharing: what it may serve; default: as at the last start. A running server must be stopped to change it.

        Raises:
            LabelStudioError: it runs with other settings or on another port, the port is taken, or the server does not
                come up; the message names the log.
        """
        login, before = self.login(), self.sharing()
        sharing = sharing or before
        if login is not None and login.token and self.is_healthy():
            if sharing != before or port not in (None, login.port):
                raise LabelStudioError(
                    f"Label Studio runs at {login.url} with other settings. Stop it (`dagkit label-studio down`), "
                    "then start it again."
                )
            return login
        self.install(tell)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock(self.folder):
            self.down()
            if login is None:
                login = Login(f"http://127.0.0.1:{port or DEFAULT_PORT}", _USERNAME, secrets.token_urlsafe(18))
            url = f"http://127.0.0.1:{port}" if port else login.url
            login = Login(url, login.username, login.password, login.token)
            _require_free(login.port)
            data = self.folder / "data"
            if not data.exists():
                partial = self.folder / "data.partial"
                _begin(partial)
                shutil.copytree(self.cache / "template", partial, dirs_exist_ok=True)
                (partial / _BEGUN).unlink()
                partial.rename(data)
            self._write_login(login)  # before the account exists: a crash must not lose its password
            atomic_write(self.folder / "settings.json", json.dumps(asdict(sharing)).encode())
            tell(f"Starting Label Studio at {url}")
            self._process = self._start(login, data, sharing)
            self._wait(self._process, login)
            if not login.token:
                login = Login(login.url, login.username, login.password, _new_token(login))
                self._write_login(login)
        return login

    def down(self) -> bool:
        """Stops the server; returns whether it ran.

        Raises:
            LabelStudioError: it does not end.
        """
        pid = self.pid
        if pid is None:
            self._pid_file.unlink(missing_ok=True)
            return False
        for at_once in (False, True):
            system.end_process(pid, at_once=at_once)
            end = time.monotonic() + _STOP_TIMEOUT_S
            while time.monotonic() < end:
                if self.pid is None:
                    if self._process is not None:
                        self._process.wait()
                    self._pid_file.unlink(missing_ok=True)
                    return True
                time.sleep(0.05)
        raise LabelStudioError(f"Label Studio (process {pid}) does not end. Stop it by hand: kill -9 {pid}")

    def _start(self, login: Login, data: Path, sharing: Sharing) -> subprocess.Popen[bytes]:
        extra = {
            "LABEL_STUDIO_USERNAME": login.username,
            "LABEL_STUDIO_PASSWORD": login.password,
        }
        if sharing.files is not None:
            extra |= {"LOCAL_FILES_SERVING_ENABLED": "true", "LOCAL_FILES_DOCUMENT_ROOT": sharing.files}
        if sharing.is_with_aws:
            extra |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        command = [str(self.python), "-m", "label_studio.server", "start", "--no-browser", "--data-dir", str(data)]
        command += ["--internal-host", "127.0.0.1", "--port", str(login.port)]
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
            process = subprocess.Popen(
                command,
                env=_environment(data) | extra,
                cwd=data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pid_file.write_text(str(process.pid))
        return process

    def _wait(self, process: subprocess.Popen[bytes], login: Login) -> None:
        end = time.monotonic() + _START_TIMEOUT_S
        while not self.is_healthy():
            if process.poll() is not None or time.monotonic() > end:
                state = "ended" if process.poll() is not None else f"is not ready after {_START_TIMEOUT_S:.0f} s"
                self.down()
                raise LabelStudioError(
                    f"Label Studio at {login.url} {state}: {_last_line(self.log)} The whole log: {self.log}"
                )
            time.sleep(0.25)

    def _write_login(self, login: Login) -> None:
        partial = self.login_file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(login), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.login_file)


_LOGIN: Final = TypeAdapter(Login)
_SHARING: Final = TypeAdapter(Sharing)


def _read_json(path: Path) -> Any:
    """A JSON file of ours.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    try:
        with open_plain(path) as file:
            return parse_json(file.read(1 << 20))
    except WorkspaceError as error:
        raise ValueError(str(error)) from error


def _environment(data: Path) -> dict[str, str]:
    """What the server sees of this process's environment, and its settings.

    Only harmless variables are handed on: Label Studio reads bare names such as ``HOST``, ``PORT``, ``CI`` and
    ``DJANGO_DB``, which shells and CI systems set for other ends.
    """
    kept = {"PATH", "HOME", "USER", "TMPDIR", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH"}
    return {name: value for name, value in os.environ.items() if name in kept or name.startswith(("LANG", "LC_"))} | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),  # read before --data-dir is: else it makes a folder of its own
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",  # no account for other users of this machine
        "LOG_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
    }


def _require_free(port: int) -> None:
    """Label Studio itself would silently take the next free port.

    A server that was just killed holds its port for a moment after its process is gone, hence the patience.
    """
    end = time.monotonic() + _PORT_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    raise LabelStudioError(
                        f"Port {port} on 127.0.0.1 cannot be used ({(error.strerror or str(error)).lower()}). Choose "
                        f"another one: dagkit label-studio up --port {port + 1 if port < 65535 else DEFAULT_PORT}"
                    ) from error
        time.sleep(0.05)


def _new_token(login: Login) -> str:
    """Logs in like a browser and makes a personal access token (legacy tokens are off by default)."""
    try:
        with httpx.Client(base_url=login.url, timeout=60, trust_env=False) as browser:
            browser.get("/user/login/").raise_for_status()
            form = {
                "email": login.username,
                "password": login.password,
                "csrfmiddlewaretoken": browser.cookies["csrftoken"],
            }
            if (
                browser.post("/user/login/", data=form, headers={"Referer": f"{login.url}/user/login/"}).status_code
                != 302
            ):
                raise LabelStudioError(
                    f"Label Studio at {login.url} does not take the login that dagkit saved: was the password of "
                    f"{login.username} changed? Make a token in its page and set LABEL_STUDIO_API_KEY."
                )
            answer = browser.post(
                "/api/token/", headers={"X-CSRFToken": browser.cookies["csrftoken"], "Referer": login.url}
            )
            answer.raise_for_status()
            return str(parse_json(answer.content)["token"])
    except (httpx.HTTPError, KeyError, ValueError, TypeError) as error:
        raise LabelStudioError(f"Label Studio at {login.url} made no access token ({type(error).__name__}).") from error


def _begin(folder: Path) -> None:
    """Makes an empty folder, and marks it; what an interrupted run left there is deleted, what is another's never.

    Raises:
        LabelStudioError: something stands there that dagkit did not make, or the folder cannot be made.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, "it is no folder")
        if folder.exists() and any(folder.iterdir()):
            if not any((folder / mark).is_file() for mark in (_BEGUN, _COMPLETE)):
                raise FileExistsError(errno.EEXIST, "it holds what dagkit did not put there")
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _BEGUN).touch()
    except OSError as error:
        raise LabelStudioError(
            f"{folder} was not made by dagkit, or by an older one that was stopped while it installed: "
            f"{error.strerror or error}. Move it away, then run it again."
        ) from error


def _run(command: list[str], advice: str, environment: dict[str, str] | None = None) -> None:
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False
    )
    if ended.returncode:
        lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()] or ["it printed nothing"]
        raise LabelStudioError(
            f"{Path(command[0]).name} {' '.join(command[1:4])} failed: {lines[-1].strip()}. {advice}"
        )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"(?i)(token|password|key)\S*\s*[:=]\s*\S+", r"\1=…", lines[-1]) if lines else "it printed nothing."
