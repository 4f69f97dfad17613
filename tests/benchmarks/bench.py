"""Runs every benchmark, writes build/bench.json, prints the table.

    python tests/benchmarks/bench.py [--quick] [--only detect optimize codec cost guide concepts robust attack]

Each script runs in a process of its own and prints one JSON object with flat keys; bars are those of
docs/benchmarks.md. All times are CPU times of one thread. Two scripts run at a time; ``guide``, ``concepts``,
``robust`` and ``attack`` have two workers of their own, so each runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ALONE = ("guide", "concepts", "robust", "attack")
SCRIPTS = ("detect", "optimize", "codec", "cost", *ALONE)
JOBS = (
    ("detect",),
    ("cost", "--only", "large"),
    ("optimize",),
    ("cost", "--only", "bundled-firing"),
    ("cost", "--only", "bundled-safe"),
    ("codec",),
)
"""Script and options, in the order in which they begin; those of `ALONE` follow. ``detect`` makes the token that the
rest take: at once, before ``optimize`` begins."""
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin cost half of a small machine
    "GOMP_SPINCOUNT": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # glibc keeps freed memory: page faults cost a tenth of the CPU time
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
OUT = Path("build/bench.json")
BARS: dict[str, tuple[str, float]] = {
    "detect.iou_to_probe": (">=", 0.9),
    "detect.iou_over_word": (">=", 0.1),
    "detect.false_area": ("<=", 0.01),
    "detect.false_trigger": ("<=", 0.05),
    "optimize.speedup": (">=", 5.0),
    "optimize.memory_within_budget": (">=", 1),
    "guide.erase": (">=", 0.98),
    "guide.preserve": (">=", 0.98),
    "guide.erase_hinted": (">=", 0.97),
    "guide.preserve_hinted": (">=", 0.97),
    "guide.untouched": (">=", 0.95),
    "guide.outside": ("<=", 0.45),
    "guide.erase_alone": (">=", 0.98),
    "concepts.worst.erase": (">=", 0.97),
    "concepts.worst.preserve": (">=", 0.97),
    "concepts.worst.untouched": (">=", 0.95),
    "concepts.worst_slice.erase": (">=", 0.93),
    "robust.worst.erase": (">=", 0.95),
    "robust.worst.preserve": (">=", 0.95),
    "peers.none_better": (">=", 1),
    "peers.none_more_local": (">=", 1),
    "attack.joint": (">=", 0.95),
    "guard.cost_safe": ("<=", 1.03),
    "guard.cost_safe_bundled": ("<=", 1.03),
    "guard.cost_firing": ("<=", 1.5),
    "guard.cost_firing_bundled": ("<=", 1.5),
    "guard.cost_firing_reuse": ("<=", 1.3),
    "guard.cost_firing_reuse_bundled": ("<=", 1.3),
    "codec.encode_speedup": (">=", 5.0),
    "codec.decode_speedup": (">=", 5.0),
}


def derive(figures: dict[str, object]) -> None:
    """Adds the figures that compare others."""
    if "detect.iou" in figures:
        token, probe, word = (float(figures[f"detect.iou{part}"]) for part in ("", "_probe", "_word"))  # type: ignore[arg-type]
        figures["detect.iou_to_probe"] = token / probe
        figures["detect.iou_over_word"] = token - word


def table(figures: dict[str, object]) -> str:
    """One line a figure, with its bar where there is one."""
    lines = []
    for key, value in sorted(figures.items()):
        if isinstance(value, str | dict):
            continue
        number = float(value)  # type: ignore[arg-type]
        sign, bar = BARS.get(key, ("", 0.0))
        verdict = "" if not sign else "ok" if (number >= bar if sign == ">=" else number <= bar) else "MISSED"
        lines.append(f"{key:36} {number:14.4g}  {sign} {bar if sign else '':<6} {verdict}".rstrip())
    return "\n".join(lines)


def run(name: str, *options: str, is_quick: bool) -> dict[str, object] | None:
    """One script's figures; None where it fails."""
    began = time.monotonic()
    environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / f"bench_{name}.py"
    command = [sys.executable, "-W", "ignore", str(script), *(["--quick"] if is_quick else []), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    print(f"{' '.join((name, *options))}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    if done.returncode:
        return None
    found: dict[str, object] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def main() -> int:
    """Runs the scripts one after the other; exits 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    arguments = parser.parse_args()
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    }
    failed = []
    for group in (JOBS, *(((name,),) for name in ALONE)):
        jobs = [job for job in group if job[0] in arguments.only]
        with ThreadPoolExecutor(2) as pool:
            for job, found in zip(jobs, pool.map(lambda job: run(*job, is_quick=arguments.quick), jobs), strict=True):
                if found is None:
                    failed.append(" ".join(job))
                figures |= found or {}
    derive(figures)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(table(figures))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
