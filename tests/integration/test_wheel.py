"""The wheel carries all it needs: built, installed outside the repository, and walked through."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

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
