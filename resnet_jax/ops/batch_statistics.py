"""Statistics of batches, and normalisation by them, in float32. Images are [batch, height, width, channel].

Each function is traced and differentiated once for all equal layers of a network.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops import gpu
from resnet_jax.ops.convolution import conv2d
from resnet_jax.ops.custom_kernels import by_platform, custom_kernels_enabled, sharded_batch, sharded_platform

Array = jax.Array
Dtype = Any


@partial(jax.jit, static_argnames="axis_name")
def batch_moments(x: Array, axis_name: str | None = None) -> tuple[Array, Array]:
    """Computes mean and biased variance of each channel, in float32.

    Args:
      x: [batch, ..., channel], or ghost batches [groups, ghost, height, width, channel] of `ghost_batches`.
      axis_name: the statistics are those of all devices of this mapped axis.

    Returns:
      Both [channel], of ghost batches [groups, 1, 1, 1, channel].

    Example:
      >>> batch_moments(jnp.arange(4.0).reshape(4, 1))
      (Array([1.5], dtype=float32), Array([1.25], dtype=float32))
    """
    grouped = x.ndim == 5
    axes = (1, 2, 3) if grouped else tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    mean, square = x.mean(axes, keepdims=grouped), jnp.square(x).mean(axes, keepdims=grouped)
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


def normalized(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype) -> Array:
    """Computes `(x - mean) / sqrt(var + epsilon) * scale + bias` in float32 and returns it as `dtype`.

    The statistics are those of `batch_moments`; scale and bias are float32 [channel].

    Example:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> normalized(x, *batch_moments(x), jnp.ones(1), jnp.zeros(1), 0.0, jnp.float32).ravel()
      Array([-1.,  1.], dtype=float32)
    """
    on_tpu = custom_kernels_enabled() and sharded_platform() == "tpu"
    return _normalized(x, mean, var, scale, bias, epsilon, dtype, on_tpu)


@partial(jax.jit, static_argnums=(5, 6, 7))
def _normalized(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype, on_tpu: bool
) -> Array:
    """Computes it in the order that a platform is best at: from x - mean a TPU's compiler makes a step that accesses
    fewer bytes, and a CPU's a slower one.
    """
    x, factor = x.astype(jnp.float32), scale * lax.rsqrt(var + epsilon)
    return ((x - mean) * factor + bias if on_tpu else x * factor + (bias - mean * factor)).astype(dtype)


@partial(jax.jit, static_argnames=("momentum", "correction"))
def update_running_average(running: Array, batch: Array, momentum: float, correction: float = 1.0) -> Array:
    """Returns `momentum * running + (1 - momentum) * correction * batch`, float32 [channel].

    Args:
      batch: a statistic of `batch_moments`; of ghost batches the mean over the groups is taken.
      momentum: share of the old value that is kept.

    Example:
      >>> update_running_average(jnp.zeros(1), jnp.ones(1), 0.75)
      Array([0.25], dtype=float32)
    """
    return momentum * running + (1 - momentum) * correction * batch.reshape(-1, *running.shape).mean(0)


def ghost_batches(x: Array, size: int | None) -> Array:
    """Splits a batch: [batch, height, width, channel] -> [groups, size, height, width, channel]; x itself for None.

    Raises:
      ValueError: the batch does not divide into groups of that size.

    Example:
      >>> ghost_batches(jnp.zeros((8, 4, 4, 3)), 2).shape
      (4, 2, 4, 4, 3)
    """
    if size is None:
        return x
    if x.shape[0] % size:
        raise ValueError(f"a batch of {x.shape[0]} images does not divide into ghost batches of {size}")
    return x.reshape(-1, size, *x.shape[1:])


def fuses_conv_and_norm(x_channels: int, features: int, dtype: Dtype) -> bool:
    """Returns whether some platform computes a 1x1 convolution and the batch norm behind it faster as one."""
    return custom_kernels_enabled() and features >= gpu.MIN_WIDENING * x_channels and jnp.dtype(dtype) == jnp.bfloat16


def normalized_conv1x1(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None = None
) -> tuple[Array, Array, Array]:
    """Convolves and normalises by the statistics of the batch: on an NVIDIA GPU as one product.

    Args:
      x: [batch, height, width, in].
      kernel: float32 [1, 1, in, out].
      scale, bias: float32 [out].
      axis_name: as in `batch_moments`.

    Returns:
      [batch, height, width, out] in x's dtype, mean and biased variance of the convolution, float32 [out].
    """
    if not custom_kernels_enabled():
        return plain_normalized_conv1x1(x, kernel, scale, bias, epsilon, axis_name)
    return _normalized_conv1x1(x, kernel, scale, bias, epsilon, axis_name, sharded_platform())


@partial(jax.jit, static_argnums=(4, 5, 6))
def _normalized_conv1x1(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None, sharded_on: str
) -> tuple[Array, Array, Array]:
    """Chooses by platform; a kept trace depends on its arguments alone, so the switches are read by the caller."""

    def on_gpu(x: Array, kernel: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        return gpu.normalized_conv1x1(x, kernel[0, 0], scale, bias, epsilon, axis_name)

    default = partial(plain_normalized_conv1x1, epsilon=epsilon, axis_name=axis_name)
    with sharded_batch(bool(sharded_on), sharded_on):
        return by_platform(sharded_on, x, kernel, scale, bias, cuda=on_gpu, default=default)


def plain_normalized_conv1x1(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None = None
) -> tuple[Array, Array, Array]:
    """Convolves, takes the moments, and normalises: the definition of `normalized_conv1x1`."""
    y = conv2d(x, kernel.astype(x.dtype))
    mean, var = batch_moments(y, axis_name)
    return normalized(y, mean, var, scale, bias, epsilon, x.dtype), mean, var
