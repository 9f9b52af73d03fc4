"""Draws images as the network gets them, for people: enlarged, side by side, under a heat map."""

from pathlib import Path
from typing import Any

import numpy as np

LEAST, MOST = 160, 2048
"""Pixels that the height of a picture has at least where it is shown, and its long side at most."""


def overlay(seen: np.ndarray, heat: np.ndarray, box: tuple[float, float, float, float] | None = None) -> Any:
    """Draws a heat map over an image.

    Args:
      seen: uint8 or float [height, width, channel].
      heat: float [h, w] in [0, 1], of any size.
      box: left, top, right, bottom of the part of the image that the heat map is of; by default all of it.

    Returns:
      A Pillow image of the size of `seen`.
    """
    from matplotlib import colormaps
    from PIL import Image

    shown = as_shown(seen)
    height, width = shown.shape[:2]
    left, top, right, bottom = map(round, box or (0, 0, width, height))
    size = (max(1, right - left), max(1, bottom - top))
    part = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    large = np.zeros((height, width), part.dtype)
    large[top : top + size[1], left : left + size[0]] = part[: height - top, : width - left]
    share = 0.6 * large[..., None]
    colours = colormaps["turbo"](large)[..., :3] * 255
    return Image.fromarray((shown * (1 - share) + colours * share).round().astype(np.uint8))


def sized(pixels: np.ndarray, least: int = LEAST, most: int = MOST) -> np.ndarray:
    """Returns an image, uint8 [height, width, 3], of a size for people: one below `least` pixels in height is
    enlarged by a whole number, one whose long side is above `most` made smaller.
    """
    from PIL import Image

    factor = max(1, -(-least // pixels.shape[0]))
    large = pixels.repeat(factor, 0).repeat(factor, 1)
    if max(large.shape) <= most:
        return large
    image = Image.fromarray(large)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return np.asarray(image)


def side_by_side(first: Any, second: Any, lines: list[str]) -> Any:
    """Returns a Pillow image with two of the same size side by side and lines of text below; what does not fit into a
    line goes on in the next one.
    """
    from PIL import Image, ImageDraw

    width, height, gap = first.width, first.height, 8
    letters = font(min(28, max(13, width // 24)))
    wrapped = [part for line in lines for part in wrapped_lines(line, letters, 2 * width + gap)]
    step = round(1.35 * letters.size)
    sheet = Image.new("RGB", (2 * width + gap, height + gap + step * len(wrapped) + gap // 2), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(second, (width + gap, 0))
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(wrapped):
        pen.text((2, height + gap + i * step), text, fill="black", font=letters)
    return sheet


def font(size: int) -> Any:
    """Returns a font of letters of many scripts, `size` pixels high: DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def wrapped_lines(text: str, letters: Any, width: int) -> list[str]:
    """Returns a text as lines that are at most `width` pixels wide, broken between words where they allow it."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if letters.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and letters.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def as_shown(seen: np.ndarray) -> np.ndarray:
    """Returns an image of any kind as uint8 [height, width, 3]: RGB as it is; else the mean of the channels as grey,
    stretched so that the least value is black and the greatest white.
    """
    if seen.dtype == np.uint8 and seen.shape[-1] == 3:
        return seen
    grey = seen.mean(-1, keepdims=True)
    least, most = grey.min(), grey.max()
    return np.repeat(((grey - least) / max(most - least, 1e-12) * 255).round().astype(np.uint8), 3, axis=-1)
