"""DenseNet: the input of a layer is the outputs of all layers before it, concatenated (Huang et al. 2016)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.head import pool_and_classify
from resnet_jax.models.layers import ACTIVATIONS, Conv, Dtype, ModuleDef, make_norm
from resnet_jax.models.resnet import Stem, StemPool, check_channels, check_remat, maybe_remat
from resnet_jax.ops.pooling import average_pool

Array = jax.Array


class DenseLayer(nn.Module):
    """Computes norm, act, 1x1 to four times the growth, norm, act, 3x3 to the growth: what a layer adds to its inputs.

    The inputs are concatenated in here, so that with rematerialisation none but they are kept (Pleiss et al. 2017,
    arXiv:1707.06990): memory then grows in proportion to the depth, not to its square.
    """

    growth: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, pieces: list[Array], train: bool = False) -> Array:
        x = jnp.concatenate(pieces, -1)
        y = self.act(self.norm(name="norm1")(x, train))
        y = self.conv(4 * self.growth, 1, name="conv1")(y)
        y = self.act(self.norm(name="norm2")(y, train))
        return self.conv(self.growth, 3, name="conv2")(y)


class DenseStage(nn.Module):
    """Applies layers in a row, and concatenates the input and all their outputs."""

    size: int
    layer: ModuleDef

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        pieces = [x]
        for i in range(1, self.size + 1):
            pieces.append(self.layer(name=f"block{i}")(pieces, train))
        return jnp.concatenate(pieces, -1)


class Transition(nn.Module):
    """Computes norm, act, a 1x1 convolution to half the channels, and the mean over 2x2: between two stages."""

    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        y = self.act(self.norm(name="norm")(x, train))
        x = self.conv(x.shape[-1] // 2, 1, name="conv")(y)
        height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        return average_pool(x[:, :height, :width], 2)


class DenseNet(nn.Module):
    """Classifies images by DenseNet-BC: [batch, height, width, channel] -> float32 logits [batch, num_classes].

    Huang et al. 2016 (arXiv:1608.06993). Paths: `stem/conv`, `stage1/block6/conv2`, `transition1/conv`, `head`.

    Attributes:
      stage_sizes: layers in each stage.
      growth: channels that each layer adds; twice as many leave the stem.
      stem: as in `ResNet`; `3x3`, for small images, is a convolution without norm, activation and pool.
      anti_alias: low pass in the stem's pool: `none`, `average` or `blur`.
      remat: `block` or `stage`: layers, or stages, are computed again in the backward pass; or `none`.
      act, norm, unbiased_variance, ghost, axis_name, drop_rate, global_pool, in_channels, num_classes, dtype: as
        in `ResNet`.
    """

    stage_sizes: tuple[int, ...]
    growth: int = 32
    stem: str = "7x7"
    anti_alias: str = "none"
    norm: str = "batch"
    unbiased_variance: bool = False
    ghost: int | None = None
    axis_name: str | None = None
    act: str = "relu"
    remat: str = "none"
    drop_rate: float = 0.0
    global_pool: str = "avg"
    in_channels: int = 3
    num_classes: int | None = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, endpoints: bool = False) -> Any:
        """Computes logits, and with `endpoints` also returns the output of each part, as `ResNet.__call__`."""
        check_channels(images, self.in_channels)
        check_remat(self.remat)
        conv = partial(Conv, dtype=self.dtype, kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"))
        norm, act = make_norm(self), ACTIVATIONS[self.act]
        small = self.stem == "3x3"
        x = Stem(self.stem, 2 * self.growth, small, conv, norm, act, name="stem")(images, train)
        outputs = {"stem": x}
        x = StemPool("none" if small else "max", self.anti_alias, conv, norm, act, name="stem_pool")(x, train)
        layer = partial(maybe_remat(DenseLayer, self.remat == "block"), self.growth, conv, norm, act)
        stage = maybe_remat(DenseStage, self.remat == "stage")
        for i, size in enumerate(self.stage_sizes, start=1):
            x = stage(size, layer, name=f"stage{i}")(x, train)
            if i == len(self.stage_sizes):
                x = act(norm(name="norm")(x, train))
            outputs[f"stage{i}"] = x
            if i < len(self.stage_sizes):
                x = Transition(conv, norm, act, name=f"transition{i}")(x, train)
        outputs["features"], logits = pool_and_classify(x, self.global_pool, self.drop_rate, self.num_classes, train)
        return (logits, outputs) if endpoints else logits
