"""How things are measured: contenders in processes of their own, in alternation, warm; ratios, median and spread."""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from resnet_jax import cli

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contenders share a GPU's memory
MEMORY = {"GLIBC_TUNABLES": cli.MEMORY}  # as the commands set it
RESULTS = Path(os.environ.get("OUT", Path(__file__).with_name("results")))


@dataclass(frozen=True)
class Contender:
    """Something to time. `build(**arguments)` runs in a process of its own and returns what is called each round.

    A call does one unit of work and waits until it is done. It may return `{"seconds": ..., ...}`: those seconds count
    in place of its time, and the rest is kept. `imports` are modules that all contenders load at the same time.
    """

    name: str
    build: Callable[..., Callable[[], Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    imports: tuple[str, ...] = ()


def alternate(
    contenders: list[Contender], rounds: int, warmup: int = 1, settle: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Times contenders in the order A B C A B C ..., `rounds` times each after `warmup` calls.

    Only one of the processes works at a time; the others are stopped, their children too, since a loader that fills its
    buffers again would take the time of the next one. With `settle`, the calls of the first `settle` seconds of a turn,
    one at least, are not timed: caches, threads that sleep, and memory that a process gives back after a call and asks
    for again in the next, are otherwise those of the contender before.

    Returns:
      name -> `seconds` and `kept` of each call and `setup` (seconds of build and warm-up), or `error` where a
      contender cannot run here.
    """
    started = {contender.name: _start(contender, warmup) for contender in contenders}
    workers: dict[str, tuple[Any, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    for pipe, _ in started.values():
        pipe.poll(None)
    for name, (pipe, process) in started.items():
        kind, value = _receive(pipe)
        if kind == "loaded":
            pipe.send("build")
            kind, value = _receive(pipe)
        if kind == "ready":
            workers[name] = (pipe, process)
            results[name] = {"seconds": [], "kept": [], "setup": value}
            os.killpg(process.pid, signal.SIGSTOP)
        else:
            results[name] = {"error": value}
    for _ in range(rounds):
        for name, (pipe, process) in workers.items():
            os.killpg(process.pid, signal.SIGCONT)
            pipe.send(settle)
            kind, value = _receive(pipe)
            if kind == "error":
                raise RuntimeError(f"{name}: {value}")
            os.killpg(process.pid, signal.SIGSTOP)
            results[name]["seconds"].append(value.pop("seconds"))
            results[name]["kept"].append(value)
    for pipe, process in workers.values():
        os.killpg(process.pid, signal.SIGCONT)
        pipe.send(None)
        process.join(5)
        process.terminate()
    return results


def _start(contender: Contender, warmup: int) -> tuple[Any, Any]:
    """Returns the pipe to a contender, and its process, which loads its modules."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = dict(os.environ)
    os.environ.update(contender.environment)
    process = context.Process(target=_work, args=(theirs, contender, warmup))
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    return ours, process


def _receive(pipe: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "error", "the process died"


def _work(pipe: Any, contender: Contender, warmup: int) -> None:
    os.setsid()
    try:
        for module in contender.imports:
            import_module(module)
        pipe.send(("loaded", None))
        pipe.recv()
        began = time.perf_counter()
        call = contender.build(**contender.arguments)
        for _ in range(warmup):
            call()
        pipe.send(("ready", time.perf_counter() - began))
        while (settle := pipe.recv()) is not None:
            asked = time.perf_counter()
            while time.perf_counter() - asked < settle:
                call()
            began = time.perf_counter()
            own = call()
            pipe.send(("done", own or {"seconds": time.perf_counter() - began}))
    except Exception as error:  # whatever keeps a contender from running is written into the table
        text = str(error).strip() or "no message"
        pipe.send(("error", f"{type(error).__name__}: {text.splitlines()[0][:200]}"))


def row(case: str, name: str, result: dict[str, Any], units: float, unit: str, **more: Any) -> dict[str, Any]:
    """Returns one line of a table: rate in `unit` a second as median, with quartiles and the number of rounds."""
    if "error" in result:
        return {"case": case, "contender": name, "error": result["error"]}
    rates = sorted(units / seconds for seconds in result["seconds"])
    middle = statistics.median(rates)
    low, high = (rates[0], rates[-1]) if len(rates) < 4 else statistics.quantiles(rates, n=4)[::2]
    numbers = {"median": middle, "quartiles": [low, high], "unit": f"{unit}/s", "n": len(rates)}
    return {"case": case, "contender": name} | numbers | {"setup_seconds": result["setup"]} | more


def with_ratios(rows: list[dict[str, Any]], ours: str = "resnet_jax") -> list[dict[str, Any]]:
    """Adds to each row `ours_over_this`: how many times as fast as it ours is, in the same case of the same run."""
    best = {r["case"]: r["median"] for r in rows if r["contender"] == ours and "median" in r}
    return [r | {"ours_over_this": best[r["case"]] / r["median"]} if "median" in r and r["case"] in best else r
            for r in rows]  # fmt: skip


def network_rows(
    case: str, results: dict[str, dict[str, Any]], batch: int, flops: float, peak: float
) -> list[dict[str, Any]]:
    """Prints and returns rows of images a second, each with its share of the arithmetic that the hardware can do.

    Args:
      flops: operations an image.
      peak: operations a second of a matrix product.
    """
    rows = [row(case, name, result, batch, "images", flops_an_image=flops) for name, result in results.items()]
    rows = with_ratios([r | {"roofline": r["median"] * flops / peak} if "median" in r else r for r in rows])
    print_table(rows)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table."""
    for r in rows:
        if "error" in r:
            print(f"{r['case']:<48}{r['contender']:<16}cannot run here: {r['error']}")
            continue
        low, high = r["quartiles"]
        ratio = f"   ours / this {r['ours_over_this']:.2f}" if "ours_over_this" in r else ""
        roof = f"   {r['roofline']:.0%} of the limit" if "roofline" in r else ""
        spread = f"{r['median']:>11.4g} [{low:.4g}, {high:.4g}] {r['unit']}, n = {r['n']}"
        print(f"{r['case']:<48}{r['contender']:<16}{spread}{ratio}{roof}", flush=True)


def write(script: str, rows: list[dict[str, Any]], name: str = "", **more: Any) -> Path:
    """Writes `results/<name>-<hardware>.json`, by default under the script's name, and returns its path."""
    RESULTS.mkdir(exist_ok=True, parents=True)
    path = RESULTS / f"{name or script}-{hardware()['short']}.json"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # folders by their names alone
    command = " ".join(["python", "-m", f"benchmarks.{script}", *words])
    record = {"command": command, "commit": commit(), "hardware": hardware(), "versions": versions()}
    path.write_text(json.dumps(record | more | {"rows": rows}, indent=1) + "\n")
    print(f"written: {path}")
    return path


def hardware() -> dict[str, Any]:
    """Returns processor, its widest vector instructions, cores, memory and accelerator; `short` is for file names."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"processor": model, "vectors": vectors, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return found | {"gpu": None, "short": short_name(model, vectors, os.cpu_count() or 1)}
    return found | {"gpu": gpu, "short": gpu.lower().replace(" ", "-")}


def short_name(processor: str, vectors: str | None, cores: int) -> str:
    """Returns a name that tells processors with other ratios from each other: cores, maker and vectors, as in
    `cpu2-amd-avx512`.
    """
    maker = [name for name in ("amd", "intel") if name in processor.lower()]
    return "-".join([f"cpu{cores}", *maker, *([vectors.removesuffix("f")] if vectors else [])])


def has_gpu() -> bool:
    """Returns whether there is an NVIDIA GPU."""
    return hardware()["gpu"] is not None


def versions() -> dict[str, str]:
    """Returns the versions of what is measured."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "numpy", "pillow", "grain",
                    "opencv-python-headless", "cykooz.resizer", "orbax-checkpoint", "tensorstore"):  # fmt: skip
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Returns the commit that is measured, with a mark where files other than results differ from it."""
    git = ("git", "-C", str(Path(__file__).parent))
    status = ("status", "--porcelain", "-uno", "--", ":(top)", ":(top,exclude)benchmarks/results")
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, *status], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+changes" if changes.strip() else "")


def options(description: str, **extra: Any) -> argparse.Namespace:
    """Parses the flags of a benchmark: `--rounds`, `--quick`, and switches of its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=None, help="calls of each contender that are timed")
    parser.add_argument("--quick", action="store_true", help="the smallest cases, few rounds")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()
