"""The labelling page, and checks of what is sent to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.concept import Concept, load_concept
from dagkit.errors import ConceptError, LabelStudioError
from dagkit.labelstudio import codec
from dagkit.labelstudio.config import (
    CANNOT_TELL,
    NOTHING_UNSAFE,
    check_prediction,
    interface,
    labelling_config,
    labelling_page,
)
from dagkit.labelstudio.tasks import prediction
from dagkit.stages import push

GOLDEN = Path(__file__).parent / "weapon.golden.xml"


def concept_with(positive: list[str], negative: list[str]) -> Concept:
    whole = load_concept("weapon").model_dump()
    return Concept.model_validate({**whole, "labels": {"positive": positive, "negative": negative}})


def test_golden_page() -> None:
    """After a wanted change: write the new page over the golden file, and look at it in a browser."""
    assert labelling_config(load_concept("weapon")) == GOLDEN.read_text()


@pytest.mark.parametrize("name", ["weapon", "nudity", "violence"])
def test_pages_of_the_shipped_concepts_are_valid(name: str) -> None:
    concept = load_concept(name)
    page = interface(labelling_config(concept))
    assert page.get_control("mask").labels == [*concept.labels.positive, *concept.labels.negative]
    assert page.get_control("verdict").labels == [NOTHING_UNSAFE, CANNOT_TELL]
    assert page.get_object("image").value == "$image"


def test_hotkeys_are_unique_and_not_those_of_the_page() -> None:
    concept = concept_with([f"positive-{index}" for index in range(12)], [f"negative-{index}" for index in range(12)])
    page = interface(labelling_config(concept))
    keys = [label.attr.get("hotkey") for control in page.controls for label in control.labels_attrs.values()]
    given = [key for key in keys if key]
    assert len(given) == len(set(given)) == 18  # 16 labels and 2 choices
    assert not set(given) & set("behruv")  # brush, eraser, pan, rotate, unselect, move


def test_labels_are_escaped() -> None:
    page = labelling_config(concept_with(["a"], [])).replace('"a"', '"<&>"')
    with pytest.raises(LabelStudioError, match="labelling page is not valid"):
        interface(page)


@pytest.mark.parametrize(
    "xml", ["", "no xml", "<View>", '<View><Labels name="x" toName="y"><Label value="a"/></Labels></View>']
)
def test_invalid_pages_are_refused(xml: str) -> None:
    with pytest.raises(LabelStudioError, match="The labelling page is not valid: ") as caught:
        interface(xml)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name="mask"', 'name="masks"', 'expected <BrushLabels name="mask" toName="image">'),
        ("BrushLabels", "RectangleLabels", "but got <RectangleLabels>"),
        (
            'value="weapon"',
            'value="gun"',
            "the values weapon, harmless in <BrushLabels>, but it lacks 'weapon'",
        ),
        ('<Label value="weapon"', '<Label value="gun"/><Label value="weapon"', "but it has 'gun'"),
        ('name="verdict"', 'name="answer"', 'expected <Choices name="verdict" toName="image">'),
        ('value="cannot tell"', 'value="?"', "in <Choices>, but it lacks 'cannot tell'"),
        ('value="$image"', 'value="$picture"', 'expected <Image name="image" value="$image"/>'),
        ("<Image ", "<Video ", 'expected <Image name="image" value="$image"/>'),
        ('toName="image"', 'toName="picture"', "The labelling page is not valid"),
        ("<Style>", "<Stile>", "The labelling page is not valid"),
        ("<View ", '<!DOCTYPE x [<!ENTITY a "b">]><View ', "defines no entities of its own"),
        ("<View ", "<View>" * 5000 + "<View ", "The labelling page is not valid"),
    ],
)
def test_a_page_of_ones_own_must_have_what_answers_are_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, expected: str
) -> None:
    concept = load_concept("weapon")
    page = labelling_config(concept).replace("Mark every", "Mark each")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotation_configs").mkdir()
    path = tmp_path / "annotation_configs" / "weapon.xml"
    path.write_text(page)
    assert push.page(concept) == page
    assert old in page
    path.write_text(page.replace(old, new))
    with pytest.raises(LabelStudioError, match=r"annotation_configs/weapon\.xml: ") as caught:
        push.page(concept)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600
    shown = CliRunner().invoke(command, ["concept", "show", "weapon"])
    assert str(shown.exception) == str(caught.value)


def test_a_page_lies_beside_its_concept(tmp_path: Path) -> None:
    shutil.copy(load_concept("weapon").file, tmp_path / "mine.yaml")
    concept = load_concept(tmp_path / "mine.yaml")
    assert labelling_page(concept) == labelling_config(concept)
    page = labelling_config(concept).replace("Mark every", "Mark each")
    (tmp_path / "weapon.xml").write_text("\ufeff" + page)
    assert labelling_page(concept) == page
    shown = CliRunner().invoke(command, ["concept", "show", str(tmp_path / "mine.yaml")])
    assert f"labelling page: {tmp_path / 'weapon.xml'}" in shown.output


@pytest.mark.parametrize("kind", ["pipe", "folder", "no text", "large"])
def test_a_page_that_is_no_text_file(tmp_path: Path, kind: str) -> None:
    shutil.copy(load_concept("weapon").file, tmp_path / "mine.yaml")
    path = tmp_path / "weapon.xml"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "no text":
            path.write_bytes(b"\xff")
        case "large":
            path.write_bytes(b"x" * 1_000_001)
    with pytest.raises(ConceptError, match=r"weapon\.xml: expected "):
        labelling_page(load_concept(tmp_path / "mine.yaml"))


MASK = np.random.default_rng(0).random((6, 9)) < 0.5
PAGE = labelling_config(load_concept("weapon"))


def valid() -> dict:
    return prediction({"weapon": MASK, "harmless": ~MASK}, {"weapon": 0.9, "harmless": 0.4}, model_version="sam@1")


def test_prediction_has_one_region_a_label_with_scores() -> None:
    made = valid()
    check_prediction(PAGE, made, 9, 6, "key")
    assert made["model_version"] == "sam@1"
    assert made["score"] == 0.4
    assert [(region["value"]["brushlabels"], region["score"]) for region in made["result"]] == [
        (["weapon"], 0.9),
        (["harmless"], 0.4),
    ]
    assert len({region["id"] for region in made["result"]}) == 2
    masks = [codec.decode(region["value"]["rle"], 9, 6) > 0 for region in made["result"]]
    assert np.array_equal(masks[0], MASK)
    assert np.array_equal(masks[1], ~MASK)


def test_unknown_label() -> None:
    made = prediction({"gun": MASK}, {"gun": 0.9}, model_version="sam@1")
    with pytest.raises(
        LabelStudioError, match=r"key: the prediction does not fit the labelling page: .*gun.*weapon"
    ) as caught:
        check_prediction(PAGE, made, 9, 6, "key")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["from_name", "to_name"])
def test_unknown_control(name: str) -> None:
    made = valid()
    made["result"][0][name] = "nobody"
    with pytest.raises(LabelStudioError, match="'nobody' not found"):
        check_prediction(PAGE, made, 9, 6, "key")


def test_score_out_of_range() -> None:
    made = valid()
    made["score"] = 1.5
    with pytest.raises(LabelStudioError, match=r"does not fit the labelling page: .*1"):
        check_prediction(PAGE, made, 9, 6, "key")


def test_mask_of_another_size() -> None:
    with pytest.raises(LabelStudioError, match=r"key: the mask is 9x6 pixels, but its image 6x9. Run `dagkit premask`"):
        check_prediction(PAGE, valid(), 6, 9, "key")


def test_damaged_mask() -> None:
    made = valid()
    made["result"][1]["value"]["rle"] = made["result"][1]["value"]["rle"][:-3]
    with pytest.raises(LabelStudioError, match=r"key: Brush data are truncated"):
        check_prediction(PAGE, made, 9, 6, "key")
