"""A whole run, from a recipe to a folder with its results. Read `train` from top to bottom."""

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, local_path
from resnet_jax.data.loader import BadImages
from resnet_jax.data.sources import Dataset, load_dataset
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.recipes import check, recorded, result_fields
from resnet_jax.sharding import (
    cached_where_sound,
    check_batch,
    check_same,
    make_mesh,
    put_state,
    start_processes,
    state_sharding,
)
from resnet_jax.training.advance import make_advance
from resnet_jax.training.checkpoints import Checkpoints, Record
from resnet_jax.training.evaluation import Result, deciding, headline, make_evaluate, scalars
from resnet_jax.training.html_report import make_report
from resnet_jax.training.optimizers import make_schedule
from resnet_jax.training.probe import computes_features_once, make_features
from resnet_jax.training.recipe import (
    Plan,
    build_model,
    complete,
    images_per_statistic,
    in_form,
    make_plan,
    norms_of_one_value,
    sharded_shapes,
    state_maker,
    with_weights,
)
from resnet_jax.training.report import Advance, Diverged, Report, say, traced
from resnet_jax.training.signals import Stop, Stopped, end_with_lost_process, stop_signals
from resnet_jax.training.state import TrainState
from resnet_jax.training.workdir import (
    better,
    device_name,
    ended,
    finish,
    locked,
    new_record,
    open_workdir,
)


def train(config: Config, workdir: str | Path | None = None) -> dict[str, Any]:
    """Trains as the recipe says and leaves everything in `workdir`; a folder that holds a run resumes it.

    SIGTERM and Ctrl-C end it after the steps that the device was given, with a checkpoint.

    Args:
      config: the recipe.
      workdir: the run's folder; None makes a new one under `runs/`.

    Returns:
      What `summary.json` holds: `test` (loss, accuracy, count), `ema`, `best`, `steps`, `seconds`, ...

    Raises:
      InputError: the recipe, the data or the folder is not as it must be.
      Diverged: the loss became infinite or not a number, more often than the recipe allows.
      Stopped: a signal asked for it; the state is saved.
      Stalled: the data gave nothing for `data.timeout` seconds.
    """
    began = time.perf_counter()
    check(config)
    workdir = None if workdir is None else local_path(workdir, "--workdir")
    config = complete(config, recorded(workdir))
    start_processes(config.parallel)
    check_same(json.dumps(result_fields(config)))
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    images_per_statistic(config, mesh.size)
    dataset = load_dataset(config.data, config.train.seed)
    if dataset.several and config.train.loss != "binary":
        raise InputError(f"{config.data.dataset} gives images several labels: add --train.loss binary")
    if config.train.metric == "map" and not dataset.several:
        raise InputError("train.metric map needs images with several labels; take accuracy, loss or macro_recall")
    plan = make_plan(config, len(dataset.train))
    model = build_model(config, len(dataset.class_names))
    if single := norms_of_one_value(config, model, mesh.size):
        say(
            f"WARNING: {len(single)} batch norms, {single[0]} the first, see one value a channel in training and put "
            "out their bias alone: take more images at a time (train.batch_size, train.accumulate_steps, "
            "parallel.batch_norm), larger images, or --model.norm group or frozen_batch"
        )
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    folder = open_workdir(workdir, config)
    say(f"run: {folder}")
    with locked(folder, config), cached_where_sound(mesh), stop_signals() as stop:
        if summary := ended(folder):
            say(f"the run is finished; see it with: resnet-jax evaluate {shlex.quote(str(folder))}")
            return summary
        with Checkpoints(folder, config.checkpoint.keep) as checkpoints:
            run = Run(folder, config, plan, model, dataset, mesh, checkpoints, stop)
            record, images_per_second = run_with_rollbacks(run, schedule)
        speed = {"images_per_second": images_per_second, "seconds": time.perf_counter() - began}
        summary = finish(folder, record, speed, device_name(mesh))
        if config.log.report and jax.process_count() == 1:
            report_on(folder)
        return summary


def report_on(folder: Path) -> None:
    """Makes the page on a run that has ended; what goes wrong with it is said, since the run itself is safe."""
    try:
        say(f"the report: {make_report(folder)}")
    except Exception as error:
        command = f"resnet-jax report {shlex.quote(str(folder))}"
        say(f"WARNING: there is no report ({type(error).__name__}: {error}); try {command}")


@dataclass(frozen=True)
class Run:
    """What does not change while a run goes on."""

    folder: Path
    config: Config
    plan: Plan
    model: nn.Module
    dataset: Dataset
    mesh: Mesh
    checkpoints: Checkpoints
    stop: Stop


def run_with_rollbacks(run: Run, schedule: optax.Schedule) -> tuple[Record, float]:
    """Runs to the plan's end; where it diverges and the recipe says so, again from the last checkpoint, more slowly.

    Returns:
      The last record and the images a second.
    """
    recipe, rollbacks = run.config.train, 0
    while True:
        state, record = begin(run)
        rollbacks = record["rollbacks"] = max(rollbacks, record["rollbacks"])
        factor = 0.5**rollbacks
        try:
            return go_on(run, state, record, lambda t, factor=factor: factor * schedule(t))
        except Diverged as error:
            if recipe.on_nonfinite != "rollback" or rollbacks >= recipe.nonfinite_limit:
                raise
            rollbacks += 1
            last = run.checkpoints.latest() or 0
            say(f"WARNING: {error.what}; going back to step {last} with {factor / 2:g} times the learning rate")


def begin(run: Run) -> tuple[TrainState, Record]:
    """A new state and record, or those of the newest sound checkpoint."""
    config, mesh = run.config, run.mesh
    new_state = state_maker(config, run.model, lambda step: 0.0)
    found = run.checkpoints.restore(lambda: sharded_shapes(new_state, mesh))
    if found is None:
        state = put_state(in_form(with_weights(new_state(), config, run.model), config), mesh)
        return state, new_record(config, run.dataset)
    state, record, step = found
    if config.model.scan:
        form = state_sharding(jax.eval_shape(lambda: in_form(new_state(), config)), mesh)
        state = jax.jit(stack_blocks, out_shardings=form)(state)
    run.checkpoints.best = record["best"] and record["best"]["step"]
    say(f"resuming at step {step} of {run.plan.total}")
    return state, record


def go_on(run: Run, state: TrainState, record: Record, schedule: optax.Schedule) -> tuple[Record, float]:
    """Runs from a state to the plan's end; returns the last record and the images a second."""
    config, plan, start = run.config, run.plan, int(state.step)
    bad = BadImages(config.data.on_bad_image, set(record["skipped"]), config.data.channels)
    features = make_features(config, run.model) if computes_features_once(config) else None
    frozen = features and partial(features, {"params": state.params, "batch_stats": state.batch_stats})
    ends = (plan.log_every, plan.eval_every, plan.save_every)
    steps = range(start, plan.total)
    advance = make_advance(config, run.model, schedule, run.dataset, run.mesh, bad, steps, ends, frozen)
    evaluate = make_evaluate(config, run.model, run.dataset, run.mesh, bad, run.stop, features)
    with Report(run.folder, config, plan, schedule, start, record, run.checkpoints.latest) as report:
        try:
            run_steps(run, state, record, traced(advance, config, run.folder), evaluate, report, bad)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                end_with_lost_process(error)
            raise
    return record, report.speed()


def run_steps(
    run: Run,
    state: TrainState,
    record: Record,
    advance: Advance,
    evaluate: Callable[[TrainState], Result | None],
    report: Report,
    bad: BadImages,
) -> None:
    """The loop: step, write metrics, save, evaluate, until the plan's end, or until `train.patience` is at its end.
    `record` is brought up to date in place.

    Everything is written and found finite before a checkpoint replaces another one. A checkpoint is begun before the
    evaluation of its step, which it owes until then, so that the two run beside each other. The device is given one
    call beyond the one that it works at, no more, so that slow steps end soon after a signal.
    """
    plan, step = run.plan, int(state.step)
    under_way: Any = ()
    if record["owed"]:
        assess(run, state, step, record, evaluate, report, bad)
    patience = run.config.train.patience or math.inf
    while step < plan.total and record["no_better"] < patience:
        state, sums, n, waited = advance(state, step)
        step += n
        jax.block_until_ready(under_way)
        under_way = sums

        def due(every: int, step: int = step) -> bool:
            return step % every == 0 or step == plan.total

        report.steps(step, n, sums, waited)
        if due(plan.log_every):
            report.flush()
        stopping = run.stop.due()
        if not due(plan.eval_every) and not due(plan.save_every) and not stopping:
            continue
        record["sums"] = report.settle(state)
        record |= {"skipped_updates": dict(report.skipped), "skipped": sorted(bad.names), "owed": due(plan.eval_every)}
        with report.paused():
            if due(plan.save_every) or stopping:
                run.checkpoints.save(step, unstack_blocks(state), record)
            if stopping:
                raise Stopped(run.folder, step, run.stop.signal or 0, run.checkpoints.has(step))
            if record["owed"]:
                assess(run, state, step, record, evaluate, report, bad)
    record["step"] = step
    if step < plan.total:
        say(f"no better for {record['no_better']} evaluations: the run ends, and is its best checkpoint")
    if not run.checkpoints.has(step):
        run.checkpoints.save(step, unstack_blocks(state), record)


def assess(
    run: Run,
    state: TrainState,
    step: int,
    record: Record,
    evaluate: Callable[[TrainState], Result | None],
    report: Report,
    bad: BadImages,
) -> None:
    """Evaluates a step, and keeps its checkpoint if it is the best so far.

    Raises:
      Stopped: a signal came meanwhile; the step is saved, and owes its evaluation.
    """
    result = evaluate(state)
    if result is None:
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), record)
        raise Stopped(run.folder, step, run.stop.signal or 0, run.checkpoints.has(step))
    report.evaluation(step, result)
    metric = deciding(run.config, run.dataset.several)
    value, before = headline(result, metric), record["best"]
    record |= {"owed": False, "skipped": sorted(bad.names), "no_better": record["no_better"] + 1}
    if run.config.train.patience is None or before is None or better(metric, value, before[metric]):
        record["result"] = scalars(result)
    if before is None or better(metric, value, before[metric]):
        best = {"step": step, metric: value}
        record["no_better"] = 0
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), record | {"best": best})
        if run.checkpoints.has(step):
            record["best"] = best
            run.checkpoints.best = step
