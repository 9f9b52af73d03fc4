"""What saving costs the loop: how long a save holds it, steps while one is being written, and reading one back.

The state is resnet50's with momentum and averages, some 300 MB. All cases take turns in one process. On a CPU the step
and the writing share the cores; on an accelerator they do not. What is read back comes from the disk: the system was
told to forget the files. Each round reads back as often as there are ways to, and each way is the first once: memory
that was just given back is cheaper than new memory.
"""

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import MEMORY, Contender, alternate, has_gpu, options, print_table, row, write

ROWS = (
    "step",
    "step beside a save",
    "loop held by a save",
    "longest step beside a save, above a quiet one",
    "save, waited for",
    "checked and restored",
    "raw read",
    "raw read, all in one file",
)
RATIOS = {
    "step beside a save / step": (ROWS[1], ROWS[0]),
    "loop held / save": (ROWS[2], ROWS[4]),
    "longest step's excess / save": (ROWS[3], ROWS[4]),
    "checked and restored / raw read": (ROWS[5], ROWS[6]),
    "checked and restored / raw read, all in one file": (ROWS[5], ROWS[7]),
}


def prepared(size: int, batch: int) -> tuple[Any, Any, Any]:
    """Returns a compiled step, a first state and a batch."""
    import jax
    import numpy as np

    from resnet_jax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
    from resnet_jax.training.build import build_model, state_maker
    from resnet_jax.training.optimizers import make_optimizer
    from resnet_jax.training.programs import recipe_step
    from resnet_jax.training.resolve import resolve
    from resnet_jax.training.sharding import compiler_options, run_in_caller

    run_in_caller()
    config = Config(
        ModelConfig("resnet50"),
        DataConfig(image_size=size, on_device=False),
        AugmentConfig(crop="none"),
        train=TrainConfig(batch_size=batch),
    )
    config = resolve(config).config
    model = build_model(config, 1000)
    step = recipe_step(config, model, make_optimizer(config.optimizer, lambda step: 0.01))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    data = jax.device_put({"image": images, "label": rng.integers(0, 1000, batch, dtype=np.int32)})
    state = state_maker(config, model, lambda step: 0.01)()
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options()), state, data


def seconds(function: Any) -> float:
    """Returns how long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def forget(files: list[Path]) -> None:
    """Drops files from the memory of the system, where it can (POSIX)."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rounds(folder: Path, size: int, batch: int) -> Callable[[], dict[str, Any]]:
    """Returns a function that does one round: quiet steps, a save and the steps beside it, a save waited for, restores.

    Its answer has the seconds of each row; those of what reads are lists, since what comes first changes with the turn.
    """
    import jax

    from resnet_jax.training.checkpoints import Checkpoints
    from resnet_jax.training.manifest import steps_in

    step_function, state, data = prepared(size, batch)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(folder, 1)
    last = 0

    def one() -> None:
        nonlocal state
        state, sums = step_function(state, data)
        jax.block_until_ready((state, sums))

    def save() -> None:
        nonlocal last
        last += 1
        checkpoints.save(last, state, {})

    def one_round() -> dict[str, Any]:
        quiet = statistics.median(seconds(one) for _ in range(8 if has_gpu() else 3))
        held = seconds(save)
        beside = []
        writing = threading.Thread(target=checkpoints.settle)
        writing.start()
        while writing.is_alive() or not beside:
            beside.append(seconds(one))
        writing.join()
        whole = seconds(lambda: (save(), checkpoints.settle()))
        step = steps_in(folder / "checkpoints")[0]
        files = [path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        single = folder / "single"
        if not single.exists():
            single.write_bytes(b"".join(path.read_bytes() for path in files))
        ways = {
            "checked and restored": lambda: jax.block_until_ready(checkpoints.restore(lambda _: template)[0]),
            "raw read": lambda: [path.read_bytes() for path in files],
            "raw read, all in one file": single.read_bytes,
        }
        reads: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(len(ways)):
            for name in [*list(ways)[turn:], *list(ways)[:turn]]:
                forget([*files, single])
                reads[name].append(seconds(ways[name]))
        times = (quiet, statistics.median(beside), held, max(beside) - quiet, whole)
        size = sum(path.stat().st_size for path in files)
        return {"seconds": whole, "bytes": size} | dict(zip(ROWS, times, strict=False)) | reads

    return one_round


def main() -> None:
    """Runs the rounds in a process that has the environment of our commands."""
    flags = options(__doc__ or "", size=224, batch=256 if has_gpu() else 16)
    folder = Path(tempfile.mkdtemp())
    ours = {"folder": folder, "size": flags.size, "batch": flags.batch}
    contender = Contender("resnet_jax", rounds, ours, MEMORY)
    result = alternate([contender], flags.rounds or (3 if flags.quick else 7))["resnet_jax"]
    shutil.rmtree(folder)
    if "error" in result:
        raise SystemExit(result["error"])
    kept = result["kept"]
    found = {name: [x for a in kept for x in (a[name] if isinstance(a[name], list) else [a[name]])] for name in ROWS}
    report(f"resnet50 {flags.size} batch {flags.batch}", found, kept[-1]["bytes"])


def report(case: str, found: dict[str, list[float]], size: int) -> None:
    """Prints and writes the seconds that were found, and the ratios of each round."""
    ratios = {name: [a / b for a, b in zip(found[above], found[below], strict=True)]
              for name, (above, below) in RATIOS.items()}  # fmt: skip
    rows = [row(case, name, {"seconds": [1 / t for t in times], "setup": 0.0}, 1, "s") | {"unit": "s"}
            for name, times in found.items()]  # fmt: skip
    print_table(rows)
    middles = {name: statistics.median(values) for name, values in ratios.items()}
    printed = ", ".join(f"{name} {middles[name]:.2f}" for name in RATIOS)
    print(f"{size / 1e6:.0f} MB; {printed}")
    write("checkpoint", rows, bytes=size, ratios={n: {"median": middles[n], "all": ratios[n]} for n in ratios})


if __name__ == "__main__":
    main()
