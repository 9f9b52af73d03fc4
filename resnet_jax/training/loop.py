"""A whole run, from a recipe to a folder with its results. Read `train` from top to bottom."""

import contextlib
import itertools
import json
import math
import shlex
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, to_dict
from resnet_jax.data.dataset import Dataset, with_outputs
from resnet_jax.data.fingerprint import (
    changes,
    described,
    devices_of,
    digest,
    fingerprint,
    load_fingerprint,
    other_resizer,
    save_fingerprint,
)
from resnet_jax.data.loader import BadImages, check_readable, sampling_table, train_batches, whole_split
from resnet_jax.data.transforms import resizer
from resnet_jax.data.watch import check_guard, keep_tracker
from resnet_jax.files import in_bucket, modified, path_of, to_json, write_whole
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.output import wrapped
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.runs.charts import draw_curves
from resnet_jax.runs.folder import begun, device_name, ended, evaluate_command, finish, locked, open_workdir
from resnet_jax.runs.hooks import Hooks, RunStart
from resnet_jax.runs.lock import BucketLock, Lock
from resnet_jax.runs.processes import check_equal, check_one_folder, ending_together, facts_of, start_processes
from resnet_jax.runs.report_page import make_report
from resnet_jax.runs.reporter import Diverged, Reporter, say
from resnet_jax.runs.signals import FolderLost, Stop, Stopped, stop_signals
from resnet_jax.runs.trace import Trace
from resnet_jax.training.build import (
    Plan,
    data_of,
    images_per_statistic,
    in_form,
    length_of,
    make_plan,
    model_with_parts,
    norms_of_one_value,
    sharded_shapes,
    state_maker,
    with_weights,
)
from resnet_jax.training.checkpoints import Checkpoints, read_checkpoint, read_record
from resnet_jax.training.evaluation import Result, better, goal_of, make_evaluate, scalars, selecting_metric, served
from resnet_jax.training.finetune import make_phases
from resnet_jax.training.linear_probe import computes_features_once, head_of, make_features, whole_features
from resnet_jax.training.losses import Loss
from resnet_jax.training.manifest import BEST, Best, Damaged, checkpoints_of, steps_in
from resnet_jax.training.metrics import Metric, Sums
from resnet_jax.training.optimizers import OwnOptimizer, make_schedule, warmup_steps
from resnet_jax.training.parts import Parts, check_parts, check_targets, make_parts, names_and_hashes, record_parts
from resnet_jax.training.programs import check_scope, compile_phases, steps_in_call, steps_per_call, weights_of_classes
from resnet_jax.training.resolve import resolve
from resnet_jax.training.run_progress import RunProgress
from resnet_jax.training.sharding import (
    broadcast_from_first,
    check_batch,
    make_mesh,
    put_everywhere,
    put_state,
    replicated,
    state_sharding,
    uncached_where_it_hangs,
)
from resnet_jax.training.state import TrainState
from resnet_jax.typed import DISTRIBUTION
from resnet_jax.weights.load import names_of_outputs


@ending_together(Stopped, FolderLost)
def train(
    config: Config,
    workdir: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | Callable[[], Dataset] | None = None,
    loss: Loss | None = None,
    optimizer: OwnOptimizer | None = None,
    metrics: Mapping[str, Metric] | None = None,
    hooks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Trains as the recipe says and leaves everything in `workdir`; a folder that holds a run resumes it.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end it after the steps that the device was given, with a checkpoint. Parts of
    your own take the place of what the recipe names; a run that resumes is given them again.

    Args:
      config: the recipe.
      workdir: the run's folder; None makes a new one under `runs/`.
      model: called as `model(images, train=...)` with float images [batch, height, width, channel]; with or without
        batch statistics, dropout and other collections.
      dataset: `Dataset(train=..., validation=None, test=None, class_names=None)`, or a function that returns one.
      loss: `loss(logits, batch) -> float32 [batch]`, of a batch with `image`, `label` and, where labels are classes,
        a soft `target` after smoothing and mixing. Labels that are no classes need one.
      optimizer: an optax transformation, or a function that makes one of the recipe's learning rate by step.
      metrics: name -> `metric(logits, batch) -> [batch]`, whose mean is logged; `train.metric` may name one.
      hooks: objects with methods of `runs.hooks.Hook`.

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

    Example:
      The digits for three epochs, then six more; and a module, data and a metric of your own::

        config = rj.Config(train=TrainConfig(epochs=3))
        summary = rj.train(config, "runs/a")
        print(summary["ema/test"]["accuracy"])

        data = rj.Dataset(train=(images, labels), test=(more_images, more_labels))
        rj.train(rj.Config(), "runs/own", model=MyNet(), dataset=data, metrics={"margin": margin})
    """
    named = {"model": model, "dataset": dataset, "loss": loss, "optimizer": optimizer, "metrics": metrics}
    return train_with(config, workdir, named | {"hooks": hooks})


def train_with(
    config: Config, workdir: str | Path | None, named: Mapping[str, Any], look_at_test: bool = True
) -> dict[str, Any]:
    """Trains as `train` does with parts of the user's own by their names; without `look_at_test` the test split is not
    evaluated, and no page is made, which would.
    """
    began = time.perf_counter()
    check_guard(config.data.workers)
    keep_tracker(config.data.workers)
    start_processes(config.parallel)
    workdir = None if workdir is None else path_of(workdir, "--workdir")
    parts = make_parts(named)
    hooks = Hooks(parts.hooks)
    before = recorded_recipe(workdir)
    if workdir is None or not begun(workdir):
        before = None  # what failed before its first step does not fix the recipe
    elif before is not None:
        for note in check_parts(workdir, parts, config.train.accept_parts):
            say(f"WARNING: {note}", error=True)
    check_equal(facts_of(config) | {"parts of your own": json.dumps(names_and_hashes(parts))})
    mesh = make_mesh(config.parallel.devices, config.parallel.fsdp)
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    images_per_statistic(config, mesh.size)
    found = resolve(config, parts, before)
    config, dataset = found.config, found.dataset or data_of(found.config, parts)
    for note in (*dataset.notes, found.line()):
        if note:
            say(wrapped(note))
    if parts.loss is None and dataset.multilabel and config.train.loss != "binary":
        raise InputError(f"{config.data.dataset} gives images several labels: add --train.loss binary")
    if not dataset.class_names and (config.augment.mixup or config.augment.cutmix):
        raise InputError("augment.mixup and augment.cutmix mix the targets of classes, and the labels are none")
    pictures = {f"{name} pictures": digest({name: rows[:, :2]}) for name, rows in fingerprint(dataset).items()}
    check_equal(facts_of(config) | pictures | {"class names": json.dumps(dataset.class_names)})
    metric = selecting_metric(config, dataset, parts)
    if config.train.on_nonfinite == "rollback" and isinstance(parts.optimizer, optax.GradientTransformation):
        raise InputError(
            "train.on_nonfinite rollback halves the learning rate: give the optimizer as a function of its schedule"
        )
    plan = make_plan(config, len(dataset.train), dataset.validation is not None)
    module, parts = model_with_parts(config, parts, len(dataset.class_names))
    check_scope(config, module, mesh.size)
    check_targets(config, parts, parts.outputs_of(module), dataset.multilabel)
    dataset = with_outputs(dataset, parts.outputs_of(module))
    if single := norms_of_one_value(config, module, mesh.size):
        say(
            f"WARNING: {len(single)} batch norms, {single[0]} the first, see one value a channel in training and put "
            "out their bias alone: take more images at a time (train.batch_size, train.accumulate_steps, "
            "parallel.batch_norm), larger images, or --model.norm group or frozen_batch"
        )
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    if shortened := warmup_steps(config, plan.total, plan.per_epoch)[1]:
        say(shortened)
    folder = open_workdir(workdir, config)
    check_one_folder(folder)
    say(f"run: {folder}")
    say(wrapped(f"training {config.model.name} on {device_name(mesh)}: {length_of(config, plan)}"))
    for split, source in dataset.splits().items():
        if split != "train":
            check_readable(source, config.data.channels, split)
    with locked(folder, config) as lock, uncached_where_it_hangs(mesh), stop_signals() as stop:
        if summary := ended(folder):
            say(f"the run is finished; see it with: {evaluate_command(folder)}")
            if look_at_test:
                make_curves_and_page(folder, config, parts)
            return summary
        if jax.process_index() == 0:  # all processes have the same pictures, as `check_equal` has found
            check_classes(folder, names_of_outputs(parts.outputs, dataset.class_names, config.data.dataset))
            check_pictures(folder, config, dataset, mesh.size)
            record_parts(folder, parts)
        with Checkpoints(folder, config.checkpoint.keep) as checkpoints:
            seen = dataset if look_at_test else replace(dataset, test=None)
            run = Run(folder, config, plan, module, seen, metric, mesh, checkpoints, stop, lock, parts, hooks)
            progress, images_per_second = fit_with_rollbacks(run, schedule)
            saved = checkpoints.has(progress.step)
        speed = {"images_per_second": images_per_second, "seconds": time.perf_counter() - began}
        try:
            summary = finish(folder, progress, speed, device_name(mesh), hooks.errors)
        except OSError as error:
            raise NotSaved(f"{folder / 'summary.json'} could not be written: {error}", folder) from error
        if not saved:
            raise NotSaved(f"the checkpoint of the last step, {progress.step}, could not be written", folder)
        if look_at_test:
            make_curves_and_page(folder, config, parts)
        hooks.call("on_end", summary)
        return summary


def check_classes(folder: Path, names: Sequence[str]) -> None:
    """Compares the names of the outputs with those of the run in the folder, which its newest checkpoint has.

    Raises:
      InputError: they are others, or stand in another order: each output has learned the class of its number.
    """
    for step in steps_in(checkpoints_of(folder)):
        with contextlib.suppress(Damaged):
            same_classes(read_record(folder, step)["class_names"], names, folder)
            return


def same_classes(before: Sequence[str], names: Sequence[str], folder: Path) -> None:
    """Raises InputError, as `check_classes` says, where the names of the outputs of a run in a folder are no more the
    same.
    """
    for number, (was, now) in enumerate(itertools.zip_longest(before, names)):
        if was != now:
            raise InputError(
                f"the classes of the data are not those of the run in {folder}: output {number} of the network stands "
                f"for {was}, and would now for {now}. Give the classes their names and their order back, or start anew "
                f"in another --workdir; --model.pretrained {shlex.quote(str(folder))} begins with what this run learned"
            )


def check_pictures(folder: Path, config: Config, dataset: Dataset, devices: int) -> None:
    """Compares the pictures with those that the run in the folder was given, what resizes them, and the devices where
    batch statistics are those of each; and records them.

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
    if config.augment.crop == "random_resized" and (other := other_resizer(folder)):
        say(
            f"WARNING: the training pictures of the run in {folder} were resized by {other}, and now are by "
            f"{resizer()}: pixels may differ by 1 of 255. The extra {DISTRIBUTION}[fast] installs cykooz.resizer",
            error=True,
        )
    had = devices_of(folder) if config.parallel.batch_norm == "local" else None
    if had not in (None, devices):
        say(
            f"WARNING: the run in {folder} had {had} devices, and now has {devices}: with parallel.batch_norm local "
            f"the statistics are of another number of images. --parallel.devices {had} goes on as it began; a run that "
            "begins with ghost:N does on any number of devices",
            error=True,
        )
    save_fingerprint(now, folder, devices)


class NotSaved(RuntimeError):
    """A run came to its end, but the disk did not take all of it."""

    def __init__(self, what: str, folder: Path) -> None:
        super().__init__(
            f"{what}. Make room on the disk; resnet-jax train --workdir {shlex.quote(str(folder))} goes on from the "
            "last checkpoint"
        )


def make_curves_and_page(folder: Path, config: Config, parts: Parts) -> None:
    """Draws the curves of a run that has ended and makes the page on it, where a start before this one did not. What
    goes wrong with them is said, since the run itself is safe. All processes evaluate for the page; the first writes.
    """
    makers: dict[str, Callable[[Path], Path]] = {"report.html": partial(make_report, parts=parts)}
    makers = makers if config.log.report else {}
    if jax.process_index() == 0:
        made_already = {name: newer(folder / name, folder / "summary.json") for name in ("curves.png", "report.html")}
        makers |= {"curves.png": draw_curves}
    else:
        made_already = {}
    for name in sorted(makers):
        try:
            there = made_already.get(name, False)
            if broadcast_from_first(there) if name == "report.html" else there:
                continue
            made = makers[name](folder)
            if name == "report.html":
                say(f"and open {made} in a browser")
        except Exception as error:
            command = f"resnet-jax report {shlex.quote(str(folder))}"
            say(f"WARNING: there is no {name} ({type(error).__name__}: {error}); try {command}", error=True)


def newer(path: Path, other: Path) -> bool:
    """Returns whether a file is there and was written no earlier than another one."""
    return path.is_file() and modified(path) >= modified(other)


@dataclass(frozen=True)
class Run:
    """What does not change while a run goes on.

    Attributes:
      metric: selects on the validation split; None where nothing does.
      lock: the first process's alone.
      parts: the user's own.
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
    parts: Parts
    hooks: Hooks


Evaluate: TypeAlias = Callable[[TrainState], Result | None]


def fit_with_rollbacks(run: Run, schedule: optax.Schedule) -> tuple[RunProgress, float]:
    """Trains to the plan's end; where it diverges and the recipe says so, again from the last checkpoint, more slowly.

    Returns:
      What came out, and the images a second.
    """
    recipe, rollbacks = run.config.train, 0
    while True:
        state, progress = begin(run)
        rollbacks = progress.rollbacks = max(rollbacks, progress.rollbacks)
        factor = 0.5**rollbacks
        try:
            return fit(run, state, progress, lambda t, factor=factor: factor * schedule(t))
        except Diverged as error:
            if recipe.on_nonfinite != "rollback" or rollbacks >= recipe.nonfinite_limit:
                raise
            rollbacks += 1
            last = run.checkpoints.latest() or 0
            say(f"WARNING: {error.what}; going back to step {last} with {factor / 2:g} times the learning rate")


def begin(run: Run) -> tuple[TrainState, RunProgress]:
    """Returns a new state and progress, or those of the newest sound checkpoint."""
    config, mesh = run.config, run.mesh
    new_state = state_maker(config, run.model, lambda step: 0.0, run.parts.optimizer)
    found = run.checkpoints.restore(lambda _: sharded_shapes(new_state, mesh))
    if found is None:
        state = put_state(in_form(with_weights(new_state(), config, run.model), config), mesh)
        names = names_of_outputs(run.parts.outputs, run.dataset.class_names, config.data.dataset)
        return state, RunProgress(to_dict(config), list(names), run.dataset.multilabel)
    state, record, step = found
    progress = RunProgress.from_record(record)
    run.checkpoints.best = progress.best and progress.best["step"]
    note_best(run.folder, progress.best)
    say(f"resuming at step {step} of {run.plan.total}")
    return with_stacked_blocks(state, run), progress


def with_stacked_blocks(state: TrainState, run: Run) -> TrainState:
    """Stacks the blocks of a checkpoint's state where the model uses `scan`; else returns it as it is."""
    if not run.config.model.scan:
        return state
    form = state_sharding(jax.eval_shape(lambda: stack_blocks(state)), run.mesh)
    return jax.jit(stack_blocks, out_shardings=form)(state)


def fit(
    run: Run, state: TrainState, progress: RunProgress, schedule: optax.Schedule, until: int | None = None
) -> tuple[RunProgress, float]:
    """Trains from a state to the plan's end, or until `train.patience` is over, and evaluates the test split.

    `reporter.settle` writes all metrics and checks that they and the state are finite; only then may a checkpoint
    replace an older one. A checkpoint is written in the background while its step is evaluated; it says `eval_pending`,
    so that a run that is killed between the two evaluates when it resumes. At most two calls are queued on the device,
    so that slow steps end soon after a signal.

    Args:
      until: a step at which training ends, with a checkpoint and without the test split; None for the plan's end.

    Returns:
      What came out, and the images a second.
    """
    config, plan, mesh, step = run.config, run.plan, run.mesh, int(state.step)
    end = plan.total if until is None else until
    bad = BadImages(config.data.on_bad_image, set(progress.skipped), config.data.channels)

    # The data: a whole split on the device, of which a step draws its batch, or batches from the host. A linear probe
    # on images that never change has their features, which are computed once, in place of images.
    table, classes = sampling_table(run.dataset, config.data.sampling), run.dataset.label_classes()
    features = make_features(config, run.model, mesh) if computes_features_once(config) else None
    from_device = config.data.on_device or features is not None
    most = steps_per_call(config, from_device, run.parts.model is not None)
    on_device: Any = None
    loader: Any = contextlib.nullcontext()
    if features is not None:
        frozen = partial(features, {"params": state.params, "batch_stats": state.batch_stats})
        on_device = put_everywhere(whole_features(run.dataset.train, config, mesh, bad, frozen, table), mesh)
    elif from_device:
        on_device = put_everywhere(whole_split(run.dataset.train, config, bad, table, classes), mesh)
    else:
        batches = train_batches(
            run.dataset.train,
            config,
            mesh,
            bad,
            range(step, end),
            rank=jax.process_index(),
            hosts=jax.process_count(),
            table=table,
            classes=classes,
        )
        loader = contextlib.closing(batches)  # while the process can still give back its shared memory

    # The step, compiled when it is first called, anew for each phase of a fine-tuning.
    phases = make_phases(config, state.params, len(run.dataset.train) / config.train.batch_size)
    programs = compile_phases(
        config,
        run.model if features is None else head_of(run.model),
        schedule,
        phases,
        mesh,
        (state_sharding(state, mesh), replicated(mesh)),
        from_device=from_device,
        most=most,
        weights=weights_of_classes(config, run.dataset, run.parts.outputs_of(run.model)),
        parts=run.parts,
    )
    counts = put_everywhere({n: np.int32(n) for n in range(1, most + 1)}, mesh)
    starts = [phase.start for phase in phases]
    ends = (*starts, step + 1, end)  # the first step is a call of its own, and is shown

    evaluates: dict[str, Evaluate] = {
        split: make_evaluate(
            config, run.model, run.dataset, split, mesh, bad, run.stop.asked, features, parts=run.parts
        )
        for split in run.dataset.splits()
        if split != "train"
    }
    validate = evaluates.get("validation")
    patience = config.train.patience or math.inf
    previous: Sums = {}
    trace = Trace(config.log.profile, run.folder)

    hooks, latest, ending = run.hooks, run.checkpoints.latest, False
    hooks.call("on_start", RunStart(run.folder, config, plan.total, step))
    known = None if isinstance(run.parts.optimizer, optax.GradientTransformation) else schedule
    with loader, Reporter(run.folder, config, plan, known, step, progress, latest, hooks) as reporter:
        if progress.eval_pending and validate is not None:
            say(f"step {step} is evaluated first: the run stopped before its result was saved")
            evaluate_step(run, state, step, progress, validate, reporter, bad)
        while step < end and progress.no_better < patience and not ending:
            phase = bisect_right(starts, step) - 1
            n = steps_in_call(step, most, ends, (plan.log_every, plan.eval_every, plan.save_every))
            asked = time.perf_counter()
            data = on_device if from_device else [next(batches) for _ in range(n)]
            waited = 0.0 if from_device else time.perf_counter() - asked
            if not from_device:
                data += data[-1:] * (most - n)  # the program takes `most` batches, and uses the first n
            trace.before(step)
            state, sums = programs[phase](state, data, counts[n])
            step += n
            trace.after(step, state)
            jax.block_until_ready(previous)
            previous = sums
            reporter.steps(step, n, sums, waited)

            log = step % plan.log_every == 0 or step == plan.total
            if log:
                reporter.flush()
            ending = step == plan.total or asked_to_end(hooks)
            save = ending or step == end or step % plan.save_every == 0
            evaluate = validate is not None and (ending or step % plan.eval_every == 0)
            if run.lock is not None and run.lock.lost(now=save):
                run.stop.ask()
            stopping = run.stop.due()
            if not (evaluate or save or stopping):
                continue
            progress.step, progress.sums = step, reporter.settle(state)
            progress.skipped_updates, progress.skipped = dict(reporter.skipped), sorted(bad.names)
            progress.eval_pending = evaluate
            with reporter.paused():
                if stopping:
                    end_early(run, state, step, progress)
                if save:
                    run.checkpoints.save(step, unstack_blocks(state), progress.to_record())
                    hooks.call("on_checkpoint", step, run.folder / "checkpoints" / str(step))
                if evaluate and validate is not None:
                    evaluate_step(run, state, step, progress, validate, reporter, bad)
                    ending = ending or asked_to_end(hooks)
        progress.step = step
        if until is not None:
            return progress, reporter.speed()
        if step < plan.total:
            reason = "a hook asked for it" if ending else f"no better for {progress.no_better} evaluations"
            say(f"{reason}: the run ends at step {step} of {plan.total}")
        if not run.checkpoints.has(step) and not lost(run):
            run.checkpoints.save(step, unstack_blocks(state), progress.to_record())
        run.checkpoints.settle()
        if lost(run):
            end_early(run, state, step, progress)
        progress.selected = progress.best["step"] if progress.best else step
        if "test" in evaluates:
            evaluate_test(run, state, progress, evaluates, reporter)
        progress.skipped = sorted(bad.names)
    return progress, reporter.speed()


def asked_to_end(hooks: Hooks) -> bool:
    """Returns whether a hook, which the first process alone calls, has asked to end the run."""
    return bool(hooks.hooks) and bool(broadcast_from_first(hooks.ending))


def evaluate_step(
    run: Run,
    state: TrainState,
    step: int,
    progress: RunProgress,
    evaluate: Evaluate,
    reporter: Reporter,
    bad: BadImages,
) -> None:
    """Evaluates a step on the validation split, and keeps its checkpoint if it is the best so far.

    Raises:
      Stopped: a signal came meanwhile; the step is saved, and its evaluation is pending.
    """
    result = evaluate(state)
    if result is None:
        end_early(run, state, step, progress)
    reporter.evaluation(step, result)
    progress.eval_pending, progress.skipped = False, sorted(bad.names)
    if run.metric is None:
        progress.result = scalars(result)
        return
    name, means = served(result, "validation")
    value, before = float(means[run.metric]), progress.best
    progress.no_better += before is not None
    if before is None:
        progress.result = scalars(result)
    if better(goal_of(run.config, run.metric), value, before and before["value"]):
        best: Best = {"step": step, "metric": f"{name}/{run.metric}", "value": value}
        chosen: dict[str, Any] = {"best": best, "result": scalars(result)}
        progress.no_better = 0
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), replace(progress, **chosen).to_record())
        if run.checkpoints.has(step):
            progress.best, progress.result = best, chosen["result"]
            run.checkpoints.best = step
            note_best(run.folder, best)


def evaluate_test(
    run: Run, state: TrainState, progress: RunProgress, evaluates: Mapping[str, Evaluate], reporter: Reporter
) -> None:
    """Evaluates what was selected on the test split, at the end of the run, and adds it to the progress's result.

    Raises:
      Stopped: a signal came meanwhile; the last step is saved, and the same command does it then.
    """
    chosen, selected, splits = state, progress.selected or progress.step, ["test"]
    if selected != progress.step:
        new_state = state_maker(run.config, run.model, lambda step: 0.0, run.parts.optimizer)
        shapes = sharded_shapes(new_state, run.mesh)
        try:
            chosen = with_stacked_blocks(read_checkpoint(run.folder, lambda _: shapes, str(selected))[0], run)
        except InputError as error:
            say(f"WARNING: {error}; the last step counts in its place", error=True)
            progress.selected = selected = progress.step
            splits = ["validation", "test"]  # what was measured on validation is of the step that is lost
    for split in splits:
        result = evaluates[split](chosen)
        if result is None:
            end_early(run, state, progress.step, progress)
        if split == "test":
            reporter.evaluation(selected, result)
        progress.result = (progress.result or {}) | scalars(result)


def end_early(run: Run, state: TrainState, step: int, progress: RunProgress) -> NoReturn:
    """Saves a state before the plan's end; where the run has lost its folder, in another one.

    Raises:
      Stopped: always, or
      FolderLost: the run has lost its folder.
    """
    if not lost(run):
        if not run.checkpoints.has(step):
            run.checkpoints.save(step, unstack_blocks(state), progress.to_record())
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
            checkpoints.save(step, unstack_blocks(state), progress.to_record())
            saved = place if checkpoints.has(step) else None
    except (OSError, InputError) as error:
        say(f"WARNING: {place} cannot take the state: {error}", error=True)
    raise FolderLost(run.folder, step, saved)


def lost(run: Run) -> bool:
    """Returns whether the run has lost its folder, as the first process sees it; all processes ask together."""
    return bool(broadcast_from_first(run.lock is not None and run.lock.lost(now=True)))


def note_best(folder: Path, best: Best | None) -> None:
    """Names the best checkpoint in the run's folder, for those who read it, or takes the name away."""
    if jax.process_index() != 0:
        return
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_whole(folder / BEST, to_json(best) + "\n")
