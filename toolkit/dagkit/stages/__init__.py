"""The whole pipeline on one page: each stage is one command, one module here, and one folder of the workspace."""

from __future__ import annotations

from typing import Final, NamedTuple


class Stage(NamedTuple):
    """One step of the data's way."""

    name: str
    reads: str
    writes: str
    help: str


STAGES: Final = (
    Stage("generate", "a concept", "candidates/", "Draw candidate images, unsafe and safe, with the base model."),
    Stage(
        "premask", "candidates/", "premasks/", "Propose and outline the concept's regions (attention, detectors, SAM)."
    ),
    Stage("push", "premasks/", "labeling/", "Send candidates and pre-masks to Label Studio."),
    Stage("pull", "Label Studio", "annotations/", "Fetch what annotators made of them."),
    Stage("export", "annotations/", "dataset/", "Pull, then build the Hugging Face dataset."),
    Stage("optimize", "dataset/", "tokens/", "Optimise a guideline token and write it as a new version."),
    Stage("sample", "a token", "samples/", "Draw images under guard, with detection maps and a trace."),
    Stage("evaluate", "a token", "reports/", "Measure a token and write a report."),
    Stage("publish", "a token", "Hub, bucket or folder", "Publish a token version."),
)
