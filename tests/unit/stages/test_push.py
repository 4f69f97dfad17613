"""What push and annotate refuse before they talk to a server."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.concept import Concept, load_concept
from dagkit.errors import DagkitError, LabelStudioError, TokenError
from dagkit.stages import push
from dagkit.workspace import Workspace
from drawn_workspace import draw_workspace


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, concept: Concept) -> Workspace:
    return draw_workspace(tmp_path_factory.mktemp("runs"), concept, 2, 1)


def test_a_token_needs_the_base_model(workspace: Workspace, concept: Concept):
    with pytest.raises(
        TokenError, match=r"'weapon@1.0.0': .* no.* given. Give the base model, too \(--model\)"
    ) as caught:
        push.choose(workspace, concept, "uncertain", None, token="weapon@1.0.0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("selection", [None, "all", "diverse"])
def test_a_token_says_what_is_uncertain_and_nothing_else(selection, workspace: Workspace, concept: Concept):
    with pytest.raises(TokenError, match="add --select uncertain, or leave it out"):
        push.choose(workspace, concept, selection, 2, token="weapon@1.0.0")


def test_all_are_sent_where_nothing_is_asked_for(workspace: Workspace, concept: Concept):
    assert push.choose(workspace, concept, None, None) is None
    assert push.choose(workspace, concept, None, 2) == ["u000", "u001"]


@pytest.mark.parametrize("line", ["push --concept weapon --label-config", "sample --guard weapon --prompts-file"])
def test_a_text_file_that_is_none_is_named(line: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"a bomb\xff")
    result = CliRunner().invoke(command, [*line.split(), str(file), "--workspace", str(tmp_path / "runs")])
    assert isinstance(result.exception, DagkitError)
    assert str(result.exception).startswith(f"{file}: expected UTF-8 text, but invalid start byte at byte 6. Save")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["push", "annotate"])
def test_a_storage_that_is_none_is_refused_before_anything_is_done(name: str, tmp_path: Path):
    line = [name, "--concept", "weapon", "--workspace", str(tmp_path / "runs"), "--storage", "gs://bucket/x"]
    result = CliRunner().invoke(command, line)
    assert isinstance(result.exception, LabelStudioError)
    assert "--storage 'gs://bucket/x': expected upload, local:FOLDER" in str(result.exception)
    assert not (tmp_path / "runs").exists()
