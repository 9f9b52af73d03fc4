"""Changes colours and shapes at random on the host: jitter, RandAugment, TrivialAugment, erasing.

Images are arrays [height, width, 3] of uint8. OpenCV changes colours, since it is faster; Pillow does the rest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

GREY = (124, 116, 104)
"""ImageNet's mean colour, which fills what shears, shifts and rotations leave empty."""

LEVELS = np.arange(256)

Operation = Callable[[np.ndarray, float, float], np.ndarray]
"""Maps an image, a strength in [0, 1] and a sign to an image."""


def rand_augment(image: np.ndarray, rng: np.random.Generator, magnitude: float) -> np.ndarray:
    """Applies two random operations, each with probability one half (Cubuk et al. 2019, as in ResNet strikes back).

    The strength of each is drawn from a normal distribution around `magnitude` of 10 with deviation 0.5, and grows
    with the magnitude for every operation.
    """
    names = list(OPERATIONS)
    for which in rng.integers(0, len(names), 2):
        if rng.random() < 0.5:
            strength = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
            sign = 1.0 if rng.random() < 0.5 else -1.0
            image = OPERATIONS[names[which]](image, strength, sign)
    return image


def trivial_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one random operation of random strength, or none (Mueller and Hutter 2021, arXiv:2103.10158)."""
    name = TRIVIAL[rng.integers(0, len(TRIVIAL))]
    strength, sign = float(rng.random()), 1.0 if rng.random() < 0.5 else -1.0
    return image if name == "identity" else OPERATIONS[name](image, strength, sign)


def color_jitter(image: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Multiplies brightness, contrast and saturation, in random order, by factors in [1 - amount, 1 + amount]."""
    for kind in rng.permutation(3):
        image = (brightness, contrast, color)[kind](image, float(rng.uniform(1 - amount, 1 + amount)))
    return image


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies every value by a factor; equal to Pillow's ImageEnhance."""
    return _away_from(0, image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies every value's distance from the mean of the grey image by a factor.

    Equal to Pillow's ImageEnhance up to the rounding of the mean.
    """
    return _away_from(int(_grey(image).mean() + 0.5), image, factor)


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies every pixel's distance from its grey by a factor; at most 2 from Pillow's ImageEnhance, which does not
    round.
    """
    import cv2

    return cv2.addWeighted(image, factor, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), 1 - factor, 0)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies every value's distance from a smoothed image by a factor, except at the border.

    At most 2 from Pillow's ImageEnhance.
    """
    import cv2

    kernel = np.asarray([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    inner = (slice(1, -1), slice(1, -1))
    sharpened = image.copy()
    sharpened[inner] = cv2.addWeighted(image, factor, cv2.filter2D(image, -1, kernel), 1 - factor, 0)[inner]
    return sharpened


def _grey(image: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _away_from(level: int, image: np.ndarray, factor: float) -> np.ndarray:
    return _by_table(image, level + np.float32(factor) * (LEVELS - level).astype(np.float32))


def _by_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box with noise, in a copy of an image (Zhong et al. 2017).

    The box covers 2 to 33 % of the image; its sides have a ratio of 0.3 to 3.3.

    Args:
      image: [height, width, channel], uint8, or float32 in [0, 1].
    """
    height, width, channels = image.shape
    area = height * width * rng.uniform(0.02, 0.33)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    h, w = (
        int(np.clip(round(x), 1, most)) for x, most in ((np.sqrt(area * ratio), height), (np.sqrt(area / ratio), width))
    )
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    box, erased = (h, w, channels), image.copy()
    noise = rng.integers(0, 256, box, np.uint8) if image.dtype == np.uint8 else rng.random(box, np.float32)
    erased[top : top + h, left : left + w] = noise
    return erased


def _pillow(change: Callable[[Image.Image, float], Any]) -> Operation:
    """Makes an operation of a function of a Pillow image and a signed strength."""
    return lambda image, strength, sign: np.asarray(change(Image.fromarray(image), strength * sign))


def _shift(change: Callable[[float, int, int], tuple[float, ...]]) -> Operation:
    """Makes an operation that moves pixels by an affine map, a function of signed strength, width and height."""
    return _pillow(
        lambda image, strength: image.transform(
            image.size, Image.Transform.AFFINE, change(strength, *image.size), fillcolor=GREY
        )
    )


def _table(change: Callable[[float], np.ndarray]) -> Operation:
    """Makes an operation of a function of the strength that returns the new value of each of the 256."""
    return lambda image, strength, sign: _by_table(image, change(strength))


def _enhance(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    return lambda image, strength, sign: change(image, max(0.1, 1 + 0.9 * strength * sign))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": _pillow(lambda image, strength: ImageOps.autocontrast(image)),
    "equalize": _pillow(lambda image, strength: ImageOps.equalize(image)),
    "invert": _table(lambda strength: 255 - LEVELS),
    "rotate": _pillow(lambda image, strength: image.rotate(30 * strength, fillcolor=GREY)),
    "posterize": _table(lambda strength: LEVELS & (256 - 2 ** (8 - max(1, 4 - int(4 * strength))))),
    "solarize": _table(lambda strength: np.where(LEVELS + int(256 * strength) < 256, LEVELS, 255 - LEVELS)),
    "solarize_add": _table(lambda strength: np.where(LEVELS < 128, LEVELS + int(110 * strength), LEVELS)),
    "color": _enhance(color),
    "contrast": _enhance(contrast),
    "brightness": _enhance(brightness),
    "sharpness": _enhance(sharpness),
    "shear_x": _shift(lambda strength, width, height: (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": _shift(lambda strength, width, height: (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate_x": _shift(lambda strength, width, height: (1, 0, 0.45 * strength * width, 0, 1, 0)),
    "translate_y": _shift(lambda strength, width, height: (1, 0, 0, 0, 1, 0.45 * strength * height)),
}

TRIVIAL = ("identity", *(name for name in OPERATIONS if name not in ("invert", "solarize_add")))
