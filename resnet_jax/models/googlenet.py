"""GoogLeNet: four branches side by side, concatenated (Szegedy et al. 2014), with batch norms as in torchvision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.head import pool_and_classify
from resnet_jax.models.layers import ACTIVATIONS, Conv, ConvNorm, Dtype, ModuleDef, make_norm
from resnet_jax.models.resnet import check_channels, check_remat, maybe_remat
from resnet_jax.ops.pooling import adaptive_average_pool, ceil_max_pool, max_pool

Array = jax.Array

STAGES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Channels of each module: 1x1; 3x3 reduced, 3x3; second 3x3 reduced, second 3x3; behind the pool (Table 1)."""


class Chain(nn.Module):
    """Applies convolutions in a row, each with norm and activation; `layers` are (features, kernel, strides)."""

    layers: tuple[tuple[int, int, int], ...]
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, (features, kernel, strides) in enumerate(self.layers, start=1):
            conv = self.conv(features, kernel, strides, name=f"conv{i}")
            x = self.act(ConvNorm(conv, self.norm(name=f"norm{i}"))(x, train))
        return x


class Inception(nn.Module):
    """Applies four branches to one input and concatenates them along the channels.

    The third branch has a 3x3 where the paper has a 5x5, as torchvision's weights need it.
    """

    widths: tuple[int, ...]
    chain: ModuleDef

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        one, reduced3, three, reduced5, five, pooled = self.widths
        branches = [
            self.chain(((one, 1, 1),), name="branch1")(x, train),
            self.chain(((reduced3, 1, 1), (three, 3, 1)), name="branch2")(x, train),
            self.chain(((reduced5, 1, 1), (five, 3, 1)), name="branch3")(x, train),
            self.chain(((pooled, 1, 1),), name="branch4")(max_pool(x, strides=1), train),
        ]
        return jnp.concatenate(branches, -1)


class InceptionStage(nn.Module):
    """Applies modules in a row, and calls `listen(name, x)` with the output of each."""

    widths: tuple[tuple[int, ...], ...]
    module: ModuleDef
    listen: Callable[[str, Array], None] = lambda name, x: None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, widths in enumerate(self.widths, start=1):
            x = self.module(widths, name=f"block{i}")(x, train)
            self.listen(f"block{i}", x)
        return x


class AuxiliaryHead(nn.Module):
    """Classifies a map within the network: mean over 4x4 parts, 1x1 convolution, two dense layers."""

    num_classes: int
    chain: ModuleDef

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = self.chain(((128, 1, 1),), name="conv")(adaptive_average_pool(x, 4), train)
        x = x.astype(jnp.float32).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # PyTorch's order of features
        x = nn.Dropout(0.7, deterministic=not train)(nn.relu(nn.Dense(1024, name="fc1")(x)))
        return nn.Dense(self.num_classes, name="fc2")(x)


class GoogLeNet(nn.Module):
    """Classifies images by GoogLeNet: [batch, height, width, channel] -> float32 logits [batch, num_classes].

    Szegedy et al. 2014 (arXiv:1409.4842). Paths: `stem1/conv1`, `stage2/block5/branch3/conv2`, `head`.

    Attributes:
      widths: of the modules of each stage, as in STAGES.
      stem: `7x7` shrinks images by eight before stage 1; `3x3`, for small ones, keeps their size.
      auxiliary: two more heads, behind the first and the fourth module of stage 2, which put logits into the collection
        `auxiliary_logits` when training; their losses count 0.3 in training here.
      remat: `block` or `stage`: modules, or stages, are computed again in the backward pass; or `none`. The stage whose
        insides auxiliary heads take is kept.
      norm, unbiased_variance, ghost, axis_name, act, drop_rate, global_pool, in_channels, num_classes, dtype: as in
        `ResNet`.
    """

    widths: tuple[tuple[tuple[int, ...], ...], ...] = STAGES
    stem: str = "7x7"
    auxiliary: bool = False
    norm: str = "batch"
    unbiased_variance: bool = False
    ghost: int | None = None
    axis_name: str | None = None
    act: str = "relu"
    remat: str = "none"
    drop_rate: float = 0.2
    global_pool: str = "avg"
    in_channels: int = 3
    num_classes: int | None = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, endpoints: bool = False) -> Any:
        """Computes logits, and with `endpoints` also returns the output of each part, as `ResNet.__call__`."""
        check_channels(images, self.in_channels)
        check_remat(self.remat)
        init = nn.initializers.truncated_normal(0.01)
        conv = partial(Conv, dtype=self.dtype, kernel_init=init)
        norm = make_norm(self, epsilon=1e-3)
        chain = partial(Chain, conv=conv, norm=norm, act=ACTIVATIONS[self.act])
        module = partial(maybe_remat(Inception, self.remat == "block"), chain=chain)
        stage = maybe_remat(InceptionStage, self.remat == "stage")
        small = self.stem == "3x3"
        x = chain(((sum(self.widths[0][0][k] for k in (0, 2, 4, 5)) // 4, 3, 1),) if small else ((64, 7, 2),),
                  name="stem1")(images, train)  # fmt: skip
        outputs = {"stem": x}
        if not small:
            x = chain(((64, 1, 1), (192, 3, 1)), name="stem2")(ceil_max_pool(x, 3), train)
        for i, widths in enumerate(self.widths, start=1):
            x = x if small and i == 1 else ceil_max_pool(x, 3 if i < 3 else 2)
            if self.auxiliary and i == 2 and (train or self.is_initializing()):
                inside: dict[str, Array] = {}
                x = InceptionStage(widths, module, inside.__setitem__, name=f"stage{i}")(x, train)
                self._auxiliary([inside["block1"], inside["block4"]], chain, train)
            else:
                x = stage(widths, module, name=f"stage{i}")(x, train)
            outputs[f"stage{i}"] = x
        outputs["features"], logits = pool_and_classify(x, self.global_pool, self.drop_rate, self.num_classes, train)
        return (logits, outputs) if endpoints else logits

    def _auxiliary(self, maps: list[Array], chain: ModuleDef, train: bool) -> None:
        """Applies an auxiliary head to each map and puts its logits into their collection."""
        for i, x in enumerate(maps, start=1):
            logits = AuxiliaryHead(self.num_classes or 1, chain, name=f"auxiliary{i}")(x, train)
            if not self.is_initializing():
                self.sow("auxiliary_logits", f"logits{i}", logits)
