"""Pictures of other than three channels, of 16 bits, and that are not square."""

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config import AugmentConfig, DataConfig
from resnet_jax.data.decode import BadImage, decode
from resnet_jax.data.on_device import normalize, per_channel
from resnet_jax.data.transforms import augment, fit, random_resized_crop

RNG = np.random.default_rng(0)


def test_sixteen_bits_of_grey_are_kept(tmp_path):
    pixels = RNG.integers(0, 65536, (9, 7), dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        found = decode(tmp_path / name, 1)
        assert found.dtype == np.float32 and found.shape == (9, 7, 1)
        np.testing.assert_allclose(found[..., 0] * 65535, pixels, atol=0.01)


def test_colours_become_grey_as_pillow_makes_them(tmp_path):
    image = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    np.testing.assert_allclose(decode(tmp_path / "a.png", 1)[..., 0] * 255, np.asarray(image.convert("L")), atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_channels_of_an_array_file(tmp_path, dtype):
    unit = RNG.random((6, 8, 5))
    largest = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    np.save(tmp_path / "a.npy", (unit * largest).astype(dtype))
    found = decode(str(tmp_path / "a.npy"), 5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit, atol=1.01 / largest if largest > 1 else 1e-6)


def test_pages_of_a_tiff_are_channels(tmp_path):
    pages = RNG.integers(0, 65536, (5, 6, 8), dtype=np.uint16)
    first, *rest = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    np.testing.assert_allclose(decode(tmp_path / "a.tif", 5) * 65535, np.moveaxis(pages, 0, -1), atol=0.01)


def test_resizing_any_channel_is_pillows(tmp_path):
    pixels = RNG.random((20, 33, 4)).astype(np.float32)
    found = fit(pixels, (10, 12), interpolation="bicubic", channels=4)
    assert found.shape == (10, 12, 4)
    for k in range(4):
        band = Image.fromarray(np.ascontiguousarray(pixels[..., k])).resize((16, 10), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[..., k], np.asarray(band)[:, 2:14])


def test_sizes_need_not_be_square():
    image = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert fit(image, (24, 12)).shape == (24, 12, 3)
    expected = image.resize((32, 24), Image.Resampling.BILINEAR).crop((10, 0, 22, 24))
    np.testing.assert_allclose(fit(image, (24, 12)), expected, rtol=0, atol=1)
    assert np.asarray(random_resized_crop(image, RNG, (6, 14), (0.2, 0.5))).shape == (6, 14, 3)
    recipe = AugmentConfig(crop="random_resized", flip="random", interpolation="bilinear")
    assert augment(RNG.random((9, 9, 2)), np.random.default_rng(0), (4, 6), recipe, channels=2).shape == (4, 6, 2)


@pytest.mark.parametrize(
    ("array", "channels", "says"),
    [
        (np.zeros((4, 4, 5), np.uint8), 4, "5 channels, the recipe 4: set data.channels"),
        (np.zeros((4, 4, 2), np.int64), 2, "int64 have no known range"),
        (np.zeros((2, 2, 2, 2), np.uint8), 2, "is no picture"),
        (np.asarray([[object()]]), 1, "allow_pickle"),
        (
            np.zeros((3, 32, 48), np.uint8),
            3,
            r"\(3, 32, 48\) has its channels first: expected \[height, width, channel\]",
        ),
        (np.zeros((1, 32, 48), np.float32), 1, "channels first"),
        (np.zeros((5, 32, 48), np.uint16), 5, "channels first"),
        (np.full((4, 4, 3), np.nan), 3, "nan or infinite"),
        (np.full((4, 4, 2), np.inf, np.float32), 2, "nan or infinite"),
        (np.full((4, 4, 3), 255.0, np.float32), 3, r"from 255 to 255 have no known range: scale them to \[0, 1\]"),
        (np.full((4, 4, 3), -0.01, np.float16), 3, "from -0.01"),
        (np.full((4, 4, 1), 1.5), 1, "from 1.5 to 1.5"),
        (np.zeros((4, 4, 3), np.int8), 3, "int8 have no known range"),
        (np.zeros((4, 4, 3), np.uint32), 3, "uint32 have no known range"),
        (np.zeros((4, 4, 3), np.complex64), 3, "complex64 have no known range"),
    ],
)
def test_what_is_no_picture_says_why(tmp_path, array, channels, says):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(BadImage, match=says):
        decode(tmp_path / "a.npy", channels)
    if array.dtype != object:
        with pytest.raises(BadImage, match=says):
            fit(array, array.shape[:2], channels=channels)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "bool", "float16", "float32", "float64"])
def test_arrays_mean_the_same_at_any_size(dtype, channels):
    unit = RNG.random((4, 6, channels))
    largest = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    pixels = (unit > 0.5) if dtype == "bool" else (unit * largest).astype(dtype)
    as_it_is, larger = (
        fit(pixels, (4, 6), channels=channels),
        fit(pixels.repeat(2, 0).repeat(2, 1), (4, 6), channels=channels),
    )
    expected = np.asarray(pixels, float) / largest
    np.testing.assert_allclose(as_it_is / (255 if channels == 3 else 1), expected, rtol=0, atol=0.002)
    assert as_it_is.dtype == larger.dtype == (np.uint8 if channels == 3 else np.float32)
    assert as_it_is.max() <= (255 if channels == 3 else 1)
    if channels == 3 and dtype == "uint8":
        np.testing.assert_array_equal(as_it_is, pixels)


def test_normalising_takes_each_channels_values_or_their_mean():
    data = DataConfig(mean=(0.1, 0.2, 0.6), std=(1.0, 2.0, 3.0))
    images = RNG.random((2, 3, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(normalize(images, data.mean, data.std, np.float32), (images - 0.3) / 2.0, atol=1e-6)
    np.testing.assert_allclose(per_channel(data.mean, 3), data.mean)
