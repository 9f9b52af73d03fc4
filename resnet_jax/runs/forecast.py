"""What a run will need, read from its compiled step: nothing is allocated and no data is read."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from resnet_jax.config import Config, InputError, known, sides
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.loader import checked_label
from resnet_jax.models.registry import create_model
from resnet_jax.training.build import (
    build_model,
    data_of,
    images_per_statistic,
    in_form,
    model_with_parts,
    state_maker,
)
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.parts import NO_PARTS, Parts
from resnet_jax.training.programs import recipe_step
from resnet_jax.training.resolve import resolve
from resnet_jax.training.sharding import (
    batch_sharding,
    check_batch,
    compiler_options,
    make_mesh,
    replicated,
    state_sharding,
)

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64}
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def forecast(config: Config, devices: int | None = None, parts: Parts = NO_PARTS) -> dict[str, Any]:
    """Compiles the step of a recipe from shapes, for this number of the devices that JAX sees, None for all.

    Returns:
      `devices`, `parameters` (their number), `flops` (of a step, on all devices, as XLA counts them), in bytes on each
      device `state` (`params`, `batch_stats`, `opt_state`, `ema`), `batch`, `temporary` (activations and all else that
      lives within a step) and `total`, and `collectives`: name -> bytes of a step that each device puts out.

    Raises:
      InputError: the recipe contradicts itself or does not fit the devices, or its strategy is pmap.
    """
    if config.parallel.strategy == "pmap":
        raise InputError("a plan is made of one program, and pmap has several: plan with --parallel.strategy shard_map")
    config = resolve(config, parts, read=parts.dataset is not None).config
    mesh = make_mesh(devices, config.parallel.fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    schedule = optax.constant_schedule(0.1)
    images_per_statistic(config, mesh.size)
    dataset = None if parts.dataset is None else data_of(config, parts)
    if dataset is not None or parts.model is not None:
        model, parts = model_with_parts(config, parts, len((dataset or data_of(config, parts)).class_names))
    else:
        named: Any = create_model(known(config.model.name, "model.name"))
        model = build_model(config, config.model.num_classes or named.num_classes)
    new_state = state_maker(config, model, schedule, parts.optimizer)
    shapes = jax.eval_shape(lambda: in_form(new_state(), config))
    places = state_sharding(shapes, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    count, split, channels = config.train.batch_size, batch_sharding(mesh), config.data.channels
    pixels = jnp.uint8 if channels == 3 else jnp.float32
    batch = {
        "image": jax.ShapeDtypeStruct((count, *sides(config.data.image_size), channels), pixels, sharding=split),
        "label": jax.tree.map(partial(shape_of_batch, count=count, sharding=split), label_of(dataset)),
        "mirrored": jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=split),
    }
    step = recipe_step(
        config, model, make_optimizer(config.optimizer, schedule, own=parts.optimizer), mesh, parts=parts
    )
    compiled = partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    program = compiled(step, out_shardings=(places, replicated(mesh))).lower(state, batch).compile()
    held = {name: bytes_on_a_device(getattr(state, name)) for name in ("params", "batch_stats", "opt_state", "ema")}
    images, temporary = bytes_on_a_device(batch), getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    return {
        "devices": mesh.size,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        "flops": (program.cost_analysis() or {}).get("flops", 0.0) * mesh.size,
        "state": held,
        "batch": images,
        "temporary": temporary,
        "total": sum(held.values()) + images + temporary,
        "collectives": collective_bytes(program.as_text() or ""),
    }


def label_of(dataset: Dataset | None) -> Any:
    """Returns the label of one example of the user's own data; of the recipe's the number of a class."""
    if dataset is None:
        return np.int32(0)
    return checked_label(dataset.train[0][1], dataset.label_classes(), dataset.train, 0)


def shape_of_batch(value: np.ndarray, count: int, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """Returns shape and type of `count` such values."""
    return jax.ShapeDtypeStruct((count, *value.shape), value.dtype, sharding=sharding)


def bytes_on_a_device(tree: Any) -> int:
    """Returns how many bytes arrays with shardings take on a device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def collective_bytes(text: str) -> dict[str, int]:
    """Returns bytes that each kind of collective of a compiled program's text results in on a device."""
    found = dict.fromkeys(COLLECTIVES, 0)
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            found[match[2]] += sum(
                math.prod(int(n) for n in dims.split(",") if n) * BITS.get(kind, 32) // 8 for kind, dims in shapes
            )
    return {name: count for name, count in found.items() if count}


def parse_memory(text: str) -> int:
    """Returns the bytes that a text such as `80GiB` means.

    Raises:
      InputError: it is no number with a unit.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?(MB|GB|MiB|GiB)", text)
    if match is None:
        raise InputError(f"--memory {text}: give a number and MB, GB, MiB or GiB, such as 80GiB")
    return int(float(match[1]) * UNITS[match[2]])


def in_bytes(count: float) -> str:
    """Returns a number of bytes in the unit that fits, such as `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def format_plan(needs: dict[str, Any]) -> str:
    """Returns the table that `resnet-jax plan` prints."""
    held = {f"  {name}": count for name, count in needs["state"].items()}
    held |= {"  batch": needs["batch"], "  activations and the like": needs["temporary"], "together": needs["total"]}
    rows = [
        f"{needs['parameters']:,} parameters, {needs['flops'] / 1e9:,.1f} GFLOP a step on {needs['devices']} devices",
        "memory of each device, in a step compiled for CPUs; an accelerator's compiler may use less or more:",
        *(f"{name:<28}{in_bytes(count):>12}" for name, count in held.items()),
    ]
    if needs["collectives"]:
        rows.append("what each device exchanges in a step:")
    rows += [f"  {name:<26}{in_bytes(count):>12}" for name, count in needs["collectives"].items()]
    if "fits" in needs:
        rows.append(f"{'fits into' if needs['fits'] else 'does NOT fit into'} {needs['memory'] / 2**30:,.1f} GiB")
    return "\n".join(rows)
