"""doctor names what is missing, with a hint for each thing."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.concept import concept_names, load_concept


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
    assert found["weapon: proposer attention"]["found"] == "attention, which looks through the base model"
    assert found["torch"]["found"].startswith("2.")


def test_a_missing_checkpoint_is_an_error_for_the_concept_that_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, found = findings("--concept", "nudity")

    assert status == 1
    missing = found["nudity: segmenter"]
    assert missing["status"] == "missing"
    path = tmp_path / "dagkit" / "checkpoints" / "sam_vit_h_4b8939.pth"
    assert missing["found"] == f"{path}: no such SAM checkpoint"
    assert f"curl -L -o {path} https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in missing["hint"]
    assert findings()[0] == 0, "without --concept it is only a hint"


@pytest.mark.parametrize(
    ("model", "status", "found"),
    [
        ("{folder}", "ok", "{folder}"),
        ("{folder}/nothing", "missing", "{folder}/nothing is not there"),
        ("no hub/id", "missing", "no hub/id is not there"),
        ("acme/cats", "off", "acme/cats, not downloaded yet"),
    ],
)
def test_the_base_model_is_looked_for(tmp_path: Path, monkeypatch, model: str, status: str, found: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = load_concept("weapon").model_dump(exclude_none=True)
    (tmp_path / "mine.yaml").write_text(json.dumps({**whole, "name": "mine", "model": model.format(folder=tmp_path)}))
    exit_code, listed = findings("--concept", str(tmp_path / "mine.yaml"))
    assert (listed["mine: base model"]["status"], listed["mine: base model"]["found"]) == (
        status,
        found.format(folder=tmp_path),
    )
    assert exit_code == (status == "missing")


def test_weights_of_proposers_and_judges_are_looked_for_too(tmp_path: Path):
    whole = load_concept("weapon").model_dump(exclude_none=True)
    lacking = {
        "proposers": [{"name": "grounding_dino", "model": str(tmp_path / "dino")}, "attention", "token"],
        "segmenter": {"name": "sam_hf", "model": str(tmp_path / "sam")},
        "judge": {"name": "clip", "checkpoint": str(tmp_path / "clip")},
    }
    (tmp_path / "weapon.yaml").write_text(json.dumps({**whole, **lacking}))
    status, found = findings("--concept", str(tmp_path / "weapon.yaml"))

    assert status == 1
    missing = {finding["what"].rpartition(": ")[2]: finding for finding in found.values()}
    for what, hint in {
        "proposer grounding_dino": "hf download IDEA-Research/grounding-dino-tiny",
        "proposer token": "proposer token: the option token is missing",
        "segmenter": "hf download facebook/sam2.1-hiera-small",
        "judge": "Name a folder or a Hub id under judge.checkpoint",
    }.items():
        assert missing[what]["status"] == "missing"
        assert hint in missing[what]["found"] + missing[what]["hint"]
    assert missing["proposer attention"]["status"] == "ok"


def test_shipped_concepts_lack_weights_at_most():
    """Their plugins take the options that they are given."""
    for what, finding in findings()[1].items():
        if what.split(":")[0] in concept_names() and finding["status"] != "ok":
            assert "checkpoint" in finding["found"].lower() or "loaded" in finding["found"], finding


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

    for address in ("http://me:secret@[::1", "no address", "http://"):
        monkeypatch.setenv("DAGKIT_LABEL_STUDIO", address)
        status, found = findings("--concept", "weapon")
        assert (status, found["Label Studio"]["status"]) == (1, "missing")
        assert "is no address of a server" in found["Label Studio"]["found"]
        assert "secret" not in json.dumps(found["Label Studio"])
