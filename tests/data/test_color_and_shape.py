"""Augmentation on the host: what is bounded, what differs from image to image, what is as often as it should be."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, works_on_host
from resnet_jax.data import color_and_shape as policy
from resnet_jax.data.color_and_shape import OPERATIONS, TRIVIAL, color_jitter, erase, rand_augment, trivial_augment
from resnet_jax.data.transforms import augment

from ..small import parse_recipe

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
PLAIN = AugmentConfig(crop="none", flip="none", interpolation="bilinear")


def test_erasing_leaves_the_rest_alone_and_covers_what_it_says():
    shares = []
    for seed in range(200):
        erased = erase(PICTURE, np.random.default_rng(seed))
        changed = (erased != PICTURE).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert changed.sum() > 0.97 * box  # noise may hit the old value by chance
        shares.append(box / (40 * 30))
    assert min(shares) > 0.015 and max(shares) < 0.36 and 0.1 < np.mean(shares) < 0.25
    unit = erase(np.full((8, 8, 5), 0.5, np.float32), np.random.default_rng(0))
    assert unit.dtype == np.float32 and unit.min() >= 0 and unit.max() <= 1


def test_jitter_changes_colours_within_its_bounds():
    grey = np.full((4, 4, 3), 100, np.uint8)
    levels = [color_jitter(grey, np.random.default_rng(s), 0.3)[0, 0, 0] for s in range(300)]
    assert 69 <= min(levels) < 75 and 125 < max(levels) <= 131 and len(set(levels)) > 30
    np.testing.assert_array_equal(color_jitter(grey, RNG, 0.0), grey)


@pytest.mark.parametrize(("name", "most"), [("brightness", 0), ("contrast", 1), ("color", 2), ("sharpness", 2)])
def test_colours_change_as_in_pillow(name, most):
    image = gradient() // 2 + RNG.integers(0, 100, (32, 32, 3), dtype=np.uint8)
    for factor in (0.1, 0.5, 0.93, 1.0, 1.2, 1.9):
        expected = getattr(ImageEnhance, name.capitalize())(Image.fromarray(image)).enhance(factor)
        np.testing.assert_allclose(getattr(policy, name)(image, factor), np.asarray(expected, int), rtol=0, atol=most)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_tables_are_those_of_pillow(strength):
    image = Image.fromarray(PICTURE)
    expected = {
        "invert": ImageOps.invert(image),
        "posterize": ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
        "solarize": ImageOps.solarize(image, 256 - int(256 * strength)),
    }
    for name, changed in expected.items():
        np.testing.assert_array_equal(OPERATIONS[name](PICTURE, strength, 1.0), changed, err_msg=name)


def test_trivial_augment_takes_every_operation_and_sometimes_none():
    same = [np.array_equal(trivial_augment(PICTURE, np.random.default_rng(s)), PICTURE) for s in range(300)]
    assert 1 / len(TRIVIAL) / 2 < np.mean(same) < 0.3


@pytest.mark.parametrize(
    "fields", [{"color_jitter": 0.4}, {"trivial_augment": True}, {"erasing": 1.0}, {"flip_vertical": True}]
)
def test_an_image_is_changed_by_its_own_numbers_alone(fields):
    recipe = dataclasses.replace(PLAIN, **fields)
    one, again, *others = (augment(PICTURE, np.random.default_rng(s), (40, 30), recipe) for s in (1, *range(1, 9)))
    np.testing.assert_array_equal(one, again)
    assert one.shape == (40, 30, 3) and one.dtype == np.uint8
    assert any(not np.array_equal(one, other) for other in others)


def test_half_of_the_images_are_turned_top_to_bottom():
    recipe = dataclasses.replace(PLAIN, flip_vertical=True)
    turned = [
        np.array_equal(augment(PICTURE, np.random.default_rng(s), (40, 30), recipe), PICTURE[::-1]) for s in range(200)
    ]
    assert 0.4 < np.mean(turned) < 0.6


@pytest.mark.parametrize(
    ("name", "value", "without"),
    [
        ("crop", "random_resized", ["--augment.crop", "pad"]),
        ("flip_vertical", True, ["--augment.no_flip_vertical"]),
        ("color_jitter", 0.5, ["--augment.color_jitter", "0"]),
        ("randaugment", 5, ["--augment.randaugment", "0"]),
        ("trivial_augment", True, ["--augment.no_trivial_augment"]),
        ("erasing", 0.5, ["--augment.erasing", "0"]),
    ],
)
def test_what_works_on_the_host_says_so_with_both_ways_out(name, value, without):
    fields, ways = AugmentConfig(**{name: value}), rf"\({' '.join(without)}\), or add --data\.no_on_device"
    with pytest.raises(InputError, match=rf"augment\.{name}.* works on the host: with data\.on_device .*{ways}"):
        Config(data=DataConfig(on_device=True), augment=fields)
    config, _ = parse_recipe(["--data.on_device", *without])
    assert config.data.on_device and not works_on_host(config.augment)


def test_colours_need_colours():
    with pytest.raises(InputError, match="color_jitter is for RGB"):
        Config(data=DataConfig(channels=5, on_device=False), augment=AugmentConfig(color_jitter=0.3))


def gradient():
    y, x = np.mgrid[:32, :32]
    return np.stack([x * 8, y * 8, (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_keeps_the_size_and_grows_with_its_strength(name):
    noisy = gradient() // 2 + RNG.integers(0, 100, (32, 32, 3), dtype=np.uint8)

    def change(strength):
        result = OPERATIONS[name](noisy, strength, 1.0)
        assert result.shape == noisy.shape and result.dtype == np.uint8
        return np.abs(result.astype(int) - noisy).mean()

    assert change(1.0) > 0
    if name not in ("autocontrast", "equalize", "invert"):
        assert change(0.2) < change(1.0)


def test_rand_augment_is_a_function_of_the_generator():
    a, b = (rand_augment(gradient(), np.random.default_rng(4), 6) for _ in range(2))
    np.testing.assert_array_equal(a, b)
