"""A tree of arrays as few vectors and back, since to a checkpoint each array costs time of its own.

A residual network's state has hundreds of arrays, of which most are vectors of norms and biases.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import numpy as np

from resnet_jax.pages import new

Index: TypeAlias = dict[str, list[tuple[str, list[int]]]]
"""Of each vector, address and shape of the arrays in it, in their order; its name begins with their type."""

LINE = 64
"""Bytes at whose multiples JAX on a CPU takes an array over; odd sizes come last, behind the others of their type."""

VECTOR = 2**24
"""Bytes above which another vector begins: several are read at a time."""


def addresses(tree: Any) -> list[str]:
    """What the leaves of a tree are called, in their order: `params.stage1.block1.conv1.kernel`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def pack(tree: Any, into: dict[str, np.ndarray] | None = None) -> tuple[dict[str, dict[str, Any]], Index]:
    """Under `whole` vectors on the host, copies; under `spread`, by address, the arrays that are split over devices.

    Args:
      into: vectors of an earlier call that nobody needs; those of the right size are written over, which is cheaper
        than new memory.

    Returns:
      That, and what lies where in the vectors, as JSON can hold it.
    """
    leaves = dict(zip(addresses(tree), jax.tree.leaves(tree), strict=True))
    whole = {name: x for name, x in leaves.items() if x.is_fully_replicated}
    index, filled = Index(), dict[str, tuple[str, int]]()
    for name, x in sorted(whole.items(), key=lambda item: item[1].nbytes % LINE > 0):
        x.copy_to_host_async()
        vector, size = filled.get(str(x.dtype), ("", VECTOR))
        if size + x.nbytes > VECTOR:
            vector, size = f"{x.dtype}-{len(index)}", 0
        index.setdefault(vector, []).append((name, list(x.shape)))
        filled[str(x.dtype)] = vector, size + x.nbytes

    def end_to_end(vector: str) -> np.ndarray:
        arrays = [np.asarray(whole[name]).ravel() for name, _ in index[vector]]
        size = sum(x.size for x in arrays)
        room = (into or {}).get(vector)
        return np.concatenate(arrays, out=empty(size, vector) if room is None or room.size != size else room)

    with ThreadPoolExecutor(4) as pool:
        vectors = dict(zip(index, pool.map(end_to_end, index), strict=True))
    return {"whole": vectors, "spread": {name: x for name, x in leaves.items() if name not in whole}}, index


def empty(size: int, vector: str) -> np.ndarray:
    """Memory for so many values of a vector, with anything in it."""
    dtype = type_of(vector)
    return new(size * dtype.itemsize).view(dtype)


def type_of(vector: str) -> np.dtype:
    """Type of the values of a vector, from its name."""
    return np.dtype(vector.split("-")[0])


def unpack(vector: np.ndarray, rows: list[tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    """The arrays of a vector by address, views of it; `rows` of the index tell of them."""
    ends = np.cumsum([math.prod(shape) for _, shape in rows])
    parts = np.split(vector, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(rows, parts, strict=True)}
