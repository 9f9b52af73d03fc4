"""Trains the members of a sweep that differ in numbers only by one compiled program: `train_together`.

The states of the members lie one after another on a leading axis, and each device trains one member, or several by
`vmap`, at a time. More members than that take their turns, call by call. When a member is
evaluated and what is selected is decided by the functions of `training.loop`; which numbers may differ, and the program
that takes them as inputs, is in `training.sweep_programs`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import Config, InputError, to_dict
from resnet_jax.data.dataset import Dataset, with_outputs
from resnet_jax.data.loader import BadImages
from resnet_jax.files import to_json, write_whole
from resnet_jax.models.stacking import unstack_blocks
from resnet_jax.runs.charts import spoken
from resnet_jax.runs.folder import device_name, finish
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.lock import BucketLock, Lock
from resnet_jax.runs.reporter import Reporter, say
from resnet_jax.runs.signals import FolderLost, Stop, Stopped
from resnet_jax.runs.sweep_page import spoken_value
from resnet_jax.training.build import (
    data_of,
    images_per_statistic,
    in_form,
    make_plan,
    model_with_parts,
    norms_of_one_value,
    state_maker,
    with_weights,
)
from resnet_jax.training.checkpoints import Checkpoints, Record
from resnet_jax.training.evaluation import Result, gathered, selecting_metric
from resnet_jax.training.loop import Run, check_pictures, evaluate_step, same_classes
from resnet_jax.training.metrics import Sums, mean_average_precision, means
from resnet_jax.training.optimizers import make_schedule
from resnet_jax.training.parts import Parts, check_targets, record_parts
from resnet_jax.training.programs import check_scope
from resnet_jax.training.run_progress import RunProgress
from resnet_jax.training.sharding import check_batch, make_mesh
from resnet_jax.training.state import TrainState
from resnet_jax.training.sweep_programs import (
    BestState,
    Member,
    Programs,
    Rows,
    RunningMember,
    make_programs,
    stack_trees,
    with_inputs,
)
from resnet_jax.weights.load import names_of_outputs


def in_rounds(trees: Any, programs: Programs) -> list[Any]:
    """Returns a tree [members, ...] in parts of `width` members on their devices; the last is filled up."""
    rounds = []
    for first in range(0, len(jax.tree.leaves(trees)[0]), programs.width):
        part = jax.tree.map(lambda x, i=first: x[i : i + programs.width], trees)
        lack = programs.width - len(jax.tree.leaves(part)[0])
        filled = jax.tree.map(lambda x, n=lack: np.concatenate([x, *[x[-1:]] * n]), part)
        rounds.append(on_members(filled, programs.mesh))
    return rounds


def on_members(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree [members, ...] on the devices of its members."""
    return jax.device_put(tree, NamedSharding(mesh, P("members")))


def state_of(states: Any, slot: int) -> Any:
    """Returns the state of a member of a round, copied to the host."""

    def copied(leaf: jax.Array) -> np.ndarray:
        for shard in leaf.addressable_shards:
            first = shard.index[0].start or 0
            if first <= slot < first + len(shard.data):
                return np.array(np.asarray(shard.data)[slot - first])
        raise IndexError(slot)

    return jax.tree.map(copied, states)


def train_together(
    members: Sequence[Member],
    place: Path,
    parts: Parts,
    *,
    per_device: int | Literal["auto"],
    stop: Stop,
    lock: Lock | BucketLock | None,
    folder: Path,
) -> Rows:
    """Trains members that share a program to their ends, and leaves each as a finished run in its folder.

    Args:
      place: of the checkpoints of all members together; a start that finds one resumes from it.
      per_device: members that go through a device together by `vmap`; `auto` tries which number is fastest, and a
        later start keeps to it.
      folder: of the sweep.

    Returns:
      For each member `status` (`finished` or `diverged`), `why`, `step`, and of its best step on the validation split
      `metric`, `value`, `best_step`, and `result`, the means of its evaluation.

    Raises:
      Stopped: a signal asked for it; the states are saved.
      FolderLost: the sweep's folder is another one's.
    """
    group, parts = start_members(members, parts, stop)
    config, module = group[0].run.config, group[0].run.model
    new_state = state_maker(config, module, lambda step: 0.0, parts.optimizer)
    with Checkpoints(place, 1) as checkpoints, contextlib.ExitStack() as open_reporters:
        found = restored(checkpoints, group, config, new_state)
        states, before = (first_states(group, parts), None) if found is None else found
        make = make_programs(group, jax.tree.map(lambda x: x[0], states.params), parts)
        chosen = before or fastest_per_device(make, states) if per_device == "auto" else per_device
        programs = make(chosen)
        for one in group:
            one.begin = one.progress.step
            known = None if isinstance(parts.optimizer, optax.GradientTransformation) else one.schedule
            about = (one.run.folder, one.run.config, one.run.plan, known, one.begin, one.progress)
            one.reporter = open_reporters.enter_context(Reporter(*about, lambda: None, terminal=False))
        rounds, given = in_rounds(states, programs), in_rounds(programs.inputs, programs)

        def save() -> None:
            kept = []
            for i, one in enumerate(group):
                state = state_of(rounds[i // programs.width], i % programs.width)
                if one.failed is None:
                    with one.watched():
                        one.progress.sums = one.reporter.settle(state)
                    one.progress.skipped_updates = dict(one.reporter.skipped)
                kept.append((state, unstack_blocks(state) if one.kept.state is None else one.kept.state))
            tree = {"state": stack_trees([state for state, _ in kept]), "best": stack_trees([best for _, best in kept])}
            record = {"members": [record_of(one) for one in group], "per_device": chosen}
            checkpoints.save(total_steps(group), tree, record)

        marks = min(one.progress.step // one.run.plan.save_every for one in group)
        train = compiled(programs, rounds[0], given[0])
        began = time.perf_counter()
        while any(one.active() for one in group):
            advanced = advance(group, programs, train, rounds, given)
            for one, sums, n in advanced:
                take_steps(one, sums, n)
            evaluate_due(group, {one.member.name for one, _, _ in advanced}, programs, rounds, given)
            lost = lock is not None and lock.lost(now=False)
            if stop.asked() or lost:
                save()
                if lost or (lock is not None and lock.lost(now=True)):
                    raise FolderLost(folder, total_steps(group), None)
                raise Stopped(
                    folder, total_steps(group), stop.signal or 0, checkpoints.has(total_steps(group)), "sweep"
                )
            going = [one.progress.step // one.run.plan.save_every for one in group if one.active()]
            if not going or min(going) > marks:
                marks = min(going, default=marks)
                save()
                say(progress_line(group, time.perf_counter() - began))
        checkpoints.settle()
        for i, one in enumerate(group):
            if one.failed is None:
                end_member(one, state_of(rounds[i // programs.width], i % programs.width), programs.width)
    return [row_of(one) for one in group]


def start_members(members: Sequence[Member], parts: Parts, stop: Stop) -> tuple[list[RunningMember], Parts]:
    """Returns the members before their first step, with their data, and the parts with the outputs of the model."""
    mesh, group, found = make_mesh(1), [], dict[str, Dataset]()
    config = members[0].config
    check_batch(config.train.batch_size, mesh, config.train.accumulate_steps)
    images_per_statistic(config, 1)
    own, module = parts, cast(Any, None)
    for member in members:
        config = member.config
        key = to_json([to_dict(config)["data"], config.train.seed])
        if key not in found:
            found[key] = data_of(config, parts)
            for note in found[key].notes if len(found) == 1 else ():
                say(note)
            if module is None:
                module, own = model_with_parts(config, parts, len(found[key].class_names))
                check_scope(config, module, 1)
                check_targets(config, own, own.outputs_of(module), found[key].multilabel)
            found[key] = with_outputs(found[key], own.outputs_of(module))
        dataset = found[key]
        if dataset.multilabel and parts.loss is None and config.train.loss != "binary":
            raise InputError(f"{config.data.dataset} gives images several labels: add --train.loss binary")
        metric = selecting_metric(config, dataset, own)
        if metric is None or dataset.validation is None:
            raise InputError(NO_VALIDATION)
        plan, kept = make_plan(config, len(dataset.train)), BestState()
        member.folder.mkdir(parents=True, exist_ok=True)
        check_pictures(member.folder, config, dataset, 1)
        write_whole(member.folder / "config.json", to_json(to_dict(config), indent=2) + "\n")
        record_parts(member.folder, own)
        shared: Any = kept
        run = Run(member.folder, config, plan, module, dataset, metric, mesh, shared, stop, None, own, Hooks(()))
        names = names_of_outputs(own.outputs, dataset.class_names, config.data.dataset)
        progress = RunProgress(to_dict(config), list(names), dataset.multilabel)
        bad = BadImages(config.data.on_bad_image, channels=config.data.channels)
        group.append(RunningMember(member, run, kept, make_schedule(config, plan.total, plan.per_epoch), bad, progress))
    if single := norms_of_one_value(config, module, 1):
        say(f"WARNING: {len(single)} batch norms, {single[0]} the first, see one value a channel in training")
    return group, own


NO_VALIDATION = (
    "a sweep chooses by the validation split, and there is none: set data.validation_fraction above 0, or give the "
    "data one, and leave train.metric none out"
)


def first_states(group: Sequence[RunningMember], parts: Parts) -> Any:
    """Returns the first states of all members, [members, ...], each with the bits of a run alone."""
    config, module = group[0].run.config, group[0].run.model

    def new(seed: jax.Array) -> TrainState:
        recipe = with_inputs(config, {"train.seed": seed})
        return state_maker(recipe, module, lambda step: 0.0, parts.optimizer)()

    make, states = jax.jit(new), {}
    for one in group:
        seed = one.run.config.train.seed
        if seed not in states:
            state = with_weights(make(np.uint32(seed)), one.run.config, module)
            states[seed] = jax.device_get(in_form(state, one.run.config))
    return stack_trees([states[one.run.config.train.seed] for one in group])


def restored(
    checkpoints: Checkpoints, group: Sequence[RunningMember], config: Config, new_state: Callable[[], TrainState]
) -> tuple[Any, int] | None:
    """Returns the states of all members from the newest checkpoint and how many went through a device together, and
    gives the members what belongs to them; None where there is none.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])

    def shapes(_: Record) -> Any:
        plain = jax.eval_shape(new_state)
        whole = {"state": jax.eval_shape(lambda: in_form(new_state(), config)), "best": plain}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(group), *x.shape), x.dtype, sharding=here), whole)

    found = checkpoints.restore(shapes)
    if found is None:
        return None
    tree, kept, _ = found
    tree = jax.device_get(tree)
    for i, (one, values) in enumerate(zip(group, kept["members"], strict=True)):
        names = one.progress.class_names
        one.progress, one.failed = RunProgress.from_record(values["progress"]), values["failed"]
        same_classes(one.progress.class_names, names, one.run.folder)
        one.bad.names |= set(one.progress.skipped)
        if values["best"] is not None:
            step = one.progress.best["step"] if one.progress.best else 0
            one.kept.save(step, jax.tree.map(lambda x, i=i: x[i], tree["best"]), values["best"])
            one.kept.best = step
    say(f"resuming at step {min(one.progress.step for one in group)} of {group[0].run.plan.total}")
    return tree["state"], kept["per_device"]


def compiled(programs: Programs, states: Any, given: Any) -> Any:
    """Returns the training program of the members of a round, compiled: threads that call it trace nothing."""
    first = on_members(np.zeros(programs.width, np.int32), programs.mesh)
    return programs.train.lower(states, given, first, programs.data).compile()


def fastest_per_device(make: Callable[[int], Programs], states: Any) -> int:
    """Returns how many members should go through a device together: a short trial doubles it while that is faster.

    Args:
      make: returns the programs for such a number.
      states: of all members, [members, ...], which are left as they are.
    """
    count, per_device, best = len(jax.tree.leaves(states)[0]), 1, math.inf
    while True:
        try:
            programs = make(per_device)
            seconds = seconds_of_a_step(programs, states)
        except jax.errors.JaxRuntimeError as error:
            if per_device == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = math.inf
        say(f"trial: {per_device} a device together, {1e3 * seconds:.3g} ms for a step of a member")
        if seconds >= best:
            return per_device // 2
        best = seconds
        if programs.width >= count:
            return per_device
        per_device *= 2


def seconds_of_a_step(programs: Programs, states: Any) -> float:
    """Returns the seconds that a step of a member takes where all members of some calls are trained, the best of 3."""
    taken = programs.at_once * programs.width
    rounds, given = (in_rounds(jax.tree.map(lambda x: x[:taken], tree), programs) for tree in (states, programs.inputs))
    train, n = compiled(programs, rounds[0], given[0]), np.full(programs.width, programs.most, np.int32)

    def call(i: int) -> None:
        rounds[i], sums = train(rounds[i], given[i], on_members(n, programs.mesh), programs.data)
        jax.block_until_ready(sums)

    took = []
    with ThreadPoolExecutor(programs.at_once) as threads:
        for _ in range(4):
            began = time.perf_counter()
            list(threads.map(call, range(len(rounds))))
            took.append(time.perf_counter() - began)
    return min(took[1:]) / (len(rounds) * programs.width * programs.most)


def record_of(one: RunningMember) -> Record:
    """Returns what the checkpoint of all holds of a member beside its states."""
    return {"progress": one.progress.to_record(), "best": one.kept.record, "failed": one.failed}


def total_steps(group: Sequence[RunningMember]) -> int:
    """Returns the steps that all members have made together, by which their checkpoints are numbered."""
    return sum(one.progress.step for one in group)


def advance(
    group: Sequence[RunningMember], programs: Programs, train: Any, rounds: list[Any], given: Sequence[Any]
) -> list[tuple[RunningMember, Sums, int]]:
    """Runs the next call of every member that has steps to go; returns each with its sums and number of steps.

    Args:
      train: the program of `programs`, compiled: threads that call it trace nothing.
    """
    width = programs.width

    def call(i: int) -> list[tuple[RunningMember, Sums, int]]:
        now, n = group[i * width : (i + 1) * width], np.zeros(width, np.int32)
        n[: len(now)] = [one.steps(programs.most) for one in now]
        if not n.any():
            return []
        began = time.perf_counter()
        rounds[i], sums = train(rounds[i], given[i], on_members(n, programs.mesh), programs.data)
        values = jax.device_get(sums)
        took, found = time.perf_counter() - began, []
        for j, one in enumerate(now):
            if n[j]:
                one.trained += took
                found.append((one, {k: v[j] for k, v in values.items()}, int(n[j])))
        return found

    with ThreadPoolExecutor(programs.at_once) as threads:
        return [one for found in threads.map(call, range(len(rounds))) for one in found]


def take_steps(one: RunningMember, sums: Sums, n: int) -> None:
    """Gives the sums of a member's steps to its log."""
    progress, plan = one.progress, one.run.plan
    progress.step += n
    with one.watched():
        one.reporter.steps(progress.step, n, sums, 0.0)
        if progress.step % plan.log_every == 0 or progress.step == plan.total:
            one.reporter.flush()


def evaluate_due(
    group: Sequence[RunningMember], advanced: set[str], programs: Programs, rounds: Sequence[Any], given: Sequence[Any]
) -> None:
    """Evaluates the members that have `advanced` to a step where their plan says so, and keeps those that are best."""
    for i, states in enumerate(rounds):
        first = i * programs.width
        now = group[first : first + programs.width]
        due = {}
        for slot, one in enumerate(now):
            step, plan = one.progress.step, one.run.plan
            here = step == plan.total or step % plan.eval_every == 0
            if one.failed is None and one.member.name in advanced and here:
                due[slot] = state_of(states, slot)
        for slot in list(due):
            with now[slot].watched():
                now[slot].progress.sums = now[slot].reporter.settle(due[slot])
            if now[slot].failed is not None:
                del due[slot]
        if not due:
            continue
        began = time.perf_counter()
        results = evaluate_round(states, given[i], programs, due, programs.batches[first : first + programs.width])
        took = time.perf_counter() - began
        for slot, state in due.items():
            now[slot].evaluated += took
            select(now[slot], state, results[slot])


def select(one: RunningMember, state: Any, result: Result) -> None:
    """Takes the evaluation of a member's step as a run alone takes it, and keeps the state where it is the best."""

    def evaluated(_: TrainState) -> Result:
        one.bad.names |= one.unread
        return result

    one.progress.skipped_updates = dict(one.reporter.skipped)
    with one.reporter.paused():
        evaluate_step(one.run, state, one.progress.step, one.progress, evaluated, one.reporter, one.bad)


def evaluate_round(
    states: Any, given: Any, programs: Programs, due: Mapping[int, Any], batches: Sequence[int]
) -> dict[int, Result]:
    """Returns what `make_evaluate` does for the members of a round that are due, by their place in it."""
    parts: dict[int, dict[str, list[Any]]] = {slot: {} for slot in due}
    for number in range(max(batches[slot] for slot in due)):
        active = np.asarray([slot in due and number < batches[slot] for slot in range(programs.width)])
        values = jax.device_get(programs.evaluate(states, given, active, programs.held_out, np.int32(number)))
        for slot in np.flatnonzero(active).tolist():
            for kind, part in values.items():
                parts[slot].setdefault(kind, []).append(jax.tree.map(lambda x, slot=slot: x[slot], part))
    return {slot: {kind: means_of(found) for kind, found in kinds.items()} for slot, kinds in parts.items()}


def means_of(parts: Sequence[tuple[Sums, Any]]) -> dict[str, Any]:
    """Returns the means of an evaluation from the sums of its batches, and what was predicted where there are any."""
    found = means([sums for sums, _ in parts])
    if parts[0][1]:
        predictions = gathered([outputs for _, outputs in parts])
        found["map"] = mean_average_precision(predictions.logits, predictions.labels)
    return found


def progress_line(group: Sequence[RunningMember], seconds: float) -> str:
    """Returns a line on how far all members are that have steps to go.

    Args:
      seconds: since the first step of this start.
    """
    going = [one for one in group if one.active()]
    done = sum(one.progress.step - one.begin for one in group)
    todo = sum(one.run.plan.total - one.progress.step for one in going)
    epochs = [one.progress.step / one.run.plan.per_epoch for one in going or group]
    best = [one.progress.best for one in group if one.progress.best and one.failed is None]
    failed = sum(one.failed is not None for one in group)
    line = f"epoch {min(epochs) if going else max(epochs):.1f}: {len(group)} members"
    if best:
        metric, values = best[0]["metric"], [found["value"] for found in best]
        low, high = (spoken_value(metric.rpartition("/")[2], value) for value in (min(values), max(values)))
        line += f", best {spoken(metric)} from {low} to {high}"
    if failed:
        line += f", {failed} diverged"
    return f"{line}, {seconds * todo / done:.0f} s left" if done and todo else line


def end_member(one: RunningMember, state: Any, at_once: int) -> None:
    """Leaves a member that has come to its end as a finished run in its folder.

    Args:
      at_once: members that went through the devices together, itself among them.
    """
    progress, folder = one.progress, one.run.folder
    progress.selected = progress.best["step"] if progress.best else progress.step
    progress.skipped = sorted(one.bad.names)
    with Checkpoints(folder, one.run.config.checkpoint.keep) as checkpoints:
        checkpoints.best = progress.best and progress.best["step"]
        if one.kept.record is not None and one.kept.step != progress.step:
            checkpoints.save(one.kept.step or 0, one.kept.state, one.kept.record)
        checkpoints.save(progress.step, unstack_blocks(state), progress.to_record())
    images = (progress.step - one.begin) * one.run.config.train.batch_size
    speed = {"images_per_second": images / one.trained if one.trained else 0.0}
    speed["seconds"] = one.trained + one.evaluated  # of its own calls, not of the sweep
    speed["members_at_once"] = at_once
    finish(folder, progress, speed, device_name(one.run.mesh), quiet=True)


def row_of(one: RunningMember) -> dict[str, Any]:
    """Returns what came out of a member."""
    best: Any = one.progress.best or {"metric": f"validation/{one.run.metric}", "value": None, "step": None}
    return {
        "status": "finished" if one.failed is None else "diverged",
        "why": one.failed,
        "step": one.progress.step,
        "metric": best["metric"],
        "value": best["value"] if one.failed is None else None,
        "best_step": best["step"],
        "result": one.progress.result,
    }
