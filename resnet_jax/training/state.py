"""What a run carries from step to step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from resnet_jax.training.sharding import known_on_cpu

PyTree = Any

OPTION = ("xla_cpu_use_fusion_emitters", False)
"""By which random draws compile sooner."""


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
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, evaluate(optimizer.init, params), averages)


copies = partial(jax.device_put, may_alias=False)
"""A tree of new arrays with the values of another one; nothing is compiled for it."""


def init_variables(model: nn.Module, key: jax.Array, images: jax.Array) -> PyTree:
    """The values of `model.init(key, images)`, sooner."""
    return evaluate(model.init, key, images)


def evaluate(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """The values of `function(*arguments)`, sooner where many of its arrays are alike, as those of a first state.

    A jitted function would compile every random draw on its own, which takes seconds for a deep net. Here what no value
    needs is dropped from its trace, constants are NumPy's, and the rest runs operation by operation, with several
    threads: arrays of equal shape share the compiled draw, and XLA compiles those of different shapes at the same time,
    on a CPU with an option that halves its work on them and gives equal bits.
    """
    given = jax.tree.leaves(arguments)
    if any(isinstance(x, jax.core.Tracer) for x in given):
        return function(*arguments)
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for place, variable in enumerate(closed.jaxpr.outvars):
        of_shape.setdefault(variable.aval.shape, []).append(place)

    def values(places: list[int]) -> dict[int, jax.Array]:
        found = jaxpr_as_fun(only(closed, places))(*given)
        new = (x if isinstance(x, jax.Array) else copies(np.asarray(x)) for x in found)
        return dict(zip(places, new, strict=True))

    with ThreadPoolExecutor() as pool:
        groups = list(pool.map(values, of_shape.values()))
    leaves = {place: value for group in groups for place, value in group.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[place] for place in sorted(leaves)])


def only(closed: ClosedJaxpr, places: list[int]) -> ClosedJaxpr:
    """A jaxpr cut down to the results at some places and to the equations that these need; filled arrays are constants
    of it, and functions inside are compiled with `OPTION`.
    """
    option = tuple(known_on_cpu(OPTION).items())
    wanted = [closed.jaxpr.outvars[place] for place in places]
    needed = {variable for variable in wanted if not isinstance(variable, Literal)}
    kept, names, filled = [], list(closed.jaxpr.constvars), list(closed.consts)
    for equation in reversed(closed.jaxpr.eqns):
        if not needed.intersection(equation.outvars):
            continue
        if equation.primitive.name == "broadcast_in_dim" and isinstance(equation.invars[0], Literal):
            aval = equation.outvars[0].aval
            names.append(equation.outvars[0])
            filled.append(np.full(aval.shape, equation.invars[0].val, aval.dtype))
        else:
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            quicker = {"compiler_options_kvs": option} if "compiler_options_kvs" in equation.params else {}
            kept.append(equation.replace(params=equation.params | quicker))
    return ClosedJaxpr(closed.jaxpr.replace(constvars=names, eqns=kept[::-1], outvars=wanted), filled)


def path_map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over a tree, paths such as `stage1/block1/conv1/kernel`."""

    def call(path: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
