"""What happens to a batch inside the compiled step: drawing it, cropping, flipping, normalising, mixing."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_jax.data.order import example_index, is_mirrored

Array = jax.Array


def draw_batch(data: dict[str, Array], step: Array, batch_size: int, seed: Any, repeats: int = 1) -> dict[str, Array]:
    """Returns the batch of a step from data that lies on the device, in the order of `example_index`.

    Args:
      data: arrays [size, ...], such as `image` uint8 and `label` int32. Where there is a `table` int32, as
        `balanced_table` returns it, its entries are shuffled in place of the examples: all of them, or the first ones
        where `grid`, uint32 [3], holds `grid_of` their number.
      step: int32 scalar, counted from 0.
      batch_size: of the whole batch.
      seed: of the order.
      repeats: how many times each example is taken, one after another.

    Returns:
      The arrays of `data` at these examples, [batch_size, ...], and `mirrored`, bool [batch_size]: which of them are
      mirrored where flips alternate.
    """
    table = data.get("table")
    size: Any = (jax.tree.leaves(data["label"])[0] if table is None else table).shape[0]
    size = data.get("grid", size)
    positions = (step.astype(jnp.uint32) * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)) // repeats
    place = example_index(positions, size, seed, jnp)
    mirrored = is_mirrored(positions, place, size, seed, jnp)
    index = place if table is None else table[place]
    examples = {name: values for name, values in data.items() if name not in ("table", "grid")}
    return jax.tree.map(lambda values: jnp.take(values, index, axis=0), examples) | {"mirrored": mirrored}


def pad_crop(key: Array, images: Array, pad: int) -> Array:
    """Adds `pad` zero pixels around each image [batch, height, width, channel] and cuts the old size out, at a random
    place for each.
    """
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * pad + 1)

    def cut(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(cut)(padded, corners)


def flip(mirrored: Array, images: Array) -> Array:
    """Mirrors left and right those images [batch, height, width, channel] for which `mirrored` bool [batch] is true."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike) -> Array:
    """Computes (pixel - mean) / std, channel by channel, in `dtype`; uint8 pixels are divided by 255 first.

    Args:
      images: uint8 or float [batch, height, width, channel].
      mean, std: one value for each channel, as in `per_channel`.
      dtype: of the result.
    """
    centre, width = (per_channel(values, images.shape[-1]) for values in (mean, std))
    largest = 255.0 if images.dtype == jnp.uint8 else 1.0
    return (images.astype(jnp.float32) * (1.0 / (largest * width)) + -centre / width).astype(dtype)


def per_channel(values: tuple[float, ...], channels: int) -> Array:
    """Returns the values as float32 [channels]; where there are not as many as channels, their mean for each."""
    array = jnp.asarray(values, jnp.float32)
    return array if len(values) == channels else jnp.full(channels, array.mean())


def mix(key: Array, images: Array, targets: Array, mixup: float, cutmix: float) -> tuple[Array, Array]:
    """Mixes each example with its neighbour in the batch, by mixup or CutMix; where both are on, a coin chooses.

    mixup (Zhang et al. 2017) blends whole images; CutMix (Yun et al. 2019) pastes a box of the neighbour. The share is
    drawn once for the whole batch, from Beta(alpha, alpha).

    Args:
      key: of the random numbers.
      images: float [batch, height, width, channel].
      targets: float [batch, classes].
      mixup, cutmix: alpha of each; 0 turns it off.

    Returns:
      Images and targets of the same shapes, mixed by the same share.
    """
    coin, blend_key, box_key = jax.random.split(key, 3)
    other, other_targets = jnp.roll(images, 1, 0), jnp.roll(targets, 1, 0)
    use_cutmix = jax.random.bernoulli(coin) if mixup and cutmix else jnp.asarray(bool(cutmix))
    kept = jnp.ones(images.shape[1:3])
    if mixup:
        kept = kept * jax.random.beta(blend_key, mixup, mixup)
    if cutmix:
        kept = jnp.where(use_cutmix, 1.0 - _box(box_key, images.shape[1:3], cutmix), kept)
    pixels = kept[None, :, :, None].astype(images.dtype)
    share = kept.mean()
    return images * pixels + other * (1 - pixels), targets * share + other_targets * (1 - share)


def _box(key: Array, size: tuple[int, ...], alpha: float) -> Array:
    """Returns a mask that is 1 inside a random box, whose area is the share 1 - Beta(alpha, alpha) of the image before
    it is clipped to the image, and 0 outside.
    """
    share_key, centre_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - jax.random.beta(share_key, alpha, alpha))
    centre = jax.random.uniform(centre_key, (2,))
    inside = [jnp.abs(jnp.arange(n) + 0.5 - c * n) <= side * n / 2 for n, c in zip(size, centre, strict=True)]
    return (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)
