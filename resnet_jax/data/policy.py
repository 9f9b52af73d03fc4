"""Random changes of colours and shapes on the host: jitter, RandAugment, TrivialAugment, erasing."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (124, 116, 104)
"""ImageNet's mean colour, for what comes in from beyond the border."""


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


def trivial_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One random operation of random strength, or none (Mueller and Hutter 2021, arXiv:2103.10158)."""
    name = rng.choice(TRIVIAL)
    strength, sign = float(rng.random()), 1.0 if rng.random() < 0.5 else -1.0
    return image if name == "identity" else OPERATIONS[name](image, strength, sign)


def color_jitter(image: Image.Image, rng: np.random.Generator, amount: float) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times a factor in [1 - amount, 1 + amount]."""
    for kind in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
        image = enhance(image).enhance(float(rng.uniform(1 - amount, 1 + amount)))
    return image


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with a random box of noise: 2 to 33 % of the image, sides in a ratio of 0.3 to 3.3 (Zhong et al. 2017).

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
    noise = rng.random((h, w, channels))
    erased = image.copy()
    erased[top : top + h, left : left + w] = noise * 255 if image.dtype == np.uint8 else noise
    return erased


def _shift(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=GREY)


def _enhance(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + 0.9 * strength * sign))


def _solarize_add(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return image.point([min(255, i + int(110 * strength)) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": lambda image, strength, sign: image.rotate(30 * strength * sign, fillcolor=GREY),
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

TRIVIAL = ("identity", *(name for name in OPERATIONS if name not in ("invert", "solarize_add")))
