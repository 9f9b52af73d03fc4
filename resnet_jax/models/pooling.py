"""Pooling, anti-aliasing, and the head. Images are [batch, height, width, channel]."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.ops.convolution import by_platform

Array = jax.Array

GLOBAL_POOLS = ("avg", "max", "avgmax", "catavgmax", "none")
ANTI_ALIASES = ("none", "average", "blur")


def max_pool(x: Array, window: int = 3, strides: int = 2, zero_border: bool = False) -> Array:
    """Maximum over windows: [batch, ceil(h / strides), ceil(w / strides), channel] for a window of 3.

    The border is -inf, `(window - 1) // 2` wide; `zero_border` makes it zero, as Big Transfer's networks have it. The
    gradient goes to the first of equal values. A window of 3 with stride 2 is made of comparisons where it is lowered
    for a CPU or an NVIDIA GPU: XLA's own gradient takes five times as long on a CPU.
    """
    edge, border = (window - 1) // 2, 0.0 if zero_border else -jnp.inf

    def pool(x: Array) -> Array:
        if edge:
            x = _pad(_pad(x, edge, edge, 1, border), edge, edge, 2, border)
        return nn.max_pool(x, window_shape=(window, window), strides=(strides, strides))

    if (window, strides) != (3, 2):
        return pool(x)
    return by_platform(x, own=partial(_by_comparisons, border=border), default=pool)


def _by_comparisons(x: Array, border: float) -> Array:
    """Maximum over windows of 3 with stride 2, first along rows, then along columns; NaN wins, as in XLA's own."""

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


def _pad(x: Array, before: int, after: int, axis: int, value: float) -> Array:
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)], constant_values=value)


def average_pool(x: Array, strides: int, dilation: int = 1) -> Array:
    """Mean over 2x2 windows, with stride 2; at an odd border over the pixels that are there (He et al. 2019).

    Without stride and dilation it is x itself; in a dilated stage the windows overlap, the size stays, and zeros stand
    beyond the border, as in timm.
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


def anti_alias(x: Array, kind: str, strides: int) -> Array:
    """Takes every `strides`-th pixel after a low pass: `average` over 2x2, or `blur` by [1, 2, 1] (Zhang 2019)."""
    if kind == "blur":
        return _blur(_blur(x, 1, strides), 2, strides)
    return average_pool(x, strides)


def _blur(x: Array, axis: int, strides: int) -> Array:
    size = x.shape[axis]
    padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="reflect")
    left, centre, right = (lax.slice_in_dim(padded, i, i + size, strides, axis) for i in range(3))
    return (left + 2 * centre + right) / 4


def global_pool(x: Array, kind: str) -> Array:
    """[batch, height, width, channel] -> float32 [batch, channel], twice the channels for `catavgmax`; `none`: x."""
    if kind not in GLOBAL_POOLS:
        raise ValueError(f"global_pool {kind!r} is unknown; choose one of {', '.join(GLOBAL_POOLS)}")
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    mean, maximum = x.mean((1, 2)), x.max((1, 2))
    if kind == "catavgmax":
        return jnp.concatenate([mean, maximum], -1)
    return {"avg": mean, "max": maximum, "avgmax": (mean + maximum) / 2}[kind]


class Classifier(nn.Module):
    """The head alone, under the names that it has in a whole network: pooled features [batch, channel] -> logits.

    Attributes:
      drop_rate, num_classes: as in `ResNet`.
    """

    num_classes: int
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> Array:
        return classify(features, self.drop_rate, self.num_classes, train)[1]


def pool_and_classify(
    x: Array, pool: str, drop_rate: float, num_classes: int | None, train: bool
) -> tuple[Array, Array]:
    """Pooled features and logits, both float32, as `classify` gives them."""
    if pool == "none" and num_classes:
        raise ValueError("global_pool none gives a map, not a vector that can be classified: add num_classes=None")
    return classify(global_pool(x, pool), drop_rate, num_classes, train)


def classify(features: Array, drop_rate: float, num_classes: int | None, train: bool) -> tuple[Array, Array]:
    """Features [batch, channel] and their logits; without classes the features twice. To be called in a compact module.

    The dense layer is called `head`; dropout draws from the `dropout` random numbers when training.
    """
    if not num_classes:
        return features, features
    dropped = nn.Dropout(drop_rate, deterministic=not train)(features)
    return features, nn.Dense(num_classes, name="head")(dropped)
