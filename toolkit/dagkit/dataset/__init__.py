"""Datasets of reviewed masks: built from a workspace, split so that near-twins stay together, with card and provenance.

data = load_dataset("runs/dataset/weapon")        # datasets.DatasetDict: train, validation, test
rows = examples(data["train"])                    # images, masks, prompts
"""

from __future__ import annotations

from dagkit.dataset.building import Collection, Record, build, collect
from dagkit.dataset.checking import Finding, check
from dagkit.dataset.likeness import drop_near_duplicates
from dagkit.dataset.reading import (
    AnnotatedImage,
    examples,
    find_dataset,
    load_dataset,
    load_with_summary,
    read_summary,
    shipped_datasets,
)
from dagkit.dataset.schema import FEATURES, REVIEW_STATES, SPLITS
from dagkit.dataset.selection import SELECTIONS, Choice, Selection, choose_candidates
from dagkit.dataset.summary import fingerprint, summarise
from dagkit.dataset.writing import push_dataset, save_dataset, write_parquet

__all__ = [
    "FEATURES",
    "REVIEW_STATES",
    "SELECTIONS",
    "SPLITS",
    "AnnotatedImage",
    "Choice",
    "Collection",
    "Finding",
    "Record",
    "Selection",
    "build",
    "check",
    "choose_candidates",
    "collect",
    "drop_near_duplicates",
    "examples",
    "find_dataset",
    "fingerprint",
    "load_dataset",
    "load_with_summary",
    "push_dataset",
    "read_summary",
    "save_dataset",
    "shipped_datasets",
    "summarise",
    "write_parquet",
]
