"""A run's folder: its recipe, the lock that keeps a second run out, its summary; and the runs under a folder."""

import contextlib
import json
import os
import platform
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from resnet_jax import __version__
from resnet_jax.config import Config, InputError
from resnet_jax.data.dataset import Dataset
from resnet_jax.integrity import best_of, damage, none, steps_in, write_whole
from resnet_jax.recipes import differences, from_dict, recorded, to_dict
from resnet_jax.training.checkpoints import Record
from resnet_jax.training.trackers import draw_curves

TOUCHED_EVERY, STALE_AFTER = 20.0, 120.0
"""Seconds: how often a run touches its lock, and when one of another host counts as left behind."""


def open_workdir(workdir: str | Path | None, config: Config) -> Path:
    """Makes the run's folder, or checks that it is one of the same recipe.

    Raises:
      InputError: the folder cannot be written, or belongs to a recipe with another result.
    """
    if workdir is None and jax.process_count() > 1:
        raise InputError("a run of several processes needs --workdir, the same folder for all of them")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}"
    folder = Path("runs") / stamp if workdir is None else Path(workdir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if previous := recorded(folder):
            changed = differences(previous, config)
            if changed:
                raise InputError(
                    f"{folder} holds a run of another recipe: {'; '.join(changed)}. "
                    "Give another --workdir, or the recipe it was started with"
                )
    except OSError as error:
        raise InputError(
            f"the folder {folder} of the run cannot be written: {error}; give another --workdir"
        ) from error
    return folder


@contextlib.contextmanager
def locked(folder: Path, config: Config) -> Iterator[None]:
    """Holds `folder/lock`, which says host, process and start, and writes the recipe. The first process alone does.

    Raises:
      InputError: another run holds it, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    lock, mine = folder / "lock", {"host": socket.gethostname(), "pid": os.getpid(), "start": start_of(os.getpid())}
    try:
        if holder := live_holder(lock):
            raise InputError(
                f"{folder} is in use by process {holder['pid']} on {holder['host']}, which locked it at "
                f"{datetime.fromtimestamp(lock.stat().st_mtime):%Y-%m-%d %H:%M:%S} the last time; wait for it, stop "
                f"it, or give another --workdir. If there is no such process, remove {lock}"
            )
        write_whole(lock, json.dumps(mine))
        write_whole(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"the folder {folder} of the run cannot be written: {error}; give another --workdir"
        ) from error
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCHED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError, ValueError):
            if json.loads(lock.read_text()) == mine:
                lock.unlink()


def live_holder(lock: Path) -> dict[str, Any] | None:
    """What a lock says of the run that holds it; None where there is none, or it was left behind by a dead one."""
    try:
        said, touched = json.loads(lock.read_text()), lock.stat().st_mtime
    except (OSError, ValueError):
        return None
    if said["host"] == socket.gethostname():
        return said if said["start"] is not None and start_of(said["pid"]) == said["start"] else None
    return said if time.time() - touched < STALE_AFTER else None


def start_of(pid: int) -> str | None:
    """What tells a process from a later one of the same number: its start, if the system says; None if it is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def new_record(config: Config, dataset: Dataset, class_names: tuple[str, ...]) -> Record:
    """What a checkpoint holds beside the state, for a run that begins."""
    return {
        "recipe": to_dict(config),
        "class_names": list(class_names),
        "several": dataset.several,
        "best": None,
        "result": None,
        "sums": None,
        "skipped": [],
        "skipped_updates": {"total": 0, "in_row": 0},
        "owed": False,
        "no_better": 0,
        "rollbacks": 0,
    }


def finished(folder: Path, step: int) -> dict[str, Any] | None:
    """The summary of a run that has ended with this step; None where it goes on."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary["steps"] == step else None


def ended(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended and whose last checkpoint is sound; None where it goes on."""
    last = max(steps_in(folder / "checkpoints"), default=0)
    summary = finished(folder, last)
    return summary if summary and damage(folder / "checkpoints" / str(last)) is None else None


def finish(folder: Path, record: Record, speed: dict[str, float], device: str) -> dict[str, Any]:
    """Writes `summary.json` and `curves.png` and says what came out."""
    skipped = {"count": len(record["skipped"]), "names": record["skipped"][:1000]}
    summary = (record["result"] or {}) | {"best": record["best"], "selected": record["selected"]}
    summary |= {"steps": record["step"]} | speed
    summary |= {"skipped_images": skipped, "skipped_updates": record["skipped_updates"]["total"]}
    summary |= {"device": device, "versions": versions()}
    if jax.process_index() == 0:
        write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        draw_curves(folder)
        for line in outcome(summary):
            print(line)
        print(f"the run lies in {folder}; see it with: resnet-jax evaluate {shlex.quote(str(folder))} --per-class")
    return summary


def outcome(summary: dict[str, Any]) -> list[str]:
    """Lines that say what came out of a run: each figure with its split, and how its step was chosen."""
    step, best, lines = summary["selected"], summary["best"], []
    for split in ("validation", "test"):
        kind = next((kind for kind in (f"ema/{split}", split) if kind in summary), None)
        if kind is None:
            continue
        values = summary[kind]
        of = f"the moving average of step {step}" if kind.startswith("ema/") else f"step {step}"
        chosen = f", which this split chose by {best['metric'].rpartition('/')[2]}" if best and split != "test" else ""
        lines.append(
            f"{split} accuracy {values['accuracy']:.2%} on {values['count']} images, loss {values['loss']:.4f} "
            f"({of}{chosen})"
        )
    return lines or [f"step {step}: there is no validation or test split to measure on"]


def device_name(mesh: Mesh) -> str:
    """Kind and number of the devices of a mesh, such as `4 x NVIDIA H200`."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def versions() -> dict[str, str]:
    """Versions of Python and of what computes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    ours = {"python": platform.python_version(), "resnet_jax": __version__}
    return ours | {name: metadata.version(name) for name in packages}


def runs_under(folder: Path) -> list[dict[str, Any]]:
    """The runs under a folder: `folder`, `model`, `data`, `step`, `steps`, `best`, `state`, by name.

    `state` is `running`, `finished`, `stopped` (the same command goes on), or `damaged` (a file cannot be read, or no
    checkpoint is sound).
    """
    return [describe_run(path.parent) for path in sorted(folder.rglob("config.json")) if is_run(path.parent)]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, not just any config.json."""
    return (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file() or (folder / "lock").is_file()


def describe_run(folder: Path) -> dict[str, Any]:
    """One row of `runs_under`."""
    row: dict[str, Any] = dict.fromkeys(("model", "data", "step", "metric", "best")) | {"folder": str(folder)}
    running = live_holder(folder / "lock") is not None
    try:
        config = from_dict(json.loads((folder / "config.json").read_text()))
        row |= {"model": config.model.name, "data": config.data.dataset}
        there = steps_in(folder / "checkpoints")
        steps = [step for step in there if damage(folder / "checkpoints" / str(step), none) is None]
        summary = finished(folder, max(steps, default=0))
    except (OSError, ValueError):
        return row | {"state": "running" if running else "damaged"}
    best = best_of(folder) or {"metric": None, "value": None}
    row |= {"step": max(steps, default=0), "metric": best["metric"], "best": best["value"]}
    if running:
        return row | {"state": "running"}
    if there and not steps:
        return row | {"state": "damaged"}
    return row | {"state": "finished" if summary else "stopped"}


def better(metric: str, new: float, old: float) -> bool:
    """Whether a value is better than another one: a loss the lower, everything else the higher."""
    return new < old if metric == "loss" else new > old
