"""A tree of arrays as few arrays: the small ones end to end, since to a checkpoint each array costs time of its own.

A residual network's state has hundreds of vectors, of norms and biases, beside some fifty kernels.
"""

import math
from typing import Any, TypeAlias

import jax
import numpy as np

from resnet_jax.sharding import SPREAD_ABOVE

Index: TypeAlias = dict[str, list[tuple[str, list[int]]]]
"""Of the small arrays of each type, address and shape in their order."""


def addresses(tree: Any) -> list[str]:
    """What the leaves of a tree are called, in their order: `params.stage1.block1.conv1.kernel`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def pack(tree: Any) -> tuple[dict[str, dict[str, Any]], Index]:
    """Arrays by address under `large`, and under `small` a vector on the host for each type.

    Small is what is never spread over devices (`SPREAD_ABOVE`).

    Returns:
      That, and what lies where in the vectors, as JSON can hold it.
    """
    leaves = dict(zip(addresses(tree), jax.tree.leaves(tree), strict=True))
    few = {name: x for name, x in leaves.items() if x.size < SPREAD_ABOVE and x.is_fully_replicated}
    values, index = jax.device_get(few), Index()
    for name, value in values.items():
        index.setdefault(str(value.dtype), []).append((name, list(value.shape)))
    small = {kind: np.concatenate([values[name].ravel() for name, _ in rows]) for kind, rows in index.items()}
    return {"large": {name: x for name, x in leaves.items() if name not in few}, "small": small}, index


def unpack(packed: dict[str, dict[str, Any]], index: Index) -> dict[str, Any]:
    """The arrays of `pack` by address."""
    found = dict(packed.get("large", {}))
    for kind, rows in index.items():
        ends = np.cumsum([math.prod(shape) for _, shape in rows])
        parts = np.split(np.asarray(packed["small"][kind]), ends[:-1])
        found |= {name: part.reshape(shape) for (name, shape), part in zip(rows, parts, strict=True)}
    return found
