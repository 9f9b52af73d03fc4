"""Sixteen runs of the digits as one sweep, on one device and on eight virtual ones, beside sixteen single starts.

Single starts are processes of `resnet-jax train`, the sweeps processes of `resnet-jax sweep`, each with a compilation
cache that is empty at first; the single starts share theirs. All come one after another, the sweeps amid the single
starts. Seconds are those of the clock and those of the processors, since other programs may run beside them. Of every
member the last state and the validation metric are compared with its single run.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import options, print_table, row, write

RATES, SEEDS, EIGHT = (0.02, 0.05, 0.1, 0.2), (0, 1, 2, 3), "--xla_force_host_platform_device_count=8"
COUNT = """
import jax, logging, sys
from resnet_jax import cli
compiled = []
class Count(logging.Handler):
    def emit(self, record):
        if "Finished XLA compilation of jit(train_members)" in record.getMessage():
            compiled.append(record)
jax.config.update("jax_log_compiles", True)
logging.getLogger("jax").handlers = [Count()]
logging.getLogger("jax").propagate = False
status = cli.main(sys.argv[1:])
print("COMPILED", len(compiled))
sys.exit(status)
"""
COMPARE = """
import json, logging, sys, jax, numpy as np, orbax.checkpoint as ocp, warnings
warnings.simplefilter("ignore")
logging.getLogger("absl").setLevel(100)
read = lambda folder: jax.tree.leaves(ocp.PyTreeCheckpointer().restore(folder))
worst, bits = 0.0, True
for pair in json.loads(sys.argv[1]):
    for a, b in zip(*map(read, pair), strict=True):
        bits = bits and np.array_equal(a, b)
        if np.size(a):
            worst = max(worst, float(np.abs(np.float64(a) - np.float64(b)).max()))
print("FOUND", json.dumps({"bits": bool(bits), "worst": worst}))
"""


SINGLE = "import sys; from resnet_jax import cli; sys.exit(cli.main(sys.argv[1:]))"


def timed(arguments: list[str], cache: str, devices: str = "", code: str = SINGLE) -> tuple[np.ndarray, str]:
    """Runs a command in a process of its own; returns its seconds of the clock and of processors, and what it
    printed.
    """
    environment = os.environ | {"XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    print(f"{seconds:7.1f} s  {' '.join(arguments)}", flush=True)
    return np.asarray([seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]), run.stdout


def last_state(folder: Path) -> str:
    """Returns the state in the newest checkpoint of a run."""
    return str(max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name)) / "state")


def compared(sweep: Path, singles: dict[tuple[float, int], Path]) -> dict[str, Any]:
    """Returns whether the members' last states have the bits of the single runs, and how far they are apart."""
    members = json.loads((sweep / "sweep.json").read_text())["members"]
    pairs, metric = [], 0.0
    for member in members:
        single = singles[member["values"]["optimizer.learning_rate"], member["values"]["train.seed"]]
        pairs.append((last_state(sweep / "members" / member["name"]), last_state(single)))
        metric = max(metric, abs(member["value"] - json.loads((single / "summary.json").read_text())["best"]["value"]))
    run = subprocess.run([sys.executable, "-c", COMPARE, json.dumps(pairs)], capture_output=True, text=True)
    found = json.loads(run.stdout.split("FOUND ")[1])
    return {"equal_bits": found["bits"], "state_apart_by": found["worst"], "accuracy_apart_by": metric}


def main() -> None:
    """Trains all, the single starts in two halves with the sweeps between them."""
    flags = options(__doc__ or "")
    epochs, most = ("1", 2) if flags.quick else ("2", 4)
    recipe = ["--train.epochs", epochs, "--log.no_report", "--log.no_tensorboard"]
    rates, seeds = RATES[:most], SEEDS[:most]
    values = [f"--optimizer.learning_rate={','.join(map(str, rates))}", f"--train.seed=0..{seeds[-1]}"]
    folder = Path(tempfile.mkdtemp())
    singles: dict[tuple[float, int], Path] = {}
    seconds: dict[str, Any] = {"singles": np.zeros(2)}

    def start(rate: float, seed: int) -> None:
        place = singles[rate, seed] = folder / f"{rate}-{seed}"
        given = [f"--optimizer.learning_rate={rate}", f"--train.seed={seed}", "--workdir", str(place)]
        seconds["singles"] += timed(["train", *recipe, *given], str(folder / "cache-singles"))[0]

    for rate in rates[: most // 2]:
        for seed in seeds:
            start(rate, seed)
    compiled = {}
    for name, devices in (("1 device", ""), ("8 virtual devices", EIGHT)):
        place = str(folder / name.replace(" ", "-"))
        command = ["sweep", *recipe, *values, "--workdir", place]
        seconds[name], printed = timed(command, f"{place}-cache", devices, COUNT)
        compiled[name] = int(re.findall(r"COMPILED (\d+)", printed)[0])
    for rate in rates[most // 2 :]:
        for seed in seeds:
            start(rate, seed)

    case = f"{len(singles)} runs of the digits, {epochs} epochs"

    def row_of(name: str, took: np.ndarray) -> dict[str, Any]:
        given = row(case, name, {"seconds": [1 / took[0]], "setup": 0.0}, 1, "s")
        return given | {"unit": "s", "processor_seconds": float(took[1])}

    rows = [row_of("single starts", seconds["singles"])]
    for name, programs in compiled.items():
        found = compared(folder / name.replace(" ", "-"), singles)
        share, of_processors = (seconds[name] / seconds["singles"]).tolist()
        found |= {"programs_compiled": programs, "of_single_starts": share, "of_their_processor_seconds": of_processors}
        rows.append(row_of(f"one sweep, {name}", seconds[name]) | found)
    print_table(rows)
    for one in rows[1:]:
        print(json.dumps({name: one[name] for name in list(one)[-7:]}))
    write("sweep", rows, load_average=os.getloadavg()[2])


if __name__ == "__main__":
    main()
