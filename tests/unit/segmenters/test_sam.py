"""SAM through its own predictor, on a small one with random weights; checkpoints; boxes; combining labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry

from dagkit.concept import Concept, load_concept
from dagkit.errors import CheckpointError, ConceptError
from dagkit.proposers import Proposal
from dagkit.segmenters import Mask, Segmenter, build_segmenter, combine, union_by_label
from dagkit.segmenters.checkpoints import find_sam
from dagkit.segmenters.cleaning import clean_mask
from dagkit.segmenters.sam import SamSegmenter, load_sam, stability
from dagkit.segmenters.sam_tiny import build_sam_tiny

PROPOSALS = [
    Proposal((4, 4, 40, 40), 0.9, "weapon", point=(20.0, 20.0)),
    Proposal((30, 8, 60, 50), 0.5, "harmless", is_positive=False),
    Proposal((0, 0, 10, 10), 0.4, "weapon"),
]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "tiny.safetensors"
    save_file(build_sam_tiny().state_dict(), path)
    return path


def with_segmenter(**options: object) -> Concept:
    return Concept.model_validate({**load_concept("weapon").model_dump(), "segmenter": options})


def test_the_image_is_embedded_once_however_many_boxes(checkpoint: Path, image: Image.Image):
    segmenter = build_segmenter(with_segmenter(name="sam", model_type="vit_tiny"), checkpoint=checkpoint)
    assert isinstance(segmenter, Segmenter)
    calls = []
    segmenter._sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))

    masks = segmenter.segment(image, PROPOSALS * 20)
    assert len(calls) == 1
    assert [mask.label for mask in masks] == [p.label for p in PROPOSALS] * 20
    assert {mask.mask.shape for mask in masks} == {(48, 64)}
    assert {mask.mask.dtype for mask in masks} == {np.dtype(bool)}
    assert all(0 <= mask.score <= 1 for mask in masks)
    assert [mask.is_positive for mask in masks[:3]] == [True, False, True]
    assert segmenter.segment(image, []) == []


def test_boxes_together_and_alone_give_the_same_masks(checkpoint: Path, image: Image.Image):
    segmenter = SamSegmenter(load_sam("vit_tiny", checkpoint), "vit_tiny")
    together = segmenter.segment(image, PROPOSALS[1:])  # none has a point
    for proposal, mask in zip(PROPOSALS[1:], together, strict=True):
        (alone,) = segmenter.segment(image, [proposal])
        assert np.array_equal(alone.mask, mask.mask)
        assert alone.score == pytest.approx(mask.score, abs=1e-5)


def test_a_point_is_a_prompt_unless_it_is_switched_off(checkpoint: Path, image: Image.Image):
    sam = load_sam("vit_tiny", checkpoint)
    seen = []
    sam.prompt_encoder.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["points"]), with_kwargs=True)
    SamSegmenter(sam, "vit_tiny").segment(image, PROPOSALS)
    SamSegmenter(sam, "vit_tiny", use_points=False).segment(image, PROPOSALS)

    coordinates, labels = seen[0]
    assert labels.tolist() == [[1], [-1], [-1]]  # -1 is SAM's padding point
    assert coordinates[0, 0].tolist() == pytest.approx([40.0, 40.0])  # 128 px encoder, 64 px image
    assert seen[1] is None


def test_score_is_predicted_iou_times_stability_and_masks_are_cleaned(image: Image.Image):
    torch.manual_seed(1)
    sam = build_sam_tiny()
    with torch.no_grad():  # sure of itself, as random weights are not
        sam.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(0.7)
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(40)
    boxes = PROPOSALS[1:]  # none has a point
    found = SamSegmenter(sam, "vit_tiny").segment(image, boxes)

    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(image))
    is_mended = []
    for proposal, mask in zip(boxes, found, strict=True):
        logits, iou, _ = predictor.predict(box=np.array(proposal.box), multimask_output=False, return_logits=True)
        stable = (logits[0] > 1).sum() / (logits[0] > -1).sum()
        assert 0 < mask.score < 1
        assert mask.score == pytest.approx(min(max(float(iou[0]), 0), 1) * stable, abs=1e-4)
        assert np.array_equal(mask.mask, clean_mask(logits[0] > 0))
        is_mended.append(not np.array_equal(mask.mask, logits[0] > 0))
    assert any(is_mended)


def test_stability_by_hand():
    logits = torch.tensor([[[2.0, 0.5, -0.5, -3.0]], [[9.0, 9.0, -9.0, -9.0]], [[-9.0, -9.0, -9.0, -9.0]]])
    assert stability(logits, 0.0).tolist() == pytest.approx([1 / 3, 1.0, 0.0])


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_missing_checkpoint_says_where_to_get_it_and_where_to_put_it(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DAGKIT_CHECKPOINTS", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        build_segmenter(with_segmenter(name="sam", model_type=kind))
    message = str(caught.value)
    assert f"https://dl.fbaipublicfiles.com/segment_anything/sam_{kind}_" in message
    assert f"-o {tmp_path}/sam_{kind}_" in message


def test_given_checkpoint_is_looked_for_first(tmp_path: Path):
    file = tmp_path / "mine.pth"
    with pytest.raises(CheckpointError, match=r"mine.pth: no such SAM checkpoint"):
        find_sam("vit_b", file)
    file.touch()
    assert find_sam("vit_b", file) == file
    with pytest.raises(
        CheckpointError, match=r"'vit_x' is not a kind of SAM. Available: vit_b, vit_l, vit_h, vit_tiny"
    ):
        find_sam("vit_x")


def test_damaged_checkpoints_are_named(tmp_path: Path, checkpoint: Path):
    for name, content in {"a.pth": b"", "b.pth": b"not a checkpoint", "c.safetensors": b"\x00" * 100}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"{name}: expected the weights of SAM vit_b, but they cannot be read"
        ):
            load_sam("vit_b", path)
    with pytest.raises(CheckpointError, match="expected the weights of SAM vit_b"):
        load_sam("vit_b", checkpoint)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"truncated\.safetensors"):
        load_sam("vit_tiny", truncated)


def test_a_checkpoint_never_runs_code(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match=r"trap\.pth"):
        load_sam("vit_b", tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_the_published_size_are_read_as_published(tmp_path: Path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in sam_model_registry["vit_b"]().state_dict().items()}
    weights = {name: torch.full((), 0.25).expand(shape) for name, shape in shapes.items()}  # small on disk
    torch.save(weights, tmp_path / "sam_vit_b_01ec64.pth")
    concept = with_segmenter(name="sam", model_type="vit_b", checkpoint=str(tmp_path / "sam_vit_b_01ec64.pth"))
    segmenter = build_segmenter(concept)
    assert segmenter.version == "vit_b-1"
    assert all((value == 0.25).all() for value in segmenter._sam.state_dict().values())
    assert sum(value.numel() for value in segmenter._sam.state_dict().values()) > 90_000_000


def test_unknown_option_is_named():
    with pytest.raises(
        ConceptError,
        match=r"unknown option 'modeltype'. Did you mean 'model_type'\? It takes model_type, checkpoint, use_points",
    ):
        build_segmenter(with_segmenter(name="sam", modeltype="vit_b"))


def test_box_fills_the_pixels_whose_centres_are_inside(image: Image.Image):
    segmenter = build_segmenter(with_segmenter(name="box"))
    (mask,) = segmenter.segment(image, [Proposal((1.6, 2, 4, 3.4), 0.7, "weapon")])
    expected = np.zeros((48, 64), bool)
    expected[2, 2:4] = True
    assert np.array_equal(mask.mask, expected)
    assert mask.score == 0.7


def test_union_and_combination_by_hand():
    def row(text: str) -> np.ndarray:
        return np.array([[character == "#" for character in text]])

    masks = [
        Mask(row("##..."), 0.9, "gun", True, (0, 0, 2, 1)),
        Mask(row("..##."), 0.5, "gun", True, (2, 0, 4, 1)),
        Mask(row(".#..#"), 0.8, "hand", False, (1, 0, 5, 1)),
        Mask(row("....."), 0.8, "knife", True, (0, 0, 1, 1)),
    ]
    merged = union_by_label(masks)
    assert list(merged) == ["gun", "hand"]
    assert np.array_equal(merged["gun"][0], row("####."))
    assert merged["gun"][1] == pytest.approx(0.7)

    mask = combine({label: mask for label, (mask, _) in merged.items()}, ["hand"], (1, 5))
    assert np.array_equal(mask, row("#.##."))
    assert not combine({"hand": row("##...")}, ["hand"], (1, 5)).any()
    assert combine({}, [], (3, 4)).shape == (3, 4)
