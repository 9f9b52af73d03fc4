"""`plan --target v5e:4x4`: the step compiled for TPUs that are not there, and bounds from what is published of them."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_jax.typed import InputError


@dataclass(frozen=True)
class Chip:
    """What is published of a chip.

    Attributes:
      kind: its generation, as accelerator types of Google Cloud are called.
      flops: peak of bfloat16, a second.
      memory: bytes of HBM.
      bandwidth: bytes of HBM a second.
      axes: of its topologies.
    """

    kind: str
    flops: float
    memory: float
    bandwidth: float
    axes: int


CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1200e9, 3),
    "v5e": Chip("v5litepod", 197e12, 16e9, 819e9, 2),
    "v5p": Chip("v5p", 459e12, 95e9, 2765e9, 3),
    "v6e": Chip("v6e", 918e12, 32e9, 1638e9, 2),
}
"""Source: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, the tables of key specifications."""


def parse_target(target: str) -> tuple[str, tuple[int, ...]]:
    """Returns generation and topology of a target such as `v5e:4x4`.

    Raises:
      InputError: it is none, or no slice of this generation.
    """
    kind, _, shape = target.partition(":")
    if kind not in CHIPS or re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", shape) is None:
        raise InputError(
            f"--target {target}: give a generation of TPUs ({', '.join(CHIPS)}) and a topology, such as v5e:4x4"
        )
    axes = tuple(int(n) for n in shape.split("x"))
    if len(axes) != CHIPS[kind].axes:
        example = "x".join(["2", "2", "1"][: CHIPS[kind].axes])
        raise InputError(
            f"--target {target}: a topology of {kind} has {CHIPS[kind].axes} axes, such as {kind}:{example}"
        )
    return kind, axes


def prepare_environment(target: str) -> None:
    """Sets what the TPU's compiler reads, so that it asks no machine of Google's; call before JAX is imported.

    Raises:
      InputError: the target is none.
    """
    kind, axes = parse_target(target)
    chips = int(np.prod(axes))
    cores = chips * 2 if kind in ("v4", "v5p") else chips
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{CHIPS[kind].kind}-{cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is held, so two plans may be made at once
    }


def target_mesh(target: str, fsdp: int = 1) -> Any:
    """Returns a mesh over the chips of a target, as `make_mesh` does over devices that are there.

    Raises:
      InputError: the TPU's compiler is not installed, or knows no such topology.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except Exception as error:  # of several types, where libtpu is missing or refuses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"--target {target}: JAX cannot compile for it here ({reason}). It needs the TPU's compiler, on Linux: "
            "pip install 'jax[tpu]'; no TPU is needed"
        ) from error
    chips: Any = np.asarray(description.devices)
    if len(chips) % fsdp:
        raise InputError(f"parallel.fsdp {fsdp}: {len(chips)} chips do not divide by it")
    return Mesh(chips.reshape(-1, fsdp), ("data", "fsdp")) if fsdp > 1 else Mesh(chips, ("data",))


def bounds(needs: dict[str, Any], target: str) -> dict[str, Any]:
    """Returns what a chip's published rates say of a step: a lower bound of its seconds, and whether it fits.

    Args:
      needs: of `forecast`, with `flops_a_chip`, `bytes_accessed` and `peak`, of one chip.

    Returns:
      `chip`, `hbm` (bytes), `fits`, `seconds_compute`, `seconds_memory`, `seconds` (the larger of both), and `limit`:
      `compute` or `memory`.
    """
    kind, _ = parse_target(target)
    chip = CHIPS[kind]
    compute, memory = needs["flops_a_chip"] / chip.flops, needs["bytes_accessed"] / chip.bandwidth
    return {
        "chip": kind,
        "hbm": chip.memory,
        "fits": needs["peak"] <= chip.memory,
        "seconds_compute": compute,
        "seconds_memory": memory,
        "seconds": max(compute, memory),
        "limit": "compute" if compute > memory else "memory",
    }


def largest_batch(peak_of: Callable[[int], float | None], memory: float, most: int = 4096) -> int:
    """Returns the largest number of images a chip whose peak fits into a chip's memory, a power of two or halfway
    between two; 0 where none fits.

    Args:
      peak_of: bytes for a number of images a chip; None where it cannot be compiled, as for want of memory.
      memory: bytes of a chip.
    """

    def fits(images: int) -> bool:
        peak = peak_of(images)
        return peak is not None and peak <= memory

    low, high = 0, 8
    while high <= most and fits(high):
        low, high = high, 2 * high
    middle = (low + high) // 2
    return middle if low and high <= most and fits(middle) else low
