"""The command line, one file a command: click, and nothing that a program could want without it."""

from __future__ import annotations

from typing import Final

# Commands that are no stage of their own: name -> (module of dagkit.commands, help)
OTHER_COMMANDS: Final = {
    "annotate": ("annotate", "generate + premask + push, resumable."),
    "demo": ("demo", "Walk the whole way on the bundled model, offline."),
    "concept": ("concepts", "List, show and write concept files."),
    "token": ("tokens", "List, show, verify, compare and sign guideline tokens."),
    "registry": ("registry", "List and verify what is published at a location."),
    "dataset": ("dataset", "Check, publish, import or export a dataset."),
    "attack": ("attack", "Attack a token's guard, and say what gets through."),
    "purge": ("purge", "Delete candidate images that no dataset uses."),
    "label-studio": ("label_studio", "Run the embedded Label Studio server."),
    "doctor": ("doctor", "Show versions, devices, checkpoints and servers, with a hint for what is missing."),
}
