"""Transforms images on the host: resize, crop, flip. Results are arrays [height, width, channel].

RGB is uint8, as in Pillow. Images of another number of channels are float32 in [0, 1], which keeps 16 bits.
"""

import math
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from resnet_jax.config import AugmentConfig, Size, known, sides
from resnet_jax.data.color_and_shape import color_jitter, erase, rand_augment, trivial_augment
from resnet_jax.data.decode import (
    ORIENTATIONS,
    Picture,
    Raw,
    decode,
    errors_as_bad_image,
    from_image,
    opened,
    orientation,
)

try:
    import cykooz_resizer as fast
except ImportError:  # the extra `fast` is not installed
    fast = None

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

SPARE = 3
"""A JPEG is decoded at a smaller size as long as it keeps this number of pixels for each one of the training image, in
each direction. With three the mean difference from the full decoding is 0.4 of 255, below 1 for each of 100
photographs; with two it is 0.7."""

MOST_PIXELS = 2**24
"""A picture is resized whole, and its centre cut out then, while that takes at most this number of pixels, or 16 times
those of the result. Of longer pictures only the part that is cut out is resized."""

LONG_SIDE = 2**14
"""Pillow holds the corners of a box as float32: where a side is longer, the part around the box is cut out first."""


def resizer() -> str:
    """Returns what resizes training pictures: `cykooz.resizer` where the extra `fast` is installed, else `Pillow`."""
    return "Pillow" if fast is None else "cykooz.resizer"


def resize(
    picture: Picture, size: tuple[int, int], interpolation: str, box: Any = None, exact: bool = False
) -> Picture:
    """Resizes an image, or its part `box` (left, top, right, bottom), to height and width `size`.

    Antialiased as in Pillow: the kernel grows where the picture shrinks. Pillow resizes where `exact` is asked for or
    `resizer()` says so, else cykooz.resizer, in a third of the time and with pixels that differ by 1 of 255.
    """
    if box is not None and max(height_width(picture)) > LONG_SIDE:
        picture, box = _part_around(picture, box, size)
    resized = _pillow_resized if exact or fast is None else _fast_resized
    if isinstance(picture, Image.Image):
        return resized(picture, size, interpolation, box)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(picture, -1, 0)]
    return np.stack([np.asarray(resized(band, size, interpolation, box)) for band in bands], -1)


def _part_around(picture: Picture, box: Any, size: tuple[int, int]) -> tuple[Picture, Any]:
    """Returns the part of an image that is read when its `box` is resized to `size`, and the box in this part."""
    height, width = height_width(picture)
    x, y = (2 + math.ceil(2 * max(1, (box[k + 2] - box[k]) / size[1 - k])) for k in (0, 1))  # a bicubic kernel's reach
    left, top = max(0, math.floor(box[0]) - x), max(0, math.floor(box[1]) - y)
    right, bottom = min(width, math.ceil(box[2]) + x), min(height, math.ceil(box[3]) + y)
    part = (
        picture[top:bottom, left:right] if isinstance(picture, np.ndarray) else picture.crop((left, top, right, bottom))
    )
    return part, (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


def _pillow_resized(image: Image.Image, size: tuple[int, int], interpolation: str, box: Any) -> Image.Image:
    return image.resize(size[::-1], RESAMPLING[interpolation], box=box)


def _fast_resized(image: Image.Image, size: tuple[int, int], interpolation: str, box: Any) -> Image.Image:
    height, width = size
    left, top, right, bottom = box or (0, 0, *image.size)
    kernel = {"bilinear": fast.FilterType.bilinear, "bicubic": fast.FilterType.catmull_rom}[interpolation]
    part = fast.CropBox(left, top, right - left, bottom - top)
    resized = Image.new(image.mode, (width, height))
    options = fast.ResizeOptions(fast.ResizeAlg.convolution(kernel), use_alpha=False, crop_box=part)
    fast.Resizer().resize_pil(image, resized, options)
    return resized


def height_width(picture: Picture) -> tuple[int, int]:
    """Returns height and width of a Pillow image or an array."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]


def fit(raw: Raw, size: Size, crop: float = 1.0, interpolation: str = "bilinear", channels: int = 3) -> np.ndarray:
    """Prepares an image for evaluation: resizes its short side to the floor of size / crop, and cuts `size` out of the
    centre.

    The pixels are those of torchvision's `Resize` and `CenterCrop`, and of timm's transform for evaluation, on a Pillow
    image. Where the resized image would have more than `MOST_PIXELS`, only the part that is cut out is resized: its
    pixels are the same up to rounding, and up to the overshoot of the bicubic kernel where Pillow resizes columns
    before rows.

    Args:
      raw: as a source holds it.
      size: of the result, in pixels.
      crop: share of the short side that is kept.
      interpolation: `bilinear` or `bicubic`.
      channels: of the result.

    Returns:
      uint8 [height, width, 3], or float32 for another number of channels.

    Raises:
      BadImage: the image cannot be decoded or resized.
    """
    height, width = sides(size)
    if (
        isinstance(raw, np.ndarray)
        and raw.shape == (height, width, 3)
        and raw.dtype == np.uint8
        and (crop, channels) == (1.0, 3)
    ):
        return raw
    with errors_as_bad_image():
        picture = decode(raw, channels)
        found = height_width(picture)
        least = math.floor(height / crop), math.floor(width / crop)
        large = _covering(found, least)
        top, left = _corner(large, (height, width))
        if large[0] * large[1] <= max(MOST_PIXELS, 16 * least[0] * least[1]):
            pixels = np.asarray(resize(picture, large, interpolation, exact=True))
            return pixels[top : top + height, left : left + width]
        box = part_seen(found, size, crop)
        return np.asarray(resize(picture, (height, width), interpolation, box, exact=True))


def part_seen(found: tuple[int, int], size: Size, crop: float = 1.0) -> tuple[float, float, float, float]:
    """Returns the part (left, top, right, bottom) that `fit` keeps of an image of height and width `found`, in pixels
    of that image.
    """
    height, width = sides(size)
    large = _covering(found, (math.floor(height / crop), math.floor(width / crop)))
    top, left = _corner(large, (height, width))
    y, x = found[0] / large[0], found[1] / large[1]
    return left * x, top * y, (left + width) * x, (top + height) * y


def _corner(large: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns top and left of the part of height and width `size` in the centre of an image, rounded as torchvision
    does.
    """
    return round((large[0] - size[0]) / 2), round((large[1] - size[1]) / 2)


def _covering(found: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width to which a picture is resized to cover `least`, rounded as torchvision and timm do."""
    if least[0] == least[1]:  # torchvision's Resize
        long = int(least[0] * max(found) / min(found))
        return (least[0], long) if found[0] <= found[1] else (long, least[0])
    ratio = min(found[0] / least[0], found[1] / least[1])  # timm's ResizeKeepRatio
    return round(found[0] / ratio), round(found[1] / ratio)


def random_resized_crop(
    raw: Raw,
    rng: np.random.Generator,
    size: Size,
    area: tuple[float, float],
    interpolation: str = "bilinear",
    channels: int = 3,
) -> Picture:
    """Resizes a random part of an image, as `random_part` draws it (Szegedy et al. 2015).

    Where the part of a JPEG has at least 2, 4 or 8 times `SPARE` pixels for each one of `size`, in both directions, the
    file is decoded at a half, a quarter or an eighth of its size, which its cosine transform allows.

    Args:
      raw: as a source holds it.
      rng: of the random numbers.
      size: of the result, in pixels.
      area: least and greatest share of the image that the part covers.
      interpolation: `bilinear` or `bicubic`.
      channels: of the result.

    Raises:
      BadImage: the image cannot be decoded or resized.
    """
    with errors_as_bad_image(), opened(raw, channels) as found:
        if isinstance(found, JpegImageFile) and found is not raw and channels in (1, 3):
            picture, box = _part_of_jpeg(found, rng, sides(size), area, channels)
        else:
            picture = from_image(found, channels) if isinstance(found, Image.Image) else found
            box = random_part(*height_width(picture), rng, area)
        return resize(picture, sides(size), interpolation, box)


def _part_of_jpeg(
    image: JpegImageFile, rng: np.random.Generator, size: tuple[int, int], area: tuple[float, float], channels: int
) -> tuple[Picture, tuple[float, float, float, float]]:
    """Decodes a JPEG, at a smaller size where that is enough, and draws a random part of it."""
    _, backwards = ORIENTATIONS.get(orientation(image), (None, ""))
    wide, tall = image.size[::-1] if "t" in backwards else image.size
    left, top, right, bottom = random_part(tall, wide, rng, area)
    spare = min((right - left) / size[1], (bottom - top) / size[0]) / SPARE
    less = max((k for k in (2, 4, 8) if k <= spare), default=1)
    if less == 1 or not image.draft(None, (image.width // less, image.height // less)):
        return from_image(image, channels), (left, top, right, bottom)
    picture = from_image(image, channels)
    found_tall, found_wide = height_width(picture)
    x = (
        found_wide - wide / less if "x" in backwards else 0
    )  # the last column and row of the file can be of fewer pixels
    y = found_tall - tall / less if "y" in backwards else 0
    return picture, (x + left / less, y + top / less, x + right / less, y + bottom / less)


def random_part(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a random part of an image: left, top, right and bottom in pixels.

    It covers a share of the image drawn from `area` and has a ratio of sides between 3/4 and 4/3; after ten draws that
    do not fit, it is the largest centred part of such a ratio.
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
    """Adds `pad` zero pixels around an image [height, width, channel] and cuts the old size out at a random place."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * pad + 1, 2)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return padded[top : top + height, left : left + width]


def augment(
    raw: Raw, rng: np.random.Generator, size: Size, recipe: AugmentConfig, mirrored: bool = False, channels: int = 3
) -> np.ndarray:
    """Prepares an image for training: crop, colours and policies, flips, erasing, as the recipe says.

    Args:
      raw: as a source holds it.
      rng: of the random numbers.
      size: of the result, in pixels.
      recipe: the part `augment` of a recipe.
      mirrored: where flips alternate, whether this image is mirrored.
      channels: of the result.

    Returns:
      uint8 [height, width, 3], or float32 for another number of channels.

    Raises:
      BadImage: the image cannot be decoded or resized.
    """
    crop, flip = known(recipe.crop, "augment.crop"), known(recipe.flip, "augment.flip")
    interpolation = known(recipe.interpolation, "augment.interpolation")
    if crop == "random_resized":
        image = np.asarray(random_resized_crop(raw, rng, size, recipe.area, interpolation, channels))
    else:
        image = fit(raw, size, interpolation=interpolation, channels=channels)
        if crop == "pad":
            image = pad_crop(image, rng, known(recipe.pad, "augment.pad"))
    if recipe.color_jitter:
        image = color_jitter(image, rng, recipe.color_jitter)
    if recipe.randaugment:
        image = rand_augment(image, rng, recipe.randaugment)
    if recipe.trivial_augment:
        image = trivial_augment(image, rng)
    if mirrored if flip == "alternating" else flip == "random" and rng.random() < 0.5:
        image = image[:, ::-1]
    if recipe.flip_vertical and rng.random() < 0.5:
        image = image[::-1]
    if recipe.erasing and rng.random() < recipe.erasing:
        image = erase(image, rng)
    return image
