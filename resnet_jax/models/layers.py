"""Layers of networks: convolution, norms, drop path. Images are [batch, height, width, channel]."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from resnet_jax.ops.batch_statistics import (
    batch_moments,
    fuses_conv_and_norm,
    ghost_batches,
    normalized,
    normalized_conv1x1,
    update_running_average,
)
from resnet_jax.ops.convolution import conv2d

Array = jax.Array
Dtype = DTypeLike
ModuleDef = Callable[..., nn.Module]
"""Makes a layer: a class, or one with some of its fields given."""
Initializer = Callable[..., Array]

he_normal_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "identity": lambda x: x,
}


class Conv(nn.Module):
    """Convolves without bias: `conv2d` with a float32 kernel of its own, He normal (fan-out) at the start.

    Attributes:
      features: channels that come out.
      kernel_size: side of the kernel, which is square.
      strides: as in `conv2d`.
      dilation: as in `conv2d`.
      groups: as in `conv2d`.
      standardized: the kernel of each output channel gets mean 0 and variance 1 first (Qiao et al. 2019).
      dtype: in which the convolution computes, and of the result.

    Example:
      >>> Conv(8, 3, strides=2).init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))[0].shape
      (1, 4, 4, 8)
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    standardized: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = he_normal_fan_out

    def __call__(self, x: Array) -> Array:
        """Convolves x, [batch, height, width, channel]."""
        kernel = self.get_kernel(x.shape[-1])
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.dilation, self.groups)

    @nn.compact
    def get_kernel(self, in_features: int) -> Array:
        """Returns the kernel for images of that number of channels, float32 [k, k, in / groups, out]."""
        shape = (self.kernel_size, self.kernel_size, in_features // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.standardized:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel * lax.rsqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-8)
        return kernel


class NormVariables(NamedTuple):
    """Holds what a batch norm owns, each float32 [channel]: running statistics, as Flax variables, and parameters."""

    mean: nn.Variable[Array]
    var: nn.Variable[Array]
    scale: Array
    bias: Array


class BatchNorm(nn.Module):
    """Normalises batches (Ioffe and Szegedy 2015) over all axes but the last, with float32 statistics.

    With `train=True` it normalises with the statistics of the batch and updates the running ones (collection
    `batch_stats`: `mean`, `var`); with `train=False` it uses the running ones. Under `jit` with a sharded batch the
    statistics are those of the whole batch, on any number of devices; in a function of one device (`shard_map`, `pmap`)
    they are its own, unless `axis_name` says over which devices to average.

    Attributes:
      momentum: share of the old running value that is kept (PyTorch's `momentum` is one minus this).
      unbiased_variance: the running variance takes n / (n - 1) times the variance of the batch, as PyTorch does;
        otherwise the biased one, as Flax does. Normalisation itself uses the biased one in both.
      frozen: always the running statistics, never updated, and no gradient to scale and bias.
      ghost: statistics over groups of this number of images (Hoffer et al. 2017); the running ones take the mean over
        the groups. None: over all of the batch.
      axis_name: of the mapped axis.
      dtype: of the result.

    Example:
      >>> norm, x = BatchNorm(momentum=0.75), jnp.ones((2, 4, 4, 8))
      >>> variables = norm.init(jax.random.key(0), x, train=False)
      >>> y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"][0]  # 0.75 times 0, and 0.25 times 1
      Array(0.25, dtype=float32)
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased_variance: bool = False
    frozen: bool = False
    ghost: int | None = None
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Normalises x, [batch, ..., channel]."""
        held, shape = self.get_variables(x.shape[-1]), x.shape
        if train and not self.frozen:
            starting = self.is_initializing()
            x = ghost_batches(x, None if starting else self.ghost)
            mean, var = batch_moments(x, None if starting else self.axis_name)
            if not starting:
                self.update_statistics(held, mean, var, x.size // mean.size)
        else:
            mean, var = held.mean.value, held.var.value
        return normalized(x, mean, var, held.scale, held.bias, self.epsilon, self.dtype).reshape(shape)

    @nn.compact
    def get_variables(self, features: int) -> NormVariables:
        """Returns scale, bias and running statistics of the norm, each [channels]."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
        scale = self.param("scale", self.scale_init, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        return NormVariables(mean, var, scale, bias)

    def update_statistics(self, held: NormVariables, mean: Array, var: Array, count: int) -> None:
        """Updates the running statistics with those of a batch, of which each is of `count` values on this device."""
        count *= 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        correction = count / max(count - 1, 1) if self.unbiased_variance else 1.0
        held.mean.value = update_running_average(held.mean.value, mean, self.momentum)
        held.var.value = update_running_average(held.var.value, var, self.momentum, correction)


class ConvNorm(nn.Module):
    """Convolves, then normalises: `norm(conv(x))`, which some platforms compute faster as one operation.

    Both are made where this is called, under names of their own, so that parameters stand at `conv1/kernel` and
    `norm1/scale`: `ConvNorm(Conv(64, 3, name="conv1"), BatchNorm(name="norm1"))(x, train)`.

    Attributes:
      conv: a `Conv`, or any module `conv(x)` in its place.
      norm: a `BatchNorm`, or any module `norm(x, train)`.

    Example:
      >>> layer = ConvNorm(Conv(8, 3, name="conv1"), BatchNorm(name="norm1"))
      >>> layer.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)[0].shape
      (1, 8, 8, 8)
    """

    conv: nn.Module
    norm: nn.Module

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Computes `norm(conv(x))`, with `train` as in `BatchNorm`."""
        conv, norm = self.conv, self.norm
        if not (train and self._is_one_operation(x)):
            return norm(conv(x), train)
        held = norm.get_variables(conv.features)
        x, kernel = x.astype(conv.dtype), conv.get_kernel(x.shape[-1])
        y, mean, var = normalized_conv1x1(x, kernel, held.scale, held.bias, norm.epsilon, norm.axis_name)
        norm.update_statistics(held, mean, var, x.size // x.shape[-1])
        return y

    @nn.nowrap
    def _is_one_operation(self, x: Array) -> bool:
        """Returns whether this is a 1x1 convolution and a norm by the whole batch that an op computes as one."""
        conv, norm = self.conv, self.norm
        if not isinstance(conv, Conv) or not isinstance(norm, BatchNorm) or norm.is_initializing():
            return False
        pointwise = (conv.kernel_size, conv.strides, conv.groups) == (1, 1, 1)
        whole_batch = not norm.frozen and norm.ghost is None and jnp.dtype(conv.dtype) == jnp.dtype(norm.dtype)
        return pointwise and whole_batch and fuses_conv_and_norm(x.shape[-1], conv.features, conv.dtype)


class GroupNorm(nn.Module):
    """Normalises groups of channels of each image (Wu and He 2018); `train` is accepted and changes nothing.

    Statistics come from the moments of each image and channel in float32. Where a mean is many times the deviation
    that costs digits, though fewer than in PyTorch's.

    Raises:
      ValueError: the channels do not divide into the groups.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> y, _ = GroupNorm(groups=4).init_with_output(jax.random.key(0), x)
      >>> y.shape
      (2, 4, 4, 8)
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shape = x.shape[-1:]
        if shape[0] % self.groups:
            raise ValueError(
                f"{shape[0]} channels do not divide into the {self.groups} groups of group normalisation; take another "
                "norm, or a network whose widths do"
            )
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        means, variances = (
            m.reshape(-1, 1, 1, self.groups, shape[0] // self.groups) for m in batch_moments(x[:, None])
        )
        mean = means.mean(-1, keepdims=True)
        var = (variances + jnp.square(means - mean)).mean(-1, keepdims=True)
        mean, var = (jnp.broadcast_to(m, means.shape).reshape(-1, 1, 1, *shape) for m in (mean, var))
        return normalized(x, mean, var, scale, bias, self.epsilon, self.dtype)


class FoldedNorm(nn.Module):
    """Adds a bias, after a factor where its variables have one (`scale`): what `fold_batch_norm` leaves of a norm."""

    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.has_variable("params", "scale"):
            x = x * self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return (x.astype(jnp.float32) + bias).astype(self.dtype)


class NoNorm(nn.Module):
    """Returns x itself, for networks without normalisation."""

    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return x.astype(self.dtype)


class Dropout(nn.Dropout):
    """Is Flax's dropout (Srivastava et al. 2014) whose rate, below 1, may be an input of a compiled function."""

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        if nn.merge_param("deterministic", self.deterministic, deterministic) or never(self.rate):
            return inputs
        share = 1 - jnp.float32(self.rate)
        kept = jax.random.bernoulli(self.make_rng(self.rng_collection) if rng is None else rng, share, inputs.shape)
        return jnp.where(kept, inputs * (1 / share), 0).astype(inputs.dtype)


class DropPath(nn.Module):
    """Zeroes a random share of the images of a batch when training, and scales up the rest (Huang et al. 2016).

    Draws from the `dropout` random numbers. The rate may also be an input of a compiled function.

    Example:
      >>> keys = {"dropout": jax.random.key(0)}
      >>> y = DropPath(0.5).apply({}, jnp.ones((8, 1)), train=True, rngs=keys)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """

    rate: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if not train or never(self.rate):
            return x
        share = 1 - jnp.float32(self.rate)
        kept = jax.random.bernoulli(self.make_rng("dropout"), share, (x.shape[0], 1, 1, 1))
        return jnp.where(kept, x * (1 / share), 0).astype(x.dtype)


def never(rate: Any) -> bool:
    """Returns whether a rate is known to be 0 when a function is traced."""
    return isinstance(rate, int | float) and rate == 0


NORMS: dict[str, ModuleDef] = {
    "batch": BatchNorm,
    "frozen_batch": partial(BatchNorm, frozen=True),
    "group": GroupNorm,
    "folded": FoldedNorm,
    "none": NoNorm,
}


def make_norm(model: nn.Module, epsilon: float = 1e-5) -> ModuleDef:
    """Returns the class of a model's norm with everything but its name set.

    Args:
      model: with the fields `norm` (`batch`, `frozen_batch`, `group`, `none`, or `folded` of `fold_batch_norm`),
        `dtype`, `unbiased_variance`, `ghost` and `axis_name`.

    Raises:
      ValueError: the norm is unknown.
    """
    kind = model.norm
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is unknown; choose one of {', '.join(NORMS)}")
    options: dict[str, Any] = {"dtype": model.dtype}
    if kind not in ("folded", "none"):
        options["epsilon"] = epsilon
    if kind in ("batch", "frozen_batch"):
        options |= {name: getattr(model, name) for name in ("unbiased_variance", "ghost", "axis_name")}
    return partial(NORMS[kind], **options)
