"""What a run carries from step to step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


copies = partial(jax.device_put, may_alias=False)
"""A tree of new arrays with the values of another one; nothing is compiled for it."""


def init_variables(model: nn.Module, key: jax.Array, images: jax.Array) -> PyTree:
    """The values of `model.init(key, images)`, sooner: what only the forward pass needs is dropped from its trace, and
    the rest runs operation by operation, with several threads.

    A jitted init compiles every random draw on its own, which takes seconds for a deep net; here layers of equal shape
    share the compiled draw, and XLA compiles those of different shapes at the same time.
    """
    closed, shapes = jax.make_jaxpr(model.init, return_shape=True)(key, images)
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for place, variable in enumerate(closed.jaxpr.outvars):
        of_shape.setdefault(variable.aval.shape, []).append(place)

    def values(places: list[int]) -> dict[int, jax.Array]:
        return dict(zip(places, jaxpr_as_fun(only(closed, places))(key, images), strict=True))

    if isinstance(key, jax.core.Tracer):  # a trace belongs to its thread
        found = [values(places) for places in of_shape.values()]
    else:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(values, of_shape.values()))
    leaves = {place: value for group in found for place, value in group.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[place] for place in sorted(leaves)])


def only(closed: ClosedJaxpr, places: list[int]) -> ClosedJaxpr:
    """A jaxpr cut down to the results at some places, and to the equations that these need."""
    wanted = [closed.jaxpr.outvars[place] for place in places]
    needed, kept = set(wanted), []
    for equation in reversed(closed.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            kept.append(equation)
    return ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1], outvars=wanted), closed.consts)


def path_map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over a tree, paths such as `stage1/block1/conv1/kernel`."""

    def call(path: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
