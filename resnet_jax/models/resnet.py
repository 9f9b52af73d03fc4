"""Residual networks: stem, stages of blocks, head; the named ones are rows of the table in `table.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.attention import with_self_attention
from resnet_jax.models.blocks import BASIC, BOTTLENECK, PreactBlock, ResidualBlock
from resnet_jax.models.head import pool_and_classify
from resnet_jax.models.layers import ACTIVATIONS, Conv, ConvNorm, Dtype, ModuleDef, make_norm
from resnet_jax.models.stacking import EQUAL, run_stacked
from resnet_jax.ops.pooling import ANTI_ALIASES, anti_alias, max_pool

Array = jax.Array

BLOCKS = {"basic": (BASIC, 1), "bottleneck": (BOTTLENECK, 4)}
STEMS = ("7x7", "3x3", "deep", "deep_tiered")
STEM_POOLS = ("max", "max_zero", "conv", "none")


class Stem(nn.Module):
    """Computes the first features from pixels.

    `7x7` is He et al.'s (stride 2); `3x3` keeps the size, for small pictures; `deep` and `deep_tiered` are three 3x3
    (stride 2 on the first), after He et al. 2019. With `preact` no norm and activation follow the last convolution.
    """

    kind: str
    width: int
    preact: bool
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.kind not in STEMS:
            raise ValueError(f"stem {self.kind!r} is unknown; choose one of {', '.join(STEMS)}")
        if self.kind in ("7x7", "3x3"):
            size, strides = (7, 2) if self.kind == "7x7" else (3, 1)
            conv = self.conv(self.width, size, strides, name="conv")
            return conv(x) if self.preact else self.act(ConvNorm(conv, self.norm(name="norm"))(x, train))
        half = self.width // 2
        first = half if self.kind == "deep" else 3 * (half // 4)
        for i, features in enumerate((first, half, self.width), start=1):
            conv = self.conv(features, 3, 2 if i == 1 else 1, name=f"conv{i}")
            if i == 3 and self.preact:
                return conv(x)
            x = self.act(ConvNorm(conv, self.norm(name=f"norm{i}"))(x, train))
        return x


class StemPool(nn.Module):
    """Halves the stem's image; the fields are those of `ResNet`."""

    kind: str
    anti_alias: str
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.kind not in STEM_POOLS or self.anti_alias not in ANTI_ALIASES:
            raise ValueError(
                f"stem_pool {self.kind!r} or anti_alias {self.anti_alias!r} is unknown; "
                f"choose one of {', '.join(STEM_POOLS)} and one of {', '.join(ANTI_ALIASES)}"
            )
        smooth = self.anti_alias != "none"
        if self.kind == "none":
            return x
        if self.kind == "conv":
            x = self.conv(x.shape[-1], 3, 1 if smooth else 2, name="conv")(x)
            x = anti_alias(x, self.anti_alias, 2) if smooth else x
            return self.act(self.norm(name="norm")(x, train))
        if not smooth:
            return max_pool(x, zero_border=self.kind == "max_zero")
        return anti_alias(max_pool(x, strides=1) if self.anti_alias == "blur" else x, self.anti_alias, 2)


class Stage(nn.Module):
    """Applies blocks in a row; the first one has the stride and changes the number of channels.

    Attributes:
      drop_paths: one rate a block; their number is the number of blocks.
      first_dilation: of the first block's strided convolution.
      scan: the blocks after the first one are compiled once and run in a loop (`stacking.py`).
      in_groups: for the backward pass that loop keeps only the inputs of groups of blocks.
    """

    block: ModuleDef
    drop_paths: tuple[float, ...]
    strides: int
    dilation: int = 1
    first_dilation: int = 1
    scan: bool = False
    in_groups: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block = partial(self.block, dilation=self.dilation)
        first, *later = self.drop_paths
        x = block(strides=self.strides, first_dilation=self.first_dilation, drop_path=first, name="block1")(x, train)
        block = partial(block, strides=1, first_dilation=self.dilation)
        if not self.scan:
            for i, rate in enumerate(later, start=2):
                x = block(drop_path=rate, name=f"block{i}")(x, train)
        elif later:
            x = run_stacked(block(name=EQUAL), x, train, len(later), self.in_groups)
        return x


class ResNet(nn.Module):
    """Classifies images by a residual network: [batch, height, width, channel] -> float32 logits [batch, num_classes].

    Parameters, running statistics and logits are float32; convolutions compute in `dtype`. Paths read as an address:
    `stem/conv`, `stage3/block2/conv1`, `stage2/block1/shortcut/conv`, `head`.

    Sources: He et al. 2015 (arXiv:1512.03385), He et al. 2016 (1603.05027, `preact`), Xie et al. 2016 (1611.05431,
    `cardinality`), Zagoruyko and Komodakis 2016 (1605.07146, `base_width` and `widths`), Hu et al. 2017 (1709.01507,
    `attention`), He et al. 2019 (1812.01187, stem `deep`, shortcut `D`), Zhang 2019 (1904.11486, `anti_alias`),
    Kolesnikov et al. 2019 (1912.11370, `standardized`), Bello et al. 2021 (2103.07579, `stem_pool` conv).

    Attributes:
      stage_sizes: blocks in each stage; every stage after the first halves the image.
      block: `basic` (3x3, 3x3) or `bottleneck` (1x1, 3x3, 1x1, four times wider outside), or one for each stage.
      preact: norm and activation come before each convolution.
      widths: channels inside each stage's blocks.
      cardinality: groups of the bottleneck's 3x3.
      base_width: width of a group's 3x3 in the first stage; (1, 64) is the plain bottleneck.
      reduce_first: a bottleneck's first convolution is narrower by this factor than its second.
      stem: `7x7`, `3x3`, `deep` or `deep_tiered`.
      stem_width: channels that leave the stem.
      stem_pool: halves the stem's map: `max` (3x3), `max_zero` (with a border of zeros), `conv`, or `none`.
      shortcut: `A`, `B`, `C`, `D`, or `none` for the plain twin.
      shortcut_kernel: size of a projection where the image shrinks.
      attention: `none`, `se` or `eca`, at the end of each branch.
      attention_ratio: of `se`.
      self_attention: heads of the attention that stands in place of each 3x3 of the last stage; 0 for convolutions.
      anti_alias: low pass before pixels are left out: `none`, `average` or `blur`. Not with `preact`.
      norm: `batch`, `frozen_batch` (running statistics only, nothing of the norm trains), `group`, `none`,
        or `folded`, which `fold_batch_norm` makes. Without a norm no branch starts at zero, but for `preact`.
      unbiased_variance: running variances are kept the PyTorch way, n / (n - 1).
      ghost: images in a group that has its own batch statistics, as in `BatchNorm`.
      axis_name: mapped axis over which they are averaged, as in `BatchNorm`.
      standardized: kernels are standardised before they are used.
      act: `relu`, `silu`, `gelu` or `identity`.
      zero_init_last: every branch starts at zero. Without effect on plain blocks.
      remat: `block` or `stage`: what is inside them and the stem is computed again in the backward pass, not kept; or
        `none`. `stage` with `scan` is for very deep stages: groups of some sqrt(depth) blocks are computed again, and
        then each block, so that memory grows with the square root of the depth.
      scan: the equal blocks of a stage are compiled once and run in a loop, with their variables stacked as
        `stack_blocks` does: compile time no longer grows with depth.
      output_stride: the image never shrinks further than by this (8, 16 or 32); later stages are dilated instead.
      drop_path_rate: share of the images whose last branch is left out when training; falls to 0 at the first branch.
      drop_rate: of the dropout before the head.
      global_pool: `avg`, `max`, `avgmax`, `catavgmax`, or `none`, which needs `num_classes=None`.
      in_channels: of the images.
      num_classes: None or 0 returns the pooled features [batch, channel] instead of logits.
      dtype: float32 or bfloat16.

    Example:
      A ResNet-26 of twice the width, with channel attention, for grey images::

        model = ResNet((2, 2, 2, 2), base_width=128, attention="se", in_channels=1, num_classes=10)
    """

    stage_sizes: tuple[int, ...]
    block: str | tuple[str, ...] = "bottleneck"
    preact: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512)
    cardinality: int = 1
    base_width: int = 64
    reduce_first: int = 1
    stem: str = "7x7"
    stem_width: int = 64
    stem_pool: str = "max"
    shortcut: str = "B"
    shortcut_kernel: int = 1
    attention: str = "none"
    attention_ratio: float = 1 / 16
    self_attention: int = 0
    anti_alias: str = "none"
    norm: str = "batch"
    unbiased_variance: bool = False
    ghost: int | None = None
    axis_name: str | None = None
    standardized: bool = False
    act: str = "relu"
    zero_init_last: bool = True
    remat: str = "none"
    scan: bool = False
    output_stride: int = 32
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    global_pool: str = "avg"
    in_channels: int = 3
    num_classes: int | None = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, endpoints: bool = False) -> Any:
        """Computes logits, or features where `num_classes` is None.

        Args:
          images: float [batch, height, width, channel], normalised.
          train: normalise with the statistics of the batch; then apply with `mutable=["batch_stats"]`, and with
            `rngs={"dropout": key}` where a drop rate is set.
          endpoints: also return the output of each part: `stem` (before the pool), `stage1`, ..., `features`.

        Returns:
          Logits, or (logits, {name: output}).

        Raises:
          ValueError: a field has an impossible value, or images have other channels than `in_channels`.
        """
        check_channels(images, self.in_channels)
        self._check()
        conv = partial(Conv, dtype=self.dtype, standardized=self.standardized)
        norm, act = make_norm(self), ACTIVATIONS[self.act]
        stem = maybe_remat(Stem, self.remat != "none")
        x = stem(self.stem, self.stem_width, self.preact, conv, norm, act, name="stem")(images, train)
        outputs = {"stem": x}
        x = StemPool(self.stem_pool, self.anti_alias, conv, norm, act, name="stem_pool")(x, train)
        strides = self._strides()
        for i, rates in enumerate(self._drop_paths()):
            last = i == len(self.stage_sizes) - 1
            layer = with_self_attention(conv, self.self_attention, self.dtype) if last and self.self_attention else conv
            block = partial(self._block(i), conv=layer, norm=norm, act=act)
            stage = maybe_remat(Stage, self.remat == "stage" and not self.scan)
            x = stage(block, rates, *strides[i], self.scan, self._in_groups, name=f"stage{i + 1}")(x, train)
            outputs[f"stage{i + 1}"] = x
        if self.preact:
            x = act(norm(name="norm")(x, train))
        outputs["features"], logits = pool_and_classify(x, self.global_pool, self.drop_rate, self.num_classes, train)
        return (logits, outputs) if endpoints else logits

    @property
    def _in_groups(self) -> bool:
        return self.scan and self.remat == "stage"

    def _check(self) -> None:
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act {self.act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {self.output_stride} is impossible; choose one of 8, 16, 32")
        check_remat(self.remat)
        if self.preact and self.anti_alias != "none":
            raise ValueError("anti_alias is not made for pre-activation networks: leave it at none")
        if self.scan and self.drop_path_rate:
            raise ValueError(
                "scan needs equal blocks, and drop_path_rate gives each its own rate: leave one of them out"
            )

    def _strides(self) -> list[tuple[int, int, int]]:
        """Returns (strides, dilation, first dilation) of each stage, such that `output_stride` is kept."""
        reached = (1 if self.stem == "3x3" else 2) * (1 if self.stem_pool == "none" else 2)
        dilation, layout = 1, []
        for i in range(len(self.stage_sizes)):
            before, strides = dilation, 1 if i == 0 else 2
            if reached >= self.output_stride:
                dilation, strides = dilation * strides, 1
            reached *= strides
            layout.append((strides, dilation, before))
        return layout

    def _drop_paths(self) -> list[tuple[float, ...]]:
        """Returns the rate of each block of each stage: linear in depth, 0 at the first (Huang et al. 2016)."""
        depth = max(1, sum(self.stage_sizes) - 1)
        starts = [sum(self.stage_sizes[:i]) for i in range(len(self.stage_sizes))]
        return [
            tuple(self.drop_path_rate * (start + i) / depth for i in range(size))
            for start, size in zip(starts, self.stage_sizes, strict=True)
        ]

    def _block(self, stage: int) -> ModuleDef:
        """Returns the class of a stage's blocks with the network's fields set."""
        kernels, expansion = BLOCKS[self.block if isinstance(self.block, str) else self.block[stage]]
        width = self.widths[stage]
        inner = width * self.base_width // 64 * self.cardinality
        low_pass: dict[str, Any] = {} if self.preact else {"anti_alias": self.anti_alias}
        return partial(
            maybe_remat(PreactBlock if self.preact else ResidualBlock, self.remat == "block" or self._in_groups),
            features=width * expansion,
            kernels=kernels,
            width=inner,
            first_width=inner // self.reduce_first,
            groups=self.cardinality,
            shortcut=self.shortcut,
            shortcut_kernel=self.shortcut_kernel,
            attention=self.attention,
            attention_ratio=self.attention_ratio,
            zero_init_last=self.zero_init_last,
            **low_pass,
        )


def maybe_remat(module: type[nn.Module], remat: bool) -> type[nn.Module]:
    """Returns a module's class, with `remat` one that is computed again in the backward pass (Chen et al. 2016)."""
    return nn.remat(module, static_argnums=(2,)) if remat else module


def check_remat(remat: str) -> None:
    """Raises ValueError where `remat` is none of its three words."""
    if remat not in ("none", "block", "stage"):
        raise ValueError(f"remat {remat!r} is unknown; choose one of none, block, stage")


def check_channels(images: Array, channels: int) -> None:
    """Raises ValueError where images do not have as many channels as the model takes."""
    if images.shape[-1] != channels:
        raise ValueError(
            f"images of shape {images.shape} have {images.shape[-1]} channels, the model takes {channels}: "
            f"make it with in_channels={images.shape[-1]}, or bring them to [batch, height, width, {channels}]"
        )
