"""Draws images as the network gets them so that people can look at them."""

from typing import Any

import numpy as np


def overlay(seen: np.ndarray, heat: np.ndarray) -> Any:
    """Draws a heat map over an image.

    Args:
      seen: the image that the network got, uint8 or float [height, width, channel].
      heat: float [h, w] in [0, 1], of any size.

    Returns:
      A Pillow image of the size of `seen`.
    """
    from matplotlib import colormaps
    from PIL import Image

    shown = as_shown(seen)
    size = (shown.shape[1], shown.shape[0])
    large = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    share = 0.6 * large[..., None]
    colours = colormaps["turbo"](large)[..., :3] * 255
    return Image.fromarray((shown * (1 - share) + colours * share).round().astype(np.uint8))


def as_shown(seen: np.ndarray) -> np.ndarray:
    """Returns an image of any kind as uint8 [height, width, 3]: RGB as it is; else the mean of the channels as grey,
    stretched so that the least value is black and the greatest white.
    """
    if seen.dtype == np.uint8 and seen.shape[-1] == 3:
        return seen
    grey = seen.mean(-1, keepdims=True)
    least, most = grey.min(), grey.max()
    return np.repeat(((grey - least) / max(most - least, 1e-12) * 255).round().astype(np.uint8), 3, axis=-1)
