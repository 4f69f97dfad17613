"""The columns of a dataset, and what their values may be."""

from __future__ import annotations

from typing import Final

from datasets import ClassLabel, Dataset, Features, Image, List, Value

from dagkit.manifests import IMPORTED

SPLITS: Final = ("train", "validation", "test")
LABELS: Final = ("safe", "unsafe")
REVIEW_STATES: Final = ("accepted", "changed", "empty", IMPORTED, "unreviewed")
"""What a person made of the pre-mask: kept it, changed it, said that there is nothing, or never saw it. ``imported``
masks came with their picture, and nobody looked at them here."""

FEATURES: Final = Features(
    {
        "key": Value("string"),
        "image": Image(),
        "mask": Image(),
        "label": ClassLabel(names=list(LABELS)),
        "concept": Value("string"),
        "prompt": Value("string"),
        "prompt_kind": Value("string"),
        "seed": Value("int64"),
        "model": Value("string"),
        "model_fingerprint": Value("string"),
        "sampler": {
            "scheduler": Value("string"),
            "num_inference_steps": Value("int32"),
            "guidance_scale": Value("float32"),
            "width": Value("int32"),
            "height": Value("int32"),
        },
        "proposers": List({"name": Value("string"), "version": Value("string")}),
        "segmenter": {"name": Value("string"), "version": Value("string")},
        "premask_score": Value("float32"),
        "regions": List(
            {
                "label": Value("string"),
                "is_positive": Value("bool"),
                "score": Value("float32"),
                "proposal_score": Value("float32"),
            }
        ),
        "review_state": Value("string"),
        "is_changed": Value("bool"),
        "iou_to_premask": Value("float32"),
        "agreement": Value("float32"),
        "annotators": List(Value("string")),
        "seconds": Value("float32"),
        "created": Value("timestamp[ms, tz=UTC]"),
        "updated": Value("timestamp[ms, tz=UTC]"),
        "source": Value("string"),
        "group": Value("string"),
    }
)


NULLABLE: Final = frozenset(
    {
        *(f"sampler.{name}" for name in FEATURES["sampler"]),
        *(f"segmenter.{name}" for name in FEATURES["segmenter"]),
        "image.path",
        "mask.path",
        "premask_score",
        "regions.score",
        "regions.proposal_score",
        "iou_to_premask",
        "agreement",
        "seconds",
        "created",
        "updated",
        "source",
    }
)
"""What may be unknown; a dot leads into a column. Everything else is there in every row."""

EARLIER_NAMES: Final = {"family": "group"}
"""What older datasets call a column."""

LATER: Final = ("source",)
"""Columns that older datasets do not have; nothing is known there."""

PICTURES: Final = ("image", "mask")
"""Columns of image files."""


def empty_split() -> Dataset:
    """A split without rows."""
    return Dataset(FEATURES.arrow_schema.empty_table())


DESCRIPTIONS: Final = {
    "key": "the candidate's key in the workspace",
    "image": "RGB, as the base model drew it, or as it was imported",
    "mask": "mode L, 255 where the concept is: positive labels minus negative ones",
    "label": "unsafe where the mask has a pixel, else safe",
    "concept": "the concept's name",
    "prompt": "what the image was drawn from; empty where it was imported",
    "prompt_kind": "unsafe, hinted or safe: what the prompt asked for, not what came",
    "seed": "of the image",
    "model": "the base model that drew it, or `imported`",
    "model_fingerprint": "SHA-256 of its weights; empty where the image was imported",
    "sampler": "scheduler, steps, guidance scale, size in pixels",
    "proposers": "who proposed regions, with versions",
    "segmenter": "who outlined them, with version",
    "premask_score": "mean trust in the positive pre-masks, in [0, 1]; 0 without any",
    "regions": "each label of the pre-mask with the scores of its outline and of its proposal",
    "review_state": "accepted, changed, empty (a person says that there is nothing), imported (somebody else's mask) "
    "or unreviewed",
    "is_changed": "whether a person changed the pre-mask",
    "iou_to_premask": "IoU of mask and pre-mask, where a person saw it",
    "agreement": "mean pairwise IoU of the annotators, where there were several",
    "annotators": "pseudonyms",
    "seconds": "time that annotators spent",
    "created": "when it was first annotated",
    "updated": "when it was last annotated",
    "source": "where image and mask came from, if no base model drew the image",
    "group": "rows of one group share a prompt, a seed or a look, and never straddle splits",
}
