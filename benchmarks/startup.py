"""Seconds until work begins: imports, init, compilation, the first step of the digits recipe; cold and warm cache.

Each measurement is a fresh process. Cold has an empty compilation cache, warm the one that a cold run has left.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.measure import options, print_table, row, write

TIMER = """
import os, time
began = float(os.environ.setdefault("BENCHMARK_BEGAN", str(time.time())))
def tell(**numbers):
    import json
    print("TIMES", json.dumps(numbers))
"""
IMPORTS = {
    "import jax, flax, optax": "import jax, flax, flax.linen, optax\ntell(seconds=time.time() - began)",
    "import resnet_jax and all its names after them": (
        "import jax, flax, flax.linen, optax\nmiddle = time.perf_counter()\n"
        "from resnet_jax import Config, create_model, grad_cam, load_pretrained, make_forward\n"
        "tell(seconds=time.perf_counter() - middle)"
    ),
}
DEPTH = """
import jax, jax.numpy as jnp
from resnet_jax.config import *
from resnet_jax.training.sharding import compiler_options
from resnet_jax.training.build import build_model, in_form, state_maker
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.programs import recipe_step
from resnet_jax.training.resolve import resolve
config = Config(model=ModelConfig(name={name!r}, {more}), data=DataConfig(image_size=32, on_device=False),
                train=TrainConfig(batch_size=8, ema_decay=None), augment=AugmentConfig(crop="none"))
config = resolve(config).config
model = build_model(config, 10)
schedule = lambda step: 0.1
jax.devices()
start = time.perf_counter()
state = jax.block_until_ready(in_form(state_maker(config, model, schedule)(), config))
made = time.perf_counter()
batch = {{"image": jnp.zeros((8, 32, 32, 3), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}}
step = jax.jit(recipe_step(config, model, make_optimizer(config.optimizer, schedule)), donate_argnums=0,
               compiler_options=compiler_options())
lowered = step.lower(state, batch)
traced = time.perf_counter()
compiled = lowered.compile()
done = time.perf_counter()
tell(init=made - start, trace=traced - made, compile=done - traced)
"""
DIGITS = """
import os, sys, tempfile
from resnet_jax import cli
command = ["train", "--workdir", "run"]
if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    cli.run(command)  # the command replaces its process by this program again
os.chdir(tempfile.mkdtemp())
import jax
import resnet_jax.training.loop as loop
compiled = []
jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event) if "cache_misses" in event else None)
make = loop.compile_phases
def timed(*arguments, **options):
    (steps,) = make(*arguments, **options)
    def first(*given):
        result = steps(*given)
        jax.block_until_ready(result[1])
        tell(seconds=time.time() - began, compiled=len(compiled))
        os._exit(0)
    return [first]
loop.compile_phases = timed
cli.run(command)
"""


def fresh(code: str, cache: str) -> dict[str, float]:
    """Returns the times that a fresh process prints which runs the code."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run = subprocess.run([sys.executable, "-c", TIMER + code], capture_output=True, text=True, env=environment)
    line = next((line for line in run.stdout.splitlines() if "TIMES" in line), None)
    if line is None:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(line.split("TIMES ")[1])


def seconds_row(case: str, what: str, times: list[float]) -> dict[str, Any]:
    """Returns a row of seconds in place of a rate."""
    return row(case, what, {"seconds": [1 / t for t in times], "setup": 0.0}, 1, "s") | {"unit": "s"}


def first_step_rows(rounds: int) -> list[dict[str, Any]]:
    """Times a command from its start to the end of the first step of the digits, and counts compiled programs."""
    rows = []
    caches = [tempfile.mkdtemp() for _ in range(rounds)]
    for state in ("cold", "warm"):
        found = [fresh(DIGITS, cache) for cache in caches]
        times = seconds_row("first step of the digits", state, [f["seconds"] for f in found])
        rows.append(times | {"compiled": int(max(f["compiled"] for f in found))})
    return rows


def main() -> None:
    """Runs all cases."""
    flags = options(__doc__ or "")
    rounds = flags.rounds or (2 if flags.quick else 5)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for case, code in IMPORTS.items():
            rows.append(seconds_row(case, "resnet_jax", [fresh(code, cache)["seconds"] for _ in range(rounds)]))
    depths = ("cifar_resnet20", "cifar_resnet110") if flags.quick else (
        "cifar_resnet20", "cifar_resnet56", "cifar_resnet110")  # fmt: skip
    looped = [(name, "scan=True") for name in (*depths[::2], "cifar_resnet1202")]  # one by one: 11 min
    for name, more in [(name, "") for name in depths] + looped:
        tries = min(rounds, 3)
        caches = [tempfile.mkdtemp() for _ in range(tries)]
        for state in ("cold", "warm"):
            found = [fresh(DEPTH.format(name=name, more=more), cache) for cache in caches]
            case = f"{name} {more}".strip()
            rows += [seconds_row(f"{what} {case}", state, [f[what] for f in found]) for what in found[0]]
    rows += first_step_rows(rounds)
    print_table(rows)
    write("startup", rows)


if __name__ == "__main__":
    main()
