"""From exported tasks to ``annotations/``: rows and mask files, each task's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import LabelStudioError, quoted
from dagkit.labelstudio.answers import decide, read_answers
from dagkit.manifests import PulledAnnotation
from dagkit.png import mask_png

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dagkit.concept import Concept
    from dagkit.labelstudio.answers import Answer, Consensus, Masks
    from dagkit.workspace import Workspace

READER_VERSION: Final = 2
"""Which regions are understood. Another number than at the last pull, and all answers are read anew."""


class AnswerReader:
    """Turns exported tasks into rows and mask files; a task that says nothing new is left as it is.

    A task whose answers or review cannot be used has no row: what it said before is not what it says now.
    """

    def __init__(self, workspace: Workspace, concept: Concept, consensus: Consensus, min_iou: float) -> None:
        self.candidates = workspace.stage("candidates", concept.name)
        self.premasks = workspace.stage("premasks", concept.name)
        self.folder = workspace.stage("annotations", concept.name)
        self.images = {row["key"]: row["image"] for row in self.candidates.present_rows()}
        self.purged = self.candidates.purged()
        self.proposed = {row["key"]: row["masks"] for row in self.premasks.rows()}
        self.concept_labels = concept.labels
        self.labels = [*concept.labels.positive, *concept.labels.negative]
        self.consensus, self.min_iou = consensus, min_iou
        self.reviews: dict[str, Answer] = {}
        self.unusable_reviews: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in self.folder.rows(PulledAnnotation)}
        has_names = self.folder.has("annotators.json")
        self.names: dict[str, str] = self.folder.read_json("annotators.json") if has_names else {}

    def take_reviews(self, tasks: Iterable[Mapping[str, Any]]) -> list[str]:
        """Takes in what reviewers answered, and returns what could not be used, one line each."""
        problems = []
        for task in tasks:
            key = _key(task)
            if key in self.purged:
                continue
            # Measured against the pre-mask, not against the annotator's mask from which the reviewer started.
            bare = {**task, "annotations": [{**one, "prediction": None} for one in task["annotations"]]}
            try:
                answers = [answer for answer in self.answers(bare) if answer.state != "skipped"]
            except LabelStudioError as error:
                problems.append(f"review: {error}")
                self.unusable_reviews.add(key)
                continue
            if answers:
                self.reviews[key] = max(answers, key=lambda answer: answer.updated)
        return problems

    def newly_reviewed(self) -> set[int]:
        """Ids of tasks whose rows do not tell of their review as it is now."""
        now = {key: _reviewed(review) for key, review in self.reviews.items()}
        return {
            row["task_id"]
            for key, row in self.rows.items()
            if row["reviewed"] != now.get(key) or key in self.unusable_reviews
        }

    def answers(self, task: Mapping[str, Any]) -> list[Answer]:
        """Reads the answers to one exported task."""
        key = _key(task)
        if key not in self.images:
            raise LabelStudioError(
                f"task {task['id']}: its key {quoted(key)} is no candidate of this workspace ({self.candidates.path}). "
                "Was it made by hand? Delete it in Label Studio."
            )
        return read_answers(task, self.concept_labels, self.size(key), self._pseudonym, self._premask(key))

    def size(self, key: str) -> tuple[int, int]:
        """Width and height of a candidate, pixels."""
        return self.candidates.read_image(self.images[key]).size

    def take(self, ids: Sequence[int], tasks: Any) -> tuple[int, list[str]]:
        """Takes in the answers to some tasks.

        Args:
            ids: of all tasks asked for; those that are not exported have no answers (any more).
            tasks: as exported.

        Returns:
            How many rows are new or changed, and what could not be used, one line each.
        """
        num_done, problems, answered = 0, [], set()
        unusable: set[str] = set()
        is_replaced = False
        for task in tasks:
            if not task["annotations"]:
                continue
            answered.add(task["id"])
            key = _key(task)
            if key in self.purged:
                continue
            try:
                row, masks = self._read(task)
            except LabelStudioError as error:
                problems.append(str(error))
                unusable.add(key)
                continue
            if key in self.unusable_reviews:
                unusable.add(key)
                continue
            before = self.rows.get(row["key"])
            if before == row:
                continue
            for label, mask in masks.items():
                self.folder.write_bytes(row["masks"][label], mask_png(mask))
            self.rows[row["key"]] = row
            num_done += 1
            if before is None:
                self.folder.append(row)
            else:
                is_replaced = True
        unanswered = set(ids) - answered
        withdrawn = [key for key, row in self.rows.items() if key in unusable or row["task_id"] in unanswered]
        for key in withdrawn:
            del self.rows[key]
        if is_replaced or withdrawn:
            lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in self.rows.values()]
            self.folder.write_bytes("manifest.jsonl", "".join(lines).encode())
        return num_done + len(withdrawn), problems

    def _read(self, task: Mapping[str, Any]) -> tuple[dict[str, Any], Masks]:
        key = _key(task)
        answers = self.answers(task)
        facts: dict[str, Any] = {"premask": self._premask(key), "rule": self.consensus, "min_iou": self.min_iou}
        verdict = decide(answers, self.concept_labels, self.size(key), **facts)
        review = self.reviews.get(key)
        decided = decide([review], self.concept_labels, self.size(key), **facts) if review else verdict
        seconds = [answer.seconds for answer in answers if answer.seconds is not None]
        row: dict[str, Any] = {
            "key": key,
            "state": decided.state,
            "masks": {label: f"masks/{key}-{label}.png" for label in decided.masks},
            "iou_to_premask": decided.iou_to_premask,
            "annotators": [answer.annotator for answer in answers],
            "seconds": sum(seconds) if seconds else None,
            "created": min(answer.created for answer in answers),
            "updated": max(answer.updated for answer in answers),
            "task_id": task["id"],
            "reasons": [] if review else list(verdict.reasons),
            "reviewed": _reviewed(review) if review else None,
            "consensus": self.consensus,
            "pair_ious": [list(pair) for pair in verdict.pair_ious],
            "answers": [
                {
                    "annotator": answer.annotator,
                    "state": answer.state,
                    "labels": list(answer.masks),
                    "iou_to_premask": answer.iou_to_premask,
                    "seconds": answer.seconds,
                    "updated": answer.updated,
                }
                for answer in answers
            ],
        }
        return row, decided.masks

    def _premask(self, key: str) -> Masks | None:
        if key not in self.proposed:
            return None
        size = self.size(key)
        return {label: self.premasks.read_mask(found["path"], size) for label, found in self.proposed[key].items()}

    def _pseudonym(self, user_id: int) -> str:
        """Numbered in the order of appearance, and written down before a row uses it."""
        if str(user_id) not in self.names:
            self.names[str(user_id)] = f"annotator-{len(self.names) + 1}"
            self.folder.write_json("annotators.json", self.names)
        return self.names[str(user_id)]


def _key(task: Mapping[str, Any]) -> str:
    """Our own name of a task; empty where it has none."""
    key = task["data"].get("key")
    return key if isinstance(key, str) else ""


def _reviewed(review: Answer) -> dict[str, str]:
    return {"annotator": review.annotator, "updated": review.updated}
