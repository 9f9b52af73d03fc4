"""A whole run, from a recipe to a folder with its results. Read `train` from top to bottom."""

import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, path_of
from resnet_jax.data.dataset import Dataset, with_outputs
from resnet_jax.data.fingerprint import changes, described, digest, fingerprint
from resnet_jax.data.fingerprint import load as load_fingerprint
from resnet_jax.data.fingerprint import save as save_fingerprint
from resnet_jax.data.loader import BadImages, check_readable
from resnet_jax.data.sources import load_dataset
from resnet_jax.data.watch import check_guard, keep_tracker
from resnet_jax.files import in_bucket, modified, to_json, write_whole
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.recipes import recorded
from resnet_jax.runs.folder import (
    better,
    device_name,
    ended,
    finish,
    locked,
    new_record,
    open_workdir,
)
from resnet_jax.runs.lock import BucketLock, Lock
from resnet_jax.runs.processes import agree, check_one_folder, ending_together, facts_of, start_processes
from resnet_jax.runs.progress import Advance, Diverged, Report, say, traced
from resnet_jax.runs.report_page import make_report
from resnet_jax.runs.signals import FolderLost, Stop, Stopped, stop_signals
from resnet_jax.runs.trackers import draw_curves
from resnet_jax.training.advance import make_advance
from resnet_jax.training.checkpoints import Checkpoints, Record
from resnet_jax.training.evaluation import (
    Result,
    make_evaluate,
    scalars,
    selecting_metric,
    served,
)
from resnet_jax.training.linear_probe import computes_features_once, make_features
from resnet_jax.training.manifest import BEST
from resnet_jax.training.optimizers import make_schedule
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
from resnet_jax.training.sharding import (
    cached_where_sound,
    check_batch,
    make_mesh,
    put_state,
    state_sharding,
)
from resnet_jax.training.state import TrainState
from resnet_jax.weights.load import names_of_outputs


@ending_together(Stopped, FolderLost)
def train(config: Config, workdir: str | Path | None = None) -> dict[str, Any]:
    """Trains as the recipe says and leaves everything in `workdir`; a folder that holds a run resumes it.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end it after the steps that the device was given, with a checkpoint.

    Args:
      config: the recipe.
      workdir: the run's folder; None makes a new one under `runs/`.

    Returns:
      What `summary.json` holds: `validation` and `test` (loss, accuracy, count, ...), the same of the moving average
      as `ema/validation` and `ema/test`, all of the step `selected`; `best`, `steps`, `seconds`, ...

    Raises:
      InputError: the recipe, the data or the folder is not as it must be.
      Diverged: the loss became infinite or not a number, more often than the recipe allows.
      Stopped: a signal asked for it; the state is saved.
      FolderLost: the folder is gone, or another run's; the state is saved elsewhere if it can be.
      NotSaved: the run came to its end, and the disk did not take its last checkpoint or summary.
      Stalled: the data gave nothing for `data.timeout` seconds.
    """
    began = time.perf_counter()
    check_guard(config.data.workers)
    keep_tracker(config.data.workers)
    start_processes(config.parallel)
    workdir = None if workdir is None else path_of(workdir, "--workdir")
    config = complete(config, recorded(workdir))
    agree(facts_of(config))
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    images_per_statistic(config, mesh.size)
    dataset = load_dataset(config.data, config.train.seed, hold_out=config.train.metric != "none")
    for note in dataset.notes:
        say(note)
    if dataset.multilabel and config.train.loss != "binary":
        raise InputError(f"{config.data.dataset} gives images several labels: add --train.loss binary")
    if config.train.metric == "map" and not dataset.multilabel:
        raise InputError("train.metric map needs images with several labels; take accuracy, loss or macro_recall")
    pictures = {f"{name} pictures": digest({name: rows[:, :2]}) for name, rows in fingerprint(dataset).items()}
    agree(pictures | {"class names": json.dumps(dataset.class_names)})
    metric = selecting_metric(config, dataset)
    plan = make_plan(config, len(dataset.train), dataset.validation is not None)
    model: Any = build_model(config, len(dataset.class_names))
    dataset = with_outputs(dataset, model.num_classes)
    if single := norms_of_one_value(config, model, mesh.size):
        say(
            f"WARNING: {len(single)} batch norms, {single[0]} the first, see one value a channel in training and put "
            "out their bias alone: take more images at a time (train.batch_size, train.accumulate_steps, "
            "parallel.batch_norm), larger images, or --model.norm group or frozen_batch"
        )
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    folder = open_workdir(workdir, config)
    check_one_folder(folder)
    say(f"run: {folder}")
    for split, source in dataset.splits().items():
        if split != "train":
            check_readable(source, config.data.channels, split)
    with locked(folder, config) as lock, cached_where_sound(mesh), stop_signals() as stop:
        if summary := ended(folder):
            say(f"the run is finished; see it with: resnet-jax evaluate {shlex.quote(str(folder))}")
            show(folder, config)
            return summary
        if jax.process_index() == 0:  # all processes have the same pictures, which `agree` saw to
            check_pictures(folder, config, dataset)
        with Checkpoints(folder, config.checkpoint.keep) as checkpoints:
            run = Run(folder, config, plan, model, dataset, metric, mesh, checkpoints, stop, lock)
            record, images_per_second = run_with_rollbacks(run, schedule)
            saved = checkpoints.has(record["step"])
        speed = {"images_per_second": images_per_second, "seconds": time.perf_counter() - began}
        try:
            summary = finish(folder, record, speed, device_name(mesh))
        except OSError as error:
            raise NotSaved(f"{folder / 'summary.json'} could not be written: {error}", folder) from error
        if not saved:
            raise NotSaved(f"the checkpoint of the last step, {record['step']}, could not be written", folder)
        show(folder, config)
        return summary


def check_pictures(folder: Path, config: Config, dataset: Dataset) -> None:
    """Compares the pictures with those that the run in the folder was given, and notes the new ones.

    Raises:
      InputError: others are to be trained on than before, and the recipe does not accept it.
    """
    before, now = load_fingerprint(folder), fingerprint(dataset)
    if before is not None and (changed := changes(before, now)):
        note = f"{config.data.dataset} is not as the run in {folder} was given it ({described(changed)})"
        if "train" in changed and not config.data.accept_changes:
            raise InputError(
                f"{note}: what is trained on would change. Give the data as it was, go on all the same with "
                "--data.accept_changes, or start anew in another --workdir"
            )
        say(f"WARNING: {note}", error=True)
        now["train"] = np.unique(np.concatenate([now["train"], before["train"]]), axis=0)
    save_fingerprint(now, folder)


class NotSaved(RuntimeError):
    """A run came to its end, but the disk did not take all of it."""

    def __init__(self, what: str, folder: Path) -> None:
        super().__init__(
            f"{what}. Make room on the disk; resnet-jax train --workdir {shlex.quote(str(folder))} goes on from the "
            "last checkpoint"
        )


def show(folder: Path, config: Config) -> None:
    """Draws the curves of a run that has ended and makes the page on it, where a start before this one did not. What
    goes wrong with them is said, since the run itself is safe.
    """
    if jax.process_index() != 0:
        return
    makers: dict[str, Callable[[Path], Path]] = {"curves.png": draw_curves}
    if config.log.report and jax.process_count() == 1:
        makers["report.html"] = make_report
    for name, make in makers.items():
        try:
            if not newer(folder / name, folder / "summary.json"):
                made = make(folder)
                if name == "report.html":
                    say(f"the report: {made}")
        except Exception as error:
            command = f"resnet-jax report {shlex.quote(str(folder))}"
            say(f"WARNING: there is no {name} ({type(error).__name__}: {error}); try {command}", error=True)


def newer(path: Path, other: Path) -> bool:
    """Whether a file is there and was written no earlier than another one."""
    return path.is_file() and modified(path) >= modified(other)


@dataclass(frozen=True)
class Run:
    """What does not change while a run goes on.

    Attributes:
      metric: selects on the validation split; None where nothing does.
      lock: the first process's alone.
    """

    folder: Path
    config: Config
    plan: Plan
    model: Any
    dataset: Dataset
    metric: str | None
    mesh: Mesh
    checkpoints: Checkpoints
    stop: Stop
    lock: Lock | BucketLock | None


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
    found = run.checkpoints.restore(lambda _: sharded_shapes(new_state, mesh))
    if found is None:
        state = put_state(in_form(with_weights(new_state(), config, run.model), config), mesh)
        names = names_of_outputs(run.model.num_classes, run.dataset.class_names, config.data.dataset)
        return state, new_record(config, run.dataset, names)
    state, record, step = found
    run.checkpoints.best = record["best"] and record["best"]["step"]
    note_best(run.folder, record["best"])
    say(f"resuming at step {step} of {run.plan.total}")
    return stacked(state, run), record


def stacked(state: TrainState, run: Run) -> TrainState:
    """A state as checkpoints hold it in the form that the recipe's model takes."""
    if not run.config.model.scan:
        return state
    form = state_sharding(jax.eval_shape(lambda: stack_blocks(state)), run.mesh)
    return jax.jit(stack_blocks, out_shardings=form)(state)


def go_on(run: Run, state: TrainState, record: Record, schedule: optax.Schedule) -> tuple[Record, float]:
    """Runs from a state to the plan's end; returns the last record and the images a second."""
    config, plan, start = run.config, run.plan, int(state.step)
    bad = BadImages(config.data.on_bad_image, set(record["skipped"]), config.data.channels)
    features = make_features(config, run.model) if computes_features_once(config) else None
    frozen = features and partial(features, {"params": state.params, "batch_stats": state.batch_stats})
    ends = (plan.log_every, plan.eval_every, plan.save_every)
    steps = range(start, plan.total)
    advance = make_advance(config, run.model, schedule, run.dataset, run.mesh, bad, steps, ends, frozen)
    measured = {
        split: make_evaluate(config, run.model, run.dataset, split, run.mesh, bad, run.stop, features)
        for split in run.dataset.splits()
        if split != "train"
    }
    with Report(run.folder, config, plan, schedule, start, record, run.checkpoints.latest) as report:
        state = run_steps(
            run, state, record, traced(advance, config, run.folder), measured.get("validation"), report, bad
        )
        record["selected"] = record["best"]["step"] if record["best"] else record["step"]
        if "test" in measured:
            look_at_test(run, state, record, measured["test"], report)
        record["skipped"] = sorted(bad.names)
    return record, report.speed()


def run_steps(
    run: Run,
    state: TrainState,
    record: Record,
    advance: Advance,
    evaluate: Callable[[TrainState], Result | None] | None,
    report: Report,
    bad: BadImages,
) -> TrainState:
    """The loop: step, write metrics, save, evaluate, until the plan's end, or until `train.patience` is at its end.
    Returns the last state; `record` is brought up to date in place.

    Args:
      evaluate: on the validation split; None where there is none.

    Everything is written and found finite before a checkpoint replaces another one. A checkpoint is begun before the
    evaluation of its step, which is pending until then, so that the two run beside each other. The device is given one
    call beyond the one that it works at, no more, so that slow steps end soon after a signal.
    """
    plan, step = run.plan, int(state.step)
    under_way: Any = ()
    if record["eval_pending"] and evaluate is not None:
        evaluate_step(run, state, step, record, evaluate, report, bad)
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
        if run.lock is not None and run.lock.lost(now=due(plan.save_every)):
            run.stop.ask()
        stopping = run.stop.due()
        evaluates = evaluate is not None and due(plan.eval_every)
        if not evaluates and not due(plan.save_every) and not stopping:
            continue
        record["sums"] = report.settle(state)
        record |= {"skipped_updates": dict(report.skipped), "skipped": sorted(bad.names), "eval_pending": evaluates}
        with report.paused():
            if stopping:
                end_early(run, state, step, record)
            if due(plan.save_every):
                run.checkpoints.save(step, unstack_blocks(state), record)
            if record["eval_pending"] and evaluate is not None:
                evaluate_step(run, state, step, record, evaluate, report, bad)
    record["step"] = step
    if step < plan.total:
        say(f"no better for {record['no_better']} evaluations: the run ends")
    if not run.checkpoints.has(step) and not lost(run):
        run.checkpoints.save(step, unstack_blocks(state), record)
    run.checkpoints.settle()
    if lost(run):
        end_early(run, state, step, record)
    return state


def look_at_test(
    run: Run,
    state: TrainState,
    record: Record,
    evaluate: Callable[[TrainState], Result | None],
    report: Report,
) -> None:
    """Evaluates what was selected on the test split, at the end of the run, and adds it to the record's result.

    Raises:
      Stopped: a signal came meanwhile; the last step is saved, and the same command does it then.
    """
    chosen = state
    if record["selected"] != record["step"]:
        shapes = sharded_shapes(state_maker(run.config, run.model, lambda step: 0.0), run.mesh)
        try:
            chosen = stacked(run.checkpoints.read(record["selected"], lambda _: shapes), run)
        except InputError as error:
            say(f"WARNING: {error}; the last step counts in its place", error=True)
            record["selected"] = record["step"]
    result = evaluate(chosen)
    if result is None:
        end_early(run, state, record["step"], record)
    report.evaluation(record["selected"], result)
    record["result"] = (record["result"] or {}) | scalars(result)


def lost(run: Run) -> bool:
    """Whether the run has lost its folder, as the first process sees it; all processes ask together."""
    return bool(broadcast_from_first(run.lock is not None and run.lock.lost(now=True)))


def broadcast_from_first(number: int) -> int:
    """The number that the first process gives, to all of them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def end_early(run: Run, state: TrainState, step: int, record: Record) -> NoReturn:
    """Saves a state before the plan's end; where the run has lost its folder, in another one.

    Raises:
      Stopped: always, or
      FolderLost: the run has lost its folder.
    """
    if not lost(run):
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), record)
        raise Stopped(run.folder, step, run.stop.signal or 0, run.checkpoints.has(step))
    run.checkpoints.abandon()
    place = run.lock.moved_to() if run.lock is not None and jax.process_count() == 1 else None
    held: Any = contextlib.nullcontext()  # its lock moved with it
    if place is None:
        folder = run.folder if in_bucket(run.folder) else run.folder.absolute()
        place = folder.with_name(f"{folder.name}-saved-{broadcast_from_first(int(time.time()))}")
        held = locked(place, run.config)
    saved: Path | None = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        with held, Checkpoints(place, run.config.checkpoint.keep) as checkpoints:
            checkpoints.save(step, unstack_blocks(state), record)
            saved = place if checkpoints.has(step) else None
    except (OSError, InputError) as error:
        say(f"WARNING: {place} cannot take the state: {error}", error=True)
    raise FolderLost(run.folder, step, saved)


def evaluate_step(
    run: Run,
    state: TrainState,
    step: int,
    record: Record,
    evaluate: Callable[[TrainState], Result | None],
    report: Report,
    bad: BadImages,
) -> None:
    """Evaluates a step on the validation split, and keeps its checkpoint if it is the best so far.

    Raises:
      Stopped: a signal came meanwhile; the step is saved, and its evaluation is pending.
    """
    result = evaluate(state)
    if result is None:
        end_early(run, state, step, record)
    report.evaluation(step, result)
    record |= {"eval_pending": False, "skipped": sorted(bad.names)}
    if run.metric is None:
        record["result"] = scalars(result)
        return
    name, means = served(result, "validation")
    value, before = float(means[run.metric]), record["best"]
    record["no_better"] += before is not None
    if before is None:
        record["result"] = scalars(result)
    if better(run.metric, value, before and before["value"]):
        best = {"step": step, "metric": f"{name}/{run.metric}", "value": value}
        record |= {"result": scalars(result), "no_better": 0}
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), record | {"best": best})
        if run.checkpoints.has(step):
            record["best"] = best
            run.checkpoints.best = step
            note_best(run.folder, best)


def note_best(folder: Path, best: dict[str, Any] | None) -> None:
    """Names the best checkpoint in the run's folder, for those who read it, or takes the name away."""
    if jax.process_index() != 0:
        return
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_whole(folder / BEST, to_json(best) + "\n")
