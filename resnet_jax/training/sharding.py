"""Devices: the mesh, and how arrays lie on it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import InputError
from resnet_jax.models.stacking import EQUAL
from resnet_jax.ops import sharded_batch
from resnet_jax.training.state import PyTree

Function = TypeVar("Function", bound=Callable[..., Any])


def run_in_caller() -> None:
    """Has a CPU run programs in the thread that calls them: what the main thread frees, glibc can keep (`cli.MEMORY`).

    JAX would run them in a thread of its own, whose large blocks glibc takes from the system anew each time. Call
    before any other use of JAX; programs over several devices run as before.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh(devices: int | None = None, fsdp: int = 1) -> Mesh:
    """Returns a mesh with the axis `data` over the first devices, of that number, of all processes; None for all.

    Args:
      fsdp: size of a second axis, `fsdp`, over which the state is spread; 1 for none.

    Raises:
      InputError: there are fewer, or they do not divide by `fsdp`.

    Example:
      >>> rj.make_mesh(1).axis_names
      ('data',)
    """
    present = jax.devices()
    if devices is not None and not 0 < devices <= len(present):
        raise InputError(f"parallel.devices {devices}: there are {len(present)} devices of kind {present[0].platform}")
    chosen = np.asarray(present[:devices])
    if len(chosen) % fsdp:
        raise InputError(f"parallel.fsdp {fsdp}: {len(chosen)} devices do not divide by it")
    return Mesh(chosen.reshape(-1, fsdp), ("data", "fsdp")) if fsdp > 1 else Mesh(chosen, ("data",))


def uncached_where_it_hangs(mesh: Mesh) -> AbstractContextManager[None]:
    """Returns the context `uncached` for a state that is spread over a CPU's devices, else one that changes nothing.

    From the cache such a program hangs (jaxlib 0.10.2): devices wait for each other in different collectives until XLA
    ends the process. It may be that their order is not kept.
    """
    spread = "fsdp" in mesh.axis_names and mesh.devices.flat[0].platform == "cpu"
    return uncached() if spread else nullcontext()


@contextmanager
def uncached() -> Iterator[None]:
    """Has programs compiled anew, and not kept in JAX's compilation cache."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises InputError, with the nearest size that works, where a batch does not divide over devices and `parts`."""
    each = mesh.size * parts
    if batch_size % each:
        lower, upper = batch_size // each * each, (batch_size // each + 1) * each
        nearest = upper if lower == 0 or upper - batch_size < batch_size - lower else lower
        over = f"{mesh.size} devices" + (f" in {parts} parts" if parts > 1 else "")
        raise InputError(
            f"train.batch_size {batch_size} does not divide over {over}; the nearest that does is {nearest}"
        )


def sharded_over(mesh: Mesh | None) -> Callable[[Function], Function]:
    """Returns `ops.sharded_batch`, as a decorator, for a step over the devices of a mesh."""
    if mesh is None or mesh.size == 1:
        return sharded_batch(False)
    return sharded_batch(platform=mesh.devices.flat[0].platform)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding by which every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding by which the first axis is split over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


SPREAD_ABOVE = 2**14
"""Values that an array needs to be spread over the axis `fsdp`; smaller ones cost more in traffic than in room."""


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """Returns how each array of a state lies on a mesh: along its largest axis that divides by `fsdp`, or whole
    everywhere.
    """
    parts = mesh.shape.get("fsdp", 1)

    def place(path: Any, array: Any) -> NamedSharding:
        stacked = any(getattr(part, "key", None) == EQUAL for part in path)  # a loop takes one block at a time
        axes = [axis for axis, size in enumerate(array.shape) if size % parts == 0 and axis >= stacked]
        if parts == 1 or not axes or array.size < SPREAD_ABOVE:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, P(*[None] * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def compiler_options() -> dict[str, str | bool]:
    """Returns options for `jax.jit` that are worth setting on the default platform.

    On a CPU: Eigen's convolutions in place of YNNPACK's, which were slower wherever we measured
    (`benchmarks/train_step.py`); and the barriers of rematerialisation stay, without which XLA finds the second
    computation equal to the first and keeps that. Empty where this version of XLA does not know the options.
    """
    ynnpack = ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE")
    return known_on_cpu(ynnpack, ("xla_disable_hlo_passes", "cse_barrier_expander"))


@cache
def known_on_cpu(*options: tuple[str, str | bool]) -> dict[str, str | bool]:
    """Returns options for `jax.jit` if the default platform is a CPU and this version of XLA knows all of them; else
    none.
    """
    if jax.default_backend() != "cpu":
        return {}

    def trial() -> jax.Array:
        return jax.numpy.zeros(())

    try:
        jax.jit(trial, compiler_options=dict(options))()
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return dict(options)


def memory_of(program: Any) -> int | None:
    """Returns bytes of arguments, results and temporaries of a compiled program, what is reused once; None where the
    platform does not say.
    """
    found = program.memory_analysis()
    if found is None:
        return None
    parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(parts) - found.alias_size_in_bytes)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns a batch, or this process's share of it, as global arrays [batch, ...] split over a mesh.

    Args:
      batch: arrays of NumPy, such as `{"image", "label"}`, with the same first axis.
      mesh: of `make_mesh`.

    Raises:
      InputError: the examples do not divide over this process's devices.

    Example:
      >>> batch = {"image": np.zeros((8, 4, 4, 3), np.uint8), "label": np.arange(8)}
      >>> rj.shard_batch(batch, rj.make_mesh(1))["image"].shape
      (8, 4, 4, 3)
    """
    sharding, devices = batch_sharding(mesh), len(mesh.local_devices)
    for array in jax.tree.leaves(batch):
        if np.shape(array)[:1] and len(array) % devices:
            raise InputError(
                f"a batch of {len(array)} examples does not divide over {devices} devices: leave out the last "
                f"{len(array) % devices}, or, to evaluate, add some and mark them with a `mask` that is false"
            )
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays that are the same in every process, whole on every device of the mesh."""
    return put(tree, replicated(mesh))


def put_state(state: Any, mesh: Mesh) -> Any:
    """Returns a first state, the same in every process, as `state_sharding` says."""
    return put(state, state_sharding(state, mesh))


def put(tree: Any, shardings: Any) -> Any:
    """Returns arrays that every process has whole, on devices as shardings say: one for all, or one for each."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def give_each_device_its_part(array: Any, sharding: Sharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: give_each_device_its_part(x, shardings), tree)
    return jax.tree.map(give_each_device_its_part, tree, shardings)


def broadcast_from_first(number: int) -> int:
    """Returns the number that the first process gives, in all of them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
