"""A whole run, from a recipe to a folder with its results. Read `train` from top to bottom."""

import json
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

from resnet_jax.config import Config, check
from resnet_jax.data.loader import BadImages, train_batches, whole_split
from resnet_jax.data.sources import Dataset, load_dataset
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.recipes import result_fields
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
from resnet_jax.training.checkpoints import Checkpoints, Record, sound_step
from resnet_jax.training.evaluation import Result, headline, make_evaluate, scalars
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer, make_schedule
from resnet_jax.training.recipe import (
    Plan,
    build_model,
    complete,
    in_form,
    make_plan,
    sharded_shapes,
    state_maker,
    with_weights,
)
from resnet_jax.training.report import Advance, Diverged, Report, say, traced
from resnet_jax.training.signals import Stop, Stopped, end_with_lost_process, stop_signals
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import draw, make_device_step, make_pmap_step, make_train_step
from resnet_jax.training.workdir import device_name, finish, locked, new_record, open_workdir, recorded


def train(config: Config, workdir: str | Path | None = None) -> dict[str, Any]:
    """Trains as the recipe says and leaves everything in `workdir`; a folder that holds a run resumes it.

    SIGTERM and Ctrl-C end it after the step that runs, with a checkpoint.

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
    with locked(folder, config), stop_signals() as stop:
        step = sound_step(folder)
        if step == plan.total and (folder / "summary.json").exists():
            say(f"the run is finished; see it with: resnet-jax evaluate {folder}")
            return json.loads((folder / "summary.json").read_text())
        with Checkpoints(folder, config.checkpoint.keep) as checkpoints:
            run = Run(folder, config, plan, model, dataset, mesh, checkpoints, stop)
            record, images_per_second = run_with_rollbacks(run, schedule, step)
        speed = {"images_per_second": images_per_second, "seconds": time.perf_counter() - began}
        return finish(folder, record, plan.total, speed, device_name(mesh))


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


def run_with_rollbacks(run: Run, schedule: optax.Schedule, step: int | None) -> tuple[Record, float]:
    """Runs to the plan's end; where it diverges and the recipe says so, again from the last checkpoint, more slowly.

    Returns:
      The last record and the images a second.
    """
    recipe, rollbacks = run.config.train, 0
    while True:
        state, record = begin(run, step)
        rollbacks = record["rollbacks"] = max(rollbacks, record["rollbacks"])
        factor = 0.5**rollbacks
        try:
            return go_on(run, state, record, lambda t, factor=factor: factor * schedule(t))
        except Diverged as error:
            if recipe.on_nonfinite != "rollback" or rollbacks >= recipe.nonfinite_limit:
                raise
            run.checkpoints.settle()
            step, rollbacks = sound_step(run.folder), rollbacks + 1
            say(f"WARNING: {error.what}; going back to step {step or 0} with {factor / 2:g} times the learning rate")


def begin(run: Run, step: int | None) -> tuple[TrainState, Record]:
    """A new state and record, or those of a step."""
    config, mesh = run.config, run.mesh
    new_state = state_maker(config, run.model, lambda step: 0.0)
    if step is None:
        state = put_state(in_form(with_weights(new_state(), config, run.model), config), mesh)
        return state, new_record(config, run.dataset)
    state, record = run.checkpoints.restore(sharded_shapes(new_state, mesh), step)
    if config.model.scan:
        form = state_sharding(jax.eval_shape(lambda: in_form(new_state(), config)), mesh)
        state = jax.jit(stack_blocks, out_shardings=form)(state)
    run.checkpoints.best = record["best"] and record["best"]["step"]
    say(f"resuming at step {step} of {run.plan.total}")
    return state, record


def go_on(run: Run, state: TrainState, record: Record, schedule: optax.Schedule) -> tuple[Record, float]:
    """Runs from a state to the plan's end; returns the last record and the images a second."""
    config, plan, start = run.config, run.plan, int(state.step)
    bad = BadImages(config.data.on_bad_image, set(record["skipped"]))
    advance = make_advance(config, run.model, schedule, run.dataset, run.mesh, bad, range(start, plan.total))
    evaluate = make_evaluate(config, run.model, run.dataset, run.mesh, bad, run.stop)
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
    """The loop: step, write metrics, save, evaluate, until the plan's end. `record` is brought up to date in place.

    Everything is written and found finite before a checkpoint replaces another one. A checkpoint is begun before the
    evaluation of its step, which it owes until then, so that the two run beside each other.
    """
    plan, step = run.plan, int(state.step)
    if record["owed"]:
        assess(run, state, step, record, evaluate, report, bad)
    while step < plan.total:
        before = step
        state, sums, n, waited = advance(state, step)
        step += n

        def due(every: int, before: int = before, step: int = step) -> bool:
            return step // every > before // every or step == plan.total

        report.steps(step, n, sums, waited)
        if due(plan.log_every):
            report.flush()
        stopping = run.stop.asked(step)
        if not due(plan.eval_every) and not due(plan.save_every) and not stopping:
            continue
        record["sums"] = report.settle(state)
        record |= {"skipped_updates": dict(report.skipped), "skipped": sorted(bad.names), "owed": due(plan.eval_every)}
        with report.paused():
            if due(plan.save_every) or stopping:
                run.checkpoints.save(step, unstack_blocks(state), record)
            if stopping:
                raise Stopped(step, run.stop.signal or 0, run.checkpoints.has(step))
            if record["owed"]:
                assess(run, state, step, record, evaluate, report, bad)


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
        raise Stopped(step, run.stop.signal or 0, run.checkpoints.has(step))
    report.evaluation(step, result)
    record |= {"owed": False, "result": scalars(result), "skipped": sorted(bad.names)}
    accuracy = headline(result)
    if record["best"] is None or accuracy > record["best"]["accuracy"]:
        best = {"step": step, "accuracy": accuracy}
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), record | {"best": best})
        if run.checkpoints.has(step):
            record["best"] = best
            run.checkpoints.best = step


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
    new_state = state_maker(config, model, schedule)
    shapes = jax.eval_shape(lambda: in_form(new_state(), config))
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
