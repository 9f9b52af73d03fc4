"""3x3 convolutions with 16 multiplications in place of 36: Winograd's minimal filtering, F(2x2, 3x3), for CPUs.

Two by two outputs are computed from a tile of four by four inputs (Lavin and Gray 2016, section 4). Tiles, kernels and
products are grids: lists of lists of arrays, one for each place in a tile.

On two cores with AVX-512 a training step takes 0.92 of its time with it for cifar_resnet20 and 0.98 for resnet50; with
weight gradients by it, too, again 0.93 for cifar_resnet18, 0.97 for resnet50 and 0.81 for cifar_wrn_28_10; inference
0.94 for 256 images of cifar_resnet20 and 0.97 for 64 of resnet50; no record was kept.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Grid: TypeAlias = Sequence[Sequence[Array]]
Matrix: TypeAlias = Sequence[Sequence[float]]

INPUTS: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUTS: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))
"""The paper's B^T, G and A^T."""

MIN_CHANNELS = 64
"""Least channels, in and out. With fewer, products are too thin for what the additions cost."""
MIN_CHANNELS_OF_GRADIENT = 128
"""The same for the weight gradient, which transforms tiles of two arrays for one product."""
MIN_IMAGE = 2**12
"""Least numbers in an image. With fewer, what is saved is not worth the time to compile."""
MIN_WORK = 2**15
"""Least tiles times channels of a part. With fewer, the transform of the kernel costs more than is saved."""
MAX_PART = 900_000
"""Most numbers in the images of a part: as tiles they are four times as many, and all stay in a cache of 32 MB."""


def count_parts(x: Array, kernel: Array) -> int:
    """Returns in how many parts images go through a 3x3 convolution without stride; 0 where it does not pay."""
    batch, height, width, _ = x.shape
    few, many = sorted(kernel.shape[2:])
    if kernel.shape[:2] != (3, 3) or few < MIN_CHANNELS or not isinstance(batch, int) or x.dtype != jnp.float32:
        return 0
    tiles = batch * -(-height // 2) * -(-width // 2)
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    count = next((n for n in divisors if n == batch or 4 * tiles * many <= n * MAX_PART), 0)
    return count if math.prod(x.shape[1:]) >= MIN_IMAGE and tiles * few >= count * MIN_WORK else 0


def conv2d(x: Array, kernel: Array) -> Array:
    """Convolves with zero padding of 1, as `plain_conv2d` does up to rounding.

    Args:
      x: float32 [batch, height, width, in], for which `count_parts` is not 0.
      kernel: float32 [3, 3, in, out].

    Returns:
      float32 [batch, height, width, out].
    """
    kernels = _transform(KERNEL, kernel)
    return _in_parts(lambda x: _gather(x, kernels), x, count_parts(x, kernel))


def scattered_conv2d(x: Array, kernel: Array) -> Array:
    """Convolves as `conv2d` does; JAX's transpose along the images, their gradient, has the form of `conv2d`."""
    kernels = _transform(KERNEL, kernel[::-1, ::-1])
    return _in_parts(lambda x: _scatter(x, kernels), x, count_parts(x, kernel))


def unsplit_conv2d(x: Array, kernel: Array) -> Array:
    """Convolves all images at once, for JAX's transpose along the kernel, the weight gradient: no sum over parts."""
    return _gather(x, _transform(KERNEL, kernel))


def _in_parts(function: Callable[[Array], Array], x: Array, count: int) -> Array:
    if count == 1:
        return function(x)
    y = lax.map(function, x.reshape(count, -1, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _gather(x: Array, kernels: Grid) -> Array:
    """Computes two by two outputs from each four by four inputs."""
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)
    padded = jnp.pad(x, ((0, 0), (1, 1 + 2 * h - height), (1, 1 + 2 * w - width), (0, 0)))

    def place(i: int, j: int) -> Array:
        return lax.slice(padded, (0, i, j, 0), (batch, i + 2 * h - 1, j + 2 * w - 1, channels), (1, 2, 2, 1))

    tiles = [[place(i, j) for j in range(4)] for i in range(4)]
    outputs = _transform(OUTPUTS, _products(_transform(INPUTS, tiles), kernels))
    rows = [jnp.stack(row, axis=3) for row in outputs]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)[:, :height, :width]


def _scatter(x: Array, kernels: Grid) -> Array:
    """Adds each two by two inputs to four by four outputs: the transpose of `_gather`, with the kernel mirrored."""
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)
    padded = jnp.pad(x, ((0, 0), (0, 2 * h - height), (0, 2 * w - width), (0, 0)))
    places = padded.reshape(batch, h, 2, w, 2, channels)
    tiles = [[places[:, :, i, :, j] for j in range(2)] for i in range(2)]
    outputs = _transform(_transposed(INPUTS), _products(_transform(_transposed(OUTPUTS), tiles), kernels))

    def placed(y: Array, i: int, j: int) -> Array:
        return lax.pad(y, jnp.zeros((), y.dtype), ((0, 0, 0), (i, 3 - i, 1), (j, 3 - j, 1), (0, 0, 0)))

    whole = reduce(operator.add, [placed(y, i, j) for i, row in enumerate(outputs) for j, y in enumerate(row)])
    # For the transpose, whose tiles would be read, number by number, out of the images of all parts.
    return lax.optimization_barrier(whole)[:, 1 : height + 1, 1 : width + 1]


def _products(tiles: Grid, kernels: Grid) -> Grid:
    """Computes a matrix product for each place, between barriers, or XLA would compute the sums anew for each reader.

    The barriers hold tiles, not matrices, for whose rows XLA would look up each number's place; one before and one
    after the product, for the transpose.
    """
    size, barrier = tiles[0][0].shape[:3], lax.optimization_barrier

    def product(x: Array, kernel: Array) -> Array:
        return barrier((barrier(x).reshape(-1, x.shape[-1]) @ kernel).reshape(*size, -1))

    return [[product(*pair) for pair in zip(*rows, strict=True)] for rows in zip(tiles, kernels, strict=True)]


def _transform(matrix: Matrix, grid: Grid | Array) -> Grid:
    """Computes `matrix @ grid @ matrix.T`."""
    columns = [_combine(matrix, column) for column in _transposed(grid)]
    return [_combine(matrix, row) for row in _transposed(columns)]


def _combine(matrix: Matrix, terms: Sequence[Array]) -> Sequence[Array]:
    """Computes `matrix @ terms`."""
    pairs = [[(factor, term) for factor, term in zip(row, terms, strict=True) if factor] for row in matrix]
    return [reduce(operator.add, [term if factor == 1 else factor * term for factor, term in row]) for row in pairs]


def _transposed(rows: Any) -> Any:
    return list(zip(*rows, strict=True))
