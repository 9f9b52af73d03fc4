"""Residual blocks: `y = F(x) + x`, after He et al. 2015 (activation last) and He et al. 2016 (activation first)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.attention import channel_attention
from resnet_jax.models.layers import BatchNorm, Conv, ConvNorm, DropPath
from resnet_jax.ops.materialize import materialize, materialized_relu
from resnet_jax.ops.pooling import anti_alias, average_pool

Array = jax.Array

SHORTCUTS = ("A", "B", "C", "D", "none")
BASIC = (3, 3)
BOTTLENECK = (1, 3, 1)


class Shortcut(nn.Module):
    """The way around a branch (He et al. 2015, section 3.3): x itself, made to fit where the shape changes.

    Attributes:
      kind: `A` takes every `strides`-th pixel and adds zero channels on both sides, with no parameters; `B` is a 1x1
        convolution where the shape changes; `C` is one in every block; `D` averages, then projects (He et al. 2019).
      dilation: of the stage; above 1 the average of `D` keeps the size.
      kernel: size of the projection of `B` and `C` where the image shrinks or the stage is dilated.
      norm: put behind a projection; None for none, as in pre-activation nets.
    """

    features: int
    strides: int = 1
    kind: str = "B"
    dilation: int = 1
    kernel: int = 1
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] | None = BatchNorm

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if not projects(self.kind, x.shape[-1], self.features, self.strides):
            missing = self.features - x.shape[-1]
            x = x[:, :: self.strides, :: self.strides]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        if self.kind == "D":
            x = average_pool(x, self.strides, self.dilation)
            conv = self.conv(self.features, 1, name="conv")
        else:
            size = 1 if self.strides == self.dilation == 1 else self.kernel
            conv = self.conv(self.features, size, self.strides, max(1, self.dilation // 2), name="conv")
        return conv(x) if self.norm is None else ConvNorm(conv, self.norm(name="norm"))(x, train)


def projects(kind: str, in_features: int, features: int, strides: int) -> bool:
    """Whether a shortcut of this kind has a convolution of its own between these shapes."""
    same = in_features == features and strides == 1
    return kind == "C" or (kind in ("B", "D") and not same)


class ResidualBlock(nn.Module):
    """A block with the activation last: `act(F(x) + shortcut(x))`, F = conv, norm, act, ..., conv, norm.

    [batch, h, w, in] -> [batch, ceil(h / strides), ceil(w / strides), features], in the dtype of `conv` and `norm`.
    He et al. 2015; with kernels (1, 3, 1) the stride sits on the 3x3 ("v1.5").

    Attributes:
      features: channels that come out.
      kernels: sizes of the branch's convolutions, `BASIC` or `BOTTLENECK` or any others.
      width: channels inside the branch; None for `features`, or a quarter of them with three kernels.
      first_width: channels after the first convolution; None for `width`.
      groups: cardinality of the 3x3 convolutions of a bottleneck (ResNeXt).
      dilation, first_dilation: distance of the taps of the 3x3 convolutions, and of the strided one.
      shortcut: `A`, `B`, `C`, `D` as in `Shortcut`, or `none`: the plain block.
      shortcut_kernel: size of a projection that shrinks the image.
      attention, attention_ratio: what weights the branch's channels at its end, as in `channel_attention`.
      anti_alias: low pass in front of the stride: `none`, `average`, `blur`.
      drop_path: share of the images whose branch is left out when training.
      zero_init_last: the branch starts as zero (the last scale is 0), so the block starts as its shortcut.
    """

    features: int
    kernels: tuple[int, ...] = BASIC
    width: int | None = None
    first_width: int | None = None
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    first_dilation: int = 1
    shortcut: str = "B"
    shortcut_kernel: int = 1
    attention: str = "none"
    attention_ratio: float = 1 / 16
    anti_alias: str = "none"
    drop_path: float = 0.0
    zero_init_last: bool = True
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_shortcut(self.shortcut)
        y, last = x, len(self.kernels)
        starts_zero = self.zero_init_last and self.shortcut != "none"
        for i, conv in enumerate(branch_layout(self), start=1):
            smooth = conv.strided and self.anti_alias != "none"
            smooth = smooth and (self.strides > 1 or self.first_dilation != self.dilation)
            strides = 1 if smooth else conv.strides
            layer = self.conv(conv.features, conv.kernel, strides, conv.dilation, conv.groups, name=f"conv{i}")
            zero = {"scale_init": nn.initializers.zeros} if starts_zero and i == last else {}
            y = ConvNorm(layer, self.norm(name=f"norm{i}", **zero))(y, train)
            if i < last:
                y = self.act(y)
            if smooth:
                y = anti_alias(y, self.anti_alias, self.strides)
        y = DropPath(self.drop_path)(channel_attention(y, self.attention, self.attention_ratio), train)
        if self.shortcut != "none":
            y = y + shortcut_of(self, self.norm)(x, train)
        return materialized_relu(y) if self.act is nn.relu else materialize(self.act(y))


class PreactBlock(nn.Module):
    """A block with the activation first: `F(x) + shortcut`, F = norm, act, conv, ..., norm, act, conv.

    A shortcut that projects starts from the first activation, any other from x itself, so that nothing stands on
    the way of identities (He et al. 2016). Fields and shapes as in `ResidualBlock`; `zero_init_last` zeroes the
    last convolution.
    """

    features: int
    kernels: tuple[int, ...] = BASIC
    width: int | None = None
    first_width: int | None = None
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    first_dilation: int = 1
    shortcut: str = "B"
    shortcut_kernel: int = 1
    attention: str = "none"
    attention_ratio: float = 1 / 16
    drop_path: float = 0.0
    zero_init_last: bool = True
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_shortcut(self.shortcut)
        starts_zero = self.zero_init_last and self.shortcut != "none"
        y = first = self.act(self.norm(name="norm1")(x, train))
        for i, conv in enumerate(branch_layout(self), start=1):
            if i > 1:
                y = self.act(self.norm(name=f"norm{i}")(y, train))
            zero = {"kernel_init": nn.initializers.zeros} if starts_zero and i == len(self.kernels) else {}
            y = self.conv(
                conv.features, conv.kernel, conv.strides, conv.dilation, conv.groups, name=f"conv{i}", **zero
            )(y)
        y = DropPath(self.drop_path)(channel_attention(y, self.attention, self.attention_ratio), train)
        if self.shortcut == "none":
            return y
        start = first if projects(self.shortcut, x.shape[-1], self.features, self.strides) else x
        return materialize(y + shortcut_of(self, None)(start))


class BranchConv(NamedTuple):
    """One convolution of a branch; `strided`: the one that has the block's stride."""

    kernel: int
    features: int
    strides: int
    dilation: int
    groups: int
    strided: bool


def branch_layout(block: ResidualBlock | PreactBlock) -> list[BranchConv]:
    """The convolutions of a block's branch; the first 3x3 has the stride and the first dilation."""
    kernels = block.kernels
    width = block.width or (block.features // 4 if len(kernels) == 3 else block.features)
    widths = [width] * (len(kernels) - 1) + [block.features]
    widths[0] = block.first_width or widths[0]
    strided = kernels.index(3) if 3 in kernels else 0
    return [
        BranchConv(
            k,
            w,
            block.strides if i == strided else 1,
            1 if k == 1 else block.first_dilation if i == strided else block.dilation,
            block.groups if k > 1 else 1,
            i == strided,
        )
        for i, (k, w) in enumerate(zip(kernels, widths, strict=True))
    ]


def shortcut_of(block: ResidualBlock | PreactBlock, norm: Callable[..., Any] | None) -> Shortcut:
    """The shortcut of a block. To be called in a compact module."""
    return Shortcut(
        block.features,
        block.strides,
        block.shortcut,
        block.dilation,
        block.shortcut_kernel,
        block.conv,
        norm,
        name="shortcut",
    )


def check_shortcut(kind: str) -> None:
    """Raises ValueError for a kind of shortcut that is not in SHORTCUTS."""
    if kind not in SHORTCUTS:
        raise ValueError(f"shortcut {kind!r} is unknown; choose one of {', '.join(SHORTCUTS)}")
