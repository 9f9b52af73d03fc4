"""One module for all residual networks; the named ones are rows of the table in `registry.py`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.blocks import BASIC, BOTTLENECK, PreactBlock, ResidualBlock
from resnet_jax.models.layers import ACTIVATIONS, BatchNorm, Conv, Dtype, FoldedNorm, GroupNorm, max_pool

Array = jax.Array

BLOCKS = {"basic": (BASIC, 1), "bottleneck": (BOTTLENECK, 4)}
STEMS = ("7x7", "3x3", "deep", "deep_tiered")
NORMS: dict[str, Any] = {
    "batch": BatchNorm,
    "frozen_batch": partial(BatchNorm, frozen=True),
    "group": GroupNorm,
    "folded": FoldedNorm,
}


class Stem(nn.Module):
    """From pixels to the first features.

    `7x7` is He et al.'s (stride 2); `3x3` keeps the size, for small pictures; `deep` and `deep_tiered` are three 3x3
    (stride 2 on the first), after He et al. 2019. With `preact` the last convolution is left bare.
    """

    kind: str
    width: int
    preact: bool
    conv: Any
    norm: Any
    act: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.kind not in STEMS:
            raise ValueError(f"stem {self.kind!r} is unknown; choose one of {', '.join(STEMS)}")
        if self.kind in ("7x7", "3x3"):
            size, strides = (7, 2) if self.kind == "7x7" else (3, 1)
            x = self.conv(self.width, size, strides, name="conv")(x)
            return x if self.preact else self.act(self.norm(name="norm")(x, train))
        half = self.width // 2
        first = half if self.kind == "deep" else 3 * (half // 4)
        for i, features in enumerate((first, half, self.width), start=1):
            x = self.conv(features, 3, 2 if i == 1 else 1, name=f"conv{i}")(x)
            if i < 3 or not self.preact:
                x = self.act(self.norm(name=f"norm{i}")(x, train))
        return x


class Stage(nn.Module):
    """Equal blocks in a row; the first one has the stride and changes the number of channels."""

    size: int
    block: Any
    strides: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i in range(1, self.size + 1):
            x = self.block(strides=self.strides if i == 1 else 1, name=f"block{i}")(x, train)
        return x


class ResNet(nn.Module):
    """A residual network: images [batch, height, width, channel] -> logits [batch, num_classes] in float32.

    Parameters, running statistics and logits are float32; convolutions compute in `dtype`. Paths read as an address:
    `stem/conv`, `stage3/block2/conv1`, `stage2/block1/shortcut/conv`, `head`.

    Sources: He et al. 2015 (arXiv:1512.03385), He et al. 2016 (1603.05027, `preact`), Xie et al. 2016 (1611.05431,
    `cardinality`), Zagoruyko and Komodakis 2016 (1605.07146, `base_width` and `widths`), He et al. 2019 (1812.01187,
    stem `deep`, shortcut `D`).

    Attributes:
      stage_sizes: blocks in each stage; every stage after the first halves the image.
      block: `basic` (3x3, 3x3) or `bottleneck` (1x1, 3x3, 1x1, four times wider outside).
      preact: norm and activation come before each convolution.
      widths: channels inside each stage's blocks.
      cardinality: groups of the bottleneck's 3x3.
      base_width: width of a group's 3x3 in the first stage; (1, 64) is the plain bottleneck.
      stem: `7x7`, `3x3`, `deep` or `deep_tiered`.
      stem_width: channels that leave the stem.
      stem_pool: a 3x3 maximum with stride 2 follows the stem.
      shortcut: `A`, `B`, `C`, `D`, or `none` for the plain twin.
      norm: `batch`, `frozen_batch` (running statistics only, nothing of the norm trains), `group`,
        or `folded`, which `fold_batch_norm` makes.
      unbiased_variance: running variances are kept the PyTorch way, n / (n - 1).
      activation: `relu`, `silu`, `gelu` or `identity`.
      zero_init_last: every branch starts at zero. Without effect on plain blocks.
      num_classes: None returns the pooled features [batch, channel] instead of logits.
      dtype: float32 or bfloat16.
    """

    stage_sizes: tuple[int, ...]
    block: str = "bottleneck"
    preact: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512)
    cardinality: int = 1
    base_width: int = 64
    stem: str = "7x7"
    stem_width: int = 64
    stem_pool: bool = True
    shortcut: str = "B"
    norm: str = "batch"
    unbiased_variance: bool = False
    activation: str = "relu"
    zero_init_last: bool = True
    num_classes: int | None = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, endpoints: bool = False) -> Any:
        """Computes logits, or features where `num_classes` is None.

        Args:
          images: float [batch, height, width, channel], normalised.
          train: normalise with the statistics of the batch; then apply with `mutable=["batch_stats"]`.
          endpoints: return also what each part puts out: `stem` (before the pool), `stage1`, ..., `features`.

        Returns:
          logits, or (logits, endpoints).
        """
        conv = partial(Conv, dtype=self.dtype)
        norm, act = self._norm(), ACTIVATIONS[self.activation]
        x = Stem(self.stem, self.stem_width, self.preact, conv, norm, act, name="stem")(images, train)
        taps = {"stem": x}
        if self.stem_pool:
            x = max_pool(x)
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            block = partial(self._block(width), conv=conv, norm=norm, act=act)
            x = Stage(size, block, strides=1 if i == 1 else 2, name=f"stage{i}")(x, train)
            taps[f"stage{i}"] = x
        if self.preact:
            x = act(norm(name="norm")(x, train))
        out = taps["features"] = x.astype(jnp.float32).mean((1, 2))
        if self.num_classes is not None:
            out = nn.Dense(self.num_classes, name="head")(out)
        return (out, taps) if endpoints else out

    def _block(self, width: int) -> Any:
        kernels, expansion = BLOCKS[self.block]
        inner = width * self.base_width // 64 * self.cardinality
        return partial(
            PreactBlock if self.preact else ResidualBlock,
            features=width * expansion,
            kernels=kernels,
            width=inner,
            groups=self.cardinality,
            shortcut=self.shortcut,
            zero_init_last=self.zero_init_last,
        )

    def _norm(self) -> Any:
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is unknown; choose one of {', '.join(NORMS)}")
        batch = self.norm in ("batch", "frozen_batch")
        options = {"unbiased_variance": self.unbiased_variance} if batch else {}
        return partial(NORMS[self.norm], dtype=self.dtype, **options)
