"""The training step with the classical `pmap` around it, in place of `jit` or `shard_map`."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.training.metrics import Sums
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import Batch, TrainStep


def pmap_step(update: TrainStep, mesh: Mesh, prepare: Callable[[Batch, jax.Array], Batch]) -> TrainStep:
    """Returns `step(state, data) -> (state, sums)`, which compiles itself.

    Args:
      update: of `make_update` with the axis name `data`.
      prepare: `prepare(data, step) -> batch`, which draws, augments and normalises the whole batch of a step.
    """
    devices = mesh.size
    each = jax.pmap(
        update,
        axis_name="data",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )
    by_device, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @partial(jax.jit, out_shardings=by_device)
    def split(data: Batch, step: jax.Array) -> Batch:
        return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), prepare(data, step))

    def step(state: TrainState, data: Batch) -> tuple[TrainState, Sums]:
        updated = each(state, split(data, state.step))
        if whole.is_fully_addressable:
            return updated
        return jax.tree.map(of_all_processes, updated)  # pmap gives each process an array of its own devices

    def of_all_processes(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(x.shape, whole, [shard.data for shard in x.addressable_shards])

    return step
