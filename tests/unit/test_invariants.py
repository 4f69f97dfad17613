"""What ARCHITECTURE.md says that dagkit never does, as far as its source shows; other tests show the rest at work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import dagkit
import tiny_pipelines as tiny
from dagkit.token import Thresholds

PACKAGE = Path(dagkit.__file__).parent
TREES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

WRITERS = {
    "workspace": "atomic_write, StageFolder, lock",
    "folders": "atomic_folder",
    "system": "deletes the lock that it holds",
    "token/artifact": "into an atomic_folder",
    "registry/cache": "into an atomic_folder",
    "registry/signing": "into a temporary folder",
    "dataset/writing": "into an atomic_folder",
    "dataset/replacing": "beside an atomic_folder, and only what it made",
    "exchange/writing": "into an atomic_folder",
    "optimization/cache": "into a file that has no name",
    "labelstudio/server": "its own data, below no workspace",
    "demo/atlas": "makes the bundled world, for its maintainers",
    "demo/networks": "as above",
    "demo/train": "as above",
    "demo/training": "as above",
}
"""Modules that change files by themselves, and which. All others ask one of them."""

CHANGES = {"mkdir", "mkdtemp", "mkstemp", "rename", "rmdir", "rmtree", "copytree", "touch", "truncate", "unlink"}
CHANGES |= {"write_text", "save_file", "save_pretrained", "symlink_to", "removedirs", "move"}
"""Methods and functions that change files, whatever they are given."""

ONE_ARGUMENT = {"write_bytes", "replace"}
"""Of a path, with one argument; what is called so with more is of a `StageFolder`, a string or a dataclass."""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Name of what is called, the part before the last dot included, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def modules_that_call(*names: str) -> set[str]:
    return {module for module, tree in TREES.items() if any(name in names for name, _ in calls(tree))}


def changes_files(name: str, call: ast.Call) -> bool:
    short = name.rpartition(".")[2]
    if short in ("open", "fdopen", "open_plain"):
        modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        return short != "open_plain" and any(set(mode) <= set("rwxab+t") and set(mode) & set("wxa+") for mode in modes)
    is_of_path = short in ONE_ARGUMENT and "." in name and len(call.args) == 1 and not call.keywords
    return short in CHANGES or is_of_path


def test_nothing_but_the_writers_changes_files():
    found = {module for module, tree in TREES.items() if any(changes_files(*one) for one in calls(tree))}
    assert found == set(WRITERS)


def test_only_a_stamp_asks_for_the_time_of_day():
    """So no row of a manifest can hold it."""
    clocks = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today", "time.time", "time.time_ns")
    assert modules_that_call(*clocks, "time.localtime", "time.gmtime", "time.strftime") == {"token/stamp"}
    stamped = {module for module, tree in TREES.items() for name, _ in calls(tree) if name in ("now", "stamp.now")}
    assert stamped == {"optimization/training", "registry/publishing", "evaluation/measuring"}  # record, index, figures


def test_only_generation_draws_and_it_always_refuses():
    """`demo.measure` rates the bundled model before it is one, on captions of its own world."""
    pipelines = {
        module
        for module, tree in TREES.items()
        for name, call in calls(tree)
        if name.rpartition(".")[2] in ("pipe", "pipeline") and not isinstance(call.func, ast.Call)
    }
    assert pipelines == {"generation", "demo/measure"}
    functions = [node for node in TREES["generation"].body if isinstance(node, ast.FunctionDef)]
    lines = [{name: call.lineno for name, call in calls(one)} for one in functions]
    drawing = [one for one in lines if "_draw" in one]
    assert len(drawing) == 3
    assert all(one["refuse_sexualised_minors"] < one["_draw"] for one in drawing)


def test_no_pickle_is_written_or_read():
    for module, tree in TREES.items():
        assert not {"dill", "joblib", "marshal", "shelve", "cloudpickle"} & set(imports(tree)), module
        for name, call in calls(tree):
            assert name not in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "torch.save"), module
            if name in ("torch.load", "numpy.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("weights_only") == "True" or given.get("allow_pickle") == "False", (module, name)


def test_yaml_is_read_in_one_place():
    readers = ("yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all")
    assert modules_that_call(*readers) == set()
    assert {module for module, tree in TREES.items() if "yaml" in imports(tree)} == {"plain_yaml", "dataset/card"}


@pytest.mark.parametrize("kind", ["import_module", "importlib.import_module", "__import__", "required"])
def test_only_names_of_plugins_commands_and_the_face_become_modules(kind: str):
    """Whatever else is imported by name is of another package, so import-linter sees all that dagkit imports."""
    by_name = {"plugins", "cli", "__init__"} | ({"errors"} if kind == "import_module" else set())  # `required`
    for module, tree in TREES.items():
        for name, call in calls(tree):
            if name == kind and module not in by_name:
                what = call.args[0]
                is_foreign = isinstance(what, ast.Constant) and not str(what.value).startswith("dagkit")
                is_metric = module == "evaluation/image_metrics"  # torchmetrics, torch_fidelity: by what a metric needs
                assert is_foreign or is_metric, (module, ast.unparse(call))


def test_only_commands_know_the_command_line():
    """And the scripts by which the bundled world is made anew."""
    users = {module for module, tree in TREES.items() if "click" in imports(tree)}
    scripts = {"demo/__init__", "demo/atlas", "demo/measure", "demo/train"}
    assert {module for module in users if not module.startswith("commands/")} - {"cli"} == scripts


def test_a_guarded_run_changes_no_weight():
    pipe = tiny.sd()
    before = {name: part.state_dict() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in before.items()}
    token = tiny.token(pipe, thresholds=Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0))
    with token.guard().attach(pipe) as trace:
        pipe(tiny.PROMPTS, generator=tiny.generators(), **tiny.SETTINGS)
    assert any(record.is_firing for record in trace.steps)
    for name, state in before.items():
        now = getattr(pipe, name).state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], value) for key, value in state.items())


LAYERS = {"to_k", "to_q", "heads", "attn2", "up_blocks", "down_blocks", "alphas_cumprod"}
"""How one architecture calls its parts: only its own file in ``models`` may know."""


@pytest.mark.parametrize(
    "room", ["guard", "optimization", "evaluation", "proposers", "attention", "guidance", "engines", "stages", "token"]
)
def test_who_looks_for_a_concept_knows_no_layer(room: str):
    names = {
        name: {one.attr for one in ast.walk(tree) if isinstance(one, ast.Attribute)}
        | {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        for name, tree in TREES.items()
        if name.split("/")[0] == room
    }
    assert names
    assert {name: found & LAYERS for name, found in names.items() if found & LAYERS} == {}
