"""Transforms on the host: decode, resize, crop, flip. Out come arrays [height, width, channel].

RGB is uint8 throughout, as Pillow has it. Pictures of another number of channels are float32 in [0, 1], so that 16 bits
are not lost.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageSequence

from resnet_jax.config import AugmentConfig, Size, sides
from resnet_jax.data.policy import color_jitter, erase, rand_augment, trivial_augment

try:
    import cykooz_resizer as fast
except ImportError:  # there is no wheel of it for every machine
    fast = None

Raw = Any
"""What a source holds: a path, the bytes of a file, or an array [height, width, channel]; also a Pillow image."""

Picture = Any
"""A Pillow image of mode RGB, or a float32 array [height, width, channel]."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

SPARE = 3
"""A photograph is decoded smaller than it is while so many pixels are left for one of the training image's, in each
direction. With three the mean difference from the full decoding is 0.4 of 255, below 1 for each of 100 photographs;
with two it is 0.7."""

TURNS = {2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}
"""Orientations of EXIF: which directions of the upright picture run backwards in the file, t if they are exchanged."""


class BadImage(ValueError):
    """An image cannot be decoded."""


def decode(raw: Raw, channels: int = 3) -> Picture:
    """A picture from a path, a file's bytes or an array, turned upright as its EXIF entry says.

    For three channels an RGB image: 16 bits a channel are scaled to 8, alpha is left out as torchvision does, palettes
    and CMYK are resolved. For another number a float32 array: 1 is grey, in [0, 1]; more are those of a `.npy` file, or
    the pages of a TIFF. Integers are scaled by the greatest value of their type, floating-point numbers stay.

    Raises:
      BadImage: with the decoder's reason; also for more pixels than Pillow takes for safe.
    """
    with _opened(raw, channels) as found:
        return _from_image(found, channels) if isinstance(found, Image.Image) else found


@contextmanager
def _opened(raw: Raw, channels: int) -> Iterator[Picture]:
    """An image of which only the header is read as yet, or an array's picture; all errors inside are of the image."""
    try:
        if isinstance(raw, np.ndarray) or (isinstance(raw, str | Path) and Path(raw).suffix.lower() == ".npy"):
            yield _from_array(raw if isinstance(raw, np.ndarray) else np.load(raw, allow_pickle=False), channels)
        elif isinstance(raw, Image.Image):
            yield raw
        else:
            with Image.open(raw if isinstance(raw, str | Path) else io.BytesIO(raw)) as image:
                yield image
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _from_array(array: np.ndarray, channels: int) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"an array of shape {array.shape} is no picture: expected [height, width, channel]")
    if channels == 3 and array.shape[2] in (1, 3):
        pixels = array if array.dtype == np.uint8 else np.round(np.clip(unit(array), 0, 1) * 255).astype(np.uint8)
        return Image.fromarray(np.broadcast_to(pixels, (*array.shape[:2], 3)).copy() if array.shape[2] == 1 else pixels)
    if channels == 1 and array.shape[2] == 3:
        return unit(array) @ np.asarray([[0.299], [0.587], [0.114]], np.float32)
    if array.shape[2] != channels:
        raise BadImage(f"it has {array.shape[2]} channels, the recipe {channels}: set data.channels")
    return unit(array)


def _from_image(image: Image.Image, channels: int) -> Picture:
    if channels in (1, 3):
        upright = _upright(image)
        return _as_rgb(upright) if channels == 3 else _as_grey(upright)
    if getattr(image, "n_frames", 1) == channels:
        return np.concatenate([_as_grey(page.copy()) for page in ImageSequence.Iterator(image)], -1)
    return _from_array(np.asarray(_upright(image)), channels)


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image  # Pillow would copy it
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def unit(array: np.ndarray) -> np.ndarray:
    """float32: integers over the greatest value of their type, floating-point numbers as they are.

    Raises:
      BadImage: the type is neither uint8, uint16, bool nor floating-point.
    """
    if array.dtype == np.uint8 or array.dtype == np.uint16:
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    raise BadImage(f"pixels of type {array.dtype} have no known range: save them as uint8, uint16 or float32")


def _of_16_bits(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise BadImage(f"pixels from {pixels.min()} to {pixels.max()} are not those of 16 bits")
    return pixels.astype(np.uint16)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion saturates everything above 255
        image = Image.fromarray(np.round(_of_16_bits(image) / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("pixels are floating-point numbers, whose range is unknown")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _as_grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return unit(_of_16_bits(image))[..., None]
    pixels = np.asarray(image if image.mode == "F" else image.convert("RGB").convert("L"))
    return unit(pixels)[..., None]


def resize(picture: Picture, size: tuple[int, int], interpolation: str, box: Any = None) -> Picture:
    """A picture, or its part `box` (left, top, right, bottom), at height and width `size`.

    Antialiased as in Pillow: the kernel grows where the picture shrinks. Values are Pillow's to the last bit or two.
    """
    if isinstance(picture, Image.Image):
        return _resized(picture, size, interpolation, box)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(picture, -1, 0)]
    return np.stack([np.asarray(_resized(band, size, interpolation, box)) for band in bands], -1)


def _resized(image: Image.Image, size: tuple[int, int], interpolation: str, box: Any) -> Image.Image:
    height, width = size
    left, top, right, bottom = box or (0, 0, *image.size)
    if fast is None:
        return image.resize((width, height), RESAMPLING[interpolation], box=(left, top, right, bottom))
    kernel = {"bilinear": fast.FilterType.bilinear, "bicubic": fast.FilterType.catmull_rom}[interpolation]
    part = fast.CropBox(left, top, right - left, bottom - top)
    resized = Image.new(image.mode, (width, height))
    options = fast.ResizeOptions(fast.ResizeAlg.convolution(kernel), use_alpha=False, crop_box=part)
    fast.Resizer().resize_pil(image, resized, options)
    return resized


def height_width(picture: Picture) -> tuple[int, int]:
    """Of either kind of picture."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]


def fit(raw: Raw, size: Size, crop: float = 1.0, interpolation: str = "bilinear", channels: int = 3) -> np.ndarray:
    """The centre of a picture: it is resized until it just covers size / crop, then `size` is cut out."""
    height, width = sides(size)
    if isinstance(raw, np.ndarray) and raw.shape == (height, width, channels) and crop == 1.0:
        return raw if channels == 3 else unit(raw)
    picture = decode(raw, channels)
    least = round(height / crop), round(width / crop)
    found = height_width(picture)
    scale = max(a / b for a, b in zip(least, found, strict=True))
    large = tuple(max(a, int(b * scale)) for a, b in zip(least, found, strict=True))
    pixels = np.asarray(resize(picture, large, interpolation))  # type: ignore[arg-type]
    top, left = round((large[0] - height) / 2), round((large[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def random_resized_crop(
    raw: Raw,
    rng: np.random.Generator,
    size: Size,
    area: tuple[float, float],
    interpolation: str = "bilinear",
    channels: int = 3,
) -> Picture:
    """A random part of a picture, resized (Szegedy et al. 2015).

    A JPEG of which the part has at least 2, 4 or 8 times `SPARE` pixels for each one of `size`, in both directions, is
    decoded at a half, a quarter or an eighth of its size, which its cosine transform allows: photographs of twelve
    million pixels take two thirds of the time.
    """
    with _opened(raw, channels) as found:
        if isinstance(found, Image.Image):
            picture, box = _part_of_image(found, rng, sides(size), area, channels, whole=found is raw)
        else:
            picture, box = found, random_part(found.shape[0], found.shape[1], rng, area)
    return resize(picture, sides(size), interpolation, box)


def _part_of_image(
    image: Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    area: tuple[float, float],
    channels: int,
    whole: bool,
) -> tuple[Picture, tuple[float, float, float, float]]:
    """An image, decoded smaller where that is enough and it need not be `whole`, and a random part of it."""
    turn = TURNS.get(_orientation(image), "")
    wide, tall = image.size[::-1] if "t" in turn else image.size
    left, top, right, bottom = random_part(tall, wide, rng, area)
    spare = min((right - left) / size[1], (bottom - top) / size[0]) / SPARE
    less = 1 if whole else max((k for k in (2, 4, 8) if k <= spare), default=1)
    if less == 1 or not image.draft(None, (image.width // less, image.height // less)):
        return _from_image(image, channels), (left, top, right, bottom)
    picture = _from_image(image, channels)
    found_tall, found_wide = height_width(picture)
    x = found_wide - wide / less if "x" in turn else 0  # the last column and row of the file can be of fewer pixels
    y = found_tall - tall / less if "y" in turn else 0
    return picture, (x + left / less, y + top / less, x + right / less, y + bottom / less)


def random_part(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of a picture.

    It covers a share of the picture drawn from `area` and has a ratio of sides between 3/4 and 4/3; after ten draws
    that do not fit, it is the largest centred part of such a ratio.
    """
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pad_crop(image: np.ndarray, rng: np.random.Generator, pad: int) -> np.ndarray:
    """Adds `pad` zero pixels around an image and cuts the old size out at a random place."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * pad + 1, 2)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return padded[top : top + height, left : left + width]


def augment(
    raw: Raw, rng: np.random.Generator, size: Size, recipe: AugmentConfig, turn: bool = False, channels: int = 3
) -> np.ndarray:
    """A training image: crop, colours and policies, flips, erasing, as the recipe says.

    Args:
      turn: mirrored if flips alternate.
    """
    if recipe.crop == "random_resized":
        image = np.asarray(random_resized_crop(raw, rng, size, recipe.area, recipe.interpolation, channels))
    else:
        image = fit(raw, size, interpolation=recipe.interpolation, channels=channels)
        if recipe.crop == "pad":
            image = pad_crop(image, rng, recipe.pad)
    if recipe.color_jitter:
        image = color_jitter(image, rng, recipe.color_jitter)
    if recipe.randaugment:
        image = rand_augment(image, rng, recipe.randaugment)
    if recipe.trivial_augment:
        image = trivial_augment(image, rng)
    if turn if recipe.flip == "alternating" else recipe.flip == "random" and rng.random() < 0.5:
        image = image[:, ::-1]
    if recipe.flip_vertical and rng.random() < 0.5:
        image = image[::-1]
    if recipe.erasing and rng.random() < recipe.erasing:
        image = erase(image, rng)
    return image
