import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config import AugmentConfig
from resnet_jax.data import transforms

RNG = np.random.default_rng(0)


def picture(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def encoded(array, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def test_decode_reads_bytes_paths_and_arrays(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    for raw in (encoded(picture()), str(tmp_path / "a.png"), picture()):
        np.testing.assert_array_equal(np.asarray(transforms.decode(raw)), picture())


def test_decode_turns_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    upright = transforms.decode(encoded(picture(), "JPEG", exif=exif))
    assert upright.size == (30, 40)


@pytest.mark.parametrize("raw", [b"", b"no image", encoded(picture(), "JPEG")[:200], "/no/such/file.jpg"])
def test_decode_names_the_reason(raw):
    with pytest.raises(transforms.BadImage, match=r"\w+Error: "):
        transforms.decode(raw)


def test_fit_is_pillow_resize_and_centre_crop():
    result = transforms.fit(picture(), 16, 0.8)
    short = Image.fromarray(picture()).resize((26, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(short.crop((5, 2, 21, 18))))


def test_random_resized_crop_covers_the_area_asked_for():
    image = Image.fromarray(picture(64, 64))
    for _ in range(20):
        result = np.asarray(transforms.random_resized_crop(image, RNG, 16, (0.2, 0.3)))
        assert result.shape == (16, 16, 3)
        width, height = np.ptp(result[..., 0]) / 255, np.ptp(result[..., 1]) / 255
        assert 0.1 < width * height < 0.35


def test_pad_crop_and_flip_stay_windows_of_the_image():
    image = picture(8, 8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    windows += [w[:, ::-1] for w in windows]
    seen = set()
    for _ in range(60):
        result = transforms.augment(image, RNG, 8, AugmentConfig(crop="pad", pad=2, flip="random"))
        seen.add(next(i for i, w in enumerate(windows) if (w == result).all()))
    assert len(seen) > 20


@pytest.mark.parametrize("name", sorted(transforms.OPERATIONS))
def test_every_operation_keeps_the_size_and_grows_with_its_strength(name):
    noisy = picture(32, 32) // 2 + RNG.integers(0, 100, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noisy)

    def change(strength):
        result = transforms.OPERATIONS[name](image, strength, 1.0)
        assert result.size == image.size and result.mode == "RGB"
        return np.abs(np.asarray(result, int) - noisy).mean()

    assert change(1.0) > 0
    if name not in ("autocontrast", "equalize", "invert"):
        assert change(0.2) < change(1.0)


def test_rand_augment_is_a_function_of_the_generator():
    image = Image.fromarray(picture(32, 32))
    a, b = (np.asarray(transforms.rand_augment(image, np.random.default_rng(4), 6)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
