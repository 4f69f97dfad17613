"""Datasets on a Hub: sent and fetched as files, checked against their fingerprint, and never in place of others'."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dagkit.concept import load_concept
from dagkit.dataset import load_dataset, read_summary
from dagkit.stages import export
from drawn_workspace import draw_workspace
from loopback_hub import ACCESS_TOKEN, LoopbackHub, Repository, running_hub

datasets.disable_progress_bars()
CONCEPT = load_concept("weapon")

RUN = """
import json, sys
from click.testing import CliRunner
from dagkit.cli import command
for line in json.load(sys.stdin):
    result = CliRunner().invoke(command, line)
    print(json.dumps([result.exit_code, type(result.exception).__name__, str(result.exception), result.stdout]))
"""


def run(hub: LoopbackHub, cache: Path, *lines: list[object]) -> list[tuple[int, str, str, str]]:
    """Runs commands in one process, for which the Hub is on loopback: status, error, its words, output of each."""
    names = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ACCESS_TOKEN, "HF_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([[str(one) for one in line] for line in lines]),
        env={**os.environ, **names, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    workspace = draw_workspace(tmp_path / "runs", CONCEPT, 5, 3)
    path: Path = export.run(workspace, CONCEPT, accept_unreviewed=True).data["path"]
    return path


def test_there_and_back(folder: Path, tmp_path: Path):
    out, url = tmp_path / "out", "hf://acme/weapon"
    with running_hub() as hub:
        pushed, fetched, again, checked, other_way = run(
            hub,
            tmp_path / "cache",
            ["dataset", "push", url, folder],
            ["dataset", "push", out, url],
            ["dataset", "push", url, out],
            ["dataset", "check", url],
            ["dataset", "push", folder, url],
        )
        files = hub.repositories["acme/weapon"].commits[hub.repositories["acme/weapon"].refs["main"]]
    assert pushed[3] == f"dataset push: 8 rows -> {url}\n"
    assert fetched[3] == f"dataset push: 8 rows -> {out}\n"
    assert again[0] == 0
    assert checked[3] == "dataset check: 8 rows: 0 errors, 0 warnings\n"
    assert other_way[1] == "DatasetError"
    assert "`dagkit export` made this dataset" in other_way[2]
    assert sorted(files) == [".gitattributes", "README.md", *data_files(files), "dataset.json"]
    assert read_summary(out) == read_summary(folder)
    assert {split: rows["key"][:] for split, rows in load_dataset(out).items()} == {
        split: rows["key"][:] for split, rows in load_dataset(folder).items()
    }


def data_files(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.startswith("data/"))


def test_what_is_wrong_on_the_hub_is_named_and_nothing_is_written(folder: Path, tmp_path: Path):
    whole = {path.relative_to(tmp_path / "whole").as_posix(): path for path in pushed(folder, tmp_path / "whole")}
    good = {name: path.read_bytes() for name, path in whole.items()}
    changed = json.loads(good["dataset.json"]) | {"fingerprint": "sha256:" + "0" * 64}
    train = next(name for name in good if "train" in name)
    repositories = {
        "changed": {**good, "dataset.json": json.dumps(changed).encode()},
        "fewer": {name: data for name, data in good.items() if "test" not in name},
        "nameless": {name: data for name, data in good.items() if name != "dataset.json"},
        "damaged": {**good, train: good[train][:500]},
        "theirs": {".gitattributes": b"", "README.md": b"mine", "weights.bin": b"mine"},
        "leading": {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: HUB/private.parquet\n---\n",
            "dataset.json": good["dataset.json"],
        },
    }
    out = tmp_path / "out"
    with running_hub() as hub:
        for name, files in repositories.items():
            repository = Repository(is_private=False)
            repository.commit({path: data.replace(b"HUB", hub.url.encode()) for path, data in files.items()})
            hub.repositories[f"acme/{name}"] = repository
        before = {name: dict(hub.repositories[f"acme/{name}"].refs) for name in repositories}
        hub.broken = "acme/new/commit"
        outcomes = run(
            hub,
            tmp_path / "cache",
            *(["dataset", "push", out, f"hf://acme/{name}"] for name in repositories),
            ["dataset", "push", "hf://acme/theirs", folder],
            ["dataset", "check", "hf://acme/nowhere"],
            *(["dataset", "push", f"hf://{name}", folder] for name in ("", "acme", "a/b/c", "../x", "a/b\n")),
            ["dataset", "push", "s3://acme/weapon", folder],
            ["dataset", "push", "hf://acme/new", folder],
        )
        after = {name: dict(hub.repositories[f"acme/{name}"].refs) for name in repositories}
        asked = list(hub.requests)
    expected = [
        "hf://acme/changed: the rows do not match the fingerprint in dataset.json",
        "hf://acme/fewer: the rows do not match the fingerprint in dataset.json",
        "hf://acme/nameless/dataset.json: no such file",
        "hf://acme/damaged: the dataset is damaged: ",
        "hf://acme/theirs: no dataset.",
        "hf://acme/leading: no dataset.",
        "hf://acme/theirs: not replaced: dagkit did not make this repository, and it holds README.md, weights.bin.",
        "hf://acme/nowhere: cannot be fetched from the Hub: ",
        *["': expected hf://owner/name."] * 5,
        "'s3://acme/weapon': expected hf://owner/name, or a folder.",
        "hf://acme/new: the Hub refused (507)",
    ]
    for (status, error, message, _), words in zip(outcomes, expected, strict=True):
        assert (status, error) == (1, "DatasetError"), message
        assert words in message
        assert "\n" not in message
        assert ACCESS_TOKEN not in message
    assert not out.exists()
    assert after == before
    assert not [line for line in asked if "private.parquet" in line]


def pushed(folder: Path, to: Path) -> list[Path]:
    from dagkit.dataset import push_dataset

    push_dataset(load_dataset(folder), str(to), read_summary(folder))
    return [path for path in to.rglob("*") if path.is_file() and path.name != "made_by_dagkit.json"]
