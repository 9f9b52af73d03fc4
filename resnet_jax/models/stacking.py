"""Two forms of the same values: a stage's blocks one by one, or the equal ones stacked, as `scan` computes them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

FIRST, EQUAL = "block1", "blocks"
"""Of a stacked stage: the block that changes the shape, and all after it along a new first axis."""


def stack_blocks(tree: Any) -> Any:
    """What `ResNet(scan=True)` takes, from variables, or anything that is made like them, with `block1`, `block2`, ...

    A tree without such stages, or one that is stacked already, comes back as it is.
    """

    def stack(stage: Any) -> Any:
        if not _is_stage(stage) or "block2" not in stage:
            return stage
        later = [stage[f"block{i}"] for i in range(2, len(stage) + 1)]
        return {FIRST: stage[FIRST], EQUAL: jax.tree.map(lambda *leaves: jnp.stack(leaves), *later)}

    return jax.tree.map(stack, tree, is_leaf=_is_stage)


def unstack_blocks(tree: Any) -> Any:
    """The inverse of `stack_blocks`: what every other model takes, and what checkpoints hold."""

    def unstack(stage: Any) -> Any:
        if not _is_stage(stage) or EQUAL not in stage:
            return stage
        count = len(jax.tree.leaves(stage[EQUAL])[0])
        later = {f"block{i + 2}": jax.tree.map(partial(_take, i=i), stage[EQUAL]) for i in range(count)}
        return {FIRST: stage[FIRST]} | later

    return jax.tree.map(unstack, tree, is_leaf=_is_stage)


def _take(stacked: Any, i: int) -> Any:
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)  # one program for all i


def _is_stage(node: Any) -> bool:
    return isinstance(node, dict) and FIRST in node


def block_by_block(model: Any) -> Any:
    """The model without `scan`, whose variables are those of `unstack_blocks`."""
    return model.clone(scan=False) if getattr(model, "scan", False) else model
