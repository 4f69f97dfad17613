"""The error tree. Every message says where, what was expected, what came, and what to do.

    DagkitError
    ├── ConceptError        a concept file is missing or wrong
    ├── WorkspaceError      a run folder, manifest or image in it cannot be read or written
    ├── ModelError          the base model cannot be loaded or is of an unknown kind
    ├── CheckpointError     a segmenter's, proposer's or judge's weights are missing or damaged
    ├── PluginError         an unknown or broken plugin name
    ├── PromptRefused       a prompt that is never generated
    ├── LabelStudioError    the annotation server, or what it sent back
    ├── DatasetError        a dataset is missing, empty or damaged
    ├── TokenError          a guideline token is damaged, or made for another base model
    ├── GuardError          the guard cannot see or cannot act, so nothing is generated
    └── PublishError        a token could not be published

The command line prints one line for these and exits with status 1; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class DagkitError(Exception):
    """Root of all errors that a user can mend."""


class ConceptError(DagkitError):
    """A concept file is missing or wrong."""


class WorkspaceError(DagkitError):
    """A run folder, a manifest or an image in it cannot be read or written."""


class ModelError(DagkitError):
    """The base model cannot be loaded or is of an unknown kind."""


class CheckpointError(DagkitError):
    """Weights of a segmenter, proposer or judge are missing or damaged."""


class PluginError(DagkitError):
    """A plugin name is unknown, taken twice, or its module cannot be imported."""


class PromptRefused(DagkitError):
    """A prompt that dagkit never generates. There is no switch for this."""


class LabelStudioError(DagkitError):
    """Label Studio could not be reached, refused a request, or sent something unusable."""


class DatasetError(DagkitError):
    """A dataset is missing, empty or damaged."""


class TokenError(DagkitError):
    """A guideline token is damaged, or was made for another base model."""


class GuardError(DagkitError):
    """The guard cannot see or cannot act, so nothing is generated."""


class PublishError(DagkitError):
    """A token could not be published, or a published one could not be fetched."""
