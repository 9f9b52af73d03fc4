"""Measures models on this machine: images a second of inference and training, memory, multiply-adds."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resnet_jax.config import InputError, Size
from resnet_jax.models.registry import (
    MODELS,
    channels_of,
    cost,
    create_model,
    default_classes,
    dtype_of,
    list_models,
    stride_of,
)
from resnet_jax.output import first_line
from resnet_jax.predict.predictor import make_forward
from resnet_jax.training.sharding import compiler_options, memory_of, uncached
from resnet_jax.training.state import TrainState, create_state
from resnet_jax.training.step import make_train_step
from resnet_jax.weights.tags import tags_of

OPTIMIZER = optax.sgd(1e-3, momentum=0.9, nesterov=True)
WARMUP = 2
"""Calls before those that are timed."""


def usual_size(name: str) -> Size:
    """Returns the image size of a model's default weights, else 32 for those for CIFAR and 224 for others."""
    tags = tags_of(name)
    return tags[0].preprocessing.image_size if tags else 32 if name.startswith("cifar_") else 224


def models_of(words: tuple[str, ...]) -> list[str]:
    """Returns the models that names and shell patterns mean, each once, in their order.

    Raises:
      InputError: one of them means none; the message names the nearest.
    """
    found: dict[str, None] = {}
    for word in words:
        names = [word] if word in MODELS else list_models(word)
        if not names:
            create_model(word)  # raises, with the nearest names
        found |= dict.fromkeys(names)
    return list(found)


def bench(
    name: str,
    batch: int,
    size: int | None = None,
    dtype: str = "float32",
    kinds: tuple[str, ...] = (),
    repeats: int = 10,
) -> dict[str, Any]:
    """Measures a model on the first device, with random parameters and the same random images in each call.

    Args:
      name: of the model.
      batch: images at once.
      size: side of an image in pixels; None takes `usual_size`.
      dtype: `float32` or `bfloat16`, of activations and convolutions.
      kinds: `inference` (batch normalisation folded, as to predict) and `training` (forward, backward, and an update of
        SGD with momentum); none means both.
      repeats: calls that are timed, after `WARMUP` others, each waited for.

    Returns:
      `name`, `image_size`, `batch`, `dtype`, `device`, `parameters`, `gmacs` (10**9 multiply-adds of an image), and of
      each kind a dict: `images_per_second` (the median), `quartiles` (of the same), `n` (calls), `memory` (bytes of
      arguments, results and temporaries of the compiled program; None where the platform does not say), and
      `compile_seconds` (without JAX's cache of programs).

    Raises:
      InputError: there is no such model, or images are smaller than its stride.
    """
    side = size or usual_size(name)
    model: Any = create_model(name, num_classes=default_classes(name), dtype=jnp.dtype(dtype))
    if hasattr(model, "image_size"):
        model = model.clone(image_size=side)
    if isinstance(side, int) and side < stride_of(model):
        raise InputError(f"--image_size {side} is below the stride of {name}, which is {stride_of(model)}")
    height, width = (side, side) if isinstance(side, int) else side
    shape = (height, width, channels_of(model))
    images = jax.random.normal(jax.random.key(0), (batch, *shape), dtype_of(model))
    state = create_state(model, OPTIMIZER, jax.random.key(0, impl="rbg"), shape)
    parameters, macs = cost(model, side)
    row = {"name": name, "image_size": side, "batch": batch, "dtype": dtype, "device": jax.devices()[0].device_kind}
    row |= {"parameters": parameters, "gmacs": macs / 1e9}
    for kind, make in PROGRAMS.items():
        if not kinds or kind in kinds:
            row[kind] = measured(make(model, state, images), batch, repeats)
    return row


Call = Callable[[], Any]


def inference(model: nn.Module, state: TrainState, images: jax.Array) -> tuple[Call, int | None, float]:
    """Returns a call of the forward pass, its memory in bytes, and the seconds it took to compile."""
    forward = make_forward(model, state.variables)
    function, given = (forward.func, forward.args) if isinstance(forward, partial) else (forward, ())
    program, seconds = compiled(function, *given, images)
    memory = memory_of(program)
    if memory is not None and not given:  # the parameters are constants of the program
        memory += sum(leaf.nbytes for leaf in jax.tree.leaves(state.variables))
    return lambda: program(*given, images), memory, seconds


def training(model: nn.Module, state: TrainState, images: jax.Array) -> tuple[Call, int | None, float]:
    """Returns a call of a training step, which takes the state's place, its memory in bytes, and the seconds it took to
    compile.
    """
    batch = {"image": images, "label": jnp.zeros(len(images), jnp.int32)}
    step = jax.jit(make_train_step(model, OPTIMIZER), donate_argnums=0, compiler_options=compiler_options())
    program, seconds = compiled(step, state, batch)
    states = [state]

    def call() -> Any:
        states[0], sums = program(states[0], batch)
        return states[0], sums

    return call, memory_of(program), seconds


PROGRAMS = {"inference": inference, "training": training}
"""What is measured: kind -> function that makes it from a model, its state and images."""


def compiled(function: Any, *given: Any) -> tuple[Any, float]:
    """Returns a jitted function, compiled for these arguments without JAX's cache, and the seconds that took."""
    with uncached():
        start = time.perf_counter()
        return function.lower(*given).compile(), time.perf_counter() - start


def measured(made: tuple[Call, int | None, float], batch: int, repeats: int) -> dict[str, Any]:
    """Returns what `bench` says of a kind."""
    call, memory, seconds = made
    for _ in range(WARMUP):
        jax.block_until_ready(call())
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        rates.append(batch / (time.perf_counter() - start))
    first, median, third = statistics.quantiles(rates, n=4, method="inclusive") if repeats > 1 else rates * 3
    found = {"images_per_second": median, "quartiles": [first, third], "n": repeats, "memory": memory}
    return found | {"compile_seconds": seconds}


def bench_or_reason(name: str, *given: Any) -> dict[str, Any]:
    """Returns what `bench` does, or `name` and `error`, the reason, where it ends in one, such as of memory."""
    try:
        return bench(name, *given)
    except Exception as error:  # whatever ends one of many
        return {"name": name, "error": first_line(error)}
    finally:
        jax.clear_caches()


def format_bench(row: dict[str, Any]) -> str:
    """Returns the lines that `resnet-jax bench` prints of a model."""
    if "error" in row:
        return f"{row['name']}: not measured: {row['error']}"
    side = row["image_size"] if isinstance(row["image_size"], int) else "x".join(map(str, row["image_size"]))
    what = f"{row['parameters']:,} parameters, {row['gmacs']:.3g} GMACs at {side} pixels"
    lines = [f"{row['name']}: {what}, batch {row['batch']}, {row['dtype']}, {row['device']}"]
    for kind in PROGRAMS:
        if kind in row:
            found = row[kind]
            first, third = found["quartiles"]
            memory = "" if found["memory"] is None else f", {found['memory'] / 2**20:,.1f} MiB"
            rate = f"{found['images_per_second']:>12,.1f} images/s"
            spread = f"(quartiles {first:,.1f} to {third:,.1f}, n = {found['n']})"
            lines.append(f"  {kind:<10}{rate} {spread}{memory}, compiled in {found['compile_seconds']:.1f} s")
    return "\n".join(lines)
