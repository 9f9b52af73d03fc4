"""The one compiled program of the members of a sweep that differ in numbers only, which are inputs of it.

`structure_of` says which recipes share a program, `why_alone` which cannot; `make_programs` makes it for a group.
"""

import contextlib
import copy
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import Config, ScheduleConfig, to_dict
from resnet_jax.data.loader import BadImages, eval_batches, sampling_table, whole_split
from resnet_jax.data.on_device import draw_batch
from resnet_jax.data.order import grid_of
from resnet_jax.files import to_json
from resnet_jax.runs.reporter import Diverged
from resnet_jax.training.checkpoints import Record
from resnet_jax.training.finetune import make_phases
from resnet_jax.training.linear_probe import computes_features_once
from resnet_jax.training.loop import Run
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.parts import Parts
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
from resnet_jax.training.sharding import compiler_options, sharded_over
from resnet_jax.training.state import PyTree, TrainState

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
SCHEDULE_FIELDS = (
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
    rest = {name: value for name, value in flat.items() if name not in (*INPUTS, *SCHEDULE_FIELDS)}
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


class BestState:
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
class RunningMember:
    """A member under way.

    Attributes:
      begin: the step at which this start began.
      failed: why it has ended, where its loss is no longer finite.
      unread: names of the held out pictures that could not be read, which `bad` has from the first evaluation on.
      trained, evaluated: seconds that its calls took since this start, of which members that go through together share
        all.
    """

    member: Member
    run: Run
    kept: BestState
    schedule: optax.Schedule
    bad: BadImages
    progress: RunProgress
    reporter: Any = None
    begin: int = 0
    failed: str | None = None
    unread: set[str] = field(default_factory=set)
    trained: float = 0.0
    evaluated: float = 0.0

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


def make_programs(group: Sequence[RunningMember], params: PyTree, parts: Parts) -> Callable[[int], Programs]:
    """Returns `programs(per_device)`: the compiled programs of a group, with the inputs of its members.

    `per_device` is how many members go through a device together.

    Args:
      params: of one member, of which the names count.
    """
    runs = [one.run for one in group]
    config, module, multilabel = replace_strategy(runs[0].config), runs[0].model, runs[0].dataset.multilabel
    varied = [name for name in INPUTS if len({to_json(value_of(run.config, name)) for run in runs}) > 1]

    datasets: dict[int, tuple[Any, Any, Any]] = {}
    unread: dict[int, tuple[set[str], set[str]]] = {}
    for one in group:
        key = id(one.run.dataset)
        if key not in datasets:
            bad, bad_held_out = replace(one.bad, names=set()), replace(one.bad, names=set())
            datasets[key] = arrays_of(one.run, bad, bad_held_out)
            unread[key] = bad.names, bad_held_out.names
        in_training, one.unread = unread[key]
        one.bad.names |= in_training
    order = list(datasets)
    train, places = shared_examples([{n: x for n, x in datasets[i][0].items() if n != "table"} for i in order])
    tables = [
        place if (t := datasets[i][0].get("table")) is None else place[t]
        for i, place in zip(order, places, strict=True)
    ]
    held_out, where = shared_examples([datasets[i][1] for i in order])
    size, batch = max(map(len, tables)), config.train.batch_size
    batches = [len(place) // batch for place in where]

    def inputs_of(one: RunningMember) -> PyTree:
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
    inputs = stack_trees([inputs_of(one) for one in group])
    phase = make_phases(config, params, runs[0].plan.per_epoch)[0]
    freezes = config.finetune.mode != "none" or any(factor == 0 for _, factor in config.optimizer.rate_rules)
    frozen = (lambda path: phase.rates(path) == 0.0) if freezes else None
    most, names = steps_per_call(config, True, parts.model is not None), names_of_sums(config, module, parts)

    def train_one(one: Any, data: Any, alone: bool) -> tuple[TrainState, Sums]:
        state, given, n = one
        recipe = with_inputs(config, given["numbers"])
        optimizer = make_optimizer(recipe.optimizer, lambda step: given["rates"][step], phase.rates, parts.optimizer)
        model = module if parts.model is not None else with_drop_rates(module, given["numbers"])
        step = recipe_step(recipe, model, optimizer, None, frozen, given.get("weights"), parts)

        def draw(data: Any, at: jax.Array) -> Any:
            of_member = data | {"table": given["table"], "grid": given["grid"]}
            return draw_batch(of_member, at, batch, recipe.train.seed, recipe.augment.repeats)

        steps = steps_on_device(step, draw, most, names)
        if most > 1 or alone:  # `steps` takes n = 0 too where it is a loop; a member alone always has steps to go
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

    def programs(per_device: int) -> Programs:
        devices = jax.devices()[: config.parallel.devices]
        mesh = Mesh(np.asarray(devices[: -(-len(group) // per_device)]), ("members",))
        everywhere = NamedSharding(mesh, P())
        trained = partial(train_one, alone=mesh.size * per_device == 1)
        trains, evaluates = (each_member(function, mesh, per_device) for function in (trained, evaluate_one))

        def train_members(states: Any, given: Any, n: Any, data: Any) -> Any:
            return trains((states, given, n), data)

        def evaluate_members(states: Any, given: Any, active: Any, data: Any, number: Any) -> Any:
            return evaluates((states, given, active), (data, number))

        on_cpu = jax.default_backend() == "cpu" and mesh.size == 1
        return Programs(
            jax.jit(train_members, donate_argnums=0, compiler_options=compiler_options()),
            jax.jit(evaluate_members, compiler_options=compiler_options()),
            inputs,
            jax.device_put(train, everywhere),
            jax.device_put(held_out, everywhere),
            [batches[order.index(id(one.run.dataset))] for one in group],
            most,
            mesh.size * per_device,
            (os.cpu_count() or 1) if on_cpu else 2,
            mesh,
        )

    return programs


def replace_strategy(config: Config) -> Config:
    """Returns a recipe whose step runs on one device, where all strategies are one."""
    return replace(config, parallel=replace(config.parallel, strategy="jit"))


def with_drop_rates(module: Any, numbers: Mapping[str, Any]) -> Any:
    """Returns a module with the drop rates that are inputs."""
    rates = {name.partition(".")[2]: value for name, value in numbers.items() if name.startswith("model.")}
    return module.clone(**rates) if rates else module


def arrays_of(run: Run, bad: BadImages, bad_held_out: BadImages) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Returns the training split, the validation split filled up to whole batches, and which of its examples count.

    Args:
      bad, bad_held_out: take the names of pictures of each split that cannot be decoded.
    """
    config, dataset, classes = run.config, run.dataset, run.dataset.label_classes()
    table = sampling_table(dataset, config.data.sampling)
    train = whole_split(dataset.train, config, bad, table, classes)
    batches = eval_batches(dataset.validation, config, run.mesh, bad_held_out, classes=classes)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *[jax.device_get(batch) for batch in batches])
    mask = whole.pop("mask")
    return train, whole, mask


def padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns rows [n, ...] with zeros behind them, [count, ...]."""
    return np.pad(rows, ((0, count - len(rows)), *((0, 0),) * (rows.ndim - 1)))


def stack_trees(trees: Sequence[Any]) -> Any:
    """Returns trees of arrays as one tree [len(trees), ...], on the host."""
    return jax.tree.map(lambda *parts: np.stack(parts), *trees)
