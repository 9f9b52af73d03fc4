"""Several training steps in one compiled call, on data that lies on the device or on a sequence of batches."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from resnet_jax.training.metrics import Sums
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import Batch, TrainStep

CLASS_SUMS = ("loss", "accuracy", "count")
"""The sums of a step on classes."""

Draw: TypeAlias = Callable[[Batch, jax.Array], Batch]
"""`draw(data, step) -> batch`: the batch of a step from a whole split."""


def steps_on_device(
    train_step: TrainStep, draw: Draw, most: int, sums: Sequence[str] = CLASS_SUMS
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Sums]]:
    """Returns `steps(state, data, n) -> (state, sums)`: n steps on batches drawn from data that lies on the device.

    Args:
      most: steps in a call; n, an int32 scalar, is at most that, and has no effect where it is 1.
      sums: their names.

    Returns:
      A function to be jitted. Each of its sums is an array [most], of which the first n are filled.
    """
    return _repeated(train_step, lambda data, i, step: draw(data, step), most, sums)


def steps_on_batches(
    train_step: TrainStep, batch_sharding: Sharding, most: int, sums: Sequence[str] = CLASS_SUMS
) -> Callable[[TrainState, Sequence[Batch], jax.Array], tuple[TrainState, Sums]]:
    """Returns `steps(state, batches, n) -> (state, sums)`: steps on the first n of `most` batches.

    Arguments and sums are as for `steps_on_device`; `batch_sharding` is how each batch lies on the devices.
    """

    def one_of(stacked: Batch, i: jax.Array | int, step: jax.Array) -> Batch:
        return jax.lax.with_sharding_constraint(jax.tree.map(lambda x: x[i], stacked), batch_sharding)

    repeated = _repeated(train_step, one_of, most, sums)

    def several_steps(state: TrainState, batches: Sequence[Batch], n: jax.Array) -> tuple[TrainState, Sums]:
        return repeated(state, jax.tree.map(lambda *parts: jnp.stack(parts), *batches), n)

    return several_steps


def _repeated(
    train_step: TrainStep,
    batch_of: Callable[[Batch, jax.Array | int, jax.Array], Batch],
    most: int,
    names: Sequence[str],
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Sums]]:
    """Returns n steps, the i-th of them, counted from 0, on `batch_of(data, i, state.step)`."""

    def several_steps(state: TrainState, data: Batch, n: jax.Array) -> tuple[TrainState, Sums]:
        if most == 1:
            state, sums = train_step(state, batch_of(data, 0, state.step))
            return state, {name: x[None] for name, x in sums.items()}

        def next_one(i: jax.Array, carried: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
            state, filled = carried
            state, sums = train_step(state, batch_of(data, i, state.step))
            return state, {name: filled[name].at[i].set(x) for name, x in sums.items()}

        return jax.lax.fori_loop(0, n, next_one, (state, {name: jnp.zeros(most) for name in names}))

    return several_steps
