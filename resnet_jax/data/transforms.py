"""Transforms on the host: decode, resize, crop, flip, RandAugment. Out come uint8 arrays [height, width, 3]."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.config import AugmentConfig

Raw = Any
"""What a source holds: a path, the bytes of a file, or a uint8 array [height, width, 3]; also a Pillow image."""


RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class BadImage(ValueError):
    """An image cannot be decoded."""


def decode(raw: Raw) -> Image.Image:
    """An RGB image from a path, a file's bytes or an array, turned upright as its EXIF entry says.

    16 bits a channel are scaled to 8, alpha is left out as torchvision does, palettes and CMYK are resolved.

    Raises:
      BadImage: with the decoder's reason; also for more pixels than Pillow takes for safe.
    """
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    if isinstance(raw, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(raw))
    try:
        with Image.open(raw if isinstance(raw, str | Path) else io.BytesIO(raw)) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion saturates everything above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImage(f"pixels from {pixels.min()} to {pixels.max()} are not those of 16 bits")
        image = Image.fromarray(np.round(pixels / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("pixels are floating-point numbers, whose range is unknown")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def fit(raw: Raw, size: int, crop: float = 1.0, interpolation: str = "bilinear") -> np.ndarray:
    """The centre of an image: the short side is resized to size / crop, then size x size is cut out."""
    if isinstance(raw, np.ndarray) and raw.shape[:2] == (size, size) and crop == 1.0:
        return raw
    image = decode(raw)
    short = round(size / crop)
    width, height = image.size
    scale = short / min(width, height)
    sides = max(short, int(width * scale)), max(short, int(height * scale))
    image = image.resize(sides, RESAMPLING[interpolation])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Image.Image, rng: np.random.Generator, size: int, area: tuple[float, float], interpolation: str = "bilinear"
) -> Image.Image:
    """A random part of an image, resized to size x size (Szegedy et al. 2015).

    The part covers a share of the image drawn from `area` and has a ratio of sides between 3/4 and 4/3; after ten
    draws that do not fit, it is the largest centred part of such a ratio.
    """
    width, height = image.size
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (int(left), int(top), int(left + w), int(top + h))
    return image.resize((size, size), RESAMPLING[interpolation], box=box)


def pad_crop(image: np.ndarray, rng: np.random.Generator, pad: int) -> np.ndarray:
    """Adds `pad` zero pixels around an image and cuts the old size out at a random place."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * pad + 1, 2)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return padded[top : top + height, left : left + width]


def augment(raw: Raw, rng: np.random.Generator, size: int, recipe: AugmentConfig, turn: bool = False) -> np.ndarray:
    """A training image: crop as the recipe says, then RandAugment, then flip; `turn`: mirrored if flips alternate."""
    if recipe.crop == "random_resized":
        image = np.asarray(random_resized_crop(decode(raw), rng, size, recipe.area, recipe.interpolation))
    else:
        image = fit(raw, size, interpolation=recipe.interpolation)
        if recipe.crop == "pad":
            image = pad_crop(image, rng, recipe.pad)
    if recipe.randaugment:
        image = np.asarray(rand_augment(Image.fromarray(image), rng, recipe.randaugment))
    if turn if recipe.flip == "alternating" else recipe.flip == "random" and rng.random() < 0.5:
        image = image[:, ::-1]
    return image


def rand_augment(image: Image.Image, rng: np.random.Generator, magnitude: float) -> Image.Image:
    """Two random operations, each with probability one half (Cubuk et al. 2019, as in ResNet strikes back).

    The strength of each is drawn from a normal distribution around `magnitude` of 10 with deviation 0.5, and grows
    with the magnitude for every operation.
    """
    names = list(OPERATIONS)
    for name in rng.choice(names, 2):
        if rng.random() < 0.5:
            strength = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
            sign = 1.0 if rng.random() < 0.5 else -1.0
            image = OPERATIONS[name](image, strength, sign)
    return image


def _shift(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    grey = (124, 116, 104)
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=grey)


def _enhance(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + 0.9 * strength * sign))


def _solarize_add(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return image.point([min(255, i + int(110 * strength)) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": lambda image, strength, sign: image.rotate(30 * strength * sign, fillcolor=(124, 116, 104)),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: _shift(image, 1, 0.3 * strength * sign, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: _shift(image, 1, 0, 0, 0.3 * strength * sign, 1, 0),
    "translate_x": lambda image, strength, sign: _shift(image, 1, 0, 0.45 * strength * sign * image.width, 0, 1, 0),
    "translate_y": lambda image, strength, sign: _shift(image, 1, 0, 0, 0, 1, 0.45 * strength * sign * image.height),
}
