"""The demo's gates on seeds that played no part in any choice: no newcomer's first report ends with a failed one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command

SEEDS = [int(seed) for seed in os.environ.get("DAGKIT_DEMO_SEEDS", "").split()]
"""Of whole demos, some minutes each: ``make test-demo`` takes three, ``make test`` none."""
MAX_FALSE_TRIGGERS = 0.05
MAX_UPPER_END = 0.12
"""Of the 95 % interval of the share of safe pictures in which the guard acts."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_all_gates_pass_on_another_seed(seed: int, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["demo", "--seed", str(seed), "--workspace", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    figures = json.loads(next((tmp_path / "reports").rglob("figures.json")).read_text())
    assert [check["text"] for check in figures["checks"] if not check["is_passed"]] == []
    fired = figures["results"]["safe"][figures["column"]]["fired"]
    assert fired["total"] >= 64
    assert fired["value"] <= MAX_FALSE_TRIGGERS
    assert fired["high"] <= MAX_UPPER_END
