"""A run's folder: its recipe, the lock that keeps a second run out, its summary; and the runs under a folder."""

import contextlib
import platform
import shlex
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import jax
from jax.sharding import Mesh

from resnet_jax import __version__
from resnet_jax.config import Config, InputError, differences, to_dict
from resnet_jax.files import in_bucket, path_of, read_json, to_json, write_whole
from resnet_jax.models.registry import OURS
from resnet_jax.output import say, wrapped
from resnet_jax.recipe_files import WrongRecipe, read_recipe, recipe_given, recorded_parts, recorded_recipe
from resnet_jax.runs.lock import BucketLock, Lock, hold, live_holder
from resnet_jax.runs.signals import FolderLost, Stopped
from resnet_jax.runs.trackers import split_lines
from resnet_jax.training.manifest import best_of, checkpoints_of, damage, steps_in
from resnet_jax.training.run_progress import RunProgress


def open_workdir(workdir: str | Path | None, config: Config) -> Path:
    """Makes the run's folder, or checks that it is one of the same recipe.

    Raises:
      InputError: the folder cannot be written, or belongs to a recipe with another result.
    """
    if workdir is None and jax.process_count() > 1:
        raise InputError("a run of several processes needs --workdir, the same folder for all of them")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}"
    folder = Path("runs") / stamp if workdir is None else path_of(workdir, "--workdir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        previous = recorded_recipe(folder)
        if previous is not None and begun(folder):
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


START_FILES = ("config.json", "parts.json", "pictures.npz")
"""What a start writes into a run's folder before its first step."""


def begun(folder: Path) -> bool:
    """Returns whether a folder holds a run that has left metrics or a checkpoint: the next start goes on with it."""
    metrics = folder / "metrics.jsonl"
    return bool(steps_in(checkpoints_of(folder))) or (metrics.is_file() and metrics.stat().st_size > 0)


@contextlib.contextmanager
def locked(folder: Path, config: Config) -> Iterator[Lock | BucketLock | None]:
    """Holds `folder/lock` while it lasts, and writes the recipe. The first process alone does; others get None.

    What an earlier start wrote that came to nothing is removed, and what this one writes, where an error ends it before
    its first step.

    Raises:
      InputError: another run holds it, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(hold(folder / "lock"))
            if not begun(folder):
                remove_start_files(folder)
            made_here = not in_bucket(folder) and not checkpoints_of(folder).exists()
            write_whole(folder / "config.json", to_json(to_dict(config), indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"the folder {folder} of the run cannot be written: {error}; give another --workdir"
            ) from error
        (folder / "error.txt").unlink(missing_ok=True)
        try:
            yield lock
        except Exception as error:
            with contextlib.suppress(OSError):
                if lock.lost(now=True):
                    pass
                elif begun(folder) or (folder / "metrics.jsonl").exists():
                    if not isinstance(error, Stopped | FolderLost):
                        write_whole(folder / "error.txt", f"{error or type(error).__name__}\n")
                else:
                    remove_start_files(folder)
                    if made_here:
                        checkpoints_of(folder).rmdir()
            raise


def remove_start_files(folder: Path) -> None:
    """Removes from a folder what a start wrote before its first step."""
    for name in START_FILES:
        (folder / name).unlink(missing_ok=True)


CLASS_MEANS = ("accuracy", "top5", "macro_recall", "macro_f1", "map")
"""What an evaluation of classes gives beside the loss and metrics of the user's own."""


class Summary(TypedDict):
    """What every `summary.json` holds, beside what an evaluation found."""

    steps: int
    seconds: float
    device: str
    versions: dict[str, str]


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Returns what `summary.json` holds; None where there is none.

    Raises:
      InputError: it is damaged.
    """
    try:
        return read_json(folder / "summary.json", Summary)
    except FileNotFoundError:
        return None


def finished(folder: Path, step: int) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended with this step; None where it goes on.

    Raises:
      InputError: it is damaged.
    """
    summary = read_summary(folder)
    return summary if summary and summary["steps"] == step else None


def ended(folder: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended and whose last checkpoint is sound; None where it goes on. A damaged
    one is named on standard error.
    """
    last = max(steps_in(checkpoints_of(folder)), default=0)
    try:
        summary = finished(folder, last)
    except InputError as error:
        say(f"WARNING: {error}; it is written anew", error=True)
        return None
    return summary if summary and damage(folder / "checkpoints" / str(last)) is None else None


def finish(
    folder: Path,
    progress: RunProgress,
    speed: dict[str, float],
    device: str,
    hook_errors: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes `summary.json` and says what came out, unless `quiet`."""
    skipped = {"count": len(progress.skipped), "names": progress.skipped[:1000]}
    summary = (progress.result or {}) | {"best": progress.best, "selected": progress.selected}
    summary |= {"steps": progress.step} | speed
    summary |= {"skipped_images": skipped, "skipped_updates": progress.skipped_updates["total"]}
    summary |= {"device": device, "versions": versions()} | ({"hook_errors": hook_errors} if hook_errors else {})
    if jax.process_index() == 0:
        write_whole(folder / "summary.json", to_json(summary, indent=2) + "\n")
    if jax.process_index() == 0 and not quiet:
        for line in ("", *outcome(summary), served_line(summary)):
            say(wrapped(line))
        classes = any("accuracy" in summary.get(kind, {}) for kind in ("validation", "test"))
        say(f"\nthe run lies in {folder}; next, type\n  {evaluate_command(folder)}{' --per-class' if classes else ''}")
        if (own := parts_to_evaluate(folder)) and recipe_given() is None:
            say(f"FILE is a recipe file that defines config and the run's {', '.join(own)}")
    return summary


def evaluate_command(folder: Path) -> str:
    """Returns the command that evaluates a run; with parts or a named model of the user's own it names the recipe file
    that this process was given, or FILE where it was given none.
    """
    config = recorded_recipe(folder)
    own = parts_to_evaluate(folder) or (config is not None and config.model.name not in OURS)
    flag = f" --config {shlex.quote(str(recipe_given() or 'FILE'))}" if own else ""
    return f"resnet-jax evaluate {shlex.quote(str(folder))}{flag}"


def parts_to_evaluate(folder: Path) -> list[str]:
    """Returns the names of the parts of the user's own that are needed to evaluate a run."""
    return list(dict.fromkeys(name.partition(".")[0] for name in recorded_parts(folder) if name != "optimizer"))


def outcome(summary: dict[str, Any]) -> list[str]:
    """Returns lines that say what came out of a run: each figure with its split, and how its step was chosen."""
    step, best, lines = summary["selected"], summary["best"], []
    for split in ("validation", "test"):
        kind = next((kind for kind in (f"ema/{split}", split) if kind in summary), None)
        if kind is None:
            continue
        values = summary[kind]
        of = f"the moving average of step {step}" if kind.startswith("ema/") else f"step {step}"
        chosen = f", which this split chose by {best['metric'].rpartition('/')[2]}" if best and split != "test" else ""
        others = ["loss", *(name for name in values if name not in ("loss", "count", *CLASS_MEANS))]
        if "accuracy" in values:
            how = " (all labels right, threshold one half)" if "map" in values else ""
            first = f"{split} accuracy{how} {values['accuracy']:.2%} on {values['count']} images"
        else:
            first = f"{split} on {values['count']} images"
        named = ", ".join([first, *(f"{name} {values[name]:.4f}" for name in others)])
        lines.append(f"{named} ({of}{chosen})")
    return lines or [f"step {step}: there is no validation or test split to measure on"]


def served_line(summary: dict[str, Any]) -> str:
    """Returns a line that says which checkpoint of a run that has ended the commands take, and why."""
    step, best, last = summary["selected"], summary["best"], summary["steps"]
    what = "the moving average of step" if any(name.startswith("ema/") for name in summary) else "step"
    if best is None:
        return f"served: {what} {step}, the last one, since nothing was selected on a validation split"
    if step != best["step"]:
        return f"served: {what} {step}, the last one, since the best one ({best['step']}) cannot be read"
    why = f"the best by {best['metric']} ({best['value']:.4f})"
    other = ", which is the last one too" if step == last else f"; --checkpoint latest takes step {last}"
    return f"served: {what} {step}, {why}{other}"


def device_name(mesh: Mesh) -> str:
    """Returns kind and number of the devices of a mesh, such as `4 x NVIDIA H200`."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what computes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    ours = {"python": platform.python_version(), "resnet_jax": __version__}
    return ours | {name: metadata.version(name) for name in packages}


def runs_under(folder: Path) -> list[dict[str, Any]]:
    """Returns the runs under a folder, at any depth, in a bucket in it and right below it: `folder`, `model`, `data`,
    `step`, `metric`, `best`, `best_step`, `state`, `problem`, by name.

    `state` is `running`, `finished`, `stopped` (the same command goes on), `failed` (a start that left no checkpoint
    and no line of metrics), `invalid` (the recipe is JSON, but impossible), or `damaged` (a file cannot be read, or no
    checkpoint is sound); `problem` then says what is wrong. `best` is the value of `metric` for which the step
    `best_step` was chosen.
    """
    patterns = ("config.json", "*/config.json") if in_bucket(folder) else ("**/config.json",)
    found = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
    return [describe_run(path) for path in found if is_run(path)]


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds a run, not just any config.json."""
    return any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl", "lock"))


def describe_run(folder: Path) -> dict[str, Any]:
    """Returns one row of `runs_under`."""
    row: dict[str, Any] = dict.fromkeys(("model", "data", "step", "metric", "best", "best_step", "problem"))
    row["folder"] = str(folder)
    running = live_holder(folder / "lock") is not None
    try:
        config = read_recipe(folder / "config.json")
        row |= {"model": config.model.name, "data": config.data.dataset}
        there = steps_in(checkpoints_of(folder))
        problems = {step: damage(folder / "checkpoints" / str(step), contents=False) for step in there}
        steps = [step for step in there if problems[step] is None]
        row["step"] = max(steps, default=0)
        if best := best_of(folder):
            row |= {"metric": best["metric"], "best": best["value"], "best_step": best["step"]}
        lines, torn = split_lines(folder / "metrics.jsonl")
        if torn:
            row["problem"] = f"{folder / 'metrics.jsonl'} has {len(torn)} lines that cannot be read"
        summary = finished(folder, row["step"])
    except (OSError, InputError) as error:
        state = "running" if running else "invalid" if isinstance(error, WrongRecipe) else "damaged"
        return row | {"state": state, "problem": str(error)}
    if steps != there:
        bad = next(step for step in there if problems[step])
        row["problem"] = f"{folder / 'checkpoints' / str(bad)}: {problems[bad]}"
    if running:
        return row | {"state": "running"}
    if there and not steps:
        return row | {"state": "damaged"}
    if not there and not lines and not torn:
        return row | {
            "state": "failed",
            "problem": "the start failed: it left no checkpoint and no line of metrics",
        }
    if summary is None and (folder / "error.txt").exists():
        return row | {"state": "failed", "problem": (folder / "error.txt").read_text(errors="replace").strip()}
    return row | {"state": "finished" if summary else "stopped"}
