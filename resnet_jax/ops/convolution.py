"""Convolution, and the ways in which CPUs and GPUs compute it faster than XLA would. Images: [batch, h, w, channel]."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops import winograd

Array = jax.Array

ORDER = ("NHWC", "HWIO", "NHWC")
"""Dimensions of images, kernel and result as layers hold them, and as XLA for CPUs computes convolutions fast."""
TURNED = ("NHWC", "HWOI", "NHWC")
"""What JAX's transposition along the images changes into `ORDER`."""

WIDTH = 16
"""Channels of a group below which a CPU convolves several groups as one, zeros between them, in less time."""

FINE = 16
"""Channels, in and out, up to which a CPU computes two neighbouring pixels of a 3x3 convolution as one."""
PIXELS = 2**10
"""Of all images together: with fewer, that is not worth the making of its kernel."""

MANY = 16
"""With this factor more pixels than channels, and the weight gradient of a 1x1 convolution is faster in two halves."""

FEW = 4
"""Channels of pictures, up to which a GPU convolves faster when four pixels are one."""

_own_ways = ContextVar("own_ways", default=True)


@contextmanager
def plain_operations() -> Iterator[None]:
    """In it networks are traced without their own ways for each platform, for translators that do not know those."""
    token = _own_ways.set(False)
    try:
        yield
    finally:
        _own_ways.reset(token)


def own_ways() -> bool:
    """False in `plain_operations`."""
    return _own_ways.get()


def by_platform(x: Array, own: Callable[[Array], Array], default: Callable[[Array], Array]) -> Array:
    """`own(x)` where it is lowered for a CPU or an NVIDIA GPU, `default(x)` elsewhere; one program serves all."""
    return lax.platform_dependent(x, cpu=own, cuda=own, default=default) if own_ways() else default(x)


def conv2d(x: Array, kernel: Array, strides: int = 1, dilation: int = 1, groups: int = 1) -> Array:
    """Convolves with zero padding of `dilation * (k - 1) / 2` on both sides, as PyTorch models do.

    `'SAME'` would pad a strided convolution on one side only, and imported weights would give other logits. Where it is
    lowered for a CPU, a 1x1 convolution is one matrix product, what goes in and comes out of any other is stored, and
    it and its derivatives are computed as in `_on_cpu`; elsewhere it is XLA's own convolution, but for the first one of
    a network on an NVIDIA GPU (`of_quarters`). Derivatives of all kinds and orders work.

    Args:
      x: [batch, height, width, in].
      kernel: [k, k, in / groups, out], k odd, of x's dtype.
      strides: step of the window in both directions.
      dilation: distance between the taps of the kernel.
      groups: the channels are split into this many independent convolutions.

    Returns:
      [batch, ceil(height / strides), ceil(width / strides), out] in x's dtype.
    """
    across = jax.device_count() > 1  # what mixes the batch with other dimensions would have to travel
    if not own_ways() or (groups > 1 and across):
        return _convolve(x, kernel, strides, dilation, groups)
    return _conv2d(x, kernel, strides, dilation, groups, not across)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _conv2d(x: Array, kernel: Array, strides: int, dilation: int, groups: int, alone: bool) -> Array:
    """Traced and differentiated once for all equal layers, as `_stored` and `_stored_relu`.

    A trace that is kept knows its arguments alone, so that callers look at `plain_operations` and the devices.
    """

    def on_cpu(x: Array, kernel: Array) -> Array:
        if kernel.shape[0] == groups == 1:
            return _pointwise(x[:, ::strides, ::strides], kernel, alone)
        convolve = _narrow_groups if groups > 1 and kernel.shape[2] < WIDTH else _on_cpu
        return lax.optimization_barrier(convolve(lax.optimization_barrier(x), kernel, strides, dilation, groups, alone))

    default = partial(_convolve, strides=strides, dilation=dilation, groups=groups)
    ways: dict[str, Callable[..., Array]] = {"cpu": on_cpu}
    first = (kernel.shape[0], strides, dilation, groups) == (7, 2, 1, 1) and x.shape[-1] <= FEW
    if first and x.shape[1] % 2 == x.shape[2] % 2 == 0:
        ways["cuda"] = of_quarters
    return lax.platform_dependent(x, kernel, **ways, default=default)


def stored(x: Array) -> Array:
    """x, and its cotangent, written to memory where they are lowered for a CPU.

    XLA would compute a cheap value anew for each of its readers, there also when that leads back through a whole chain
    of residual sums.
    """
    return _stored(x) if own_ways() else x


@jax.jit
def _stored(x: Array) -> Array:
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def stored_relu(x: Array) -> Array:
    """relu(x), written to memory where it is lowered for a CPU or an NVIDIA GPU; the derivative reads that, not x."""
    return _stored_relu(x) if own_ways() else nn.relu(x)


@jax.custom_jvp
def _relu(x: Array) -> Array:
    barrier = lax.optimization_barrier
    return lax.platform_dependent(nn.relu(x), cpu=barrier, cuda=barrier, default=lambda x: x)


@_relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _relu(*primals)
    return y, jnp.where(y > 0, *tangents, 0)


_stored_relu = jax.jit(_relu)


def _convolve(x: Array, kernel: Array, strides: int, dilation: int, groups: int) -> Array:
    window = _window(kernel, strides, dilation)
    return lax.conv_general_dilated(x, kernel, **window, dimension_numbers=ORDER, feature_group_count=groups)


def _window(kernel: Array, strides: int, dilation: int) -> dict[str, Any]:
    pad = dilation * (kernel.shape[0] - 1) // 2
    return {"window_strides": (strides,) * 2, "padding": ((pad, pad),) * 2, "rhs_dilation": (dilation,) * 2}


def of_quarters(x: Array, kernel: Array) -> Array:
    """A 7x7 convolution with stride 2 as a 4x4 one without, of images of half the size with four times the channels.

    Matrix units take channels in eights, and would mostly compute with zeros for three of them.
    """
    batch, height, width, channels = x.shape
    fill = -4 * channels % 8
    places = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    places = places.reshape(*places.shape[:3], 4 * channels)
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, channels, -1)
    taps = taps.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, -1)
    return lax.conv_general_dilated(
        jnp.pad(places, ((0, 0), (2, 1), (2, 1), (0, fill))),
        jnp.pad(taps, ((0, 0), (0, 0), (0, fill), (0, 0))),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=ORDER,
    )


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pointwise(x: Array, kernel: Array, alone: bool) -> Array:
    """A 1x1 convolution without stride as a matrix product, with derivatives whose transposes are fast.

    The gradient of the images is a product with the kernel, which is turned before. The weight gradient is one of two
    matrices along all pixels: the narrower of the two is the one that is turned, and many pixels go in two halves. Both
    matrices are stored: halves have another shape, for which XLA would compute cheap values anew.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)


@_pointwise.defjvp
def _pointwise_jvp(alone: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    x = lax.optimization_barrier(x)
    y = _pointwise(x, kernel, alone)
    wide, out = kernel.shape[2:]
    pixels = math.prod(y.shape[:3]) if isinstance(x.shape[0], int) else 0
    parts = 2 if alone and pixels % 2 == 0 and pixels > MANY * max(wide, out) else 1
    halves = x.reshape(parts, -1, wide)
    each = jnp.broadcast_to(kernel_dot[0, 0], (parts, wide, out))
    if wide > out:
        along_kernel = jnp.einsum("pic,poc->pio", halves, lax.optimization_barrier(each.swapaxes(1, 2)))
    else:
        along_kernel = halves @ each
    # As a vector, or XLA copies the kernel once to store it and once more to turn it.
    turned = lax.optimization_barrier(kernel[0, 0].T.ravel()).reshape(out, wide)
    along_x = jnp.einsum("bhwi,oi->bhwo", x_dot, turned)
    return y, lax.optimization_barrier(along_x + along_kernel.reshape(y.shape))


def _narrow_groups(x: Array, kernel: Array, strides: int, dilation: int, groups: int, alone: bool) -> Array:
    """`_convolve` in up to eight parts; the groups of a part are one, with zeros in its kernel."""
    count = math.gcd(groups, 8)
    size = groups // count
    *window, width, out = kernel.shape
    separate = kernel.reshape(*window, 1, width, count, size, -1)
    whole = (separate * jnp.eye(size, dtype=x.dtype)[:, None, None, :, None]).reshape(*window, size * width, out)
    parts = zip(jnp.split(x, count, axis=-1), jnp.split(whole, count, axis=-1), strict=True)
    return jnp.concatenate([_on_cpu(x, k, strides, dilation, 1, alone) for x, k in parts], axis=-1)


def _chunk(x: Array) -> int:
    """Images whose weight gradient is computed at once; 0 for all of them, which is faster for wide or small images."""
    narrow = x.shape[-1] < 64 and 24 * 1024 <= math.prod(x.shape[1:]) * x.dtype.itemsize <= 256 * 1024
    return 16 if narrow and isinstance(x.shape[0], int) and x.shape[0] > 16 else 0


def _by_winograd(x: Array, kernel: Array, strides: int, dilation: int, groups: int, alone: bool) -> bool:
    return alone and strides == dilation == groups == 1 and winograd.parts(x, kernel) > 0


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _on_cpu(x: Array, kernel: Array, strides: int, dilation: int, groups: int, alone: bool) -> Array:
    """`_convolve`, where it pays by Winograd's algorithm or `_in_pairs`; derivatives transpose into the fast `ORDER`.

    XLA for CPUs computes any other order some twenty times slower where it does not turn the operands by itself: in
    loops, in functions, with groups. JAX transposes a convolution by changing its order; so the derivatives here have
    the order that it changes into `ORDER`, and turn their operands to fit.

    The derivative along the kernel, and so the weight gradient, goes by Winograd's algorithm, too, where channels are
    many, else by `_chunk` images, 0 for all at once. That along the images of a 3x3 with stride 2, and so their
    gradient, goes through four convolutions without stride; XLA's own spreads the gradient among zeros.
    """
    if _by_winograd(x, kernel, strides, dilation, groups, alone):
        return winograd.convolve(x, kernel)
    if _in_pairs(x, kernel, strides, dilation, groups):
        pads = ((1, 1), (1, 1))
        y = lax.conv_general_dilated(x, _kernel_of_pairs(kernel), (1, 2), pads, dimension_numbers=ORDER)
        return y.reshape(*x.shape[:3], -1)
    return _convolve(x, kernel, strides, dilation, groups)


@_on_cpu.defjvp
def _on_cpu_jvp(
    strides: int, dilation: int, groups: int, alone: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    window = _window(kernel, strides, dilation)
    turned = kernel.transpose(0, 1, 3, 2)
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    by_winograd = _by_winograd(x, kernel, strides, dilation, groups, alone)
    if by_winograd:
        along_x = jax.checkpoint(winograd.spread)(x_dot, kernel)  # or the kernel's sums would be kept for the gradient
    elif _in_pairs(x, kernel, strides, dilation, groups):
        along_x = _from_pairs(x_dot, turned)
    elif kernel.shape[0] == 3 and strides == 2 and dilation == 1 and even:
        along_x = _halving(x_dot, turned, groups)
    else:
        along_x = lax.conv_general_dilated(
            x_dot, turned, **window, dimension_numbers=TURNED, feature_group_count=groups
        )

    def with_images_last(x: Array) -> Array:
        batch, height, width, channels = x.shape
        each = x.reshape(batch, height, width, groups, channels // groups).transpose(4, 1, 2, 3, 0)
        return each.reshape(*each.shape[:3], groups * batch)

    def along_kernel(images: Array) -> Array:
        y = lax.conv_general_dilated(
            images,
            kernel_dot.transpose(2, 0, 1, 3),
            **window,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            batch_group_count=groups,
        )
        return y.transpose(2, 0, 1, 3)

    # Not as a loop: those are put off until all of a step's activations are there, and rematerialisation saves little.
    chunk = _chunk(x) if alone else 0
    if by_winograd and min(kernel.shape[2:]) >= winograd.GRADIENT:
        parts = [jax.checkpoint(winograd.along_kernel)(x, kernel_dot)]  # or the images' tiles would be kept
    elif chunk:  # slices are stored before they are turned: as one, the two take half as long again
        slices = [lax.optimization_barrier(x[i : i + chunk]) for i in range(0, x.shape[0], chunk)]
        parts = [along_kernel(lax.optimization_barrier(with_images_last(images))) for images in slices]
    else:
        parts = [along_kernel(with_images_last(x))]
    return _on_cpu(x, kernel, strides, dilation, groups, alone), along_x + jnp.concatenate(parts)


def _in_pairs(x: Array, kernel: Array, strides: int, dilation: int, groups: int) -> bool:
    """Whether a CPU computes two neighbouring pixels as one."""
    fine = kernel.shape[0] == 3 and max(kernel.shape[2:]) <= FINE and strides == dilation == groups == 1
    return fine and isinstance(x.shape[0], int) and x.shape[2] % 2 == 0 and math.prod(x.shape[:3]) >= PIXELS


def _kernel_of_pairs(kernel: Array) -> Array:
    """The kernel [3, 4, in, 2 * out] that computes two neighbouring pixels from four columns, a quarter of it zeros.

    That is more arithmetic, but the pixels that a window reads are gathered for two windows at once.
    """
    both = [jnp.pad(kernel, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1)]
    return jnp.stack(both, axis=3).reshape(3, 4, kernel.shape[2], -1)


def _from_pairs(x: Array, turned: Array) -> Array:
    """A 3x3 convolution whose transpose along the images goes in pairs, as `_kernel_of_pairs` does."""
    batch, height, width, _ = x.shape
    return lax.conv_general_dilated(
        x.reshape(batch, height, width // 2, -1),
        _kernel_of_pairs(turned[::-1, ::-1])[::-1, ::-1],
        window_strides=(1, 1),
        padding=((1, 1), (2, 2)),
        lhs_dilation=(1, 2),
        dimension_numbers=TURNED,
    )


def _halving(x: Array, turned: Array, groups: int) -> Array:
    """A 3x3 convolution with stride 2, as the sum over the pixels at even and at odd places in both directions.

    An output at i reads 2i - 1, 2i and 2i + 1: the middle tap of an even place, and the outer taps of two odd ones.
    """
    batch, height, width, channels = x.shape
    places = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    taps = (slice(1, 2), slice(0, 3, 2))
    out = jnp.zeros((), x.dtype)
    for i in (0, 1):
        for j in (0, 1):
            out += lax.conv_general_dilated(
                places[:, :, i, :, j],
                turned[taps[i], taps[j]],
                window_strides=(1, 1),
                padding=((i, 0), (j, 0)),
                dimension_numbers=TURNED,
                feature_group_count=groups,
            )
    return out
