"""Pooling and low-pass filters. Images are [batch, height, width, channel]."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.ops.custom_kernels import by_platform, custom_kernels_enabled, sharded_platform

Array = jax.Array

GLOBAL_POOLS = ("avg", "max", "avgmax", "catavgmax", "none")
ANTI_ALIASES = ("none", "average", "blur")


def max_pool(x: Array, window: int = 3, strides: int = 2, zero_border: bool = False) -> Array:
    """Computes the maximum over windows: [batch, ceil(h / strides), ceil(w / strides), channel] for a window of 3.

    The border is `(window - 1) // 2` wide, of -inf, or of zeros with `zero_border`, as in Big Transfer's networks. The
    gradient goes to the first of equal values. `plain_max_pool` is the definition.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)
    """
    border = 0.0 if zero_border else -jnp.inf
    plain = partial(plain_max_pool, window=window, strides=strides, border=border)
    if (window, strides) != (3, 2) or not custom_kernels_enabled():
        return plain(x)
    compare = partial(_max_pool_by_comparisons, border=border)
    on_tpu = plain if zero_border else _max_pool_with_border
    return by_platform(sharded_platform(), x, cpu=compare, cuda=compare, tpu=on_tpu, default=plain)


def plain_max_pool(x: Array, window: int, strides: int, border: float) -> Array:
    """Computes the maximum over windows by XLA's own operation, beside a border of that value."""
    edge = (window - 1) // 2
    if edge:
        x = _pad(_pad(x, edge, edge, 1, border), edge, edge, 2, border)
    return nn.max_pool(x, window_shape=(window, window), strides=(strides, strides))


def _max_pool_with_border(x: Array) -> Array:
    """Computes the maximum over windows of 3 with stride 2 by XLA's operation, which pads with -inf itself: a TPU would
    write a padded copy, and its gradient. (A converter to ONNX leaves such a border out.)
    """
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _max_pool_by_comparisons(x: Array, border: float) -> Array:
    """Computes the maximum over windows of 3 with stride 2, along rows and then along columns; NaN wins, as in XLA's.

    XLA's own gradient takes five times as long on a CPU. On an H200, together with `gpu.space_to_depth_conv2d`, it
    takes a step of resnet50 in bfloat16 from 39.5 to 36.6 ms; no record was kept.
    """

    def larger(a: Array, b: Array) -> Array:
        return jnp.where((a >= b) | (a != a), a, b)

    for axis in (2, 1):
        x = _pad(x, 0, x.shape[axis] % 2, axis, border)
        half = x.shape[axis] // 2
        pairs = x.reshape(*x.shape[:axis], half, 2, *x.shape[axis + 1 :])
        even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        before = lax.slice_in_dim(_pad(odd, 1, 0, axis, border), 0, half, axis=axis)
        x = larger(larger(before, even), odd)
    return x


def ceil_max_pool(x: Array, window: int) -> Array:
    """Computes the maximum with stride 2 from the first pixel on; the last window may hang over (`ceil_mode`)."""
    sizes = [-(-(size - window) // 2) * 2 + window for size in x.shape[1:3]]
    beyond = [(0, max(0, whole - size)) for whole, size in zip(sizes, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *beyond, (0, 0)), constant_values=-jnp.inf)
    return nn.max_pool(padded, window_shape=(window, window), strides=(2, 2))


def average_pool(x: Array, strides: int, dilation: int = 1) -> Array:
    """Computes the mean over 2x2 windows, with stride 2; at an odd border over the pixels inside (He et al. 2019).

    Without stride and dilation it returns x itself. With a dilation the windows overlap and the size stays, with zeros
    beyond the border, as in timm.

    Example:
      >>> average_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), strides=2).ravel()
      Array([1.5], dtype=float32)
    """
    if strides == dilation == 1:
        return x
    height, width = x.shape[1:3]
    if dilation > 1:
        x = _pad(_pad(x, 0, 1, 1, 0.0), 0, 1, 2, 0.0)
        return (x[:, :-1, :-1] + x[:, :-1, 1:] + x[:, 1:, :-1] + x[:, 1:, 1:]) / 4
    x = _pad(_pad(x, 0, height % 2, 1, 0.0), 0, width % 2, 2, 0.0)
    sums = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).sum((2, 4))
    counts = [np.minimum(2, size - np.arange(0, size, 2)) for size in (height, width)]
    return sums / np.outer(*counts)[:, :, None].astype(x.dtype)


def adaptive_average_pool(x: Array, parts: int) -> Array:
    """Computes means over `parts` x `parts` windows, which overlap where the sides do not divide.

    [batch, height, width, channel] -> [batch, parts, parts, channel], as PyTorch's `adaptive_avg_pool2d`.
    """

    def means(x: Array, axis: int) -> Array:
        size = x.shape[axis]
        edges = [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
        return jnp.stack([lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in edges], axis)

    return means(means(x, 1), 2)


def anti_alias(x: Array, kind: str, strides: int) -> Array:
    """Takes every `strides`-th pixel after a low pass: `average` over 2x2, or `blur` by [1, 2, 1] (Zhang 2019).

    Example:
      >>> anti_alias(jnp.arange(4.0).reshape(1, 2, 2, 1), "average", strides=2).ravel()
      Array([1.5], dtype=float32)
    """
    if kind == "blur":
        return _blur(_blur(x, 1, strides), 2, strides)
    return average_pool(x, strides)


def _blur(x: Array, axis: int, strides: int) -> Array:
    size = x.shape[axis]
    padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="reflect")
    left, centre, right = (lax.slice_in_dim(padded, i, i + size, strides, axis) for i in range(3))
    return (left + 2 * centre + right) / 4


def global_pool(x: Array, kind: str) -> Array:
    """Pools whole images: [batch, height, width, channel] -> float32 [batch, channel].

    Args:
      kind: `avg`, `max`, `avgmax` (their mean), `catavgmax` (both, twice the channels), or `none`, which returns x.

    Raises:
      ValueError: the kind is unknown.

    Example:
      >>> global_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), "avgmax").ravel()
      Array([2.25], dtype=float32)
    """
    if kind not in GLOBAL_POOLS:
        raise ValueError(f"global_pool {kind!r} is unknown; choose one of {', '.join(GLOBAL_POOLS)}")
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    mean, maximum = x.mean((1, 2)), x.max((1, 2))
    if kind == "catavgmax":
        return jnp.concatenate([mean, maximum], -1)
    return {"avg": mean, "max": maximum, "avgmax": (mean + maximum) / 2}[kind]


def _pad(x: Array, before: int, after: int, axis: int, value: float) -> Array:
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)], constant_values=value)
