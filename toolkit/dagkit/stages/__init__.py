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

# Commands that are no stage of their own: name -> (module of dagkit.stages, help)
OTHER_COMMANDS: Final = {
    "annotate": ("annotate", "generate + premask + push, resumable."),
    "demo": ("demo", "Walk the whole way on the bundled model, offline."),
    "concept": ("concepts", "List, show and write concept files."),
    "token": ("tokens", "List, show, verify, compare and sign guideline tokens."),
    "registry": ("registry", "List and verify what is published at a location."),
    "dataset": ("dataset", "Check or publish a dataset."),
    "purge": ("purge", "Delete candidate images that no dataset uses."),
    "label-studio": ("label_studio", "Run the embedded Label Studio server."),
    "doctor": ("doctor", "Show versions, devices, checkpoints and servers, with a hint for what is missing."),
}
