import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data import on_device

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3), dtype=np.uint8)


def test_pad_crop_cuts_windows_out_of_the_padded_image():
    cropped = np.asarray(on_device.pad_crop(jax.random.key(0), jnp.asarray(IMAGES), 2))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = []
    for image, windows in zip(cropped, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if (windows[i : i + 6, j : j + 6] == image).all()]
        assert found
        corners.append(found[0])
    assert len(set(corners)) > 15


def test_flip_mirrors_what_it_is_told_to():
    mirrored = np.arange(64) % 3 == 0
    flipped = np.asarray(on_device.flip(jnp.asarray(mirrored), jnp.asarray(IMAGES)))
    np.testing.assert_array_equal(flipped[mirrored], IMAGES[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~mirrored], IMAGES[~mirrored])


def test_normalize_is_the_formula():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = (IMAGES / 255 - np.asarray(mean)) / np.asarray(std)
    actual = on_device.normalize(jnp.asarray(IMAGES), mean, std, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_mixup_blends_images_and_targets_by_the_same_share():
    images = jnp.asarray(IMAGES, jnp.float32)
    targets = jnp.eye(64)
    mixed, soft = on_device.mix(jax.random.key(1), images, targets, 0.4, 0.0)
    share = float(soft[3, 3])
    assert 0 < share < 1
    np.testing.assert_allclose(soft[3, 2], 1 - share, rtol=1e-5)
    np.testing.assert_allclose(mixed[3], share * images[3] + (1 - share) * images[2], rtol=1e-4, atol=1e-3)


def test_cutmix_pastes_a_box_and_weighs_targets_by_its_area():
    images = jnp.asarray(IMAGES, jnp.float32)
    for seed in range(5):
        mixed, soft = on_device.mix(jax.random.key(seed), images, jnp.eye(64), 0.0, 1.0)
        pasted = np.asarray(mixed[3] == images[2]).all(-1)
        kept = np.asarray(mixed[3] == images[3]).all(-1)
        assert (pasted ^ kept).all()
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)
        np.testing.assert_allclose(soft[3, 3], kept.mean(), rtol=1e-5)


def test_one_of_both_by_a_coin():
    images, kinds = jnp.asarray(IMAGES, jnp.float32), set()
    for seed in range(8):
        mixed, _ = on_device.mix(jax.random.key(seed), images, jnp.eye(64), 0.5, 1.0)
        same = np.asarray(mixed == images) | np.asarray(mixed == jnp.roll(images, 1, 0))
        kinds.add(bool(same.all()))
    assert kinds == {True, False}
