"""Layers of residual networks: convolution, norms, drop path. Images are [batch, height, width, channel]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops.convolution import conv2d, own_ways
from resnet_jax.ops.covariance import WIDER, normalized_product

Array = jax.Array
Dtype = Any
Initializer = Callable[..., Array]

he_normal_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "identity": lambda x: x,
}


class Conv(nn.Module):
    """A convolution without bias: `conv2d` with a float32 kernel of its own, He normal (fan-out) at the start.

    Attributes:
      standardized: the kernel of each output channel gets mean 0 and variance 1 first (Qiao et al. 2019).
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    standardized: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def __call__(self, x: Array, apart: bool = False) -> Any:
        """The convolution of x; or, `apart`, what it would convolve, x in `dtype` and the kernel in float32."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.standardized:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel * lax.rsqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-8)
        if apart:
            return x.astype(self.dtype), kernel
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.dilation, self.groups)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over all axes but the last, with float32 statistics.

    With `train=True` it normalises with the statistics of the batch and moves the running ones (collection
    `batch_stats`: `mean`, `var`); with `train=False` it uses the running ones. Under `jit` with a sharded batch the
    statistics are those of the whole batch, on any number of devices; in a function of one device (`shard_map`, `pmap`)
    they are its own, unless `axis_name` says over which devices to average.

    Attributes:
      momentum: share of the old running value that is kept (PyTorch's `momentum` is one minus this).
      unbiased_variance: the running variance takes n / (n - 1) times the variance of the batch, as PyTorch does;
        otherwise the biased one, as Flax does. Normalisation itself uses the biased one in both.
      frozen: always the running statistics, never moved, and no gradient to scale and bias.
      ghost: statistics over groups of this number of images (Hoffer et al. 2017); the running ones move by the mean
        over the groups. None: over all of the batch.
      axis_name: of the mapped axis.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased_variance: bool = False
    frozen: bool = False
    ghost: int | None = None
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False, kernel: Array | None = None) -> Array:
        """Normalises x, or its convolution by a kernel [1, 1, in, out], when training as `_as_one` says."""
        features = (x if kernel is None else kernel).shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", self.scale_init, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))

        if kernel is not None:
            y, mean, var = _normalized_convolution(x, kernel, scale, bias, self.epsilon, self.axis_name)
            self._move(running_mean, running_var, mean, var, x.size // x.shape[-1])
            return y
        shape = x.shape
        if train and not self.frozen:
            axis_name = None if self.is_initializing() else self.axis_name
            x = in_groups(x, None if self.is_initializing() else self.ghost)
            mean, var = batch_moments(x, axis_name)
            if not self.is_initializing():
                self._move(running_mean, running_var, mean, var, x.size // mean.size)
        else:
            mean, var = running_mean.value, running_var.value
        return normalized(x, mean, var, scale, bias, self.epsilon, self.dtype).reshape(shape)

    def _move(self, running_mean: Any, running_var: Any, mean: Array, var: Array, count: int) -> None:
        count *= 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        correction = count / max(count - 1, 1) if self.unbiased_variance else 1.0
        running_mean.value = update_running_average(running_mean.value, mean, self.momentum)
        running_var.value = update_running_average(running_var.value, var, self.momentum, correction)


def convolved_and_normed(conv: nn.Module, norm: nn.Module, x: Array, train: bool) -> Array:
    """`norm(conv(x))`; in training an NVIDIA GPU computes it as `covariance` says, where that is faster."""
    if train and own_ways() and _as_one(conv, norm, x):
        x, kernel = conv(x, apart=True)
        return norm(x, train, kernel)
    return norm(conv(x), train)


def _as_one(conv: nn.Module, norm: nn.Module, x: Array) -> bool:
    """Whether a 1x1 in bfloat16 widens, and its statistics are those of a whole batch."""
    if not isinstance(conv, Conv) or not isinstance(norm, BatchNorm) or norm.is_initializing():
        return False
    widens = (conv.kernel_size, conv.strides, conv.groups) == (1, 1, 1) and conv.features >= WIDER * x.shape[-1]
    half = jnp.dtype(conv.dtype) == jnp.dtype(norm.dtype) == jnp.bfloat16
    return widens and half and not norm.frozen and norm.ghost is None


def in_groups(x: Array, ghost: int | None) -> Array:
    """[batch, height, width, channel] -> [groups, ghost, height, width, channel]; x itself for no ghost batches.

    Raises:
      ValueError: the batch does not divide into groups of that size.
    """
    if ghost is None:
        return x
    if x.shape[0] % ghost:
        raise ValueError(f"a batch of {x.shape[0]} images does not divide into ghost batches of {ghost}")
    return x.reshape(-1, ghost, *x.shape[1:])


@partial(jax.jit, static_argnames="axis_name")
def batch_moments(x: Array, axis_name: str | None = None) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, in float32.

    [batch, height, width, channel] gives [channel]; [groups, ghost, height, width, channel] gives
    [groups, 1, 1, 1, channel]. With `axis_name` they are those of all devices of that mapped axis.

    This and the next two are traced and differentiated once for all equal layers.
    """
    grouped = x.ndim == 5
    axes = (1, 2, 3) if grouped else tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    mean, square = x.mean(axes, keepdims=grouped), jnp.square(x).mean(axes, keepdims=grouped)
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


@partial(jax.jit, static_argnames=("momentum", "correction"))
def update_running_average(running: Array, found: Array, momentum: float, correction: float = 1.0) -> Array:
    """A running statistic [channel] after a batch of which `found` holds one or, in ghost batches, several."""
    return momentum * running + (1 - momentum) * correction * found.reshape(-1, *running.shape).mean(0)


@partial(jax.jit, static_argnames=("epsilon", "dtype"))
def normalized(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype) -> Array:
    """x less the mean over the standard deviation, times scale plus bias; computed in float32, put out as `dtype`."""
    factor = scale * lax.rsqrt(var + epsilon)
    return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(dtype)


@partial(jax.jit, static_argnames=("epsilon", "axis_name"))
def _normalized_convolution(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """A normalised 1x1 convolution [batch, height, width, out] in x's dtype, its mean and its biased variance [out]."""

    def on_gpu(x: Array, kernel: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        return normalized_product(x, kernel[0, 0], scale, bias, epsilon, axis_name)

    def default(x: Array, kernel: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        y = conv2d(x, kernel.astype(x.dtype))
        mean, var = batch_moments(y, axis_name)
        return normalized(y, mean, var, scale, bias, epsilon, x.dtype), mean, var

    return lax.platform_dependent(x, kernel, scale, bias, cuda=on_gpu, default=default)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018); `train` is accepted and changes nothing.

    Statistics come from the moments of each image and channel in float32. Where a mean is many times the deviation
    that costs digits, though fewer than in PyTorch's.

    Raises:
      ValueError: the channels do not divide into the groups.
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
    """What `fold_batch_norm` leaves of a norm: a bias, and a factor where its variables have one (`scale`)."""

    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.has_variable("params", "scale"):
            x = x * self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return (x.astype(jnp.float32) + bias).astype(self.dtype)


class NoNorm(nn.Module):
    """x itself, for networks without normalisation."""

    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return x.astype(self.dtype)


class DropPath(nn.Module):
    """Zero for a random share of the images of a batch when training, and scaled up for the rest (Huang et al. 2016).

    Draws from the `dropout` random numbers.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if not train or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0], 1, 1, 1))
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


NORMS: dict[str, Any] = {
    "batch": BatchNorm,
    "frozen_batch": partial(BatchNorm, frozen=True),
    "group": GroupNorm,
    "folded": FoldedNorm,
    "none": NoNorm,
}


def make_norm(model: Any, epsilon: float = 1e-5) -> Any:
    """The class of a model's norm with everything but its name set.

    Args:
      model: with the fields `norm` (`batch`, `frozen_batch`, `group`, `none`, or `folded` of `fold_batch_norm`),
        `dtype`, `unbiased_variance`, `ghost` and `axis_name`.
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
