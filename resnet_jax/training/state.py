"""What a run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

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
    ema: bool = False,
) -> TrainState:
    """Returns a new state with random parameters, in one compiled program.

    Args:
      key: of which the parameters are drawn. One of JAX's `rbg` generator compiles several times faster than the
        default one, and may draw other values on another kind of device.
      image_shape: height, width, channel of an image.
      ema: whether to keep moving averages of parameters and statistics.
    """

    def new_state(key: jax.Array) -> TrainState:
        variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        averages = {"params": params, "batch_stats": batch_stats} if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), averages)

    return jax.jit(new_state)(key)


def path_map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over a tree, paths such as `stage1/block1/conv1/kernel`."""

    def call(path: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
