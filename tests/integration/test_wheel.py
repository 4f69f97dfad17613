"""The wheel carries all it needs: built, installed outside the repository, and walked through."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    [path] = folder.glob("dagkit-*.whl")
    return path


def test_wheel_holds_code_weights_sprites_and_shipped_files_only(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()

    for wanted in (
        "dagkit/py.typed",
        "dagkit/demo/data/sprites.png",
        "dagkit/demo/data/judge.safetensors",
        "dagkit/demo/data/sam_tiny.safetensors",
        "dagkit/demo/data/model/unet/diffusion_pytorch_model.safetensors",
        "dagkit/_data/annotation_configs/weapon.yaml",
        "dagkit/_data/datasets/README.md",
        "dagkit/_data/datasets/weapon-demo/dataset.json",
        "dagkit/_data/datasets/weapon-demo/data/train-00000-of-00001.parquet",
    ):
        assert wanted in names
    assert {name.split("/")[0] for name in names} <= {"dagkit", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert [name for name in names if name.endswith((".pyc", ".pkl", ".pt", ".ckpt"))] == []
    weights = [info.file_size for info in zipfile.ZipFile(wheel).infolist() if info.filename.endswith(".safetensors")]
    assert sum(weights) <= 25_000_000


@pytest.mark.slow
def test_installed_wheel_runs_the_demo_outside_the_repository(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if os.environ.get("CI"):
        subprocess.run([*pip, wheel], check=True, env=environment)
    else:
        # dependencies of the environment that runs the tests, so that nothing is downloaded twice
        subprocess.run([*pip, "--no-deps", wheel], check=True, env=environment)
        purelib = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(purelib.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    dagkit = tmp_path / "venv" / "bin" / "dagkit"

    def run(*arguments: str) -> str:
        done = subprocess.run([dagkit, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.check_output([python, "-c", "import dagkit; print(dagkit.__file__)"], cwd=tmp_path, text=True)
    assert where.startswith(str(tmp_path))
    assert "weapon" in run("concept", "list")
    assert " 0 errors" in run("dataset", "check", "datasets/weapon-demo")
    report = Path(run("demo", "--quick", "--quiet").splitlines()[-1])
    assert report.is_relative_to(tmp_path)
    assert "weapon 1.0.0" in report.read_text()


GUARDING = ("torch", "diffusers", "transformers", "safetensors", "huggingface-hub", "pydantic", "numpy")
NOT_FOR_GUARDING = ("accelerate", "datasets", "label_studio_sdk", "pyarrow", "scipy", "torchvision")


def link_packages(names: tuple[str, ...], folder: Path) -> None:
    """Links packages of the environment that runs the tests, and what they require, into a folder; nothing else."""
    todo, seen = list(names), set[str]()
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of another system
            continue
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))


@pytest.fixture(scope="module")
def guarding(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, without what the wheel requires, beside what guarding needs."""
    folder = tmp_path_factory.mktemp("guarding") / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(command, check=True)
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    link_packages(GUARDING, Path(purelib.strip()))
    return folder


GUARD = f"""
import importlib.util, sys, torch
import dagkit
from dagkit import demo, errors, guidance, models

assert dagkit.__file__.startswith(sys.prefix)
assert [name for name in {NOT_FOR_GUARDING} if importlib.util.find_spec(name)] == []
guard = dagkit.load_token(sys.argv[1]).guard()
pipe = models.load(demo.model_path()).pipe
with guard.attach(pipe) as trace:
    image = pipe("a cat and a bomb on grass", num_inference_steps=6, guidance_scale=5.0).images[0]
try:
    dagkit.guidance.area_scale(torch.ones(1, 2, 2))
except dagkit.errors.MissingPackage as error:
    print(error)
print(image.size, trace.summary(0)['is_firing'], len(trace.of(0)))
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_guarding_needs_seven_packages_and_theirs(guarding: Path, tmp_path: Path):
    token = ROOT / "tests" / "tokens" / "weapon"
    command = [guarding / "bin" / "python", "-c", GUARD, token]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    advice, drawn = done.stdout.splitlines()
    assert re.fullmatch(r"this needs scipy, which is not installed. Run: pip install 'scipy>=[\d.]+'", advice)
    assert drawn == "(64, 64) True 6"


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ("dataset check .", "scipy>="),
        ("export --concept weapon", "datasets>="),
        ("premask --concept weapon", "scipy>="),
    ],
)
def test_a_command_whose_package_is_missing_says_what_to_install(
    arguments: str, package: str, guarding: Path, tmp_path: Path
):
    command = [guarding / "bin" / "dagkit", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"is not installed. Run: pip install '{package}" in done.stderr
