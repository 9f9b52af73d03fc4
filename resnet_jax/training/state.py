"""What a run carries from step to step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """A run at the end of `step` steps. There is no random key: keys are folded from the seed and the step.

    Attributes:
      step: int32 scalar.
      params: float32 parameters of the model.
      batch_stats: running statistics of its norms; empty for a model without.
      opt_state: of the optax optimizer.
      ema: moving averages `{"params", "batch_stats"}`, or None.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    ema: bool,
) -> TrainState:
    """A new state with random parameters.

    Args:
      image_shape: height, width, channel of an image.
      ema: whether to keep moving averages.
    """
    variables = init_variables(model, key, jnp.zeros((1, *image_shape)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averages = copies({"params": params, "batch_stats": batch_stats}) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), averages)


copies = jax.jit(partial(jax.tree.map, jnp.copy))
"""A tree of new arrays with the values of another one."""


def init_variables(model: nn.Module, key: jax.Array, images: jax.Array) -> PyTree:
    """The values of `model.init(key, images)`, sooner: what only the forward pass needs is dropped from its trace, and
    the rest runs operation by operation.

    A jitted init compiles every random draw on its own, which takes seconds for a deep net; here layers of equal shape
    share the compiled draw.
    """
    closed, shapes = jax.make_jaxpr(model.init, return_shape=True)(key, images)
    needed, kept = set(closed.jaxpr.outvars), []
    for equation in reversed(closed.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            kept.append(equation)
    short = ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1]), closed.consts)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(short)(key, images))


def path_map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over a tree, paths such as `stage1/block1/conv1/kernel`."""

    def call(path: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
