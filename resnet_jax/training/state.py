"""What a run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

SOWN = ("auxiliary_logits", "losses", "intermediates")
"""Collections that a model fills anew at each call, and that no state carries."""


class TrainState(flax.struct.PyTreeNode):
    """A run at the end of `step` steps. There is no random key: keys are folded from the seed and the step.

    Attributes:
      step: int32 scalar.
      params: float32 parameters of the model.
      batch_stats: running statistics of its norms; empty for a model without.
      opt_state: of the optax optimizer.
      ema: moving averages `{"params", "batch_stats"}`, or None.
      collections: other variables that the model changes in training, by collection; empty for most.

    Example::

      logits = model.apply(state.variables, images, train=False)  # parameters and running statistics
      logits = model.apply(state.averages, images, train=False)  # their moving averages, where the run keeps them
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None
    collections: PyTree = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> PyTree:
        """Returns the model's variables, as `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats} | self.collections

    @property
    def averages(self) -> PyTree | None:
        """Returns the model's variables with the moving averages in place of parameters and statistics; None where
        there are none.
        """
        return None if self.ema is None else self.ema | self.collections


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    ema: bool = False,
    mesh: Mesh | None = None,
) -> TrainState:
    """Returns a new state with random parameters, in one compiled program.

    Args:
      key: of which the parameters are drawn. One of JAX's `rbg` generator compiles several times faster than the
        default one, and may draw other values on another kind of device.
      image_shape: height, width, channel of an image.
      ema: whether to keep moving averages of parameters and statistics.
      mesh: each of its devices gets the whole state, as the step returns it for batches of `shard_batch`: the step is
        then compiled once, and not again for its own result. None leaves the state on the default device.

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train):
      ...         return nn.Dense(10)(images.mean((1, 2)))
      >>> model, tx = Net(), optax.sgd(0.1)
      >>> state = rj.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
      >>> int(state.step), state.params["Dense_0"]["kernel"].shape
      (0, (3, 10))
    """

    def new_state(key: jax.Array) -> TrainState:
        keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables = model.init(keys, jnp.zeros((1, *image_shape)), train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        others = {name: values for name, values in variables.items() if name not in ("params", "batch_stats", *SOWN)}
        averages = {"params": params, "batch_stats": batch_stats} if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), averages, others)

    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(new_state, out_shardings=everywhere)(key)


def path_map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over a tree, paths such as `stage1/block1/conv1/kernel`."""

    def call(path: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
