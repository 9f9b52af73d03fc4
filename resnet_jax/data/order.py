"""The order of examples: a pure function of (seed, epoch, index), the same on host and device.

The positions of a run are numbered without end: position p is example `permutation_of_epoch[p mod size]` of epoch
`p div size`. The permutation is a keyed Feistel network over a grid of at least `size` cells (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"): any single index costs O(1) and nothing is stored, so that resuming costs
nothing and the number of hosts may change.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np

ROUNDS = 6
"""Rounds of the Feistel network."""


def grid_of(size: int) -> tuple[int, int, int]:
    """Returns a number of examples, and the rows and columns of the grid over which their order is enciphered."""
    rows = math.isqrt(size - 1) + 1
    return size, rows, -(-size // rows)


def example_index(position: Any, size: Any, seed: Any, xp: ModuleType = np) -> Any:
    """Computes which example each position of a run takes.

    Args:
      position: uint32 array of positions, counted from the beginning of the run; below 2**32.
      size: number of examples; or `grid_of` it as a uint32 array, which may be an input of a compiled function.
      seed: of the order, an int or a uint32 array.
      xp: numpy, or jax.numpy inside a compiled function.

    Returns:
      int32 array of indices in [0, size).
    """
    position = xp.asarray(position, xp.uint32)
    size, rows, columns = grid_of(size) if isinstance(size, int) else size
    epoch = position // xp.uint32(size)
    key = _mix(_mix(epoch * xp.uint32(0x9E3779B9) + _word(seed, xp), xp) + xp.uint32(0x7F4A7C15), xp)

    def encipher(index: Any) -> Any:
        left, right = index // xp.uint32(columns), index % xp.uint32(columns)
        for i in range(ROUNDS):
            left = (left + _mix(right ^ (key + xp.uint32(2 * i)), xp) % xp.uint32(rows)) % xp.uint32(rows)
            right = (right + _mix(left ^ (key + xp.uint32(2 * i + 1)), xp) % xp.uint32(columns)) % xp.uint32(columns)
        return left * xp.uint32(columns) + right

    index = encipher(position % xp.uint32(size))
    return _walk(encipher, index, size, xp).astype(xp.int32)


def is_mirrored(position: Any, index: Any, size: Any, seed: Any, xp: ModuleType = np) -> Any:
    """Computes which images alternating flips mirror: one half of them in one epoch, the other half in the next.

    Args:
      position: uint32 array of positions, counted from the beginning of the run.
      index: what `example_index` returns for them.
      size, seed, xp: as in `example_index`.

    Returns:
      bool array of the shape of `position`.
    """
    size = size if isinstance(size, int) else size[0]
    epoch = xp.asarray(position, xp.uint32) // xp.uint32(size)
    first = _mix(_mix(xp.asarray(index).astype(xp.uint32), xp) + _word(seed, xp), xp)
    return (first + epoch) % xp.uint32(2) == 1


def _word(seed: Any, xp: ModuleType) -> Any:
    """Returns a seed as a uint32 scalar."""
    return xp.uint32(seed % 2**32) if isinstance(seed, int) else xp.asarray(seed, xp.uint32)


def _walk(encipher: Any, index: Any, size: Any, xp: ModuleType) -> Any:
    """Enciphers again what fell into the few cells beyond `size`, until nothing is there."""
    if xp is np:
        while (index >= size).any():
            index = np.where(index >= size, encipher(index), index)
        return index
    from jax import lax

    return lax.while_loop(
        lambda i: (i >= size).any(),
        lambda i: xp.where(i >= size, encipher(i), i),
        index,
    )


def _mix(x: Any, xp: ModuleType) -> Any:
    """Spreads every bit of a uint32 over all others (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> xp.uint32(16))


def balanced_table(labels: np.ndarray) -> np.ndarray:
    """Returns the indices of an epoch in which every class has as many examples as the largest one.

    Smaller classes repeat theirs. `example_index` shuffles the entries of this table.

    Args:
      labels: int [size], the class of each example; every class has at least one.

    Returns:
      int32 [classes * n], where n is the number of examples of the largest class.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    most = max(map(len, members))
    return np.concatenate([np.resize(which, most) for which in members]).astype(np.int32)
