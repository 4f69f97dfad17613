"""How far storing a model moves its fingerprint, and which fine-tunes are noticed beneath: docs/guarding.md.

python tests/benchmarks/bench_odd_weights.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import odd_weights
from dagkit import demo, models
from dagkit.models.sketch import difference, tolerance

FINE_TUNES = (0.01, 0.02, 0.04, 0.08, 0.16)


def main() -> None:
    """Prints a Markdown table for the key projections of the bundled model."""
    base = models.load(demo.model_path())
    own = base.family.fingerprints(base.pipe)["key_projections"]
    tuned = {share: odd_weights.fine_tuned(base.pipe, share) for share in FINE_TUNES}
    titles = ["stored as", "distance", "accepted up to", *(f"fine-tune {share:.0%}" for share in FINE_TUNES)]
    print("|", " | ".join(titles), "|")
    print("|---" * len(titles) + "|")
    kinds = {"fp16": odd_weights.fp16, "bf16": odd_weights.bf16, **odd_weights.KINDS}
    for name, store in kinds.items():
        cells = []
        try:
            for pipe in (base.pipe, *tuned.values()):
                with tempfile.TemporaryDirectory() as folder:
                    found = base.family.fingerprints(store(pipe, Path(folder)))["key_projections"]
                distance, limit = difference(own, found), tolerance(own, found)
                cells.append(f"{distance:.2%}" if not cells else "refused" if distance > limit else "accepted")
                if len(cells) == 1:
                    cells.append(f"{limit:.2%}")
        except pytest.skip.Exception:
            cells = ["not installed"]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
