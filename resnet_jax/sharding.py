"""Devices: the mesh, how arrays lie on it, and the start of several processes."""

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import InputError


def start_processes(distributed: str) -> None:
    """Joins the processes of a cluster if `distributed` is `auto`; call before any other use of JAX.

    Raises:
      InputError: JAX finds no cluster to join.
    """
    if distributed == "off" or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"parallel.distributed auto: {error}; give --parallel.distributed off on one host") from error


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh with one axis, `data`, over the first so many devices of all processes; None for all.

    Raises:
      InputError: there are not so many.
    """
    present = jax.devices()
    if devices is not None and not 0 < devices <= len(present):
        raise InputError(f"parallel.devices {devices}: there are {len(present)} devices of kind {present[0].platform}")
    return Mesh(np.asarray(present[:devices]), ("data",))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError, with the nearest size that works, where a batch does not divide over the devices."""
    devices = mesh.size
    if batch_size % devices:
        lower, upper = batch_size // devices * devices, (batch_size // devices + 1) * devices
        nearest = upper if lower == 0 or upper - batch_size < batch_size - lower else lower
        raise InputError(
            f"train.batch_size {batch_size} does not divide over {devices} devices; the nearest that does is {nearest}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, P("data"))


@cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit` that are worth setting on the default platform.

    On a CPU: Eigen's convolutions in place of YNNPACK's, which were slower wherever we measured
    (`benchmarks/train_step.py`). Empty where this version of XLA does not know the option.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: jax.numpy.zeros(()), compiler_options=options)()
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return options


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's share of a batch, as global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in batch.items()}
