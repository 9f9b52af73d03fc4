"""A vision transformer: attention and dense layers, each with a shortcut around it (Dosovitskiy et al. 2020)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.attention import attention_weights
from resnet_jax.models.head import classify
from resnet_jax.models.layers import Dropout, Dtype, ModuleDef
from resnet_jax.models.resnet import check_channels, check_remat, maybe_remat

Array = jax.Array


class SelfAttention(nn.Module):
    """Computes self-attention over tokens with several heads (Vaswani et al. 2017): [batch, n, width] -> the same."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, tokens, width = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        mixed = dense(3 * width, name="qkv")(x).reshape(batch, tokens, 3 * self.heads, width // self.heads)
        queries, keys, values = jnp.split(mixed, 3, axis=2)
        weights = attention_weights(queries, keys).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, tokens, width)
        return dense(width, name="out")(y)


class EncoderBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x)): the pre-activation residual block of transformers.

    Attributes:
      shortcut: False leaves out both `x +`.
    """

    heads: int
    mlp: int
    shortcut: bool = True
    drop_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        drop = Dropout(self.drop_rate, deterministic=not train)
        y = drop(SelfAttention(self.heads, self.dtype, name="attention")(norm(name="norm1")(x)))
        x = x + y if self.shortcut else y
        y = nn.gelu(dense(self.mlp, name="mlp1")(norm(name="norm2")(x)), approximate=False)
        y = drop(dense(x.shape[-1], name="mlp2")(drop(y)))
        return x + y if self.shortcut else y


class Encoder(nn.Module):
    """Applies blocks in a row."""

    depth: int
    block: ModuleDef

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i in range(1, self.depth + 1):
            x = self.block(name=f"block{i}")(x, train)
        return x


class ViT(nn.Module):
    """Classifies images by a transformer: [batch, height, width, channel] -> float32 logits [batch, num_classes].

    Dosovitskiy et al. 2020 (arXiv:2010.11929), as torchvision has it. Paths: `stem/conv`, `class_token`, `position`,
    `stage1/block3/attention/qkv`, `norm`, `head`.

    Attributes:
      patch: side of the squares that become tokens.
      width: of a token.
      depth: blocks.
      heads: of the attention.
      mlp: width inside the dense part of a block.
      image_size: side of the images; positions are learned for this size alone.
      shortcut: as in `EncoderBlock`.
      remat: `block` or `stage`: blocks, or all of them together, are computed again in the backward pass; or `none`.
      drop_rate, in_channels, num_classes, dtype: as in `ResNet`; the dropout is within the blocks too.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    image_size: int = 224
    shortcut: bool = True
    remat: str = "none"
    drop_rate: float = 0.0
    in_channels: int = 3
    num_classes: int | None = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, endpoints: bool = False) -> Any:
        """Computes logits, and with `endpoints` also returns tokens after `stem` and `stage1`, as `ResNet.__call__`.

        Raises:
          ValueError: the images have another size or number of channels than the model was made for.
        """
        check_channels(images, self.in_channels)
        check_remat(self.remat)
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"images of shape {images.shape} are not {self.image_size} high and wide: set image_size")
        x = PatchStem(self.patch, self.width, self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(self.dtype), x], 1)
        position = self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width), jnp.float32)
        x = x + position.astype(self.dtype)
        outputs = {"stem": x}
        module = maybe_remat(EncoderBlock, self.remat == "block")
        block = partial(module, self.heads, self.mlp, self.shortcut, self.drop_rate, self.dtype)
        encoder = maybe_remat(Encoder, self.remat == "stage")
        x = outputs["stage1"] = encoder(self.depth, block, name="stage1")(x, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        outputs["features"], logits = classify(x[:, 0].astype(jnp.float32), self.drop_rate, self.num_classes, train)
        return (logits, outputs) if endpoints else logits


class PatchStem(nn.Module):
    """Computes a token from each square of pixels: [batch, height / patch, width / patch, width]."""

    patch: int
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        size = (self.patch, self.patch)
        conv = partial(nn.Conv, padding="VALID", dtype=self.dtype, conv_general_dilated=patch_conv2d)
        return conv(self.width, size, size, name="conv")(images)


def patch_conv2d(images: Array, kernel: Array, strides: tuple[int, int], *_: Any, **__: Any) -> Array:
    """Convolves with windows that do not overlap, as one matrix product: fast in loops on a CPU too.

    [batch, height, width, in] and [patch, patch, in, out] give [batch, height / patch, width / patch, out].
    """
    patch, height, width = strides[0], *(size // strides[0] for size in images.shape[1:3])
    within = images[:, : height * patch, : width * patch]
    patches = within.reshape(-1, height, patch, width, patch, images.shape[-1])
    return jnp.einsum("nhiwjc,ijcf->nhwf", patches, kernel)
