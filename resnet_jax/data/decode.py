"""Decodes pictures on the host, upright: files, bytes and arrays.

RGB is uint8, as in Pillow. Images of another number of channels are float32 in [0, 1], which keeps 16 bits.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageSequence

from resnet_jax.files import parse_path

Raw = Any
"""What a source holds: a path, the bytes of a file, or an array [height, width, channel]; also a Pillow image."""

Picture = Any
"""A Pillow image of mode RGB, or a float32 array [height, width, channel]."""

ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, "x"),
    3: (Image.Transpose.ROTATE_180, "xy"),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, "y"),
    5: (Image.Transpose.TRANSPOSE, "t"),
    6: (Image.Transpose.ROTATE_270, "tx"),
    7: (Image.Transpose.TRANSVERSE, "txy"),
    8: (Image.Transpose.ROTATE_90, "ty"),
}
"""Orientations of EXIF: the transposition that makes the image upright, and which of its directions, x or y, run
backwards in the file; t where the two are exchanged."""


class BadImage(ValueError):
    """An image cannot be decoded."""


def decode(raw: Raw, channels: int = 3) -> Picture:
    """Decodes an image from a path, a file's bytes or an array, and makes it upright as its EXIF says.

    For three channels an RGB image: 16 bits a channel are scaled to 8, alpha is left out as torchvision does, palettes
    and CMYK are resolved. For another number a float32 array: 1 is grey, in [0, 1]; more are those of a `.npy` file, or
    the pages of a TIFF. Arrays of integers are scaled by the greatest value of their type, floating-point numbers must
    lie in [0, 1].

    Raises:
      BadImage: with the decoder's reason; also for more pixels than Pillow takes for safe.
    """
    with errors_as_bad_image(), opened(raw, channels) as found:
        return from_image(found, channels) if isinstance(found, Image.Image) else found


@contextmanager
def errors_as_bad_image() -> Iterator[None]:
    """Raises BadImage for every error inside: decoders raise many types, and an image can be too large for memory."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


@contextmanager
def opened(raw: Raw, channels: int) -> Iterator[Picture]:
    """Opens an image, of which only the header is read, or converts an array."""
    if not isinstance(raw, Path) and isinstance(raw, str | os.PathLike) and os.fspath(raw).startswith("gs://"):
        place = parse_path(os.fspath(raw), "a picture")
        raw = place.read_bytes()
        if place.suffix.lower() == ".npy":
            raw = np.load(io.BytesIO(raw), allow_pickle=False)
    if isinstance(raw, np.ndarray) or (isinstance(raw, str | Path) and Path(raw).suffix.lower() == ".npy"):
        yield _from_array(raw if isinstance(raw, np.ndarray) else np.load(raw, allow_pickle=False), channels)
    elif isinstance(raw, Image.Image):
        yield raw
    else:
        with Image.open(raw if isinstance(raw, str | Path) else io.BytesIO(raw)) as image:
            yield image


def _from_array(array: np.ndarray, channels: int) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"an array of shape {array.shape} is no picture: expected [height, width, channel]")
    found, taken = array.shape[2], {channels, 1} if channels == 3 else {channels, 3} if channels == 1 else {channels}
    if found not in taken and array.shape[0] in taken and array.shape[0] < min(array.shape[1:]):
        raise BadImage(f"an array of shape {array.shape} has its channels first: expected [height, width, channel]")
    if found not in taken:
        raise BadImage(f"it has {found} channels, the recipe {channels}: set data.channels")
    if channels == 3:
        pixels = array if array.dtype == np.uint8 else np.round(unit(array) * 255).astype(np.uint8)
        return Image.fromarray(np.repeat(pixels, 3, axis=2) if found == 1 else pixels)
    return unit(array) if found == channels else unit(array) @ np.asarray([[0.299], [0.587], [0.114]], np.float32)


def from_image(image: Image.Image, channels: int) -> Picture:
    """Returns an image upright, and with this number of channels.

    Raises:
      BadImage: it has another number of them.
    """
    if channels in (1, 3):
        upright = _upright(image)
        return _as_rgb(upright) if channels == 3 else _as_grey(upright)
    if getattr(image, "n_frames", 1) == channels:
        return np.concatenate([_as_grey(_upright(page.copy())) for page in ImageSequence.Iterator(image)], -1)
    return _from_array(np.asarray(_upright(image)), channels)


def _upright(image: Image.Image) -> Image.Image:
    """Makes an image upright; `ImageOps.exif_transpose` fails where another part of the EXIF is broken."""
    image.load()  # Pillow transposes a TIFF itself, and forgets its orientation
    found = orientation(image)
    if found not in ORIENTATIONS:
        return image
    upright = image.transpose(ORIENTATIONS[found][0])
    upright.info = {name: value for name, value in image.info.items() if name == "transparency"}  # no orientation
    return upright


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where it cannot be read or is no such number."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # errors of many types, for metadata that the pixels do not need
        return 1
    return found if isinstance(found, int) and found in ORIENTATIONS else 1


def unit(array: np.ndarray) -> np.ndarray:
    """Scales an array to float32 in [0, 1]: integers are divided by the greatest value of their type, floating-point
    numbers stay as they are.

    Raises:
      BadImage: the type is neither uint8, uint16, bool nor floating-point, or a number lies outside of [0, 1].
    """
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if array.dtype.kind == "f" and not ((array >= 0) & (array <= 1)).all():
        if not np.isfinite(array).all():
            raise BadImage("some of its floating-point numbers are nan or infinite")
        raise BadImage(
            f"floating-point pixels from {array.min():g} to {array.max():g} have no known range: scale them to [0, 1], "
            "or save them as uint8 or uint16"
        )
    if array.dtype.kind in "bf":
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
