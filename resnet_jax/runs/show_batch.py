"""Draws the first training batch as the network sees it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, InputError
from resnet_jax.data.dataset import with_outputs
from resnet_jax.data.loader import BadImages, sampling_table, train_batches, whole_split
from resnet_jax.data.on_device import per_channel
from resnet_jax.data.show import as_shown, font, wrapped_lines
from resnet_jax.training.build import data_of, model_with_parts
from resnet_jax.training.parts import NO_PARTS, Parts
from resnet_jax.training.programs import draw_from, make_prepare, normalization
from resnet_jax.training.resolve import resolve
from resnet_jax.training.sharding import make_mesh, put_everywhere
from resnet_jax.training.step import step_key
from resnet_jax.weights.load import names_of_outputs

MOST, COLUMNS, HIGH = 64, 8, 128
"""How many images are drawn at most, how many in a row, and how high each is at least, in pixels."""
LETTERS, MOST_LINES = 11, 6
"""Height of the letters of a caption in pixels, and how many lines it has at most."""


def show_batch(config: Config, file: Path, parts: Parts = NO_PARTS) -> Path:
    """Draws images of the recipe's first batch, after all augmentation and mixing, with their targets; returns `file`.

    Args:
      config: the recipe.
      file: where the picture is written; its suffix is the format, such as .png.
      parts: of the user's own.

    Raises:
      InputError: the recipe or the data is not valid, or the file cannot be written.
    """
    found = resolve(config, parts, fetch=False)
    config, mesh = found.config, make_mesh(1)
    dataset = found.dataset or data_of(config, parts)
    model, parts = model_with_parts(config, parts, len(dataset.class_names))
    dataset = with_outputs(dataset, parts.outputs_of(model))
    names = names_of_outputs(parts.outputs_of(model), dataset.class_names, config.data.dataset)
    bad = BadImages(config.data.on_bad_image, channels=config.data.channels)
    table, step, classes = sampling_table(dataset, config.data.sampling), jnp.int32(0), dataset.label_classes()
    if config.data.on_device:
        data = put_everywhere(whole_split(dataset.train, config, bad, table, classes), mesh)
        batch = jax.jit(lambda data: draw_from(config, mesh)(data, step))(data)
    else:
        batch = next(train_batches(dataset.train, config, mesh, bad, range(1), table=table, classes=classes))
    prepared = make_prepare(config, model, parts)(batch, step_key(config.train.seed, step))
    images = np.asarray(prepared["image"], np.float32)
    if "target" in prepared:
        multilabel = np.ndim(batch["label"]) == 2
        shares = unsmoothed(np.asarray(prepared["target"], np.float32), config.train.label_smoothing, multilabel)
        captions = [caption(row, names, multilabel) for row in shares]
    else:
        labels = jax.device_get(prepared["label"])
        captions = [str(jax.tree.map(lambda values, i=i: values[i], labels)) for i in range(len(images))]
    mean, std = (np.asarray(per_channel(v, images.shape[-1])) for v in normalization(config))
    pixels = (images * std + mean).clip(0, 1)
    return draw_grid(pixels[:MOST], captions, file)


def unsmoothed(targets: np.ndarray, smoothing: float, multilabel: bool) -> np.ndarray:
    """Returns the shares of the classes in targets, float [batch, classes], without what label smoothing spread."""
    spread = smoothing / (2 if multilabel else targets.shape[1])
    return (targets - spread) / max(1.0 - smoothing, 1e-6)


def caption(shares: np.ndarray, names: tuple[str, ...], multilabel: bool = False) -> str:
    """Returns the classes of an image, from their shares, float [classes]: a line for each, greatest first.

    Where images are mixed each has its share in percent; an image of a single class, and one of several labels that is
    not mixed, has names alone. Classes of less than a hundredth are left out, and all but three.
    """
    chosen = [k for k in np.argsort(-shares, kind="stable")[:3] if shares[k] >= 0.01]
    mixed = any(shares[k] < 0.99 for k in chosen)
    if multilabel and not chosen:
        return "no label"
    return "\n".join(f"{100 * shares[k]:.0f} % {names[k]}" if mixed else names[k] for k in chosen)


def draw_grid(pixels: np.ndarray, captions: list[str], file: Path) -> Path:
    """Draws images side by side with their captions into a file; returns `file`.

    Args:
      pixels: float [size, height, width, channel] in [0, 1].
      captions: a text for each image, of one or several lines; what is too long for its line goes on in the next.
      file: where the picture is written.

    Raises:
      InputError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    height, width = pixels.shape[1:3]
    factor = max(1, -(-HIGH // height))
    letters = font(LETTERS)
    texts = [
        [part for line in text.split("\n") for part in wrapped_lines(line, letters, width * factor)]
        for text in captions
    ]
    texts = [lines[:MOST_LINES] for lines in texts[: len(pixels)]]
    line = LETTERS + 3
    cell = (width * factor + 8, height * factor + 8 + line * max(map(len, texts), default=1))
    rows = -(-len(pixels) // COLUMNS)
    sheet = Image.new("RGB", (cell[0] * min(COLUMNS, len(pixels)), cell[1] * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pixels, texts, strict=True)):
        shown = (picture * 255).round().astype(np.uint8) if picture.shape[-1] == 3 else as_shown(picture)
        left, top = i % COLUMNS * cell[0] + 4, i // COLUMNS * cell[1] + 2
        large = Image.fromarray(shown).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(large, (left, top))
        for k, text in enumerate(lines):
            pen.text((left, top + height * factor + 2 + k * line), text, fill="black", font=letters)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be written: {error}") from error
    return file
