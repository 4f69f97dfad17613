"""Tokens by folder and by name."""

from pathlib import Path

import pytest

import dagkit
from dagkit import registry
from dagkit.errors import TokenError
from small_tokens import save_small_token, small_token


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with three versions of one concept, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGKIT_WORKSPACE", raising=False)
    for version in ("1.0.0", "1.10.0", "2.0.0"):
        save_small_token(tmp_path / "runs" / "tokens", version)
    (tmp_path / "runs" / "tokens" / "weapon" / ".checkpoint").mkdir()
    (tmp_path / "runs" / "tokens" / "weapon" / "2.0.0-draft").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("weapon", "2.0.0"),
        ("weapon@latest", "2.0.0"),
        ("weapon@^1", "1.10.0"),
        ("weapon@1.0.0", "1.0.0"),
        ("runs/tokens/weapon/1.0.0", "1.0.0"),
        (Path("runs/tokens/weapon/1.0.0"), "1.0.0"),
        ("runs/tokens/weapon/1.0.0/token.json", "1.0.0"),
    ],
)
def test_references_to_one_workspace(workspace: Path, reference: str | Path, version: str):
    assert registry.resolve(reference).path.resolve() == workspace / "tokens" / "weapon" / version
    assert registry.load_token(reference).name == f"weapon@{version}"


def test_workspaces_by_argument_and_environment(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_small_token(tmp_path / "other" / "tokens", "3.0.0")
    save_small_token(tmp_path / "third" / "tokens", "4.0.0")

    assert registry.load_token("weapon", workspace=tmp_path / "other").version == "3.0.0"
    monkeypatch.setenv("DAGKIT_WORKSPACE", str(tmp_path / "third"))
    assert registry.load_token("weapon").version == "4.0.0"
    assert registry.load_token("weapon", workspace=tmp_path / "other").version == "3.0.0"
    roots = [tmp_path / "other" / "tokens", workspace / "tokens"]
    assert registry.resolve("weapon", roots=roots).version == "3.0.0"  # the first root that has one
    assert registry.resolve("weapon@^1", roots=roots).version == "1.10.0"


def test_dagkit_load_token_is_the_same(workspace: Path):
    assert dagkit.load_token("weapon@^1").name == "weapon@1.10.0"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "wepon",
            "there is no token of 'wepon' in runs/tokens.*Did you mean 'weapon'.*dagkit optimize --concept wepon",
        ),
        ("weapon@1.0.1", "weapon has no version 1.0.1. Did you mean '1.0.0'.*Available: 1.0.0, 1.10.0, 2.0.0"),
        ("weapon@^3", r"has no version \^3. Available"),
        ("./runs/tokens/weapon", "holds versions, not a token. Write runs/tokens/weapon/2.0.0"),
        ("./nowhere", "nowhere does not exist. See what there is with: dagkit token list"),
        ("./runs", "runs is not a token's folder: it has no token.json"),
    ],
)
def test_what_is_not_there(workspace: Path, reference: str, message: str):
    with pytest.raises(TokenError, match=message):
        registry.load_token(reference)


def test_a_folder_with_a_concepts_name_is_not_taken_by_chance(workspace: Path, tmp_path: Path):
    small_token(concept="violence").save(tmp_path / "violence")

    with pytest.raises(TokenError, match=r"For the folder of that name, write \./violence"):
        registry.load_token("violence")
    assert registry.load_token("./violence").name == "violence@1.0.0"


@pytest.mark.parametrize("moved", ["weapon/1.0.1", "violence/1.0.0"])
def test_a_token_under_another_name_is_refused(workspace: Path, moved: str):
    target = workspace / "tokens" / moved
    target.parent.mkdir(exist_ok=True)
    (workspace / "tokens" / "weapon" / "1.0.0").rename(target)

    with pytest.raises(TokenError, match=r"expected .*@.*, but its token.json says weapon@1.0.0"):
        registry.load_token(moved.replace("/", "@"))


def test_what_a_root_has(workspace: Path):
    root = workspace / "tokens"
    (root / "empty").mkdir()

    assert registry.concepts_in(root) == ["weapon"]
    assert registry.versions_in(root, "weapon") == ["1.0.0", "1.10.0", "2.0.0"]
    assert registry.concepts_in(root / "none") == registry.versions_in(root, "none") == []
    assert [token.version for token in registry.local_tokens(root / "weapon")] == ["1.0.0", "1.10.0", "2.0.0"]
    assert registry.next_version_in(root, "weapon", "patch") == "2.0.1"
    assert registry.next_version_in(root, "weapon", "minor") == "2.1.0"
    assert registry.next_version_in(root, "weapon", "major") == "3.0.0"
    assert registry.next_version_in(root, "none", "major") == "1.0.0"


def test_versions_are_never_overwritten(workspace: Path):
    folder = workspace / "tokens" / "weapon"

    assert registry.require_new(folder, "1.1.0") == folder / "1.1.0"
    with pytest.raises(TokenError, match=r"1.0.0 exists, and a version is never overwritten. Use 2.0.1"):
        registry.require_new(folder, "1.0.0")
    with pytest.raises(TokenError, match=r"expected a version such as 1.2.0, but got '../x'"):
        registry.require_new(folder, "../x")
