"""Measures memory and time of a training step against depth: with all activations kept, with blocks or groups of blocks
computed again in the backward pass (Chen et al. 2016), and with equal blocks in a loop.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from resnet_jax.lab.panels import COLOURS, Panel, Text, log_axis, short
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.recipe_files import load_config
from resnet_jax.training.build import build_model, in_form, state_maker
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.programs import recipe_step
from resnet_jax.training.resolve import filled
from resnet_jax.training.sharding import compiler_options, uncached

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS: dict[str, dict[str, Any]] = {
    "all kept": {},
    "blocks twice": {"remat": "block"},
    "loop": {"scan": True},
    "loop, blocks twice": {"scan": True, "remat": "block"},
    "loop, groups twice": {"scan": True, "remat": "stage"},
}
BATCH = 32
"""Images."""
UNITS = {"temporary": 2**20, "step_seconds": 1e-3, "compile_seconds": 1.0}


def rows(book: Notebook) -> Rows:
    """Compiles and runs training steps; returns their measures.

    Columns: `way`, `depth`, `temporary` and `state` in bytes, `compile_seconds`, `step_seconds`.
    """
    options = book.options
    depths = options.depths or ((14, 32, 110) if options.quick else (20, 56, 110, 1202))
    unrolled = 40 if options.quick else 200  # deeper only in loops, whose compile time does not depend on the depth
    found: Rows = []
    for depth in depths:
        for way, fields in WAYS.items():
            if depth > unrolled and "scan" not in fields:
                continue
            found += book.part(f"{way} {depth}", partial(measured, depth, way, fields, options.quick))
    return found


def measured(depth: int, way: str, fields: dict[str, Any], quick: bool) -> Rows:
    """Returns the row of one network, measured with the `fields` of the recipe's section `model` that a way sets."""
    size = 16 if quick else 32
    config = Config(
        ModelConfig(f"cifar_resnet{depth}", num_classes=10, **fields),
        DataConfig(image_size=size),
        optimizer=OptimizerConfig(),
        train=TrainConfig(batch_size=BATCH, ema_decay=None),
    )
    config = filled(config, load_config("digits_resnet20"))
    lowered, state, batch = step_of(config, size)
    began = time.perf_counter()
    with uncached():
        compiled = lowered.compile()
    row: dict[str, Any] = {"way": way, "depth": depth, "compile_seconds": time.perf_counter() - began}
    row["temporary"] = compiled.memory_analysis().temp_size_in_bytes
    row["state"] = sum(x.nbytes for x in jax.tree.leaves(state))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - began)
    return [row | {"step_seconds": float(np.median(times[1:]))}]


def step_of(config: Config, size: int) -> tuple[Any, Any, Any]:
    """Returns a training step, lowered but not compiled, its first state, and a batch of images `size` pixels wide."""
    model = build_model(config, 10)
    optimizer = make_optimizer(config.optimizer, lambda step: 0.01)
    state = in_form(state_maker(config, model, lambda step: 0.01)(), config)
    batch = {"image": jnp.zeros((BATCH, size, size, 3), jnp.uint8), "label": jnp.zeros(BATCH, jnp.int32)}
    batch["mirrored"] = jnp.zeros(BATCH, bool)
    step = jax.jit(recipe_step(config, model, optimizer), donate_argnums=0, compiler_options=compiler_options())
    return step.lower(state, batch), state, batch


def value(found: Rows, way: str, depth: int, name: str) -> float:
    """Returns a measure of one network in the unit of the charts; nan where it was not measured."""
    return next((row[name] / UNITS[name] for row in found if (row["way"], row["depth"]) == (way, depth)), np.nan)


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    depth = max(row["depth"] for row in found)
    kept, again = (value(found, way, depth, "temporary") for way in ("loop", "loop, blocks twice"))
    once, twice = (value(found, way, depth, "step_seconds") for way in ("loop", "loop, blocks twice"))
    slower = f"{100 * (twice / once - 1):+.0f} %"
    return (
        f"At {depth} layers a step needs {short(kept)} MiB with all activations kept, and {short(again)} MiB where "
        f"blocks are computed twice, which changes its time by {slower}.",
        f"{depth} 層の 1 ステップに必要なメモリは、活性をすべて残すと {short(kept)} MiB、ブロックを計算し直すと "
        f"{short(again)} MiB で、時間の変化は {slower} である。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns memory, time of a step and time of compilation against the depth."""
    depths = sorted({row["depth"] for row in found})

    def against_depth(axes: "Axes", name: str, label: str) -> None:
        for colour, marker, way in zip(COLOURS, "osD^v", WAYS, strict=False):
            of = sorted((row for row in found if row["way"] == way), key=lambda row: row["depth"])
            values = [row[name] / UNITS[name] for row in of]
            axes.plot([row["depth"] for row in of], values, f"{marker}-", color=colour, label=way)
        axes.set(xlabel="layers", ylabel=label, xscale="log", yscale="log")
        log_axis(axes.xaxis, depths)
        log_axis(axes.yaxis)

    def over(way: str, name: str) -> str:
        return " → ".join(short(value(found, way, depth, name)) for depth in depths)

    span, span_ja = " → ".join(map(str, depths)) + " layers", " → ".join(map(str, depths)) + " 層"
    memory, cheap = (over(way, "temporary") for way in ("loop", "loop, blocks twice"))
    step, compiling = over("loop", "step_seconds"), over("loop", "compile_seconds")
    return [
        Panel(
            (f"{span}: memory {memory} MiB, with blocks twice {cheap} MiB",
             f"{span_ja}: メモリ {memory} MiB、再計算では {cheap} MiB"),
            partial(against_depth, name="temporary", label=f"memory, MiB (batch {BATCH})"),
        ),
        Panel(
            (f"{span}: a step in a loop takes {step} ms",
             f"{span_ja}: ループの 1 ステップは {step} ms"),
            partial(against_depth, name="step_seconds", label="time of a step, ms"),
        ),
        Panel(
            (f"{span}: a loop compiles in {compiling} s",
             f"{span_ja}: ループのコンパイルは {compiling} s"),
            partial(against_depth, name="compile_seconds", label="time to compile, s"),
        ),
    ]  # fmt: skip
