"""A stage's variables in two forms: block by block, or those of equal blocks stacked, as `scan` takes them."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

FIRST, EQUAL = "block1", "blocks"
"""Names in a stacked stage: the block that changes the shape, and all after it, along a new first axis."""


def stack_blocks(tree: Any) -> Any:
    """Returns variables as `ResNet(scan=True)` takes them, from those with `block1`, `block2`, ...

    Any tree with the structure of variables will do, such as a whole state. One without such stages, or one that is
    stacked already, is returned as it is.
    """

    def stack(stage: Any) -> Any:
        if not _is_stage(stage) or "block2" not in stage:
            return stage
        later = [stage[f"block{i}"] for i in range(2, len(stage) + 1)]
        return {FIRST: stage[FIRST], EQUAL: jax.tree.map(lambda *leaves: jnp.stack(leaves), *later)}

    return jax.tree.map(stack, tree, is_leaf=_is_stage)


def unstack_blocks(tree: Any) -> Any:
    """Undoes `stack_blocks`: returns variables as every other model takes them, and as checkpoints hold them."""

    def unstack(stage: Any) -> Any:
        if not _is_stage(stage) or EQUAL not in stage:
            return stage
        count = len(jax.tree.leaves(stage[EQUAL])[0])
        later = {f"block{i + 2}": jax.tree.map(partial(_take, i=i), stage[EQUAL]) for i in range(count)}
        return {FIRST: stage[FIRST]} | later

    return jax.tree.map(unstack, tree, is_leaf=_is_stage)


def run_stacked(block: nn.Module, x: jax.Array, train: bool, count: int, in_groups: bool) -> jax.Array:
    """Applies `count` equal blocks in a row, in a loop; the variables of `block` are stacked.

    With `in_groups` a loop over groups runs loops over their blocks, and groups are computed again in the backward
    pass: some 2 sqrt(count) inputs of blocks are kept instead of `count` (Chen et al. 2016, section 4).
    """

    def once(block: nn.Module, x: jax.Array, real: jax.Array | None) -> tuple[jax.Array, None]:
        y = block(x, train)
        return (y if real is None else jnp.where(real, y, x)), None

    loop = partial(nn.scan, variable_axes=dict.fromkeys(STACKED, 0), split_rngs={"params": True})
    if not in_groups or block.is_initializing():
        return loop(once, length=count)(block, x, None)[0]
    groups, size = grid(count)
    spare = groups * size - count  # blocks that only fill the last group: their outputs are not used

    def fold(variables: Any) -> Any:
        def one(v: jax.Array) -> jax.Array:
            return jnp.concatenate([v, v[:spare]]).reshape(groups, size, *v.shape[1:])

        return jax.tree.map(one, variables)

    def unfold(variables: Any) -> Any:
        return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:count], variables)

    loops = loop(nn.remat(loop(once, length=size)), length=groups)
    folded = nn.map_variables(loops, STACKED, trans_in_fn=fold, trans_out_fn=unfold, mutable=True)
    return folded(block, x, (jnp.arange(groups * size) < count).reshape(groups, size))[0]


STACKED = ("params", "batch_stats")
"""Collections in which each block has values of its own."""


def grid(count: int) -> tuple[int, int]:
    """Returns a number of groups and of blocks in each: few of both together, with few blocks to spare."""

    def cost(size: int) -> int:
        groups = -(-count // size)
        return groups + size + groups * size - count

    size = min(range(1, count + 1), key=cost)
    return -(-count // size), size


def _take(stacked: Any, i: int) -> Any:
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)  # one program for all i


def _is_stage(node: Any) -> bool:
    return isinstance(node, dict) and FIRST in node


def block_by_block(model: nn.Module) -> Any:
    """Returns the model without `scan`, which takes variables as `unstack_blocks` returns them."""
    return model.clone(scan=False) if getattr(model, "scan", False) else model
