"""doctor names what is missing, with a hint for each thing."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from dagkit.cli import command


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGKIT_LABEL_STUDIO", raising=False)
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)


@pytest.fixture
def other_site() -> Iterator[str]:
    """A web site that is no Label Studio."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(command, ["doctor", "--json", *arguments])
    return result.exit_code, {finding["what"]: finding for finding in json.loads(result.output)}


def test_the_bundled_concept_lacks_nothing():
    status, found = findings("--concept", "weapon")

    assert status == 0
    assert {name: finding for name, finding in found.items() if finding["status"] == "missing"} == {}
    assert found["weapon: segmenter"]["found"].startswith("sam ")
    assert found["torch"]["found"].startswith("2.")


def test_a_missing_checkpoint_is_an_error_for_the_concept_that_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, found = findings("--concept", "nudity")

    assert status == 1
    missing = found["nudity: segmenter"]
    assert missing["status"] == "missing"
    assert "sam_vit_h_4b8939.pth" in missing["found"] + missing["hint"]
    assert findings()[0] == 0, "without --concept it is only a hint"


def test_label_studio(monkeypatch: pytest.MonkeyPatch, other_site: str):
    assert "dagkit label-studio up" in findings("--concept", "weapon")[1]["Label Studio"]["hint"]

    monkeypatch.setenv("DAGKIT_LABEL_STUDIO", other_site)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "secret-token")
    status, found = findings("--concept", "weapon")
    assert status == 1
    assert found["Label Studio"]["found"] == f"{other_site} answers 404, LABEL_STUDIO_API_KEY set"
    assert "secret-token" not in json.dumps(found)

    monkeypatch.setenv("DAGKIT_LABEL_STUDIO", "http://127.0.0.1:9")
    assert "ConnectError" in findings("--concept", "weapon")[1]["Label Studio"]["found"]
