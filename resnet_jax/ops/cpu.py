"""Convolutions for CPUs, and their derivatives, where XLA's own are slower.

Gains are of training steps on two cores (float32), alternating with the commit before; no record was kept.
Derivatives are written as JVPs whose transposes, which give the gradients, are the fast forms.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops import winograd

Array = jax.Array

ORDER = ("NHWC", "HWIO", "NHWC")
"""Dimensions of images, kernel and result in layers, and the only order that XLA for CPUs always computes fast."""
TRANSPOSED = ("NHWC", "HWOI", "NHWC")
"""The order which JAX's transposition along the images changes into `ORDER`."""

NARROW_GROUP = 16
"""Groups with fewer channels are computed several at once (`_narrow_groups`)."""

HALVED_RATIO = 16
"""With this many times more pixels than channels, the weight gradient of a 1x1 convolution is computed in halves."""

_barrier = lax.optimization_barrier


def conv2d(
    x: Array, kernel: Array, strides: int = 1, dilation: int = 1, groups: int = 1, sharded: bool = False
) -> Array:
    """Convolves as `plain_conv2d` does, by the algorithm that is fastest on a CPU for these shapes.

    A 1x1 convolution is a matrix product. What any other reads and writes is materialised: XLA would fuse cheap
    operations into it and compute them anew for each tap.

    Args:
      sharded: the batch is split over several devices by `jax.jit`, and is not cut or joined with other dimensions.
    """
    if kernel.shape[0] == groups == 1:
        return _conv1x1(x[:, ::strides, ::strides], kernel, sharded)
    convolve = _narrow_groups if groups > 1 and kernel.shape[2] < NARROW_GROUP else _direct
    return _barrier(convolve(_barrier(x), kernel, strides, dilation, groups, sharded))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _conv1x1(x: Array, kernel: Array, sharded: bool) -> Array:
    """Computes a 1x1 convolution as a matrix product, with fast gradients.

    The image gradient is a product with the transposed kernel. The weight gradient is one of two matrices as long as
    all pixels: the narrower of them is transposed, and many pixels go in two halves. Both matrices are materialised,
    since for the halves, which have another shape, XLA would compute cheap values anew: that takes a step of resnet50
    to 0.96 of its time; the halves alone take such a gradient to between 0.6 and 1.05.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)


@_conv1x1.defjvp
def _conv1x1_jvp(sharded: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    x = _barrier(x)
    y = _conv1x1(x, kernel, sharded)
    channels, features = kernel.shape[2:]
    pixels = math.prod(y.shape[:3]) if isinstance(x.shape[0], int) else 0
    parts = 2 if not sharded and pixels % 2 == 0 and pixels > HALVED_RATIO * max(channels, features) else 1
    halves = x.reshape(parts, -1, channels)
    each = jnp.broadcast_to(kernel_dot[0, 0], (parts, channels, features))
    if channels > features:
        along_kernel = jnp.einsum("pic,poc->pio", halves, _barrier(each.swapaxes(1, 2)))
    else:
        along_kernel = halves @ each
    # As a vector, or XLA copies the kernel once to materialise it and once more to transpose it.
    transposed = _barrier(kernel[0, 0].T.ravel()).reshape(features, channels)
    along_x = jnp.einsum("bhwi,oi->bhwo", x_dot, transposed)
    return y, _barrier(along_x + along_kernel.reshape(y.shape))


def _narrow_groups(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded: bool) -> Array:
    """Convolves in up to eight parts, each of several groups as one convolution, with zeros between them in its kernel.

    XLA computes narrow groups channel by channel: a step of resnext50 takes a thirtieth of the time.
    """
    count = math.gcd(groups, 8)
    size = groups // count
    *window, width, features = kernel.shape
    separate = kernel.reshape(*window, 1, width, count, size, -1)
    joined = (separate * jnp.eye(size, dtype=x.dtype)[:, None, None, :, None]).reshape(*window, size * width, features)
    parts = zip(jnp.split(x, count, axis=-1), jnp.split(joined, count, axis=-1), strict=True)
    return jnp.concatenate([_direct(x, k, strides, dilation, 1, sharded) for x, k in parts], axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _direct(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded: bool) -> Array:
    """Convolves by Winograd's algorithm or by XLA's convolution, whose derivatives are in `ORDER`.

    XLA for CPUs computes any other order some twenty times slower in loops, in functions, and with groups. JAX
    transposes a convolution by changing its order, so the derivatives below are in the orders which that changes into
    `ORDER`, with their operands transposed to fit.
    """
    if _takes_winograd(x, kernel, strides, dilation, groups, sharded):
        return winograd.conv2d(x, kernel)
    window = _window(kernel, strides, dilation)
    return lax.conv_general_dilated(x, kernel, **window, dimension_numbers=ORDER, feature_group_count=groups)


@_direct.defjvp
def _direct_jvp(
    strides: int, dilation: int, groups: int, sharded: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    layer = (strides, dilation, groups)
    y_dot = _along_x(x_dot, kernel, *layer, sharded) + _along_kernel(x, kernel_dot, *layer, sharded)
    return _direct(x, kernel, *layer, sharded), y_dot


def _along_x(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded: bool) -> Array:
    """Convolves in a form whose transpose along the images, the image gradient, is fast."""
    transposed = kernel.transpose(0, 1, 3, 2)
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    if _takes_winograd(x, kernel, strides, dilation, groups, sharded):
        return jax.checkpoint(winograd.scattered_conv2d)(
            x, kernel
        )  # or its transformed kernel is kept for the gradient
    if kernel.shape[0] == 3 and strides == 2 and dilation == 1 and even:
        return _strided_by_parity(x, transposed, groups)
    window = _window(kernel, strides, dilation)
    return lax.conv_general_dilated(x, transposed, **window, dimension_numbers=TRANSPOSED, feature_group_count=groups)


def _along_kernel(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded: bool) -> Array:
    """Convolves in a form whose transpose along the kernel, the weight gradient, is fast.

    Narrow layers take 16 images at a time, and each such part is materialised before it is transposed: as one operation
    the two take half as long again; as two operations, a step of cifar_resnet20 takes 0.96 of its time. The parts are
    not a loop, since XLA puts off loops until all activations of a step are there, and rematerialisation would save
    little.
    """
    winograd_too = _takes_winograd(x, kernel, strides, dilation, groups, sharded)
    if winograd_too and min(kernel.shape[2:]) >= winograd.MIN_CHANNELS_OF_GRADIENT:
        return jax.checkpoint(winograd.unsplit_conv2d)(x, kernel)  # or the tiles of the images are kept
    window = _window(kernel, strides, dilation)

    def batch_last(x: Array) -> Array:
        batch, height, width, channels = x.shape
        each = x.reshape(batch, height, width, groups, channels // groups).transpose(4, 1, 2, 3, 0)
        return each.reshape(*each.shape[:3], groups * batch)

    def convolve(images: Array) -> Array:
        y = lax.conv_general_dilated(
            images,
            kernel.transpose(2, 0, 1, 3),
            **window,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            batch_group_count=groups,
        )
        return y.transpose(2, 0, 1, 3)

    if size := 0 if sharded else _images_a_part(x):
        slices = [_barrier(x[i : i + size]) for i in range(0, x.shape[0], size)]
        return jnp.concatenate([convolve(_barrier(batch_last(images))) for images in slices])
    return convolve(batch_last(x))


def _window(kernel: Array, strides: int, dilation: int) -> dict[str, Any]:
    pad = dilation * (kernel.shape[0] - 1) // 2
    return {"window_strides": (strides,) * 2, "padding": ((pad, pad),) * 2, "rhs_dilation": (dilation,) * 2}


def _takes_winograd(x: Array, kernel: Array, strides: int, dilation: int, groups: int, sharded: bool) -> bool:
    return not sharded and strides == dilation == groups == 1 and winograd.count_parts(x, kernel) > 0


def _images_a_part(x: Array) -> int:
    """Returns how many images a weight gradient takes at once; 0 for all, which is faster for wide or small images."""
    narrow = x.shape[-1] < 64 and 24 * 1024 <= math.prod(x.shape[1:]) * x.dtype.itemsize <= 256 * 1024
    return 16 if narrow and isinstance(x.shape[0], int) and x.shape[0] > 16 else 0


def _strided_by_parity(x: Array, transposed: Array, groups: int) -> Array:
    """Computes a 3x3 convolution with stride 2 as four without stride, over even and odd rows and columns.

    An output at i reads 2i - 1, 2i and 2i + 1: the middle tap of an even place, and the outer taps of two odd ones.
    Its transpose is as four; that of XLA's own convolution first spreads the gradient among zeros.
    """
    batch, height, width, channels = x.shape
    places = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    taps = (slice(1, 2), slice(0, 3, 2))
    out = jnp.zeros((), x.dtype)
    for i in (0, 1):
        for j in (0, 1):
            out += lax.conv_general_dilated(
                places[:, :, i, :, j],
                transposed[taps[i], taps[j]],
                window_strides=(1, 1),
                padding=((i, 0), (j, 0)),
                dimension_numbers=TRANSPOSED,
                feature_group_count=groups,
            )
    return out
