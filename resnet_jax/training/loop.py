"""A whole run, from a recipe to a folder with its results. Read `train` from top to bottom."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, check
from resnet_jax.data.loader import BadImages, train_batches, whole_split
from resnet_jax.data.sources import Dataset, load_dataset
from resnet_jax.recipes import differences, from_dict, result_fields, to_dict
from resnet_jax.sharding import (
    batch_sharding,
    check_batch,
    check_same,
    compiler_options,
    make_mesh,
    put_everywhere,
    put_state,
    replicated,
    start_processes,
    state_sharding,
)
from resnet_jax.training import checkpoints
from resnet_jax.training.evaluation import Result, headline, make_evaluate, scalars
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer, make_schedule
from resnet_jax.training.recipe import (
    Plan,
    build_model,
    complete,
    make_plan,
    sharded_shapes,
    state_maker,
    with_weights,
)
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import draw, make_device_step, make_pmap_step, make_train_step
from resnet_jax.training.trackers import Advance, Report, draw_curves, say, traced


def train(config: Config, workdir: str | Path | None = None) -> dict[str, Any]:
    """Trains as the recipe says and leaves everything in `workdir`; a folder that holds a run resumes it.

    Args:
      config: the recipe.
      workdir: the run's folder; None makes a new one under `runs/`.

    Returns:
      What `summary.json` holds: `test` (loss, accuracy, count), `ema`, `best`, `steps`, `seconds`, ...

    Raises:
      InputError: the recipe, the data or the folder is not as it must be.
      Diverged: the loss became infinite or not a number.
    """
    began = time.perf_counter()
    check(config)
    config = complete(config, recorded(workdir))
    start_processes(config.parallel)
    check_same(json.dumps(result_fields(config)))
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    dataset = load_dataset(config.data, config.train.seed)
    plan = make_plan(config, len(dataset.train))
    model = build_model(config, len(dataset.class_names))
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    folder = open_workdir(workdir, config)
    say(f"run: {folder}")
    with checkpoints.open_checkpoints(folder, config.checkpoint.keep) as manager:
        if manager.latest_step() == plan.total and (folder / "summary.json").exists():
            say(f"the run is finished; see it with: resnet-jax evaluate {folder}")
            return json.loads((folder / "summary.json").read_text())
        record, images_per_second = start_or_resume(folder, config, plan, model, schedule, dataset, mesh, manager)
    speed = {"images_per_second": images_per_second, "seconds": time.perf_counter() - began}
    return finish(folder, record, plan.total, speed, device_name(mesh))


def start_or_resume(
    folder: Path,
    config: Config,
    plan: Plan,
    model: nn.Module,
    schedule: optax.Schedule,
    dataset: Dataset,
    mesh: Mesh,
    manager: checkpoints.Manager,
) -> tuple[checkpoints.Record, float]:
    """Makes a new state or restores the latest one, and runs to the plan's end.

    Returns:
      The last record and the images a second.
    """
    new_state = state_maker(config, model, schedule)
    if manager.latest_step() is None:
        state = with_weights(new_state(), config, model)
        state = put_state(state, mesh)
        record = new_record(config, dataset)
    else:
        state, record = checkpoints.restore(manager, sharded_shapes(new_state, mesh))
        say(f"resuming at step {int(state.step)} of {plan.total}")
    start = int(state.step)
    bad = BadImages(config.data.on_bad_image, set(record["skipped"]))
    advance = make_advance(config, model, schedule, dataset, mesh, bad, range(start, plan.total))
    evaluate = make_evaluate(config, model, dataset, mesh, bad)
    with Report(folder, config, plan, schedule, start, record["sums"], manager.latest_step) as report:
        try:
            run_steps(plan, state, record, traced(advance, config, folder), evaluate, report, manager, bad)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                end_with_lost_process(error)
            raise
    return record, report.speed()


def end_with_lost_process(error: Exception) -> NoReturn:
    """Ends this process at once with status 1: with a process missing, everything that would tidy up waits for it."""
    reason = str(error).splitlines()[0]
    print(
        f"error: process {jax.process_index()} lost touch with another process of the run ({reason}); "
        "start the same command again in all processes to go on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def run_steps(
    plan: Plan,
    state: TrainState,
    record: checkpoints.Record,
    advance: Advance,
    evaluate: Callable[[TrainState], Result],
    report: Report,
    manager: checkpoints.Manager,
    bad: BadImages,
) -> None:
    """The loop: step, write metrics, evaluate, save, until the plan's end. `record` is brought up to date in place.

    Everything is written and found finite before a checkpoint replaces another one.
    """
    step = int(state.step)
    while step < plan.total:
        before = step
        state, sums, n, waited = advance(state, step)
        step += n

        def due(every: int, before: int = before, step: int = step) -> bool:
            return step // every > before // every or step == plan.total

        report.steps(step, n, sums, waited)
        if due(plan.log_every):
            report.flush()
        if not due(plan.eval_every) and not due(plan.save_every):
            continue
        record["sums"] = report.settle(state)
        with report.paused():
            metric = None
            if due(plan.eval_every):
                result = evaluate(state)
                report.evaluation(step, result)
                record["result"], metric = scalars(result), headline(result)
                if record["best"] is None or metric > record["best"]["accuracy"]:
                    record["best"] = {"step": step, "accuracy": metric}
            if due(plan.save_every) or record["best"] == {"step": step, "accuracy": metric}:
                record["skipped"] = sorted(bad.names)
                checkpoints.save(manager, step, state, record, metric)


def new_record(config: Config, dataset: Dataset) -> checkpoints.Record:
    """What a checkpoint holds beside the state, for a run that begins."""
    return {
        "recipe": to_dict(config),
        "class_names": list(dataset.class_names),
        "best": None,
        "result": None,
        "sums": None,
        "skipped": [],
    }


def finish(
    folder: Path, record: checkpoints.Record, steps: int, speed: dict[str, float], device: str
) -> dict[str, Any]:
    """Writes `summary.json` and `curves.png` and says what came out."""
    skipped = {"count": len(record["skipped"]), "names": record["skipped"][:1000]}
    summary = record["result"] | {"best": record["best"], "steps": steps} | speed
    summary |= {"skipped_images": skipped, "device": device, "versions": versions()}
    if jax.process_index() == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw_curves(folder)
        test = summary["test"]
        print(f"test accuracy {test['accuracy']:.2%} on {test['count']} images, loss {test['loss']:.4f}")
        print(f"the run lies in {folder}; see it with: resnet-jax evaluate {folder} --per-class")
    return summary


def recorded(workdir: str | Path | None) -> Config | None:
    """The recipe of the run that a folder holds, if it holds one."""
    recipe = Path(workdir or "").expanduser() / "config.json"
    return from_dict(json.loads(recipe.read_text())) if workdir is not None and recipe.is_file() else None


def open_workdir(workdir: str | Path | None, config: Config) -> Path:
    """Makes the run's folder with the recipe in it, or checks that it is one of the same recipe.

    Raises:
      InputError: the folder cannot be written, or belongs to a recipe with another result.
    """
    if workdir is None and jax.process_count() > 1:
        raise InputError("a run of several processes needs --workdir, the same folder for all of them")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}"
    folder = Path("runs") / stamp if workdir is None else Path(workdir).expanduser()
    recipe = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if previous := recorded(folder):
            changed = differences(previous, config)
            if changed:
                raise InputError(
                    f"{folder} holds a run of another recipe: {'; '.join(changed)}. "
                    "Give another --workdir, or the recipe it was started with"
                )
        if jax.process_index() == 0:
            whole = recipe.with_suffix(".new")  # other processes must never see half of it
            whole.write_text(json.dumps(to_dict(config), indent=2) + "\n")
            whole.replace(recipe)
    except OSError as error:
        raise InputError(
            f"the folder {folder} of the run cannot be written: {error}; give another --workdir"
        ) from error
    return folder


def make_advance(
    config: Config,
    model: nn.Module,
    schedule: optax.Schedule,
    dataset: Dataset,
    mesh: Mesh,
    bad: BadImages,
    steps: range,
) -> Advance:
    """`advance(state, step) -> (state, sums, n, waited)` dispatches the next n steps and does not wait for them.

    `waited` is the time in seconds that it took to get the batch; each of the sums has n entries, or none for one step.
    """
    everywhere, on_batch = replicated(mesh), batch_sharding(mesh)
    optimizer = make_optimizer(config.optimizer, schedule)
    pmapped = partial(make_pmap_step, model, optimizer, config, mesh) if config.parallel.strategy == "pmap" else None
    train_step = make_train_step(model, optimizer, config, mesh)
    shapes = jax.eval_shape(state_maker(config, model, schedule))
    compiled = partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(state_sharding(shapes, mesh), everywhere),
        compiler_options=compiler_options(),
    )
    if not config.data.on_device:
        step_function = pmapped() if pmapped else compiled(train_step)
        batches = train_batches(dataset.train, config, mesh, bad, steps, jax.process_index(), jax.process_count())

        def advance_host(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
            asked = time.perf_counter()
            batch = next(batches)
            return *step_function(state, batch), 1, time.perf_counter() - asked

        return advance_host

    split = whole_split(dataset.train, config.data.image_size, bad, config.augment.interpolation)
    data = put_everywhere(split, mesh)
    several = config.train.steps_per_call
    if pmapped:
        device_steps = {1: pmapped(partial(draw, config=config, batch_sharding=on_batch))}
    else:
        device_steps = {n: compiled(make_device_step(train_step, config, n, on_batch)) for n in (1, several)}

    def advance_device(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
        n = several if step % several == 0 and step + several <= steps.stop else 1
        return *device_steps[n](state, data), n, 0.0

    return advance_device


def device_name(mesh: Mesh) -> str:
    """Kind and number of the devices of a mesh, such as `4 x NVIDIA H200`."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def versions() -> dict[str, str]:
    """Versions of Python and of what computes."""
    packages = ("resnet_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
