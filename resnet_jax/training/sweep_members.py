"""Trains the members of a sweep that differ in numbers only by one compiled program: `train_together`.

The numbers are inputs of the program, the states of the members lie one after another on a leading axis, and each
device trains one member, or several by `vmap`, at a time. More members than that take their turns, call by call. What
happens to a member at which step, and what is selected, is told by the functions of `training.loop`.
"""

import contextlib
import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import Config, InputError, ScheduleConfig, to_dict
from resnet_jax.data.dataset import Dataset, with_outputs
from resnet_jax.data.loader import BadImages, eval_batches, sampling_table, whole_split
from resnet_jax.data.on_device import draw_batch
from resnet_jax.data.order import grid_of
from resnet_jax.files import to_json, write_whole
from resnet_jax.models.stacking import unstack_blocks
from resnet_jax.runs.folder import device_name, finish
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.lock import BucketLock, Lock
from resnet_jax.runs.reporter import Diverged, Reporter, say
from resnet_jax.runs.signals import FolderLost, Stop, Stopped
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
from resnet_jax.training.finetune import make_phases
from resnet_jax.training.linear_probe import computes_features_once
from resnet_jax.training.loop import Run, check_pictures, evaluate_step
from resnet_jax.training.metrics import Sums, mean_average_precision, means
from resnet_jax.training.optimizers import make_optimizer, make_schedule
from resnet_jax.training.parts import Parts, record
from resnet_jax.training.programs import (
    names_of_sums,
    recipe_eval_step,
    recipe_step,
    steps_in_call,
    steps_per_call,
    weights_of_classes,
)
from resnet_jax.training.resolve import value_of
from resnet_jax.training.run_progress import RunProgress
from resnet_jax.training.several_steps import steps_on_device
from resnet_jax.training.sharding import check_batch, compiler_options, make_mesh, sharded_over
from resnet_jax.training.state import PyTree, TrainState
from resnet_jax.weights.load import names_of_outputs

INPUTS = (
    "train.seed",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "train.label_smoothing",
    "train.ema_decay",
    "model.drop_rate",
    "model.drop_path_rate",
    "data.mean",
    "data.std",
)
"""Numbers that are inputs of the program where members differ in them."""
OF_STEPS = (
    "optimizer.learning_rate",
    "optimizer.base_batch_size",
    *(f"schedule.{field.name}" for field in fields(ScheduleConfig)),
    "train.epochs",
    "train.steps",
    "train.eval_every_epochs",
    "train.patience",
)
"""Fields that say the learning rate of each step, which is an input as a table, and what happens at which step."""

Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      values: `section.field` -> its value of each field that the sweep varies.
      given: its recipe.
      config: the same, in which nothing is open.
      folder: of the run.
    """

    name: str
    values: Mapping[str, Any]
    given: Config
    config: Config
    folder: Path


def structure_of(config: Config) -> str:
    """Returns a text that is the same for recipes that share a compiled program."""
    flat = {f"{section}.{name}": value for section, of in to_dict(config).items() for name, value in of.items()}
    rest = {name: value for name, value in flat.items() if name not in (*INPUTS, *OF_STEPS)}
    return to_json([rest, {name: kind_of_number(name, flat[name]) for name in INPUTS}])


def kind_of_number(name: str, value: Any) -> Any:
    """Returns what a program must know of an input: whether it is there, how many numbers, whether a drop rate is 0."""
    if value is None or isinstance(value, list | tuple):
        return value and len(value)
    return "drop" not in name or value > 0


def why_alone(config: Config, parts: Parts) -> str | None:
    """Returns why a recipe cannot share a program with others, in words; None where it can."""
    reasons = {
        "the data is not kept on the device (data.on_device)": not config.data.on_device,
        "a linear probe on features that are computed once": computes_features_once(config),
        "finetune.mode gradual changes the program on the way": config.finetune.mode == "gradual",
        "train.on_nonfinite rollback repeats steps": config.train.on_nonfinite == "rollback",
        "hooks are told of one run": bool(parts.hooks),
        "log.profile traces one run": config.log.profile is not None,
        "parallel.fsdp spreads a state over devices": config.parallel.fsdp > 1,
    }
    return next((reason for reason, there in reasons.items() if there), None)


def with_inputs(config: Config, numbers: Mapping[str, Any]) -> Config:
    """Returns a recipe for tracing alone, in which `section.field`s are inputs of a compiled function, unchecked."""
    made = copy.copy(config)
    for name, value in numbers.items():
        section, _, field = name.partition(".")
        changed = copy.copy(getattr(made, section))
        object.__setattr__(changed, field, value)
        object.__setattr__(made, section, changed)
    return made


def shared_examples(splits: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns the different examples of several splits, and where among them those of each split are, int32 [size].

    Args:
      splits: arrays [size, ...], such as `image` and `label`.
    """
    places: dict[bytes, int] = {}
    kept: list[Any] = []
    found = []
    for split in splits:
        leaves = jax.tree.leaves(split)
        where = np.empty(len(leaves[0]), np.int32)
        for i in range(len(where)):
            key = hashlib.blake2b(b"".join(leaf[i].tobytes() for leaf in leaves), digest_size=16).digest()
            if key not in places:
                places[key] = len(kept)
                kept.append(jax.tree.map(lambda leaf, i=i: leaf[i], split))
            where[i] = places[key]
        found.append(where)
    return jax.tree.map(lambda *rows: np.stack(rows), *kept), found


def rates_by_step(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Returns the learning rate of each step, float32 [steps], computed one by one as a training program does."""

    def rates() -> jax.Array:
        return jax.lax.map(lambda step: jnp.asarray(schedule(step), jnp.float32), jnp.arange(steps, dtype=jnp.int32))

    return np.asarray(jax.jit(rates, compiler_options=compiler_options())())


class Kept:
    """Holds the best state of a member on the host, where a run alone has its checkpoint."""

    def __init__(self) -> None:
        self.best: int | None = None
        self.step: int | None = None
        self.state: Any = None
        self.record: Record | None = None

    def has(self, step: int) -> bool:
        """Returns whether it is the state of this step."""
        return self.step == step

    def save(self, step: int, state: Any, record: Record) -> None:
        """Holds a state with its record in place of the one before."""
        self.step, self.state, self.record = step, state, record


@dataclass
class Going:
    """A member under way.

    Attributes:
      begin: the step at which this start began.
      failed: why it has ended, where its loss is no longer finite.
    """

    member: Member
    run: Run
    kept: Kept
    schedule: optax.Schedule
    bad: BadImages
    progress: RunProgress
    reporter: Any = None
    begin: int = 0
    failed: str | None = None

    def active(self) -> bool:
        """Returns whether it has steps to go."""
        patience = self.run.config.train.patience or math.inf
        return self.failed is None and self.progress.step < self.run.plan.total and self.progress.no_better < patience

    def steps(self, most: int) -> int:
        """Returns the steps of its next call, as a run alone has them."""
        plan, step = self.run.plan, self.progress.step
        ends, every = (self.begin + 1, plan.total), (plan.log_every, plan.eval_every, plan.save_every)
        return steps_in_call(step, most, ends, every) if self.active() else 0

    @contextlib.contextmanager
    def watched(self) -> Any:
        """Notes where the member diverges, which leaves the others as they are."""
        try:
            yield
        except Diverged as error:
            self.failed = error.what


@dataclass(frozen=True)
class Programs:
    """What the members of a group are trained and evaluated by.

    Attributes:
      train: (states, inputs, n, data) -> (states, sums), jitted; states, inputs and n int32 [members] by member.
      evaluate: (states, inputs, active, data, batch) -> sums of that batch by split, of those that are active, and
        where images have several labels logits, labels and mask.
      inputs: of all members, [members, ...].
      data, held_out: the examples to train on and those of validation, on every device.
      batches: of the validation split of each member.
      width: members of a call.
      at_once: calls that are under way together: on a CPU one for each core, since one of them fills no more.
    """

    train: Any
    evaluate: Any
    inputs: PyTree
    data: PyTree
    held_out: PyTree
    batches: list[int]
    most: int
    width: int
    at_once: int
    mesh: Mesh


def each_member(function: Callable[[Any, Any], Any], mesh: Mesh, per_device: int) -> Callable[[Any, Any], Any]:
    """Returns a function of trees [members, ...] and what they share, which calls `function(one, shared)` for each
    member on its device; several of a device go through together by `vmap`.
    """

    def of_device(ones: Any, shared: Any) -> Any:
        if per_device > 1:
            return jax.vmap(function, in_axes=(0, None))(ones, shared)
        found = function(jax.tree.map(lambda x: x[0], ones), shared)
        return jax.tree.map(lambda x: x[None], found)

    split, whole = P("members"), P()
    return jax.shard_map(of_device, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False)


def make_programs(group: Sequence[Going], params: PyTree, parts: Parts, per_device: int) -> Programs:
    """Returns the compiled programs of a group and the inputs of its members.

    Args:
      params: of one member, of which the names count.
      per_device: members that go through a device together.
    """
    runs = [one.run for one in group]
    config, module, multilabel = replace_strategy(runs[0].config), runs[0].model, runs[0].dataset.multilabel
    devices = jax.devices()[: config.parallel.devices]
    mesh = Mesh(np.asarray(devices[: -(-len(group) // per_device)]), ("members",))
    varied = [name for name in INPUTS if len({to_json(value_of(run.config, name)) for run in runs}) > 1]

    datasets: dict[int, tuple[Any, Any, Any]] = {}
    for one in group:
        if id(one.run.dataset) not in datasets:
            datasets[id(one.run.dataset)] = arrays_of(one.run, one.bad)
    order = list(datasets)
    train, places = shared_examples([{n: x for n, x in datasets[i][0].items() if n != "table"} for i in order])
    tables = [
        place if (t := datasets[i][0].get("table")) is None else place[t]
        for i, place in zip(order, places, strict=True)
    ]
    held_out, where = shared_examples([datasets[i][1] for i in order])
    size, batch = max(map(len, tables)), config.train.batch_size
    batches = [len(place) // batch for place in where]

    def inputs_of(one: Going) -> PyTree:
        i, run = order.index(id(one.run.dataset)), one.run
        numbers = {
            n: np.asarray(value_of(run.config, n), np.uint32 if n == "train.seed" else np.float32) for n in varied
        }
        rates = rates_by_step(one.schedule, run.plan.total)
        weights = weights_of_classes(run.config, run.dataset, parts.outputs_of(module))
        return {
            "numbers": numbers,
            "rates": np.pad(rates, (0, most_steps - len(rates)), mode="edge"),
            "table": np.pad(tables[i], (0, size - len(tables[i]))),
            "grid": np.asarray(grid_of(len(tables[i])), np.uint32),
            "places": padded(where[i].reshape(-1, batch), max(batches)),
            "mask": padded(datasets[order[i]][2].reshape(-1, batch), max(batches)),
        } | ({} if weights is None else {"weights": np.asarray(weights, np.float32)})

    most_steps = max(run.plan.total for run in runs)
    inputs = stacked([inputs_of(one) for one in group])
    phase = make_phases(config, params, runs[0].plan.per_epoch)[0]
    freezes = config.finetune.mode != "none" or any(factor == 0 for _, factor in config.optimizer.rate_rules)
    frozen = (lambda path: phase.rates(path) == 0.0) if freezes else None
    most, names = steps_per_call(config, True, parts.model is not None), names_of_sums(config, module, parts)

    def train_one(one: Any, data: Any) -> tuple[TrainState, Sums]:
        state, given, n = one
        recipe = with_inputs(config, given["numbers"])
        optimizer = make_optimizer(recipe.optimizer, lambda step: given["rates"][step], phase.rates, parts.optimizer)
        model = module if parts.model is not None else with_drop_rates(module, given["numbers"])
        step = recipe_step(recipe, model, optimizer, None, frozen, given.get("weights"), parts)

        def draw(data: Any, at: jax.Array) -> Any:
            of_member = data | {"table": given["table"], "grid": given["grid"]}
            return draw_batch(of_member, at, batch, recipe.train.seed, recipe.augment.repeats)

        steps = steps_on_device(step, draw, most, names)
        if most > 1 or mesh.size * per_device == 1:  # a member alone in its call always has steps to go
            return steps(state, data, n)
        nothing = {name: jnp.zeros(1) for name in names}
        return jax.lax.cond(n > 0, lambda: steps(state, data, n), lambda: (state, nothing))

    def evaluate_one(one: Any, shared: Any) -> dict[str, Any]:
        state, given, active = one
        data, number = shared
        step = sharded_over(None)(recipe_eval_step(with_inputs(config, given["numbers"]), module, parts))
        examples = jax.tree.map(lambda x: jnp.take(x, given["places"][number], axis=0), data)
        variables = {"validation": state.variables}
        if state.averages is not None:
            variables["ema/validation"] = state.averages

        def measured() -> dict[str, Any]:
            batch, found = examples | {"mask": given["mask"][number]}, {}
            for kind, values in variables.items():
                sums, logits = step(values, batch)
                found[kind] = (sums, (logits, batch["label"], batch["mask"]) if multilabel else ())
            return found

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured))
        return jax.lax.cond(active, measured, lambda: nothing)

    trains, evaluates = (each_member(function, mesh, per_device) for function in (train_one, evaluate_one))
    options: dict[str, Any] = {"compiler_options": compiler_options()}
    everywhere = NamedSharding(mesh, P())

    def train_members(states: Any, given: Any, n: Any, data: Any) -> Any:
        return trains((states, given, n), data)

    def evaluate_members(states: Any, given: Any, active: Any, data: Any, number: Any) -> Any:
        return evaluates((states, given, active), (data, number))

    return Programs(
        jax.jit(train_members, donate_argnums=0, **options),
        jax.jit(evaluate_members, **options),
        inputs,
        jax.device_put(train, everywhere),
        jax.device_put(held_out, everywhere),
        [batches[order.index(id(one.run.dataset))] for one in group],
        most,
        mesh.size * per_device,
        (os.cpu_count() or 1) if jax.default_backend() == "cpu" and mesh.size == 1 else 2,
        mesh,
    )


def replace_strategy(config: Config) -> Config:
    """Returns a recipe whose step runs on one device, where all strategies are one."""
    return replace(config, parallel=replace(config.parallel, strategy="jit"))


def with_drop_rates(module: Any, numbers: Mapping[str, Any]) -> Any:
    """Returns a module with the drop rates that are inputs."""
    rates = {name.partition(".")[2]: value for name, value in numbers.items() if name.startswith("model.")}
    return module.clone(**rates) if rates else module


def arrays_of(run: Run, bad: BadImages) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Returns the training split, the validation split filled up to whole batches, and which of its examples count."""
    config, dataset, classes = run.config, run.dataset, run.dataset.label_classes()
    table = sampling_table(dataset, config.data.sampling)
    train = whole_split(dataset.train, config, bad, table, classes)
    batches = [jax.device_get(x) for x in eval_batches(dataset.validation, config, run.mesh, bad, classes=classes)]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    mask = whole.pop("mask")
    return train, whole, mask


def padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns rows [n, ...] with zeros behind them, [count, ...]."""
    return np.pad(rows, ((0, count - len(rows)), *((0, 0),) * (rows.ndim - 1)))


def stacked(trees: Sequence[Any]) -> Any:
    """Returns trees of arrays as one tree [len(trees), ...], on the host."""
    return jax.tree.map(lambda *parts: np.stack(parts), *trees)


def put_rounds(trees: Any, programs: Programs) -> list[Any]:
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
    per_device: int,
    stop: Stop,
    lock: Lock | BucketLock | None,
    folder: Path,
) -> Rows:
    """Trains members that share a program to their ends, and leaves each as a finished run in its folder.

    Args:
      place: where the states of all lie on the way; a start that finds them goes on with them.
      per_device: members that go through a device together by `vmap`.
      folder: of the sweep.

    Returns:
      For each member `status` (`finished` or `diverged`), `why`, `step`, and of its best step on the validation split
      `metric`, `value`, `best_step`, and `result`, the means of its evaluation.

    Raises:
      Stopped: a signal asked for it; the states are saved.
      FolderLost: the sweep's folder is another one's.
    """
    began = time.perf_counter()
    group, parts = start_members(members, parts, stop)
    config, module = group[0].run.config, group[0].run.model
    new_state = state_maker(config, module, lambda step: 0.0, parts.optimizer)
    with Checkpoints(place, 1) as checkpoints, contextlib.ExitStack() as open_reporters:
        states = restored(checkpoints, group, config, new_state)
        if states is None:
            states = first_states(group, parts)
        programs = make_programs(group, jax.tree.map(lambda x: x[0], states.params), parts, per_device)
        for one in group:
            one.begin = one.progress.step
            known = None if isinstance(parts.optimizer, optax.GradientTransformation) else one.schedule
            about = (one.run.folder, one.run.config, one.run.plan, known, one.begin, one.progress)
            one.reporter = open_reporters.enter_context(Reporter(*about, lambda: None, terminal=False))
        rounds, given = put_rounds(states, programs), put_rounds(programs.inputs, programs)

        def save() -> None:
            kept = []
            for i, one in enumerate(group):
                state = state_of(rounds[i // programs.width], i % programs.width)
                if one.failed is None:
                    with one.watched():
                        one.progress.sums = one.reporter.settle(state)
                    one.progress.skipped_updates = dict(one.reporter.skipped)
                kept.append((state, unstack_blocks(state) if one.kept.state is None else one.kept.state))
            tree = {"state": stacked([state for state, _ in kept]), "best": stacked([best for _, best in kept])}
            checkpoints.save(passed(group), tree, {"members": [record_of(one) for one in group]})

        marks = min(one.progress.step // one.run.plan.save_every for one in group)
        first = on_members(np.zeros(programs.width, np.int32), programs.mesh)
        train = programs.train.lower(rounds[0], given[0], first, programs.data).compile()
        while any(one.active() for one in group):
            moved = advance(group, programs, train, rounds, given)
            for one, sums, n in moved:
                take_steps(one, sums, n)
            evaluate_due(group, {one.member.name for one, _, _ in moved}, programs, rounds, given)
            lost = lock is not None and lock.lost(now=False)
            if stop.asked() or lost:
                save()
                if lost or (lock is not None and lock.lost(now=True)):
                    raise FolderLost(folder, passed(group), None)
                raise Stopped(folder, passed(group), stop.signal or 0, checkpoints.has(passed(group)), "sweep")
            going = [one.progress.step // one.run.plan.save_every for one in group if one.active()]
            if not going or min(going) > marks:
                marks = min(going, default=marks)
                save()
                say(standing(group))
        checkpoints.settle()
        seconds = time.perf_counter() - began
        for i, one in enumerate(group):
            if one.failed is None:
                end_member(one, state_of(rounds[i // programs.width], i % programs.width), seconds)
    return [row_of(one) for one in group]


def start_members(members: Sequence[Member], parts: Parts, stop: Stop) -> tuple[list[Going], Parts]:
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
            found[key] = with_outputs(found[key], own.outputs_of(module))
        dataset = found[key]
        if dataset.multilabel and parts.loss is None and config.train.loss != "binary":
            raise InputError(f"{config.data.dataset} gives images several labels: add --train.loss binary")
        metric = selecting_metric(config, dataset, own)
        if metric is None or dataset.validation is None:
            raise InputError(NO_VALIDATION)
        plan, kept = make_plan(config, len(dataset.train)), Kept()
        member.folder.mkdir(parents=True, exist_ok=True)
        check_pictures(member.folder, config, dataset)
        write_whole(member.folder / "config.json", to_json(to_dict(config), indent=2) + "\n")
        record(member.folder, own)
        shared: Any = kept
        run = Run(member.folder, config, plan, module, dataset, metric, mesh, shared, stop, None, own, Hooks(()))
        names = names_of_outputs(own.outputs, dataset.class_names, config.data.dataset)
        progress = RunProgress(to_dict(config), list(names), dataset.multilabel)
        bad = BadImages(config.data.on_bad_image, channels=config.data.channels)
        group.append(Going(member, run, kept, make_schedule(config, plan.total, plan.per_epoch), bad, progress))
    if single := norms_of_one_value(config, module, 1):
        say(f"WARNING: {len(single)} batch norms, {single[0]} the first, see one value a channel in training")
    return group, own


NO_VALIDATION = (
    "a sweep chooses by the validation split, and there is none: set data.validation_fraction above 0, or give the "
    "data one, and leave train.metric none out"
)


def first_states(group: Sequence[Going], parts: Parts) -> Any:
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
    return stacked([states[one.run.config.train.seed] for one in group])


def restored(
    checkpoints: Checkpoints, group: Sequence[Going], config: Config, new_state: Callable[[], TrainState]
) -> Any:
    """Returns the states of all members from the newest checkpoint, and gives the members what belongs to them; None
    where there is none.
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
        one.progress, one.failed = RunProgress.from_record(values["progress"]), values["failed"]
        one.bad.names |= set(one.progress.skipped)
        if values["best"] is not None:
            step = one.progress.best["step"] if one.progress.best else 0
            one.kept.save(step, jax.tree.map(lambda x, i=i: x[i], tree["best"]), values["best"])
            one.kept.best = step
    say(f"resuming at step {min(one.progress.step for one in group)} of {group[0].run.plan.total}")
    return tree["state"]


def record_of(one: Going) -> Record:
    """Returns what the checkpoint of all holds of a member beside its states."""
    return {"progress": one.progress.to_record(), "best": one.kept.record, "failed": one.failed}


def passed(group: Sequence[Going]) -> int:
    """Returns the steps that all members have made together, by which their checkpoints are numbered."""
    return sum(one.progress.step for one in group)


def advance(
    group: Sequence[Going], programs: Programs, train: Any, rounds: list[Any], given: Sequence[Any]
) -> list[tuple[Going, Sums, int]]:
    """Runs the next call of every member that has steps to go; returns each with its sums and number of steps.

    Args:
      train: the program of `programs`, compiled: threads that call it trace nothing.
    """
    width = programs.width

    def call(i: int) -> list[tuple[Going, Sums, int]]:
        now, n = group[i * width : (i + 1) * width], np.zeros(width, np.int32)
        n[: len(now)] = [one.steps(programs.most) for one in now]
        if not n.any():
            return []
        rounds[i], sums = train(rounds[i], given[i], on_members(n, programs.mesh), programs.data)
        values = jax.device_get(sums)
        return [(one, {k: v[j] for k, v in values.items()}, int(n[j])) for j, one in enumerate(now) if n[j]]

    with ThreadPoolExecutor(programs.at_once) as threads:
        return [one for found in threads.map(call, range(len(rounds))) for one in found]


def take_steps(one: Going, sums: Sums, n: int) -> None:
    """Gives the sums of a member's steps to its log."""
    progress, plan = one.progress, one.run.plan
    progress.step += n
    with one.watched():
        one.reporter.steps(progress.step, n, sums, 0.0)
        if progress.step % plan.log_every == 0 or progress.step == plan.total:
            one.reporter.flush()


def evaluate_due(
    group: Sequence[Going], moved: set[str], programs: Programs, rounds: Sequence[Any], given: Sequence[Any]
) -> None:
    """Evaluates the members that have `moved` to a step at which their plan says so, and keeps those that are best."""
    for i, states in enumerate(rounds):
        first = i * programs.width
        now = group[first : first + programs.width]
        due = {}
        for slot, one in enumerate(now):
            step, plan = one.progress.step, one.run.plan
            here = step == plan.total or step % plan.eval_every == 0
            if one.failed is None and one.member.name in moved and here:
                due[slot] = state_of(states, slot)
        for slot in list(due):
            with now[slot].watched():
                now[slot].progress.sums = now[slot].reporter.settle(due[slot])
            if now[slot].failed is not None:
                del due[slot]
        if not due:
            continue
        results = evaluate_round(states, given[i], programs, due, programs.batches[first : first + programs.width])
        for slot, state in due.items():
            select(now[slot], state, results[slot])


def select(one: Going, state: Any, result: Result) -> None:
    """Takes the evaluation of a member's step as a run alone takes it, and keeps the state where it is the best."""
    one.progress.skipped_updates = dict(one.reporter.skipped)
    with one.reporter.paused():
        evaluate_step(one.run, state, one.progress.step, one.progress, lambda _: result, one.reporter, one.bad)


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


def standing(group: Sequence[Going]) -> str:
    """Returns a line on how far the members are."""
    best = [one.progress.best["value"] for one in group if one.progress.best and one.failed is None]
    plan = group[0].run.plan
    steps = [one.progress.step for one in group]
    values = f", best {group[0].run.metric} from {min(best):.4f} to {max(best):.4f}" if best else ""
    failed = sum(one.failed is not None for one in group)
    diverged = f", {failed} diverged" if failed else ""
    return f"epoch {max(steps) / plan.per_epoch:.1f}: {len(group)} members{values}{diverged}"


def end_member(one: Going, state: Any, seconds: float) -> None:
    """Leaves a member that has come to its end as a finished run in its folder."""
    progress, folder = one.progress, one.run.folder
    progress.selected = progress.best["step"] if progress.best else progress.step
    progress.skipped = sorted(one.bad.names)
    with Checkpoints(folder, one.run.config.checkpoint.keep) as checkpoints:
        checkpoints.best = progress.best and progress.best["step"]
        if one.kept.record is not None and one.kept.step != progress.step:
            checkpoints.save(one.kept.step or 0, one.kept.state, one.kept.record)
        checkpoints.save(progress.step, unstack_blocks(state), progress.to_record())
    speed = {"images_per_second": one.reporter.speed(), "seconds": seconds}
    finish(folder, progress, speed, device_name(one.run.mesh), quiet=True)


def row_of(one: Going) -> dict[str, Any]:
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
