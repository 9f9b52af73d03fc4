"""3x3 convolutions with 16 multiplications in place of 36: Winograd's minimal filtering, F(2x2, 3x3).

Two by two outputs are made from a tile of four by four inputs (Lavin and Gray 2016, section 4). Tiles, kernels and
products are grids: lists of lists of arrays, one for each place in a tile.
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

WIDTH = 64
"""Least channels, in and out. With fewer, products are too thin for what the additions cost."""
GRADIENT = 128
"""The same for the weight gradient, which takes tiles of two arrays for one product."""
IMAGE = 2**12
"""Least numbers in an image. With fewer, what is saved is not worth the time to compile."""
WORK = 2**15
"""Least tiles times channels of a part, without which the kernel's way into tiles costs more than is saved."""
PART = 900_000
"""Most numbers of a part's images: they have four times as many in tiles, and all stay in a cache of 32 MB."""


def parts(x: Array, kernel: Array) -> int:
    """In how many parts a CPU should take the images of a 3x3 convolution without stride; 0 for another algorithm."""
    batch, height, width, _ = x.shape
    few, many = sorted(kernel.shape[2:])
    if kernel.shape[:2] != (3, 3) or few < WIDTH or not isinstance(batch, int) or x.dtype != jnp.float32:
        return 0
    tiles = batch * -(-height // 2) * -(-width // 2)
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    count = next((n for n in divisors if n == batch or 4 * tiles * many <= n * PART), 0)
    return count if math.prod(x.shape[1:]) >= IMAGE and tiles * few >= count * WORK else 0


def convolve(x: Array, kernel: Array) -> Array:
    """A convolution with zero padding of 1: XLA's, up to rounding.

    Args:
      x: [batch, height, width, in], for which `parts` is not 0.
      kernel: [3, 3, in, out].
    """
    kernels = _both_ways(KERNEL, kernel)
    return _in_parts(lambda x: _gathered(x, kernels), x, parts(x, kernel))


def spread(x: Array, kernel: Array) -> Array:
    """The same, so written that JAX's transpose along the images, their gradient, has the form of `convolve`."""
    kernels = _both_ways(KERNEL, kernel[::-1, ::-1])
    return _in_parts(lambda x: _scattered(x, kernels), x, parts(x, kernel))


def along_kernel(x: Array, kernel: Array) -> Array:
    """The same of all images at once, for JAX's transpose along the kernel, the weight gradient: no sum of parts."""
    return _gathered(x, _both_ways(KERNEL, kernel))


def _in_parts(function: Callable[[Array], Array], x: Array, count: int) -> Array:
    if count == 1:
        return function(x)
    y = lax.map(function, x.reshape(count, -1, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _gathered(x: Array, kernels: Grid) -> Array:
    """Each four by four inputs give two by two outputs."""
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)
    padded = jnp.pad(x, ((0, 0), (1, 1 + 2 * h - height), (1, 1 + 2 * w - width), (0, 0)))

    def place(i: int, j: int) -> Array:
        return lax.slice(padded, (0, i, j, 0), (batch, i + 2 * h - 1, j + 2 * w - 1, channels), (1, 2, 2, 1))

    tiles = [[place(i, j) for j in range(4)] for i in range(4)]
    outputs = _both_ways(OUTPUTS, _products(_both_ways(INPUTS, tiles), kernels))
    rows = [jnp.stack(row, axis=3) for row in outputs]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)[:, :height, :width]


def _scattered(x: Array, kernels: Grid) -> Array:
    """Each two by two inputs add to four by four outputs: the transpose of `_gathered`, with the kernel turned."""
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)
    padded = jnp.pad(x, ((0, 0), (0, 2 * h - height), (0, 2 * w - width), (0, 0)))
    places = padded.reshape(batch, h, 2, w, 2, channels)
    tiles = [[places[:, :, i, :, j] for j in range(2)] for i in range(2)]
    outputs = _both_ways(_turned(INPUTS), _products(_both_ways(_turned(OUTPUTS), tiles), kernels))

    def placed(y: Array, i: int, j: int) -> Array:
        return lax.pad(y, jnp.zeros((), y.dtype), ((0, 0, 0), (i, 3 - i, 1), (j, 3 - j, 1), (0, 0, 0)))

    whole = reduce(operator.add, [placed(y, i, j) for i, row in enumerate(outputs) for j, y in enumerate(row)])
    # For the transpose: its tiles would be read, number by number, out of the images of all parts.
    return lax.optimization_barrier(whole)[:, 1 : height + 1, 1 : width + 1]


def _products(tiles: Grid, kernels: Grid) -> Grid:
    """A matrix product for each place, between barriers: XLA would make the sums anew for each of its readers.

    They hold tiles, not matrices, in whose rows XLA would look for each number's place; both ways, for the transpose.
    """
    size, stored = tiles[0][0].shape[:3], lax.optimization_barrier

    def product(x: Array, kernel: Array) -> Array:
        return stored((stored(x).reshape(-1, x.shape[-1]) @ kernel).reshape(*size, -1))

    return [[product(*pair) for pair in zip(*rows, strict=True)] for rows in zip(tiles, kernels, strict=True)]


def _both_ways(matrix: Matrix, grid: Grid | Array) -> Grid:
    """`matrix @ grid @ matrix.T`."""
    columns = [_combined(matrix, column) for column in _turned(grid)]
    return [_combined(matrix, row) for row in _turned(columns)]


def _combined(matrix: Matrix, terms: Sequence[Array]) -> Sequence[Array]:
    """`matrix @ terms`."""
    pairs = [[(factor, term) for factor, term in zip(row, terms, strict=True) if factor] for row in matrix]
    return [reduce(operator.add, [term if factor == 1 else factor * term for factor, term in row]) for row in pairs]


def _turned(rows: Any) -> Any:
    return list(zip(*rows, strict=True))
