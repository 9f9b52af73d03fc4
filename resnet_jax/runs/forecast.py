"""What a run will need, read from its compiled step: nothing is allocated and no data is read."""

import dataclasses
import math
import re
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from resnet_jax.config import Config, InputError, known, sides
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.folders import classes_in, table_dataset
from resnet_jax.data.loader import checked_label
from resnet_jax.files import in_bucket, path_of
from resnet_jax.models.registry import default_classes
from resnet_jax.ops import use_custom_kernels
from resnet_jax.runs.tpu_target import CHIPS, bounds, largest_batch, parse_target, target_mesh
from resnet_jax.training.build import (
    build_model,
    data_of,
    images_per_statistic,
    in_form,
    model_with_parts,
    state_maker,
)
from resnet_jax.training.check_tracing import counted
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


def forecast(
    config: Config, devices: int | None = None, parts: Parts = NO_PARTS, target: str | None = None
) -> dict[str, Any]:
    """Compiles the step of a recipe from shapes, for this number of the devices that JAX sees, None for all; or for the
    TPUs of a target such as `v5e:4x4`, which need not be there.

    Returns:
      `devices`, `parameters` (their number), `classes` (their number, None of a model of the user's own) with
      `classes_from`, `flops` (of a step, on all devices, as `flops_of` counts them), in bytes on each device `state`
      (`params`, `batch_stats`, `opt_state`, `ema`), `batch`, `temporary` (activations and all else that lives within a
      step) and `total`, whether the training images would be kept on each device beside it (`data_on_device`), and
      `collectives`: name -> bytes of a step that each device puts out. For a target also, of one
      chip, `flops_a_chip` and `bytes_accessed` (as its compiler counts them), `peak` (bytes), `compile_seconds`, and
      `bounds`.

    Raises:
      InputError: the recipe contradicts itself or does not fit the devices, or its strategy is pmap.
    """
    if config.parallel.strategy == "pmap":
        raise InputError("a plan is made of one program, and pmap has several: plan with --parallel.strategy shard_map")
    config = resolve(config, parts, read=parts.dataset is not None, fetch=False).config
    fsdp = config.parallel.fsdp
    mesh = make_mesh(devices, fsdp) if target is None else target_mesh(target, fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    schedule = optax.constant_schedule(0.1)
    images_per_statistic(config, mesh.size)
    dataset = None if parts.dataset is None else data_of(config, parts)
    classes: int | None
    if dataset is not None or parts.model is not None:
        model, parts = model_with_parts(config, parts, len((dataset or data_of(config, parts)).class_names))
        classes, classes_from = getattr(model, "num_classes", None), "of your own parts"
    else:
        classes, classes_from = classes_of(config)
        model = build_model(config, classes)
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

    def new_step() -> Any:
        return recipe_step(
            config, model, make_optimizer(config.optimizer, schedule, own=parts.optimizer), mesh, parts=parts
        )

    options = compiler_options() if target is None else {}
    compiled = partial(jax.jit, donate_argnums=0, compiler_options=options)
    lowered = compiled(new_step(), out_shardings=(places, replicated(mesh))).lower(state, batch)
    began = time.perf_counter()
    program = lowered.compile()
    held = {name: bytes_on_a_device(getattr(state, name)) for name in ("params", "batch_stats", "opt_state", "ema")}
    images, temporary = bytes_on_a_device(batch), getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    needs: dict[str, Any] = {
        "devices": mesh.size,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        "classes": classes,
        "classes_from": classes_from,
        "flops": flops_of(new_step(), state, batch),
        "state": held,
        "batch": images,
        "temporary": temporary,
        "total": sum(held.values()) + images + temporary,
        "data_on_device": bool(config.data.on_device),
        "collectives": collective_bytes(program.as_text() or ""),
    }
    if target is not None:
        costs, memory = program.cost_analysis() or {}, program.memory_analysis()
        assert memory is not None
        needs |= {"flops_a_chip": costs.get("flops", 0.0), "bytes_accessed": costs.get("bytes accessed", 0.0)}
        needs |= {"peak": memory.peak_memory_in_bytes, "compile_seconds": time.perf_counter() - began}
        needs |= {"target": target, "bounds": bounds(needs, target)}
    return needs


def classes_of(config: Config) -> tuple[int, str]:
    """Returns how many classes the model of a recipe has, and in a few words who says so: the recipe, the data where it
    lies on this machine, or nobody.

    Raises:
      InputError: the data is there and cannot be read.
    """
    kind, _, rest = config.data.dataset.partition(":")
    if config.model.num_classes is not None:
        return config.model.num_classes, "by model.num_classes"
    if config.data.dataset == "synthetic":
        return config.data.synthetic_classes, "by data.synthetic_classes"
    path = path_of(rest, "data.dataset") if kind in ("folder", "csv") and rest else None
    if path is not None and not in_bucket(path) and path.exists():
        names = table_dataset(path).class_names if kind == "csv" else classes_in(path)
        if len(names) > 1:
            return len(names), f"of {config.data.dataset}"
    return default_classes(known(config.model.name, "model.name")), "assumed; --model.num_classes gives another number"


def flops_of(step: Any, state: Any, batch: Any) -> int:
    """Returns the floating-point operations of a step: two for each multiply-add of its convolutions and matrix
    products, forward, backward and where something is computed again, on all devices together.

    They are those of the plain operations, whatever the custom kernels make of them, with padding and without the holes
    of strided gradients: 6 x the model's multiply-adds x images, less the gradient for the pixels, which nobody needs.

    Args:
      step: a step that was not traced before.
      state, batch: what it takes, or shapes.
    """
    with use_custom_kernels(False):
        traced = jax.make_jaxpr(step)(state, batch)
    return 2 * sum(counted(getattr(traced, "jaxpr", traced)).values())


def largest_batch_of(config: Config, target: str, parts: Parts = NO_PARTS) -> int:
    """Returns the largest number of images a chip that fits, found by compiling the step again and again."""
    kind, axes = parse_target(target)

    def peak_of(images: int) -> float | None:
        batch = images * math.prod(axes) * config.train.accumulate_steps
        try:
            train = dataclasses.replace(config.train, batch_size=batch)
            return forecast(dataclasses.replace(config, train=train), None, parts, target)["peak"]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise

    return largest_batch(peak_of, CHIPS[kind].memory) * config.train.accumulate_steps


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


def giga(count: float) -> str:
    """Returns a number in units of 10**9, to a tenth, or below 1 to two digits."""
    return f"{count / 1e9:,.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def format_plan(needs: dict[str, Any]) -> str:
    """Returns the table that `resnet-jax plan` prints."""
    held = {f"  {name}": count for name, count in needs["state"].items()}
    held |= {"  batch": needs["batch"], "  activations and the like": needs["temporary"], "together": needs["total"]}
    compiler = (
        "compiled for CPUs; an accelerator's compiler may use less or more"
        if "target" not in needs
        else f"by the TPU's own compiler, for {needs['target']}"
    )
    classes = "" if needs["classes"] is None else f" with {needs['classes']:,} classes ({needs['classes_from']})"
    on = "1 device" if needs["devices"] == 1 else f"{needs['devices']} devices"
    counted_as = "2 for each multiply-add of convolutions and matrix products"
    rows = [
        f"{needs['parameters']:,} parameters{classes}",
        f"{giga(needs['flops'])} GFLOP a step on {on}: {counted_as}",
        f"memory of each device, in a step {compiler}:",
        *(f"{name:<28}{in_bytes(count):>12}" for name, count in held.items()),
    ]
    if needs["data_on_device"]:
        rows.append("beside it training images of less than 1 GiB are kept on each device, but for --data.no_on_device")
    if needs["collectives"]:
        rows.append("what each device exchanges in a step:")
    rows += [f"  {name:<26}{in_bytes(count):>12}" for name, count in needs["collectives"].items()]
    if "bounds" in needs:
        found, chip = needs["bounds"], needs["bounds"]["chip"]
        fits = "fits into" if found["fits"] else "does NOT fit into"
        rows += [
            f"peak of a chip {in_bytes(needs['peak'])}: {fits} the {in_bytes(found['hbm'])} of a {chip}",
            f"a step of a chip: {needs['flops_a_chip'] / 1e12:,.3f} TFLOP, {needs['bytes_accessed'] / 1e9:,.2f} GB",
            f"at least {found['seconds'] * 1e3:.2f} ms a step, limited by {found['limit']} (compute "
            f"{found['seconds_compute'] * 1e3:.2f} ms, memory {found['seconds_memory'] * 1e3:.2f} ms), by the chip's "
            f"published rates; compiled in {needs['compile_seconds']:.0f} s",
        ]
    if "largest_batch" in needs:
        each = needs["largest_batch"]
        rows.append(f"the largest batch that fits: {each} images a chip, {each * needs['devices']:,} in all")
    if "fits" in needs:
        rows.append(f"{'fits into' if needs['fits'] else 'does NOT fit into'} {needs['memory'] / 2**30:,.1f} GiB")
    return "\n".join(rows)
