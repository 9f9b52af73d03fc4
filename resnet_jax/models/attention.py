"""Channel attention, which weights a branch by its own global mean, and self-attention in place of a 3x3."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.layers import Dtype, ModuleDef
from resnet_jax.ops.pooling import average_pool

Array = jax.Array

ATTENTIONS = ("none", "se", "eca")


class SqueezeExcite(nn.Module):
    """Computes x times sigmoid(fc2(relu(fc1(mean of x)))) (Hu et al. 2017, arXiv:1709.01507).

    Attributes:
      ratio: width of the layer between as a share of the channels, rounded to a multiple of 8.
    """

    ratio: float = 1 / 16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        reduced = max(8, int(channels * self.ratio + 4) // 8 * 8)
        y = x.astype(jnp.float32).mean((1, 2))
        y = nn.Dense(channels, name="fc2")(nn.relu(nn.Dense(reduced, name="fc1")(y)))
        return x * nn.sigmoid(y)[:, None, None].astype(x.dtype)


class EfficientChannelAttention(nn.Module):
    """Computes x times sigmoid of a convolution along the channels of its mean (Wang et al. 2019, arXiv:1910.03151).

    The kernel's size grows with the logarithm of the number of channels.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = int(abs(math.log2(x.shape[-1]) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        y = x.astype(jnp.float32).mean((1, 2))[..., None]
        y = nn.Conv(1, (size,), padding=(size - 1) // 2, use_bias=False, name="conv")(y)[..., 0]
        return x * nn.sigmoid(y)[:, None, None].astype(x.dtype)


def channel_attention(x: Array, kind: str, ratio: float) -> Array:
    """Returns x with its channels weighted by a module called `attention`; x itself for `none`. To be called in a
    compact module.

    Args:
      kind: `none`, `se` (`SqueezeExcite`) or `eca` (`EfficientChannelAttention`).
      ratio: of `SqueezeExcite`.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention {kind!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if kind == "none":
        return x
    module = SqueezeExcite(ratio, name="attention") if kind == "se" else EfficientChannelAttention(name="attention")
    return module(x)


def attention_weights(queries: Array, keys: Array, bias: Array | float = 0.0) -> Array:
    """Computes softmax(q k / sqrt(d) + bias) in float32: [batch, n, heads, d] twice -> [batch, heads, n, n]."""
    scale = queries.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", queries.astype(jnp.float32) * scale, keys.astype(jnp.float32))
    return nn.softmax(logits + bias)


class SpatialAttention(nn.Module):
    """Computes self-attention over the pixels of a map, which BoTNet has in place of a bottleneck's 3x3.

    Several heads, with learned relative positions in both directions (Srinivas et al. 2021, arXiv:2101.11605). Where a
    convolution would have a stride, the mean over 2x2 follows.

    Attributes:
      features: channels that come out; they divide into `heads`.
      window: the longest side of a map for which there are relative positions.

    Raises:
      ValueError: the map is larger than that.
    """

    features: int
    heads: int = 4
    strides: int = 1
    window: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, _ = x.shape
        if max(height, width) > self.window:
            raise ValueError(f"a map of {height} x {width} is larger than the window {self.window} of its attention")
        depth = self.features // self.heads
        mixed = nn.Dense(3 * self.features, use_bias=False, dtype=self.dtype, name="qkv")(x)
        queries, keys, values = jnp.split(mixed.reshape(batch, height * width, 3 * self.heads, depth), 3, axis=2)
        grid = queries.reshape(batch, height, width, self.heads, depth).astype(jnp.float32)
        init = nn.initializers.normal(depth**-0.5)
        rows, columns = (
            self.param(name, init, (2 * self.window - 1, depth), jnp.float32)[_distances(side, self.window)]
            for name, side in (("relative_rows", height), ("relative_columns", width))
        )
        above = jnp.einsum("byxhd,yqd->bhyxq", grid, rows)[..., :, None]
        beside = jnp.einsum("byxhd,xqd->bhyxq", grid, columns)[..., None, :]
        positions = (above + beside).reshape(batch, self.heads, height * width, height * width)
        weights = attention_weights(queries, keys, positions).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, height, width, self.features)
        return average_pool(y, self.strides)


def _distances(side: int, window: int) -> Array:
    """Returns the row of each distance in a table of 2 window - 1 distances: [side, side]."""
    places = jnp.arange(side)
    return places[None, :] - places[:, None] + window - 1


def with_self_attention(conv: ModuleDef, heads: int, dtype: Dtype) -> ModuleDef:
    """Returns what makes convolutions as `conv` does, but `SpatialAttention` in place of every 3x3."""

    def make(features: int, kernel: int, strides: int = 1, dilation: int = 1, groups: int = 1, **options: Any) -> Any:
        if kernel == 3:
            return SpatialAttention(features, heads, strides, dtype=dtype, name=options["name"])
        return conv(features, kernel, strides, dilation, groups, **options)

    return make
