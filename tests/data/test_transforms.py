import io
import itertools
import re
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from resnet_jax.config import AugmentConfig
from resnet_jax.data import transforms
from resnet_jax.data.decode import BadImage, decode

from ..conftest import ROOT

RNG = np.random.default_rng(0)


def picture(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def encoded(array, form="PNG", **options):
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, form, **options)
    return buffer.getvalue()


def test_decode_reads_bytes_paths_and_arrays(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    for raw in (encoded(picture()), str(tmp_path / "a.png"), picture()):
        np.testing.assert_array_equal(np.asarray(decode(raw)), picture())


def test_decode_turns_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    upright = decode(encoded(picture(), "JPEG", exif=exif))
    assert upright.size == (30, 40)


def entry(tag, kind, count, value):
    return struct.pack("<HHI", tag, kind, count) + value


def exif(*entries):
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + b"\0\0\0\0"


def oriented(number):
    return entry(0x112, 3, 1, struct.pack("<HH", number, 0))


METADATA = {
    "rubbish": (b"Exif\0\0rubbishrubbish", 1),
    "of a damaged header": (b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03\0\0\0\1", 1),
    "blank": (b"Exif\0\0", 1),
    "cut off": (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 40), 1),
    "a wrong offset": (b"Exif\0\0II*\0" + struct.pack("<I", 60000), 1),
    "orientation 0": (exif(oriented(0)), 1),
    "orientation 99": (exif(oriented(99)), 1),
    "orientation as text": (exif(entry(0x112, 2, 4, b"6\0\0\0")), 1),
    "a huge count": (exif(oriented(6), entry(0x10F, 2, 2**31, struct.pack("<I", 2**30))), 6),
    "a wrong type": (exif(oriented(6), entry(0x11A, 3, 1, struct.pack("<HH", 72, 0))), 6),
    "an unknown type": (exif(oriented(6), entry(0x9999, 77, 1, b"\0\0\0\0")), 6),
    "text of wrong bytes": (exif(oriented(6), entry(0x10F, 2, 4, b"\xff\xfe\xfd\0")), 6),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_metadata_costs_no_pixels(kind, form, channels):
    data, orientation = METADATA[kind]
    image = Image.fromarray(RNG.integers(0, 256, (24, 32, 4 if channels == 4 else 3), dtype=np.uint8))
    if form == "JPEG" and channels == 4:
        image = image.convert("CMYK")
    good, marked = encoded(image, form), encoded(image, form, exif=data)
    expected = np.asarray(decode(good, channels))
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    np.testing.assert_array_equal(decode(marked, channels), expected)
    assert transforms.fit(marked, 16, channels=channels).shape == (16, 16, channels)
    first, again = (
        np.asarray(transforms.random_resized_crop(raw, np.random.default_rng(0), 16, (0.3, 0.9), channels=channels))
        for raw in (marked, Image.fromarray(expected) if channels == 3 else np.ascontiguousarray(expected))
    )
    np.testing.assert_array_equal(first, again)


def test_rubbish_where_a_text_of_png_should_hold_metadata():
    from PIL import PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", "\nexif\n 4\nno hexadecimal numbers\n", zip=True)
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "PNG", pnginfo=texts)
    np.testing.assert_array_equal(decode(buffer.getvalue()), picture())


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_upright_however_it_comes_in(form, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    raw = encoded(picture(), form, exif=tag)
    with Image.open(io.BytesIO(raw)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    decoded = decode(raw)
    np.testing.assert_array_equal(decoded, upright)
    np.testing.assert_array_equal(decode(decoded), upright)  # it does not remember how it lay
    np.testing.assert_array_equal(transforms.fit(raw, 16), transforms.fit(upright, 16))
    for seed in range(3):
        np.testing.assert_array_equal(cropped(raw, seed, 16, (0.2, 0.6)), cropped(upright, seed, 16, (0.2, 0.6)))


def saved(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def kinds():
    """Name -> a file of an unusual kind, and the RGB picture that it shows."""
    rgb = Image.fromarray(picture())
    grey, indexed = rgb.convert("L"), rgb.quantize(64)
    wide = np.asarray(grey, np.uint16) * 257
    alpha = rgb.copy()
    alpha.putalpha(grey)
    transparent = indexed.copy()
    transparent.info["transparency"] = bytes(range(64))
    cmyk = rgb.convert("CMYK")
    return {
        "grey": (saved(grey), grey.convert("RGB")),
        "grey with alpha": (saved(grey.convert("LA")), grey.convert("RGB")),
        "16-bit PNG": (saved(Image.fromarray(wide)), grey.convert("RGB")),
        "16-bit TIFF": (saved(Image.fromarray(wide), "TIFF"), grey.convert("RGB")),
        "alpha": (saved(alpha), rgb),
        "palette": (saved(indexed), indexed.convert("RGB")),
        "transparent palette": (saved(transparent), indexed.convert("RGB")),
        "CMYK": (saved(cmyk, "TIFF"), cmyk.convert("RGB")),
        "CMYK JPEG": (saved(cmyk, "JPEG"), rgb),
        "black and white": (saved(grey.convert("1")), grey.convert("1").convert("RGB")),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_picture_comes_out_as_rgb(kind):
    raw, expected = kinds()[kind]
    image = decode(raw)
    assert image.mode == "RGB"
    near = 12 if "JPEG" in kind else 0
    difference = np.asarray(image).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() <= near


NOISE = encoded(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))


def broken_png():
    data = bytearray(NOISE)
    data[data.index(b"IDAT") - 5] ^= 0x08  # in the checksum of the chunk before
    return bytes(data)


BAD = {
    "empty": b"",
    "text": b"no image",
    "truncated JPEG": encoded(picture(), "JPEG")[:-300],
    "truncated PNG": NOISE[:2000],
    "broken PNG": broken_png(),
    "missing": "/no/such/file.jpg",
    "bomb": saved(Image.new("1", (20_000, 10_000))),
    "32-bit": saved(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"),
    "float": saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD)
def test_decode_names_the_reason(kind):
    with pytest.raises(BadImage, match=r"\w+Error: |pixels |DecompressionBomb"):
        decode(BAD[kind])


def test_fit_is_pillow_resize_and_centre_crop():
    result = transforms.fit(picture(), 16, 0.8)
    short = Image.fromarray(picture()).resize((26, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(short.crop((5, 2, 21, 18))))


def noise_of(width, height):
    rng = np.random.default_rng([width, height])
    small = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


SHAPES = ((500, 375), (333, 500), (201, 200), (64, 48), (25, 400))
SIZES = (31, 64, 97, 128, 160, 176, 224, 240, 256, 320)
CROPS = (0.875, 0.9, 0.94, 0.95, 0.965, 1.0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_has_the_pixels_of_torchvision_and_timm(size, interpolation):
    from ..weights.torch_twins import timm, torchvision

    kernel = torchvision.transforms.InterpolationMode(interpolation)
    for k, crop in enumerate(CROPS):
        shape = SHAPES[(SIZES.index(size) + k) % len(SHAPES)]
        image = noise_of(*shape)
        found = transforms.fit(image, size, crop, interpolation)
        resize, cut = torchvision.transforms.Resize(int(size / crop), kernel), torchvision.transforms.CenterCrop(size)
        np.testing.assert_array_equal(found, cut(resize(image)), err_msg=f"torchvision, {shape} {crop}")
        preparation = {"interpolation": interpolation, "crop_pct": crop, "normalize": False}
        theirs = timm.data.create_transform((3, size, size), is_training=False, **preparation)(image)
        np.testing.assert_array_equal(found.transpose(2, 0, 1), theirs, err_msg=f"timm, {shape} {crop}")


@pytest.mark.parametrize("size", [(96, 160), (131, 64), (112, 113)])
def test_evaluation_at_other_than_square_sizes_has_the_pixels_of_timm(size):
    from ..weights.torch_twins import timm

    for shape, crop, interpolation in itertools.product(SHAPES, CROPS[::2], ("bilinear", "bicubic")):
        preparation = {"interpolation": interpolation, "crop_pct": crop, "normalize": False}
        theirs = timm.data.create_transform((3, *size), is_training=False, **preparation)(noise_of(*shape))
        found = transforms.fit(noise_of(*shape), size, crop, interpolation)
        np.testing.assert_array_equal(found.transpose(2, 0, 1), theirs, err_msg=f"{shape} {crop}")


def long_png(width, height):
    """A black and white PNG of few bytes, in stripes."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\x55" * -(-width // 8)
    pixels = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("shape", [(1, 20_000), (65_000, 1), (5_000_000, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_long_picture_costs_what_its_part_costs(shape, channels):
    raw = long_png(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fitted = transforms.fit(raw, 224, 0.95, "bicubic", channels)
    rng, recipe = np.random.default_rng(0), AugmentConfig(crop="pad", pad=1, flip="none", interpolation="bilinear")
    cut = np.asarray(transforms.random_resized_crop(raw, rng, 224, (0.1, 1.0), "bicubic", channels))
    padded = transforms.augment(raw, rng, (96, 32), recipe, channels=channels)
    assert (fitted.shape, cut.shape, padded.shape) == ((224, 224, channels), (224, 224, channels), (96, 32, channels))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("shape", [(20, 4000), (5000, 37), (40_000, 50)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_part_of_a_long_picture_is_that_of_all_of_it(shape, channels, monkeypatch):
    image = Image.fromarray(RNG.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    whole = transforms.fit(image, (24, 32), 0.9, "bilinear", channels)
    monkeypatch.setattr(transforms, "MOST_PIXELS", 0)
    part = transforms.fit(image, (24, 32), 0.9, "bilinear", channels)
    np.testing.assert_allclose(
        np.asarray(part, float), np.asarray(whole, float), rtol=0, atol=1 if channels == 3 else 0.004
    )


@pytest.mark.parametrize("error", [MemoryError, OverflowError, ValueError, SystemError, Image.DecompressionBombError])
def test_any_error_of_decoding_or_resizing_is_of_the_image(error, monkeypatch):
    def fails(*_, **__):
        raise error("of the library")

    for name in ("_pillow_resized", "_fast_resized"):
        monkeypatch.setattr(transforms, name, fails)
    for make in (lambda: transforms.fit(NOISE, 16), lambda: cropped(NOISE, 0, 16, (0.2, 0.5))):
        with pytest.raises(BadImage, match=f"{error.__name__}: of the library"):
            make()


BOXES = {"all": None, "part": (3, 5, 97, 71), "small": (10, 10, 14, 13)}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [(16, 16), (33, 70), (150, 150)])
def test_resizing_is_that_of_pillow(interpolation, box, size):
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    kernel = transforms.RESAMPLING[interpolation]
    to = size[::-1]
    found = np.asarray(transforms.resize(Image.fromarray(noise), size, interpolation, BOXES[box]), int)
    apart = np.abs(found - np.asarray(Image.fromarray(noise).resize(to, kernel, box=BOXES[box]), int))
    assert found.shape == (*size, 3)
    assert apart.mean() < 0.5
    if interpolation == "bilinear":
        assert apart.max() <= 1
    bands = np.asarray(noise / 255, np.float32)
    found = transforms.resize(bands, size, interpolation, BOXES[box])
    for band in range(3):
        expected = Image.fromarray(bands[..., band]).resize(to, kernel, box=BOXES[box])
        np.testing.assert_allclose(found[..., band], expected, atol=2e-6)


def test_resizing_of_a_photograph_is_that_of_pillow(pictures):
    for path in sorted((pictures / "imagenet_samples").glob("*.JPEG"))[:20]:
        image = decode(path)
        box = (image.width // 10, image.height // 8, image.width, image.height)
        for name, kernel in transforms.RESAMPLING.items():
            found = np.asarray(transforms.resize(image, (224, 224), name, box), int)
            assert np.abs(found - np.asarray(image.resize((224, 224), kernel, box=box), int)).mean() < 0.5


def test_resizing_works_without_the_fast_library(monkeypatch):
    image = Image.fromarray(picture())
    fast = np.asarray(transforms.resize(image, (20, 20), "bicubic", (2, 3, 30, 29)), int)
    monkeypatch.setattr(transforms, "fast", None)
    plain = np.asarray(transforms.resize(image, (20, 20), "bicubic", (2, 3, 30, 29)), int)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=2)
    np.testing.assert_array_equal(plain, image.resize((20, 20), Image.Resampling.BICUBIC, box=(2, 3, 30, 29)))


def test_random_resized_crop_covers_the_area_asked_for():
    image = Image.fromarray(picture(64, 64))
    for _ in range(20):
        result = np.asarray(transforms.random_resized_crop(image, RNG, 16, (0.2, 0.3)))
        assert result.shape == (16, 16, 3)
        width, height = np.ptp(result[..., 0]) / 255, np.ptp(result[..., 1]) / 255
        assert 0.1 < width * height < 0.35


@pytest.fixture(scope="module")
def mosaic(pictures):
    """48 photographs beside each other, each at its own sharpness: 3000 x 3000 pixels and a few more."""
    whole = Image.new("RGB", (3001, 3003))
    paths = sorted((pictures / "imagenet_samples").glob("*.JPEG"))
    fitting = [image for image in map(decode, paths) if image.width >= 500 and image.height >= 375]
    for i, image in enumerate(fitting[:48]):
        whole.paste(image, (i % 6 * 500, i // 6 * 375))
    return whole


def cropped(raw, seed, size, area):
    return np.asarray(transforms.random_resized_crop(raw, np.random.default_rng(seed), size, area), int)


@pytest.mark.parametrize(("orientation", "size"), [(1, 40), (1, 230), *((turn, 100) for turn in range(1, 9))])
def test_a_large_photograph_is_decoded_smaller_with_the_pixels_of_all_of_it(mosaic, tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    mosaic.save(tmp_path / "a.jpg", quality=92, exif=exif)
    upright, kernel = decode(tmp_path / "a.jpg"), Image.Resampling.BILINEAR
    for seed in range(3):
        box = transforms.random_part(*upright.size[::-1], np.random.default_rng(seed), (0.3, 1.0))
        expected = np.asarray(upright.resize((size, size), kernel, box=box), int)
        from_image, from_file = (cropped(raw, seed, size, (0.3, 1.0)) for raw in (upright, tmp_path / "a.jpg"))
        assert np.abs(from_image - expected).max() <= 1
        assert 0 < np.abs(from_file - from_image).mean() < 1
    with Image.open(tmp_path / "a.jpg") as image:
        cropped(image, 0, size, (0.3, 1.0))
        assert image.size == (3001, 3003), "an image that is given keeps its size"


def test_a_large_photograph_that_is_cut_off_is_a_bad_image(mosaic):
    raw = saved(mosaic, "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        cropped(raw[: len(raw) * 9 // 10], 0, 40, (0.3, 0.5))


def test_a_photograph_is_decoded_in_full_where_its_pixels_are_needed(pictures):
    for path in sorted((pictures / "imagenet_samples").glob("*.JPEG"))[:5]:
        raw = path.read_bytes()
        from_image, from_file = (cropped(source, 1, 160, (0.08, 1.0)) for source in (decode(raw), raw))
        np.testing.assert_array_equal(from_file, from_image)


def test_pad_crop_and_flip_stay_windows_of_the_image():
    image = picture(8, 8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    windows += [w[:, ::-1] for w in windows]
    seen = set()
    for _ in range(60):
        result = transforms.augment(
            image, RNG, 8, AugmentConfig(crop="pad", pad=2, flip="random", interpolation="bilinear")
        )
        seen.add(next(i for i, w in enumerate(windows) if (w == result).all()))
    assert len(seen) > 20


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.95])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_page_on_serving_prepares_pictures_as_an_evaluation_does(tmp_path, crop, interpolation):
    page = (ROOT / "docs" / "serving.md").read_text()
    names: dict = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "def prepare" in code), names)
    metadata = {"input": ["batch", 32, 32, 3], "eval_crop": crop, "interpolation": interpolation}
    rng = np.random.default_rng(0)
    for i, (shape, mode, turned) in enumerate(
        [((47, 91), "RGB", 6), ((91, 47), "RGBA", 1), ((33, 32), "L", 3), ((20, 25), "CMYK", 1), ((64, 64), "P", 1)]
    ):
        pixels = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).convert(mode)
        exif = Image.Exif()
        exif[274] = turned
        path = tmp_path / f"{i}.{'jpg' if mode in ('RGB', 'L', 'CMYK') else 'png'}"
        pixels.save(path, exif=exif)
        np.testing.assert_array_equal(names["prepare"](path, metadata), transforms.fit(path, 32, crop, interpolation))
    Image.fromarray(rng.integers(0, 2**16, (47, 91), np.uint16)).save(path := tmp_path / "grey.png")
    np.testing.assert_array_equal(names["prepare"](path, metadata), transforms.fit(path, 32, crop, interpolation))
