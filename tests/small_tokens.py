"""Guideline tokens of a few rows, for tests that need an artifact and no model."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from dagkit.models.sketch import sketch
from dagkit.token import SUMS_FILE, BaseModelInfo, DatasetInfo, GuidelineToken, TokenRecord

WIDTH = 8


def small_token(version: str = "1.0.0", *, concept: str = "weapon", seed: int = 0, **record: Any) -> GuidelineToken:
    """A token with two guideline rows; another seed, other values. ``record`` replaces fields of its record."""
    generator = torch.Generator().manual_seed(seed)

    def rows(num: int) -> torch.Tensor:
        return torch.randn(num, WIDTH, generator=generator)

    model = BaseModelInfo(
        id="acme/small-sd",
        architecture="sd",
        fingerprint=f"sha256:{hashlib.sha256(b'weights').hexdigest()}",
        text_encoder=sketch([torch.ones(64)]),
        key_projections=sketch([torch.arange(64.0)]),
    )
    fields = {
        "concept": concept,
        "version": version,
        "base_model": model,
        "layers": ("down.0.attn2", "up.1.attn2"),
        "safety_prompt": "a weapon",
        "dataset": DatasetInfo(fingerprint="sha256:data", num_unsafe=30, num_safe=20, review_states={"accepted": 50}),
        "created": "2025-01-01T00:00:00+00:00",
    }
    return GuidelineToken(
        guideline=rows(2),
        start_of_text=rows(1),
        background=rows(3),
        head_weights=torch.full((4,), 0.25),
        record=TokenRecord(**(fields | record)),
    )


def save_small_token(root: Path, version: str = "1.0.0", *, concept: str = "weapon", seed: int = 0) -> Path:
    """Writes ``root/<concept>/<version>``."""
    return small_token(version, concept=concept, seed=seed).save(root / concept / version)


def seal(folder: Path) -> None:
    """Writes ``SHA256SUMS`` anew, as somebody who tampers would."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / SUMS_FILE).write_text("".join(lines))


def is_equal(left: GuidelineToken, right: GuidelineToken) -> bool:
    """Whether two tokens are the same to the bit."""
    one, other = left.tensors(), right.tensors()
    return (
        left.record == right.record
        and one.keys() == other.keys()
        and all(map(torch.equal, one.values(), other.values()))
    )
