"""Attention over channels: what a block's branch puts out is weighted by its own global mean."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

ATTENTIONS = ("none", "se", "eca")


class SqueezeExcite(nn.Module):
    """x times sigmoid(fc2(relu(fc1(mean of x)))) (Hu et al. 2017, arXiv:1709.01507).

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
    """x times sigmoid of a convolution along the channels of its mean (Wang et al. 2019, arXiv:1910.03151).

    The kernel's size grows with the logarithm of the number of channels.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = int(abs(math.log2(x.shape[-1]) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        y = x.astype(jnp.float32).mean((1, 2))[..., None]
        y = nn.Conv(1, (size,), padding=(size - 1) // 2, use_bias=False, name="conv")(y)[..., 0]
        return x * nn.sigmoid(y)[:, None, None].astype(x.dtype)


def attend(x: Array, kind: str, ratio: float) -> Array:
    """Applies the attention of that kind as a module called `attention`. To be called in a compact module."""
    if kind not in ATTENTIONS:
        raise ValueError(f"attention {kind!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if kind == "none":
        return x
    module = SqueezeExcite(ratio, name="attention") if kind == "se" else EfficientChannelAttention(name="attention")
    return module(x)
