"""Two-dimensional convolution. Images: [batch, height, width, channel]; kernels: [height, width, in, out].

`plain_conv2d` is the definition. `conv2d` gives the same values, and chooses an algorithm by the shapes and by the
platform for which it is lowered: `cpu.py` (with `winograd.py`), `gpu.py`, or XLA's own.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax

from resnet_jax.ops import cpu, gpu
from resnet_jax.ops.custom_kernels import by_platform, custom_kernels_enabled, sharded_platform

Array = jax.Array


def conv2d(x: Array, kernel: Array, strides: int = 1, dilation: int = 1, groups: int = 1) -> Array:
    """Convolves images with zero padding of `dilation * (k - 1) / 2` on all sides, as PyTorch models do.

    `'SAME'` would pad a strided convolution on one side only, and imported weights would give other logits. Derivatives
    of all kinds and orders work.

    Args:
      x: [batch, height, width, in].
      kernel: [k, k, in / groups, out], k odd, of x's dtype.
      strides: step of the window in both directions.
      dilation: distance between the taps of the kernel.
      groups: the channels are split into this many independent convolutions.

    Returns:
      [batch, ceil(height / strides), ceil(width / strides), out] in x's dtype.

    Example:
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), strides=2)[0, :, :, 0]
      Array([[4., 6.],
             [6., 9.]], dtype=float32)
    """
    sharded_on = sharded_platform()
    if not custom_kernels_enabled() or (groups > 1 and sharded_on):
        return plain_conv2d(x, kernel, strides, dilation, groups)
    return _conv2d(x, kernel, strides, dilation, groups, sharded_on)


def plain_conv2d(x: Array, kernel: Array, strides: int = 1, dilation: int = 1, groups: int = 1) -> Array:
    """Convolves as `conv2d` does, by XLA's own operation on every platform.

    Example:
      >>> plain_conv2d(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
      Array([[4., 4.],
             [4., 4.]], dtype=float32)
    """
    pad = dilation * (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _conv2d(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded_on: str) -> Array:
    """Chooses by platform. Under `jax.jit`, all equal layers of a network are traced and differentiated once.

    A kept trace depends on its arguments alone, so the switches are read by the caller.
    """
    default = partial(plain_conv2d, strides=strides, dilation=dilation, groups=groups)
    on_cpu = partial(cpu.conv2d, strides=strides, dilation=dilation, groups=groups, sharded=bool(sharded_on))
    platforms: dict[str, Callable[..., Array]] = {"cpu": on_cpu}
    if gpu.takes_space_to_depth(x, kernel, strides, dilation, groups):
        platforms["cuda"] = gpu.space_to_depth_conv2d
    return by_platform(sharded_on, x, kernel, **platforms, default=default)
