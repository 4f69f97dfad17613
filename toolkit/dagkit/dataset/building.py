"""From a workspace to a dataset: what annotators said, or, if asked for, pre-masks that nobody looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from dagkit.dataset.likeness import find_twins, perceptual_hash
from dagkit.dataset.schema import FEATURES, LABELS, REVIEW_STATES, SPLITS, empty_split
from dagkit.dataset.splitting import assign_splits, find_groups
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.manifests import IMPORTED
from dagkit.png import mask_png
from dagkit.provenance import public_name
from dagkit.segmenters import combine
from dagkit.workspace import listed

if TYPE_CHECKING:
    from datasets import DatasetDict

    from dagkit.concept import Concept
    from dagkit.workspace import StageFolder, Workspace

TWIN_DISTANCE: Final = 2
"""Images whose perceptual hashes differ in at most so many bits never straddle splits."""

_UNSEEN: Final = ("unreviewed", IMPORTED)
_LEFT_OUT: Final = {"skipped": "skipped by annotators", "cannot_tell": "annotators cannot tell"}


@dataclass(frozen=True)
class Record:
    """One row of a dataset before it has a split.

    Attributes:
        values: all columns but ``group``; the image as its path, so that memory holds one image at a time.
        perceptual_hash: of the image.
    """

    values: dict[str, Any]
    perceptual_hash: int

    @property
    def key(self) -> str:
        """The candidate's key."""
        key: str = self.values["key"]
        return key

    @property
    def is_unsafe(self) -> bool:
        """Whether its mask has a pixel."""
        return bool(self.values["label"] == LABELS.index("unsafe"))


@dataclass(frozen=True)
class Collection:
    """What a workspace holds for a dataset.

    Attributes:
        records: usable rows, in the order of the candidates.
        left_out: reason -> number of candidates that are not in it.
        agreement: ``mean_iou`` and ``kappa`` (label -> value) of the annotators, as `dagkit pull` found them; None if
            nobody annotated.
    """

    records: list[Record]
    left_out: dict[str, int]
    agreement: dict[str, Any] | None = None


def collect(workspace: Workspace, concept: Concept, *, accept_unreviewed: bool = False) -> Collection:
    """Reads candidates, pre-masks and annotations of a concept.

    A reviewed candidate counts as its annotators say: what they marked, or nothing. Skipped ones are left out, and so
    are those about which they cannot tell. An imported mask that nobody reviewed here counts as it came.

    Args:
        workspace: with candidates, and pre-masks or annotations.
        concept: whose labels to combine.
        accept_unreviewed: take candidates that nobody reviewed, too, with their pre-masks. Those of unsafe prompts in
            which nothing was found are left out all the same: nobody knows what they show.

    Raises:
        DatasetError: a mask has an unknown label, or a row an unknown review state.
        WorkspaceError: a file is missing or unreadable, or a mask not as large as its image; the message names it.
    """
    candidates, premasks, annotations = (
        workspace.stage(name, concept.name) for name in ("candidates", "premasks", "annotations")
    )
    premask_rows = {row["key"]: row for row in premasks.rows()}
    annotation_rows = {row["key"]: row for row in annotations.rows()}
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    purged = candidates.purged()
    for candidate in candidates.rows():
        key = candidate["key"]
        premask = premask_rows.get(key)
        unseen = IMPORTED if premask and premask.get("source") else "unreviewed"
        review = annotation_rows.get(key, {"state": unseen, "masks": {}})
        state = review["state"]
        if state not in (*REVIEW_STATES, *_LEFT_OUT):
            raise DatasetError(
                f"{annotations.manifest}: {key} has the state {state!r}; expected one of "
                f"{', '.join((*REVIEW_STATES, *_LEFT_OUT))}. Run: dagkit pull --concept {concept.name}"
            )
        if state in _LEFT_OUT:
            left_out[_LEFT_OUT[state]] += 1
        elif key in purged:
            left_out["purged"] += 1
        elif state == "unreviewed" and not accept_unreviewed:
            left_out["not reviewed yet"] += 1
        elif state in _UNSEEN and premask is None:
            left_out["neither reviewed nor pre-masked"] += 1
        elif state == "unreviewed" and premask and not premask["masks"] and candidate["kind"] != "safe":
            left_out["unsafe prompt, nothing found, not reviewed"] += 1
        else:
            is_reviewed = state not in _UNSEEN
            paths = review["masks"] if is_reviewed else {k: v["path"] for k, v in (premask or {})["masks"].items()}
            masks_folder = annotations if is_reviewed else premasks
            records.append(_record(concept, candidates, candidate, premask, review, masks_folder, paths))
    agreement = annotations.read_json("agreement.json") if annotations.has("agreement.json") else None
    return Collection(records, dict(left_out), agreement)


def build(
    collection: Collection, concept: Concept, *, previous: Mapping[str, str] | None = None, seed: int = 0
) -> DatasetDict:
    """Splits the records into train, validation and test.

    Rows that share a prompt or a seed, or look nearly the same, stay together. A split may be empty when there are few
    rows.

    Args:
        collection: as from `collect`.
        concept: for messages.
        previous: key -> split in the dataset that this one replaces; kept.
        seed: of the split.

    Raises:
        DatasetError: there is no row, none that shows the concept, or an image is there twice.
    """
    from datasets import Dataset, DatasetDict

    records = collection.records
    keys = [record.key for record in records]
    images = Counter(record.values["image"]["path"] for record in records)
    doubled = [record.key for record in records if images[record.values["image"]["path"]] > 1]
    if doubled or len(set(keys)) < len(keys):
        raise DatasetError(
            f"concept {concept.name!r}: expected each image once, but rows repeat one ({listed(doubled or keys)}). "
            "Delete them from the manifest of the candidates."
        )
    if not any(record.is_unsafe for record in records):
        reasons = ", ".join(f"{count} {reason}" for reason, count in collection.left_out.items()) or "no candidates"
        raise DatasetError(
            f"concept {concept.name!r}: {len(records)} usable images, and none shows the concept ({reasons} left out). "
            f"Review candidates with dagkit annotate --concept {concept.name}, or accept pre-masks with --unreviewed."
        )
    twins = find_twins({record.key: record.perceptual_hash for record in records}, TWIN_DISTANCE)
    groups = find_groups(
        keys,
        [
            {record.key: prompt for record in records if (prompt := record.values["prompt"])},
            {record.key: record.values["seed"] for record in records},
            {key: twins.get(key, key) for key in keys},
        ],
    )
    strata = {record.key: LABELS[record.values["label"]] for record in records}
    splits = assign_splits(groups, strata, previous=previous, seed=seed)
    rows = {
        split: [{**r.values, "group": groups[r.key]} for r in records if splits[r.key] == split] for split in SPLITS
    }
    return DatasetDict(
        {split: Dataset.from_list(rows[split], features=FEATURES) if rows[split] else empty_split() for split in SPLITS}
    )


def _record(
    concept: Concept,
    candidates: StageFolder,
    candidate: dict[str, Any],
    premask: dict[str, Any] | None,
    review: dict[str, Any],
    masks_folder: StageFolder,
    paths: Mapping[str, str],
) -> Record:
    known = [*concept.labels.positive, *concept.labels.negative]
    if unknown := [label for label in paths if label not in known]:
        raise DatasetError(
            f"{masks_folder.manifest}: {candidate['key']} has a mask of the label {unknown[0]!r}; expected one of "
            f"{', '.join(known)}. Add the label to the concept file again, or run its stage again."
        )
    image = candidates.read_image(candidate["image"])
    masks = {label: masks_folder.read_mask(path, image.size) for label, path in paths.items()}
    mask = combine(masks, concept.labels.negative, (image.height, image.width))
    state = review["state"]
    settings = candidate["settings"]
    nothing: dict[str, Any] = {
        "proposers": [],
        "segmenter": {"name": None, "version": None},
        "score": None,
        "masks": {},
    }
    found = {**nothing, **(premask or {})}
    values = {
        "key": candidate["key"],
        "image": {"bytes": None, "path": str(candidates.inside(candidate["image"]))},
        "mask": {"bytes": mask_png(mask, optimize=True), "path": None},
        "label": int(mask.any()),
        "concept": concept.name,
        "prompt": candidate["prompt"],
        "prompt_kind": candidate.get("prompt_kind", candidate["kind"]),
        "seed": candidate["seed"],
        "model": _model_name(candidate["model"], concept),
        "model_fingerprint": candidate["model_fingerprint"],
        "sampler": {name: settings.get(name) for name in FEATURES["sampler"]},
        "proposers": found["proposers"],
        "segmenter": found["segmenter"],
        "premask_score": found["score"],
        "regions": [
            {
                "label": label,
                "is_positive": label in concept.labels.positive,
                "score": region.get("score"),
                "proposal_score": region.get("proposal_score"),
            }
            for label, region in found["masks"].items()
        ],
        "review_state": state,
        "is_changed": state == "changed" or (state == "empty" and bool(found["masks"])),
        "iou_to_premask": review.get("iou_to_premask"),
        "agreement": _mean([value for *_, value in review.get("pair_ious", []) if value is not None]),
        "annotators": review.get("annotators", []),
        "seconds": review.get("seconds"),
        "created": _time(review.get("created")),
        "updated": _time(review.get("updated")),
        "source": candidate.get("source"),
    }
    return Record(values, perceptual_hash(image))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _model_name(source: str, concept: Concept) -> str:
    """A Hub id or ``demo`` as it is; of a local folder only its name, so that no dataset tells where somebody works."""
    path = PurePath(source)
    if concept.model == "demo" and path.parts[-3:] == ("demo", "data", "model"):
        return "demo"
    return public_name(source)


def _time(text: str | None) -> datetime | None:
    """A time, cut to whole milliseconds, as `FEATURES` holds it."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return time.replace(microsecond=time.microsecond // 1000 * 1000)
    except ValueError as error:
        raise WorkspaceError(
            f"expected an ISO 8601 time in an annotation, but got {text!r}. Run dagkit pull again."
        ) from error
