"""Residual blocks: `y = F(x) + x`, after He et al. 2015 (activation last) and He et al. 2016 (activation first)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.layers import BatchNorm, Conv, average_pool

Array = jax.Array

SHORTCUTS = ("A", "B", "C", "D", "none")
BASIC = (3, 3)
BOTTLENECK = (1, 3, 1)


class Shortcut(nn.Module):
    """The way around a branch (He et al. 2015, section 3.3): x itself, made to fit where the shape changes.

    Attributes:
      kind: `A` takes every `strides`-th pixel and adds zero channels on both sides, with no parameters; `B` is a 1x1
        convolution where the shape changes; `C` is one in every block; `D` averages, then projects (He et al. 2019).
      norm: put behind a projection; None for none, as in pre-activation nets.
    """

    features: int
    strides: int = 1
    kind: str = "B"
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] | None = BatchNorm

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if not projects(self.kind, x.shape[-1], self.features, self.strides):
            missing = self.features - x.shape[-1]
            x = x[:, :: self.strides, :: self.strides]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        if self.kind == "D":
            x = self.conv(self.features, 1, name="conv")(average_pool(x, self.strides))
        else:
            x = self.conv(self.features, 1, self.strides, name="conv")(x)
        return x if self.norm is None else self.norm(name="norm")(x, train)


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
      groups: cardinality of the 3x3 convolutions of a bottleneck (ResNeXt).
      shortcut: `A`, `B`, `C`, `D` as in `Shortcut`, or `none`: the plain block.
      zero_init_last: the branch starts as zero (the last scale is 0), so the block starts as its shortcut.
    """

    features: int
    kernels: tuple[int, ...] = BASIC
    width: int | None = None
    strides: int = 1
    groups: int = 1
    shortcut: str = "B"
    zero_init_last: bool = True
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_shortcut(self.shortcut)
        y, last = x, len(self.kernels)
        starts_zero = self.zero_init_last and self.shortcut != "none"
        for i, (kernel, features, strides, groups) in enumerate(branch_layout(self), start=1):
            y = self.conv(features, kernel, strides, groups=groups, name=f"conv{i}")(y)
            if i < last:
                y = self.act(self.norm(name=f"norm{i}")(y, train))
        last_scale = {"scale_init": nn.initializers.zeros} if starts_zero else {}
        y = self.norm(name=f"norm{last}", **last_scale)(y, train)
        if self.shortcut != "none":
            skip = Shortcut(self.features, self.strides, self.shortcut, self.conv, self.norm, name="shortcut")
            y = y + skip(x, train)
        return self.act(y)


class PreactBlock(nn.Module):
    """A block with the activation first: `F(x) + shortcut`, F = norm, act, conv, ..., norm, act, conv.

    A shortcut that projects starts from the first activation, any other from x itself, so that nothing stands on
    the way of identities (He et al. 2016). Fields and shapes as in `ResidualBlock`; `zero_init_last` zeroes the
    last convolution.
    """

    features: int
    kernels: tuple[int, ...] = BASIC
    width: int | None = None
    strides: int = 1
    groups: int = 1
    shortcut: str = "B"
    zero_init_last: bool = True
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        check_shortcut(self.shortcut)
        starts_zero = self.zero_init_last and self.shortcut != "none"
        y = first = self.act(self.norm(name="norm1")(x, train))
        for i, (kernel, features, strides, groups) in enumerate(branch_layout(self), start=1):
            if i > 1:
                y = self.act(self.norm(name=f"norm{i}")(y, train))
            zero = {"kernel_init": nn.initializers.zeros} if starts_zero and i == len(self.kernels) else {}
            y = self.conv(features, kernel, strides, groups=groups, name=f"conv{i}", **zero)(y)
        if self.shortcut == "none":
            return y
        start = first if projects(self.shortcut, x.shape[-1], self.features, self.strides) else x
        return y + Shortcut(self.features, self.strides, self.shortcut, self.conv, None, name="shortcut")(start)


def branch_layout(block: ResidualBlock | PreactBlock) -> list[tuple[int, int, int, int]]:
    """(kernel, features, strides, groups) of each convolution in a block's branch; the first 3x3 has the stride."""
    kernels = block.kernels
    bottleneck = len(kernels) == 3
    width = block.width or (block.features // 4 if bottleneck else block.features)
    widths = [width] * (len(kernels) - 1) + [block.features]
    strided = kernels.index(3) if 3 in kernels else 0
    return [
        (k, w, block.strides if i == strided else 1, block.groups if k > 1 else 1)
        for i, (k, w) in enumerate(zip(kernels, widths, strict=True))
    ]


def check_shortcut(kind: str) -> None:
    """Raises ValueError for a kind of shortcut that is not in SHORTCUTS."""
    if kind not in SHORTCUTS:
        raise ValueError(f"shortcut {kind!r} is unknown; choose one of {', '.join(SHORTCUTS)}")
