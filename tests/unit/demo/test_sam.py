import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from dagkit import demo
from dagkit.demo import sam as training
from dagkit.demo import world
from dagkit.demo.measure import measure_sam
from dagkit.errors import CheckpointError
from dagkit.segmenters.sam_tiny import build_sam_tiny


def test_the_bundled_sam_reaches_its_bars_on_held_out_renderings():
    figures = measure_sam(demo.sam_checkpoint(), num_scenes=25)
    assert figures["iou_from_box"]["value"] >= 0.90
    assert figures["iou_from_point"]["value"] >= 0.80
    assert figures["error_of_predicted_iou"]["value"] <= 0.08


def test_it_goes_through_the_predictor_like_any_checkpoint_at_any_image_size():
    scene = world.render_scene(np.random.default_rng(8), ("bomb", "cat"), "grass")
    predictor = SamPredictor(build_sam_tiny(demo.sam_checkpoint()))
    for factor in (1, 8):
        image, mask = (
            np.kron(array, np.ones((factor, factor) + (1,) * (array.ndim - 2), np.uint8))
            for array in (scene.image, scene.mask("bomb"))
        )
        predictor.set_image(image)
        masks, ratings, low = predictor.predict(box=factor * np.array(scene.boxes[0]), multimask_output=False)
        assert masks.shape == (1, 64 * factor, 64 * factor)
        assert low.shape == (1, 64, 64)
        assert (masks[0] & (mask > 0)).sum() / (masks[0] | (mask > 0)).sum() > 0.85
        assert ratings[0] > 0.7


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_damaged_weights_are_named(tmp_path, damage):
    path = tmp_path / "sam.safetensors"
    if damage == "torn":
        path.write_bytes(b"x" * 20)
    with pytest.raises(
        CheckpointError, match=r"sam.safetensors: expected the weights of the small SAM .* but .* reinstall"
    ):
        build_sam_tiny(path)


def test_masks_keep_repeats_apart():
    scene = world.render_scene(np.random.default_rng(0), ("duck", "duck", "axe"))
    masks = training.object_masks(scene)
    assert masks.shape == (3, 64, 64)
    assert not (masks[0] & masks[1]).any()
    assert np.array_equal(masks[0] | masks[1], scene.mask("duck"))


def test_prompts_stay_near_the_object():
    scene = world.render_scene(np.random.default_rng(0), ("tree",))
    mask, box = training.object_masks(scene)[0], scene.boxes[0]
    rng = np.random.default_rng(1)
    for _ in range(50):
        x, y = training.random_point(mask, rng).astype(int)
        assert mask[y, x]
        loose = training.loose_box(box, rng, 0.1)
        assert np.abs(loose - box).max() <= 0.1 * 30
        assert loose.min() >= 0
        assert loose.max() <= 64


def test_the_loss_takes_the_best_of_three_masks():
    target = torch.zeros(1, 1, 8, 8)
    target[..., :4] = 1
    right, wrong = 20 * target - 10, 10 - 20 * target
    quality = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    one_right = training.mask_loss(torch.cat([right, right, wrong, wrong], 1), quality, target)
    all_wrong = training.mask_loss(torch.cat([wrong, wrong, wrong, wrong], 1), torch.zeros(1, 4), target)
    badly_rated = training.mask_loss(torch.cat([right, right, wrong, wrong], 1), 1 - quality, target)
    assert one_right.item() == pytest.approx(0.0, abs=0.01)
    assert badly_rated.item() == pytest.approx(1.0, abs=0.01)
    assert all_wrong > 3
