import numpy as np
import pytest

from dagkit.demo import world


def test_a_seed_is_a_scene():
    first, again = (world.render_scene(np.random.default_rng(5)) for _ in range(2))
    other = world.render_scene(np.random.default_rng(6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert first.classes == again.classes
    assert not np.array_equal(first.image, other.image)


def test_labels_are_exactly_the_pixels_that_the_sprite_covers_by_more_than_half():
    for seed, name in enumerate(world.CLASSES):
        scene = world.render_scene(np.random.default_rng(seed), (name,), "sand")
        empty = world.render_scene(np.random.default_rng(seed), (), "sand").image.astype(float)
        x0, y0, x1, y1 = scene.boxes[0]
        matches = 0
        for side in range(22, 31):
            rgba = world.sprite(name, side)
            rows, columns = np.nonzero(rgba[..., 3] > 0.5)
            if (np.ptp(columns) + 1, np.ptp(rows) + 1) != (x1 - x0, y1 - y0):
                continue
            y, x = y0 - rows.min(), x0 - columns.min()
            alpha, colour = np.zeros((64, 64, 1)), np.zeros((64, 64, 3))
            alpha[y : y + side, x : x + side] = rgba[..., 3:]
            colour[y : y + side, x : x + side] = 255 * rgba[..., :3]
            expected = empty * (1 - alpha) + colour * alpha
            if np.abs(expected - scene.image).max() < 1.5:
                assert np.array_equal(scene.mask(name), alpha[..., 0] > 0.5)
                matches += 1
        assert matches >= 1, name


def test_boxes_are_tight_around_masks():
    scene = world.render_scene(np.random.default_rng(1), ("axe", "tree"))
    for name, (x0, y0, x1, y1) in zip(scene.classes, scene.boxes, strict=True):
        rows, columns = np.nonzero(scene.mask(name))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)


def test_mask_joins_the_objects_named():
    scene = world.render_scene(np.random.default_rng(2), ("axe", "tree", "cup"))
    assert np.array_equal(scene.mask("axe", "cup"), scene.mask("axe") | scene.mask("cup"))
    assert not scene.mask("dog").any()


def test_a_name_given_twice_is_drawn_twice():
    single = world.render_scene(np.random.default_rng(3), ("duck",), "night")
    double = world.render_scene(np.random.default_rng(3), ("duck", "duck"), "night")
    assert double.classes == ("duck", "duck")
    assert len(set(double.boxes)) == 2
    assert double.mask("duck").sum() > 1.4 * single.mask("duck").sum()


def test_draws_have_different_objects_and_weapons_as_often_as_asked():
    rng = np.random.default_rng(4)
    draws = [world.draw_classes(rng, weapon_probability=0.25) for _ in range(2000)]
    assert all(len(set(names)) == len(names) <= 3 for names in draws)
    armed = [sum(name in world.WEAPONS for name in names) for names in draws]
    assert max(armed) == 1
    assert 0.21 < np.mean(armed) < 0.29


def test_repeats_hold_at_least_two_of_a_kind():
    rng = np.random.default_rng(4)
    for _ in range(50):
        names = world.draw_repeats(rng)
        assert 2 <= names.count(names[0]) <= len(names) <= 4


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_every_background_renders(background):
    image = world.render_scene(np.random.default_rng(0), (), background).image
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ("cat", "gnu")}, "but got 'gnu'"),
        ({"background": "moon"}, "background must be one of grass, .* but got 'moon'"),
        ({"classes": ("cat",) * 12}, "12 objects of 22 to 30 px do not fit into 64 px"),
    ],
)
def test_bad_scenes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        world.render_scene(np.random.default_rng(0), **arguments)


@pytest.mark.parametrize(
    ("classes", "mode", "expected"),
    [
        (("cat",), "named", "a cat on grass"),
        (("cat", "bomb"), "named", "a cat and a bomb on grass"),
        (("cat", "dog", "bomb"), "named", "a cat, a dog and a bomb on grass"),
        (("cat", "cat"), "named", "a cat on grass"),
        (("cat", "bomb"), "class", "a cat and a weapon on grass"),
        (("cat", "bomb"), "hinted", "a cat in danger on grass"),
        (("bomb",), "hinted", "a weapon on grass"),
        (("cat", "dog"), "hinted", "a cat and a dog on grass"),
        (("cat", "dog"), "class", "a cat and a dog on grass"),
    ],
)
def test_captions(classes, mode, expected):
    assert world.caption(classes, "grass", mode=mode) == expected


def test_a_generator_shuffles_the_order_of_a_caption():
    texts = {world.caption(("cat", "bomb"), "snow", np.random.default_rng(seed)) for seed in range(20)}
    assert texts == {"a cat and a bomb on snow", "a bomb and a cat on snow"}
