"""From exported tasks to answers and a consensus."""

from __future__ import annotations

import numpy as np
import pytest

from dagkit.concept import Labels
from dagkit.errors import LabelStudioError
from dagkit.labelstudio import codec
from dagkit.labelstudio.answers import Answer, decide, read_answers, whole_mask
from dagkit.labelstudio.config import CANNOT_TELL, NOTHING_UNSAFE
from dagkit.metrics import iou

LABELS = Labels(positive=["weapon", "gun"], negative=["harmless"])
SIZE = (8, 6)
RNG = np.random.default_rng(0)
MASK, OTHER = RNG.random((6, 8)) < 0.5, RNG.random((6, 8)) < 0.5


def region(mask: np.ndarray, label: str | None = "weapon", size: tuple[int, int] = SIZE) -> dict:
    value = {"format": "rle", "rle": codec.encode(mask)} | ({"brushlabels": [label]} if label else {})
    return {"type": "brushlabels", "original_width": size[0], "original_height": size[1], "value": value}


def choice(value: str) -> dict:
    return {"type": "choices", "value": {"choices": [value]}}


def annotation(result: list, user: int = 1, number: int = 1, prediction: list | None = None, **more) -> dict:
    return {
        "id": number,
        "completed_by": user,
        "result": result,
        "was_cancelled": False,
        "lead_time": 2.0,
        "created_at": f"2026-01-01T00:00:{number:02d}Z",
        "updated_at": f"2026-01-02T00:00:{number:02d}Z",
        "prediction": {} if prediction is None else {"result": prediction},
        **more,
    }


def read(*annotations: dict, premask: dict | None = None) -> list[Answer]:
    task = {"id": 12, "data": {"key": "k7"}, "annotations": list(annotations)}
    return read_answers(task, LABELS, SIZE, "annotator-{}".format, premask)


def test_untouched_prediction_is_accepted() -> None:
    (answer,) = read(annotation([region(MASK)], prediction=[region(MASK)]))
    assert (answer.state, answer.iou_to_premask, answer.seconds) == ("accepted", 1.0, 2.0)
    assert answer.masks.keys() == {"weapon"}
    assert np.array_equal(answer.masks["weapon"], MASK)
    assert (answer.created, answer.updated) == ("2026-01-01T00:00:01Z", "2026-01-02T00:00:01Z")


def test_changed_prediction_has_its_iou() -> None:
    (answer,) = read(annotation([region(MASK)], prediction=[region(OTHER)]))
    assert answer.state == "changed"
    assert answer.iou_to_premask == (MASK & OTHER).sum() / (MASK | OTHER).sum()


def test_same_pixels_under_another_label_are_a_change() -> None:
    (answer,) = read(annotation([region(MASK, "gun")], prediction=[region(MASK, "weapon")]))
    assert (answer.state, answer.iou_to_premask) == ("changed", 1.0)


def test_annotation_made_from_scratch_is_compared_with_the_given_pre_mask() -> None:
    (answer,) = read(annotation([region(MASK)]), premask={"weapon": OTHER})
    assert answer.iou_to_premask == iou(MASK, OTHER)
    (answer,) = read(annotation([region(MASK)]))
    assert (answer.state, answer.iou_to_premask) == ("changed", None)


def test_positive_minus_negative() -> None:
    (answer,) = read(annotation([region(MASK), region(OTHER, "harmless")], prediction=[region(MASK)]))
    expected = MASK & ~OTHER
    assert np.array_equal(whole_mask(answer.masks, LABELS, SIZE), expected)
    assert answer.iou_to_premask == expected.sum() / MASK.sum()


def test_regions_of_one_label_are_united_and_strokes_binarised() -> None:
    strokes = np.where(OTHER, 128, 127).astype(np.uint8)
    (answer,) = read(annotation([region(MASK), region(strokes)]))
    assert np.array_equal(answer.masks["weapon"], MASK | OTHER)


def test_skipped_is_not_empty() -> None:
    skipped, empty = read(annotation([], 1, was_cancelled=True), annotation([], 2))
    assert (skipped.state, empty.state) == ("skipped", "empty")
    assert (skipped.is_vote, empty.is_vote) == (False, True)


@pytest.mark.parametrize(
    ("result", "state"),
    [
        ([choice(NOTHING_UNSAFE)], "empty"),
        ([choice(NOTHING_UNSAFE), region(MASK)], "empty"),  # the choice counts, not the pre-mask left behind
        ([choice(CANNOT_TELL), region(MASK)], "cannot_tell"),
        ([region(np.zeros((6, 8), bool))], "empty"),  # all erased
        ([region(MASK, "harmless")], "empty"),
        ([region(MASK), region(np.ones((6, 8), bool), "harmless")], "empty"),
        ([choice("something else"), region(MASK)], "changed"),
    ],
)
def test_states(result: list, state: str) -> None:
    (answer,) = read(annotation(result, prediction=[region(OTHER)]))
    assert answer.state == state
    if state == "empty":
        assert answer.masks == {}
        assert answer.iou_to_premask == 0.0


BOX = {"x": 25.0, "y": 0.0, "width": 50.0, "height": 50.0, "rotation": 0}
BOXED = np.zeros((6, 8), bool)
BOXED[:3, 2:6] = True


def foreign(kind: str, label: str | None = "weapon", key: str | None = None, **changes) -> dict:
    """A region of another tool than the brush, as Label Studio exports it."""
    value = dict(BOX) | ({key or kind: [label]} if label else {})
    whole = {"id": "r1", "type": kind, "original_width": 8, "original_height": 6, "image_rotation": 0, "value": value}
    return whole | changes


@pytest.mark.parametrize(
    "result",
    [
        [foreign("rectanglelabels")],
        [foreign("rectangle", key="labels")],
        [foreign("rectangle", None), foreign("labels")],  # <Rectangle> and <Labels>: two results of one region
        [foreign("rectanglelabels", image_rotation=None)],
        [
            foreign(
                "polygonlabels", value={"points": [[25, 0], [75, 0], [75, 50], [25, 50]], "polygonlabels": ["weapon"]}
            )
        ],
        [foreign("rectanglelabels"), {"type": "textarea", "value": {"text": ["a note"]}}],
        [foreign("rectanglelabels"), {"type": "relation", "from_id": "r1", "to_id": "r1", "direction": "right"}],
    ],
)
def test_regions_of_other_tools_become_masks(result: list) -> None:
    (answer,) = read(annotation(result))
    assert answer.state == "changed"
    assert np.array_equal(answer.masks["weapon"], BOXED)


def test_regions_of_other_tools_are_united_with_brushes_and_cut_out() -> None:
    (answer,) = read(annotation([region(MASK), foreign("rectanglelabels"), foreign("rectanglelabels", "harmless")]))
    assert np.array_equal(answer.masks["weapon"], MASK | BOXED)
    assert np.array_equal(whole_mask(answer.masks, LABELS, SIZE), MASK & ~BOXED)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([foreign("keypointlabels")], "'keypointlabels', which says nothing exact about pixels"),
        ([foreign("keypoint", None)], "a region of the type 'keypoint'"),
        ([foreign("vectorlabels")], "a region of the type 'vectorlabels'"),
        ([foreign("labels")], "a region of the type 'labels'"),
        ([foreign("somethingnew" * 100)], "type"),
        ([region(MASK), foreign("keypointlabels")], "a region of the type 'keypointlabels'"),
        ([foreign("rectanglelabels", None)], "a rectangle region has no label"),
        ([foreign("rectanglelabels", "knife")], "'knife' is not a label of this concept"),
        (
            [foreign("rectanglelabels", value=BOX | {"rectanglelabels": ["weapon", "gun"]})],
            "2 labels, but expected one",
        ),
        (
            [foreign("rectanglelabels", image_rotation=90)],
            "was drawn on the image turned by 90 degrees (image_rotation)",
        ),
        ([region(MASK) | {"image_rotation": 180}], "was drawn on the image turned by 180 degrees (image_rotation)"),
        ([foreign("rectanglelabels", original_width=16)], "the mask 'weapon' is 16x6 pixels, but its image 8x6"),
        ([foreign("rectanglelabels", original_width=None)], "is of no known size, but its image 8x6"),
        ([foreign("rectanglelabels", value=None)], "a rectangle region has no label"),
        ([foreign("rectanglelabels", value=BOX | {"x": 500, "rectanglelabels": ["weapon"]})], "marks no pixel"),
        ([region(np.where(MASK, 90, 0).astype(np.uint8))], "mark something, but no pixel by half or more"),
        ([choice("something else")], "it marks nothing, but says 'something else', which is no verdict"),
        ([{"type": "taxonomy", "value": {"taxonomy": [["weapon", "gun"]]}}], "it marks nothing, but says"),
        ([{"type": "choices", "value": {}}], "a choice is damaged"),
        ([{"value": {}}], "result.0.type: missing"),
        ("text", "result: expected a list"),
    ],
)
def test_what_says_something_else_is_never_empty(result: list, message: str) -> None:
    with pytest.raises(LabelStudioError) as caught:
        read(annotation(result))
    assert message in str(caught.value)
    assert str(caught.value).startswith("task 12 (k7)")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"was_cancelled": None}, "was_cancelled"),
        ({"lead_time": "long"}, "lead_time"),
        ({"created_at": "yesterday"}, "created_at: expected an ISO 8601 time"),
        ({"updated_at": 5}, "updated_at"),
        ({"completed_by": "someone"}, "completed_by"),
        ({"id": -1}, "id"),
        ({"prediction": "none"}, "prediction"),
    ],
)
def test_damaged_annotations_are_named(changes: dict, message: str) -> None:
    with pytest.raises(LabelStudioError, match="is not as Label Studio writes one") as caught:
        read(annotation([]) | changes)
    assert message in str(caught.value)


def test_annotators_whose_accounts_were_deleted_are_not_one_person() -> None:
    answers = read(annotation([], None, 3), annotation([region(MASK)], None, 4))  # type: ignore[arg-type]
    assert sorted(answer.state for answer in answers) == ["changed", "empty"]
    assert len({answer.annotator for answer in answers}) == 2


def test_last_annotation_of_an_annotator_counts() -> None:
    (answer,) = read(annotation([], 5, 9), annotation([region(MASK)], 5, 2))
    assert answer.state == "empty"
    assert answer.annotator == "annotator-5"


def test_expanded_user_is_understood() -> None:
    (answer,) = read(annotation([], {"id": 3, "email": "someone@example.org"}))
    assert answer.annotator == "annotator-3"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (region(MASK, "knife"), r"task 12 \(k7\): 'knife' is not a label of this concept \(weapon, gun, harmless\)"),
        (region(MASK, None), r"task 12 \(k7\): a brush region has no label"),
        (region(MASK, size=(6, 8)), r"task 12 \(k7\): the mask 'weapon' is 6x8 pixels, but its image 8x6"),
        (region(MASK.repeat(2, 0)), r"task 12 \(k7\), label 'weapon': Brush data hold 384 values"),
        ({**region(MASK), "value": {"brushlabels": ["gun"]}}, r"label 'gun': Brush data are truncated: 0 bytes"),
    ],
)
def test_what_cannot_be_used_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(LabelStudioError, match=message):
        read(annotation([wrong]))


def vote(mask: np.ndarray | None, number: int, state: str | None = None) -> Answer:
    masks = {} if mask is None or not mask.any() else {"weapon": mask}
    return Answer(f"annotator-{number}", state or ("changed" if masks else "empty"), masks)  # type: ignore[arg-type]


THREE = [np.random.default_rng(seed).random((6, 8)) < 0.6 for seed in range(3)]


@pytest.mark.parametrize(("rule", "least"), [("majority", 2), ("union", 1), ("intersection", 3)])
def test_rules_of_consensus(rule: str, least: int) -> None:
    verdict = decide([vote(mask, i) for i, mask in enumerate(THREE)], LABELS, SIZE, rule=rule)  # type: ignore[arg-type]
    expected = [[sum(bool(mask[y, x]) for mask in THREE) >= least for x in range(8)] for y in range(6)]
    assert verdict.masks["weapon"].tolist() == expected
    assert verdict.state == "changed"


def test_two_votes_need_both_for_a_majority() -> None:
    verdict = decide([vote(MASK, 1), vote(OTHER, 2)], LABELS, SIZE)
    assert np.array_equal(verdict.masks["weapon"], MASK & OTHER)
    assert verdict.pair_ious == (("annotator-1", "annotator-2", iou(MASK, OTHER)),)


def test_an_empty_vote_counts_against_every_pixel() -> None:
    verdict = decide([vote(MASK, 1), vote(None, 2)], LABELS, SIZE)
    assert (verdict.state, verdict.masks, verdict.reasons) == ("empty", {}, ("presence",))
    assert decide([vote(MASK, 1), vote(None, 2)], LABELS, SIZE, rule="union").state == "changed"


def test_accepted_only_where_all_votes_accept() -> None:
    both = [vote(MASK, 1, "accepted"), vote(MASK, 2, "accepted")]
    verdict = decide(both, LABELS, SIZE, premask={"weapon": MASK})
    assert (verdict.state, verdict.iou_to_premask, verdict.reasons) == ("accepted", 1.0, ())
    both[1] = vote(MASK, 2, "changed")
    assert decide(both, LABELS, SIZE, premask={"weapon": MASK}).state == "changed"


def test_skips_and_cannot_tell() -> None:
    skip, unsure = vote(None, 1, "skipped"), vote(None, 2, "cannot_tell")
    assert decide([skip], LABELS, SIZE).state == "skipped"
    assert decide([skip, unsure], LABELS, SIZE).state == "cannot_tell"
    verdict = decide([skip, vote(MASK, 3)], LABELS, SIZE)
    assert (verdict.state, verdict.reasons) == ("changed", ())
    verdict = decide([unsure, vote(MASK, 3)], LABELS, SIZE)
    assert (verdict.state, verdict.reasons) == ("changed", ("cannot_tell",))
    verdict = decide([unsure, vote(None, 4, "cannot_tell"), vote(MASK, 3)], LABELS, SIZE)
    assert (verdict.state, verdict.masks) == ("cannot_tell", {})


def test_reasons_to_look_again() -> None:
    near = MASK.copy()
    near[0, 0] = ~near[0, 0]
    assert decide([vote(MASK, 1), vote(near, 2)], LABELS, SIZE).reasons == ()
    assert decide([vote(MASK, 1), vote(near, 2)], LABELS, SIZE, min_iou=1.0).reasons == ("outline",)
    assert decide([vote(MASK, 1), vote(~MASK, 2)], LABELS, SIZE).reasons == ("outline",)
    assert decide([vote(MASK, 1), vote(~MASK, 2), vote(None, 3)], LABELS, SIZE).reasons == ("presence", "outline")
    assert decide([vote(None, 1), vote(None, 2)], LABELS, SIZE).pair_ious == (("annotator-1", "annotator-2", None),)
