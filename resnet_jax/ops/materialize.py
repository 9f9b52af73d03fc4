"""Values that are written to memory once, where XLA would compute them anew for each reader."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops.custom_kernels import by_platform, custom_kernels_enabled, sharded_platform

Array = jax.Array


def materialize(x: Array) -> Array:
    """Returns x, which a program for a CPU writes to memory, and its gradient too.

    XLA would fuse a cheap value into each of its readers and compute it there anew, back through a whole chain of
    residual sums: a step of cifar_resnet110 compiles in a fifth of the time with it.
    """
    return _materialize(x, sharded_platform()) if custom_kernels_enabled() else x


@partial(jax.jit, static_argnums=1)
def _materialize(x: Array, platform: str) -> Array:
    return by_platform(platform, x, cpu=lax.optimization_barrier, default=lambda x: x)


def materialized_relu(x: Array) -> Array:
    """Returns relu(x), which a program for a CPU or an NVIDIA GPU writes to memory; its derivative reads that, not x.

    On an H200, XLA computed the mask of a block's activation anew from the two arrays of the sum before it.
    """
    return _materialized_relu(sharded_platform(), x) if custom_kernels_enabled() else nn.relu(x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _relu(platform: str, x: Array) -> Array:
    barrier = lax.optimization_barrier
    return by_platform(platform, nn.relu(x), cpu=barrier, cuda=barrier, default=lambda x: x)


@_relu.defjvp
def _relu_jvp(platform: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _relu(platform, *primals)
    return y, jnp.where(y > 0, *tangents, 0)


_materialized_relu = jax.jit(_relu, static_argnums=0)
