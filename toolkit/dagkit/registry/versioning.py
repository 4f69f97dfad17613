"""Which version a new token should be, by what changed since the newest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packaging.version import Version

from dagkit.token import GuidelineToken, next_version
from dagkit.token.versions import Bump
from dagkit.workspace import sha256_json

if TYPE_CHECKING:
    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.token import DatasetInfo


def suggest_version(
    existing: Sequence[GuidelineToken], base_model: BaseModel, dataset: DatasetInfo, concept: Concept
) -> tuple[str, str]:
    """The version of a token that is about to be trained, and why.

    major = another base model or concept definition; minor = other data; patch = only another seed or other settings.

    Args:
        existing: all versions of the concept.
        base_model: that it is trained on.
        dataset: that it is trained from.
        concept: that it stands for.

    Returns:
        (version, reason): e.g. ``("1.1.0", "more data than 1.0.0")``; ``1.0.0`` where there is none.
    """
    if not existing:
        return "1.0.0", "the first version"
    versions = [token.version for token in existing]
    newest = max(existing, key=lambda token: Version(token.version))
    bump, what = _bump(newest, base_model, dataset, concept)
    return next_version(versions, bump), f"{what} {newest.version}"


def concept_definition(concept: Concept) -> str:
    """``sha256:`` of what a concept means: its labels, words and safety prompt, and nothing that is a mere setting."""
    return sha256_json(
        {
            "positive": sorted(concept.labels.positive),
            "negative": sorted(concept.labels.negative),
            "words": sorted(concept.words),
            "safety_prompt": concept.safety_prompt,
        }
    )


def _bump(token: GuidelineToken, base_model: BaseModel, dataset: DatasetInfo, concept: Concept) -> tuple[Bump, str]:
    record = token.record
    if record.base_model.fingerprint != base_model.fingerprint:
        return "major", "another base model than"
    definition = record.optimization.get("concept_definition")
    if record.safety_prompt != concept.safety_prompt or definition not in (None, concept_definition(concept)):
        return "major", "another definition of the concept than"
    if record.dataset.fingerprint != dataset.fingerprint:
        before, now = (info.num_unsafe + info.num_safe for info in (record.dataset, dataset))
        return "minor", "more data than" if now > before else "other data than"
    return "patch", "another seed or other settings than"
