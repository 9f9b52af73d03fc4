"""Residual blocks: `y = F(x) + x`, after He et al. 2015 (activation last) and He et al. 2016 (activation first)."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.attention import channel_attention
from resnet_jax.models.layers import BatchNorm, Conv, ConvNorm, DropPath, ModuleDef
from resnet_jax.ops.materialize import materialize, materialized_relu
from resnet_jax.ops.pooling import anti_alias, average_pool

Array = jax.Array

SHORTCUTS = ("A", "B", "C", "D", "none")
BASIC = (3, 3)
BOTTLENECK = (1, 3, 1)


class Shortcut(nn.Module):
    """Leads x around a branch (He et al. 2015, section 3.3): x itself, made to fit where the shape changes.

    Attributes:
      kind: `A` takes every `strides`-th pixel and adds zero channels on both sides, with no parameters; `B` is a 1x1
        convolution where the shape changes; `C` is one in every block; `D` averages, then projects (He et al. 2019).
      dilation: of the stage; above 1 the average of `D` keeps the size.
      kernel: size of the projection of `B` and `C` where the image shrinks or the stage is dilated.
      norm: put behind a projection; None for none, as in pre-activation nets.

    Example:
      >>> shortcut = Shortcut(32, strides=2, kind="A")
      >>> shortcut.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 16)), train=False)[0].shape
      (1, 4, 4, 32)
    """

    features: int
    strides: int = 1
    kind: str = "B"
    dilation: int = 1
    kernel: int = 1
    conv: ModuleDef = Conv
    norm: ModuleDef | None = BatchNorm

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Returns x with the shape of the branch's result."""
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
    """Returns whether a shortcut of this kind has a convolution of its own between these shapes."""
    same = in_features == features and strides == 1
    return kind == "C" or (kind in ("B", "D") and not same)


class ResidualBlock(nn.Module):
    """Computes `act(F(x) + shortcut(x))`, F = conv, norm, act, ..., conv, norm: the block with the activation last.

    [batch, h, w, in] -> [batch, ceil(h / strides), ceil(w / strides), features], in the dtype of `conv` and `norm`.
    He et al. 2015; the stride of a bottleneck sits on its 3x3 ("v1.5").

    Attributes:
      features: channels that come out.
      kernels: sizes of the branch's convolutions: `BASIC` (3x3, 3x3) or `BOTTLENECK` (1x1, 3x3, 1x1).
      width: channels inside the branch; None for `features`, or a quarter of them in a bottleneck.
      first_width: channels after the first convolution; None for `width`.
      groups: cardinality of the 3x3 convolutions (ResNeXt).
      strides: factor by which height and width shrink.
      dilation: of the 3x3 convolutions.
      first_dilation: of the 3x3 convolution that carries the stride.
      shortcut: `A`, `B`, `C`, `D` as in `Shortcut`, or `none`: the plain block.
      shortcut_kernel: size of a projection that shrinks the image.
      attention: what weights the branch's channels at its end: `none`, `se` or `eca`.
      attention_ratio: of the channels inside `se`.
      anti_alias: low pass in front of the stride: `none`, `average`, `blur`.
      drop_path: share of the images whose branch is left out when training.
      zero_init_last: the branch starts as zero (the last scale is 0), so the block starts as its shortcut.
      conv: called with features, kernel size, strides, dilation, groups, and a name, as `Conv`.
      norm: called with a name, and `scale_init` where it starts at zero, as `BatchNorm`.

    Example:
      >>> block = ResidualBlock(32, kernels=BOTTLENECK, strides=2)
      >>> x = jnp.zeros((1, 8, 8, 16))
      >>> y, variables = block.init_with_output(jax.random.key(0), x, train=False)
      >>> y.shape
      (1, 4, 4, 32)
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
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Computes the block; `train` is for norms and `drop_path`, which draws `dropout` random numbers.

        Raises:
          ValueError: `kernels`, `shortcut` or `attention` is none of its choices.
        """
        check_block(self.kernels, self.shortcut)
        conv, norm, act = self.conv, self.norm, self.act
        starts_at_zero = self.zero_init_last and self.shortcut != "none"
        last_norm = partial(norm, scale_init=nn.initializers.zeros) if starts_at_zero else norm
        shrinks = self.strides > 1 or self.first_dilation != self.dilation  # dilation in place of a stride
        low_pass = self.anti_alias if shrinks else "none"
        strides = self.strides if low_pass == "none" else 1

        if self.kernels == BASIC:
            width = self.first_width or self.width or self.features
            conv1 = conv(width, 3, strides, self.first_dilation, self.groups, name="conv1")
            y = act(ConvNorm(conv1, norm(name="norm1"))(x, train))
            if low_pass != "none":
                y = anti_alias(y, low_pass, self.strides)
            conv2 = conv(self.features, 3, 1, self.dilation, self.groups, name="conv2")
            y = ConvNorm(conv2, last_norm(name="norm2"))(y, train)
        else:
            width = self.width or self.features // 4
            conv1 = conv(self.first_width or width, 1, name="conv1")
            y = act(ConvNorm(conv1, norm(name="norm1"))(x, train))
            conv2 = conv(width, 3, strides, self.first_dilation, self.groups, name="conv2")
            y = act(ConvNorm(conv2, norm(name="norm2"))(y, train))
            if low_pass != "none":
                y = anti_alias(y, low_pass, self.strides)
            conv3 = conv(self.features, 1, name="conv3")
            y = ConvNorm(conv3, last_norm(name="norm3"))(y, train)

        y = channel_attention(y, self.attention, self.attention_ratio)
        y = DropPath(self.drop_path)(y, train)
        if self.shortcut != "none":
            y = y + shortcut_of(self, norm)(x, train)
        return materialized_relu(y) if act is nn.relu else materialize(act(y))


class PreactBlock(nn.Module):
    """Computes `F(x) + shortcut`, F = norm, act, conv, ..., norm, act, conv: the block with the activation first.

    A shortcut that projects starts from the first activation, any other from x itself, so that no norm and no
    activation lies on the identity path (He et al. 2016). Fields and shapes are those of `ResidualBlock`, but there is
    no `anti_alias`; `zero_init_last` zeroes the last convolution.

    Example:
      >>> y, _ = PreactBlock(16).init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 16)), train=False)
      >>> y.shape
      (1, 8, 8, 16)
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
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Computes the block, as `ResidualBlock.__call__`."""
        check_block(self.kernels, self.shortcut)
        conv, norm, act = self.conv, self.norm, self.act
        starts_at_zero = self.zero_init_last and self.shortcut != "none"
        last_conv = partial(conv, kernel_init=nn.initializers.zeros) if starts_at_zero else conv

        first = act(norm(name="norm1")(x, train))
        if self.kernels == BASIC:
            width = self.first_width or self.width or self.features
            y = conv(width, 3, self.strides, self.first_dilation, self.groups, name="conv1")(first)
            y = act(norm(name="norm2")(y, train))
            y = last_conv(self.features, 3, 1, self.dilation, self.groups, name="conv2")(y)
        else:
            width = self.width or self.features // 4
            y = conv(self.first_width or width, 1, name="conv1")(first)
            y = act(norm(name="norm2")(y, train))
            y = conv(width, 3, self.strides, self.first_dilation, self.groups, name="conv2")(y)
            y = act(norm(name="norm3")(y, train))
            y = last_conv(self.features, 1, name="conv3")(y)

        y = channel_attention(y, self.attention, self.attention_ratio)
        y = DropPath(self.drop_path)(y, train)
        if self.shortcut == "none":
            return y
        start = first if projects(self.shortcut, x.shape[-1], self.features, self.strides) else x
        return materialize(y + shortcut_of(self, None)(start))


def shortcut_of(block: ResidualBlock | PreactBlock, norm: ModuleDef | None) -> Shortcut:
    """Makes the shortcut of a block. To be called in a compact module."""
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


def check_block(kernels: tuple[int, ...], shortcut: str) -> None:
    """Raises ValueError for kernels or a shortcut that no block has."""
    if kernels not in (BASIC, BOTTLENECK):
        raise ValueError(f"kernels {kernels} are unknown; choose one of {BASIC}, {BOTTLENECK}")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut {shortcut!r} is unknown; choose one of {', '.join(SHORTCUTS)}")
