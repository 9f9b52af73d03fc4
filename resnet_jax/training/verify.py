"""A run as evidence: replays what lies between its checkpoints, and names what its folder says otherwise.

The replay is the loop of `training.loop` itself, in a temporary folder: from the recorded recipe, the data and the
checkpoint at an interval's start (or, from step 0, a new state) to the checkpoint at its end.
"""

import contextlib
import dataclasses
import io
import random
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from resnet_jax.config import Config, InputError, differences, from_dict
from resnet_jax.data.dataset import with_outputs
from resnet_jax.data.fingerprint import changes, described, fingerprint, other_resizer
from resnet_jax.data.fingerprint import load as load_fingerprint
from resnet_jax.data.loader import BadImages
from resnet_jax.data.transforms import resizer
from resnet_jax.files import path_of, to_json
from resnet_jax.models.stacking import unstack_blocks
from resnet_jax.output import say
from resnet_jax.recipe_files import recorded
from resnet_jax.runs.folder import better, device_name, read_summary, versions
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.lock import live_holder
from resnet_jax.runs.reporter import Diverged
from resnet_jax.runs.signals import Stop
from resnet_jax.runs.trackers import split_lines
from resnet_jax.training.build import data_of, make_plan, model_with_parts
from resnet_jax.training.checkpoints import Record, Template, leaves_of, read_checkpoint, read_record
from resnet_jax.training.evaluation import Result, goal_of, make_evaluate, scalars, selecting_metric
from resnet_jax.training.linear_probe import computes_features_once, make_features
from resnet_jax.training.loop import Run, begin, fit
from resnet_jax.training.manifest import best_of, checkpoints_of, damage, steps_in
from resnet_jax.training.optimizers import make_schedule
from resnet_jax.training.parts import NAMES, Parts, check_recorded, make_parts
from resnet_jax.training.programs import steps_per_call
from resnet_jax.training.sharding import cached_where_sound, make_mesh
from resnet_jax.training.state import TrainState

ARRAYS = 0.05
"""Rounding of an array: the norm of its difference, in parts of the norm of what the interval changed in it (at least
of what it changed, on the mean, in arrays of the same kind), and 1e-5 of the array's own."""
FIGURES = 0.01
"""Rounding of a figure, such as a loss or an accuracy: the difference, above 1 in parts of the figure."""
EXACT_FIGURES = ("epoch", "learning_rate")
"""Figures that are a function of the step; their rounding is 1e-5 of them."""
BFLOAT16 = 5.0
"""Times both in a run that computes in 16 bits."""

TIMES = ("images_per_second", "data_wait")
"""What a line of metrics.jsonl says of speed."""
COMPUTES = ("jax", "jaxlib", "flax", "optax", "resnet_jax")
"""Packages another version of which may round otherwise."""
ROUNDS = ("model.scan", "model.remat", "parallel.strategy", "parallel.devices", "parallel.fsdp")
"""Fields that a resumed run may change, and that change the rounding."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it would be if the run were what its folder says.

    Attributes:
      where: a file of the run's folder, such as `metrics.jsonl` or `checkpoints/20`, or `data` or `parts`.
      step: of a line or a checkpoint; None where it belongs to none.
      what: both sides, in words.
    """

    where: str
    step: int | None
    what: str

    def __str__(self) -> str:
        at = "" if self.step is None or self.where.endswith(f"/{self.step}") else f", step {self.step}"
        return f"{self.where}{at}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What came out of `verify`.

    Attributes:
      run: its folder.
      kept: steps of the sound checkpoints.
      replayed: (first, last) step of each interval that was replayed.
      exact: whether bits were compared; otherwise within rounding, for the reasons in the notes.
      seed: of the draw of intervals; None where all were replayed.
      differences: what is not as it should be; empty for a sound run.
      notes: what a reader has to know beside: what was not looked at, other versions, another number of devices.
    """

    run: str
    kept: tuple[int, ...]
    replayed: tuple[tuple[int, int], ...]
    exact: bool
    seed: int | None
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        spans = ", ".join(f"{a} to {b}" for a, b in self.replayed) or "none"
        how = "bit by bit" if self.exact else "within rounding"
        drawn = "" if self.seed is None else f" (drawn with --seed {self.seed})"
        count = len(self.differences)
        found = f"{count} thing{'s differ' if count > 1 else ' differs'}" if count else "sound: nothing differs"
        rows = [f"{self.run}: {found}", f"replayed {how}, steps: {spans}{drawn}"]
        rows += [f"DIFFERS  {difference}" for difference in self.differences]
        return "\n".join(rows + [f"note     {note}" for note in self.notes])


def verify(
    run: str | Path,
    intervals: int | None = None,
    *,
    seed: int | None = None,
    rounding: bool = False,
    data: str | None = None,
    **parts: Any,
) -> Verification:
    """Replays a run between its checkpoints from the recorded recipe and data, and says what does not come out again.

    Compared bit by bit are parameters, statistics, optimizer state, averages and the lines of metrics.jsonl (without
    times and speeds); where the run had other versions or devices, or other kinds of programs on its way, within
    `ARRAYS` and `FIGURES`. Beside it recipe, pictures, parts of the user's own, best.json and summary.json are compared
    with the checkpoints, the lines, and an evaluation of the selected checkpoint. Events for TensorBoard, times and
    pages are not looked at. Nothing in the folder is written or touched.

    Args:
      run: its folder; nothing may train in it.
      intervals: how many of those between kept checkpoints, the first one from step 0, to replay, drawn at random;
        0 compares what the folder says with itself, None replays all.
      seed: of that draw; None takes a new one.
      rounding: compare within rounding also where versions and devices are the run's: another kind of processor rounds
        otherwise.
      data: where the run's data lies now, in place of the recipe's `data.dataset`.
      **parts: those of the user's own that the run was trained with, as for `train`.

    Raises:
      InputError: the folder holds no run or no sound checkpoint, a run is under way in it, or its data or parts are not
        there.
    """
    folder = path_of(run, "run")
    config = recorded(folder)
    if config is None:
        raise InputError(f"{folder} holds no run: there is no {folder / 'config.json'}")
    if intervals is not None and intervals < 0:
        raise InputError(f"intervals {intervals}: give a number of intervals to replay, or 0 for none")
    if jax.process_count() > 1:
        raise InputError("a run is verified by one process: start it once, without a cluster's settings")
    if live_holder(folder / "lock") is not None:
        raise InputError(f"a run is under way in {folder}: verify it when it has stopped")
    found: list[Difference] = []
    notes: list[str] = []
    records = read_records(folder, found)
    config = chosen_recipe(config, records, found)
    if data is not None:
        config = replace(config, data=replace(config.data, dataset=data))
    given = make_parts(parts if data is None else parts | {"dataset": None})
    needed = None if data is None else [name for name in NAMES if name != "dataset"]
    found += [Difference("parts", None, note) for note in check_recorded(folder, given, accept=True, needed=needed)]
    job = make_job(folder, config, given, records, rounding, found, notes)

    steps = sorted(records)
    chosen = list(pairwise([0, *(step for step in steps if step > 0)]))
    if intervals is None or intervals >= len(chosen):
        seed = None
    else:
        seed = secrets.randbelow(2**31) if seed is None else seed
        chosen = sorted(random.Random(seed).sample(chosen, intervals))
        notes.append(f"{intervals} of {len(steps)} intervals were replayed; --all replays the whole run")
    lines, torn = split_lines(folder / "metrics.jsonl")
    if torn:
        found.append(Difference("metrics.jsonl", None, f"{len(torn)} lines cannot be read"))
    with cached_where_sound(job.run.mesh):
        for span in spans_of(chosen, job):
            found += verify_span(job, span, lines)
        found += verify_selection(job, lines, notes)
    if beyond := sorted({line["step"] for line in lines if line["step"] > steps[-1]}):
        notes.append(f"lines of {len(beyond)} steps after the last checkpoint, {steps[-1]}, were not looked at")
    unique = tuple(dict.fromkeys(found))
    return Verification(str(folder), tuple(steps), tuple(chosen), job.exact, seed, unique, tuple(notes))


@dataclass(frozen=True)
class Job:
    """What all replays of a run share.

    Attributes:
      run: with everything but a place for checkpoints.
      records: step -> what the checkpoint holds beside the state.
      summary: None where the run has not ended.
      scale: times the stated rounding.
      same_kind: whether the devices are of the run's kind, so that the first state is drawn from the same bits.
    """

    run: Run
    records: dict[int, Record]
    summary: dict[str, Any] | None
    schedule: optax.Schedule
    exact: bool
    scale: float
    same_kind: bool


def read_records(folder: Path, found: list[Difference]) -> dict[int, Record]:
    """Returns the records of the sound checkpoints by step; adds the damaged ones to what was found.

    Raises:
      InputError: no checkpoint is sound.
    """
    checkpoints, records = checkpoints_of(folder), {}
    for step in sorted(steps_in(checkpoints)):
        problem = damage(checkpoints / str(step))
        try:
            if problem is None:
                records[step] = read_record(folder, step)
                from_dict(records[step]["recipe"])
                if (says := records[step]["step"]) != step:
                    problem = f"its record says that it is of step {says}"
        except (InputError, KeyError) as error:
            problem = f"its record is none of this version's: {error}"
            records.pop(step, None)
        if problem is not None:
            found.append(Difference(f"checkpoints/{step}", step, problem))
    if not records:
        listed = "; ".join(map(str, found)) or "it has none"
        raise InputError(f"{folder} has no sound checkpoint to replay from ({listed})")
    return records


def chosen_recipe(config: Config, records: dict[int, Record], found: list[Difference]) -> Config:
    """Returns the recipe to replay: that of config.json, or of the checkpoints where none of them has it.

    What can change no result is config.json's. Recipes that are not the chosen one are added to what was found.
    """
    recipes = {step: from_dict(record["recipe"]) for step, record in records.items()}
    chosen = config
    if all(differences(recipe, config) for recipe in recipes.values()):
        chosen = with_results_of(config, recipes[max(recipes)])
        changed = "; ".join(differences(chosen, config))
        what = f"it is not the recipe that the checkpoints hold (theirs -> config.json): {changed}"
        found.append(Difference("config.json", None, what))
    for step, recipe in recipes.items():
        if changed := "; ".join(differences(chosen, recipe)):
            what = f"it is another run's: its recipe is not this one (this run's -> the checkpoint's): {changed}"
            found.append(Difference(f"checkpoints/{step}", step, what))
    return chosen


def with_results_of(config: Config, other: Config) -> Config:
    """Returns a recipe with all fields of another one that can change a result."""
    sections = {}
    for section, values in vars(config).items():
        decisive = [f.name for f in dataclasses.fields(values) if not f.metadata.get("may_change_on_resume")]
        sections[section] = replace(values, **{name: getattr(getattr(other, section), name) for name in decisive})
    return replace(config, **sections)


def make_job(
    folder: Path,
    config: Config,
    parts: Parts,
    records: dict[int, Record],
    rounding: bool,
    found: list[Difference],
    notes: list[str],
) -> Job:
    """Compares data, versions and devices with the run's, and returns what its replays share."""
    dataset = data_of(config, parts, prepare=False)
    before, now = load_fingerprint(folder), fingerprint(dataset)
    if before is None:
        notes.append("the folder has no pictures.npz, so nothing says which pictures the run was given")
    elif changed := changes(before, now):
        found.append(Difference("data", None, f"the pictures are not those of the run: {described(changed)}"))
    loose = [] if not rounding else ["it was asked for"]
    if other := other_resizer(folder):
        loose.append(f"the run's pictures were resized by {other}, and now are by {resizer()}")
    summary = None
    try:
        summary = read_summary(folder)
        if summary is None:
            notes.append("the run has not ended: no summary.json says its versions and devices, which count as equal")
    except InputError as error:
        found.append(Difference("summary.json", None, str(error)))
    for name, here in versions().items():
        there = (summary or {}).get("versions", {}).get(name, here)
        if there != here:
            which = f"the run was computed by {name} {there}, after its summary.json, and here is {here}"
            (loose if name in COMPUTES else notes).append(which)
    first = from_dict(records[min(records)]["recipe"])
    for section, name in (names.split(".") for names in ROUNDS):
        old, new = (getattr(getattr(recipe, section), name) for recipe in (first, config))
        if old != new:
            loose.append(f"{section}.{name} was {old} at the run's start, and {new} at its end")

    wanted, _, kind = (summary or {}).get("device", "").partition(" x ")
    count = int(wanted) if re.fullmatch(r"[0-9]{1,6}", wanted) else config.parallel.devices or len(jax.devices())
    batch = config.train.batch_size // config.train.accumulate_steps
    usable = max(n for n in range(1, min(count, len(jax.devices())) + 1) if batch % n == 0)
    fsdp = config.parallel.fsdp if usable % config.parallel.fsdp == 0 else 1
    mesh = make_mesh(usable, fsdp)
    here = device_name(mesh)
    if summary is not None and here != summary["device"]:
        if usable != count and config.parallel.batch_norm == "local":
            raise InputError(
                f"the run had {count} devices, each with its own statistics (parallel.batch_norm local): verify it "
                f"where there are as many; here are {len(jax.devices())}"
            )
        loose.append(f"the run was computed on {summary['device']}, and the replay on {here}")
    notes += [f"compared within rounding (figures {FIGURES:g}, arrays {ARRAYS:g}): {why}" for why in loose]

    plan = make_plan(config, len(dataset.train), dataset.validation is not None)
    metric = selecting_metric(config, dataset, parts)
    module, parts = model_with_parts(config, parts, len(dataset.class_names))
    dataset = with_outputs(dataset, parts.outputs_of(module))
    where = in_a_temporary_folder(config, usable, fsdp)
    run = Run(folder, where, plan, module, dataset, metric, mesh, NO_CHECKPOINTS, Stop(), None, parts, Hooks(()))
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    scale = 1.0 if config.model.compute_dtype == "float32" else BFLOAT16
    return Job(run, records, summary, schedule, not loose, scale, summary is None or here.endswith(f" x {kind}"))


NO_CHECKPOINTS: Any = None
"""In their place is each replay itself."""


def in_a_temporary_folder(config: Config, devices: int, fsdp: int) -> Config:
    """Returns a recipe with the same programs, of one process, that writes the lines and nothing else."""
    from_device = config.data.on_device or computes_features_once(config)
    return replace(
        config,
        train=replace(config.train, steps_per_call=steps_per_call(config, from_device)),
        data=replace(config.data, workers=0),
        parallel=replace(
            config.parallel,
            devices=devices,
            fsdp=fsdp,
            distributed="off",
            coordinator=None,
            processes=None,
            process_id=None,
        ),
        log=replace(config.log, tensorboard=False, report=False, profile=None),
    )


def spans_of(intervals: Sequence[tuple[int, int]], job: Job) -> list[list[int]]:
    """Returns the steps of intervals that one replay goes through without a stop, [start, end, end, ...] each.

    It goes through a checkpoint where the plan writes one. Within rounding each interval begins at its checkpoint.
    """
    spans: list[list[int]] = []
    for start, end in intervals:
        through = spans and spans[-1][-1] == start and start % job.run.plan.save_every == 0 and job.exact
        if through and job.records[start]["rollbacks"] == job.records[end]["rollbacks"]:
            spans[-1].append(end)
        else:
            spans.append([start, end])
    return spans


def verify_span(job: Job, span: Sequence[int], lines: Sequence[dict[str, Any]]) -> list[Difference]:
    """Replays a span and returns what differs in its checkpoints and lines.

    Where two checkpoints in a row differ from the replay, the second is looked at once more, from the first: so that
    what follows from the first is not held against it.
    """
    replay = Replay(job, span)
    replay.start()
    found: list[Difference] = []
    for start, end in pairwise(span):
        seen = replay
        if start != span[0] and replay.found.get(start) and replay.found.get(end, ["not reached"]):
            seen = Replay(job, [start, end])
            seen.start()
        found += [Difference(f"checkpoints/{end}", end, what) for what in seen.found.get(end, [])]
        if seen.failure:
            found.append(Difference(f"checkpoints/{end}", end, seen.failure))
        elif end not in seen.found:
            found.append(Difference(f"checkpoints/{end}", end, f"the replay from step {seen.span[0]} ends before it"))
        else:
            found += compare_lines(job, lines, seen.lines, start, end)
    return found


@dataclass
class Replay:
    """Replays a span in a temporary folder; takes the place of `Checkpoints` in the run, and writes none.

    Attributes:
      span: steps of the checkpoint that it begins at, or 0, and of those that it compares.
      found: step -> what differs in the checkpoint, in words; only for those that were reached.
      lines: that it wrote to its metrics.jsonl.
      failure: why it could not be replayed to its end.
      best: set by the loop.
    """

    job: Job
    span: Sequence[int]
    found: dict[int, list[str]] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    best: int | None = None
    template: Template | None = None
    before: Mapping[str, np.ndarray] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)

    def start(self) -> None:
        """Replays."""
        job, (first, *_, last) = self.job, self.span
        if first == 0 and not job.same_kind and job.run.config.model.pretrained is None:
            self.failure = (
                "it cannot be replayed from step 0 here: the first parameters are drawn by a generator whose bits are "
                f"those of the run's devices ({(job.summary or {}).get('device')})"
            )
            return
        say(f"replaying steps {first} to {last}", error=True)
        with self.opened() as (run, state, progress):
            if state is None:
                return
            progress.rollbacks = job.records[last]["rollbacks"]
            factor = 0.5**progress.rollbacks
            try:
                fit(run, state, progress, lambda t: factor * job.schedule(t), until=last)
            except Diverged as error:
                self.failure = f"the replay from step {first} diverges: {error.what}"
            self.lines, _ = split_lines(run.folder / "metrics.jsonl")

    @contextlib.contextmanager
    def opened(self) -> Any:
        """Gives the run in a temporary folder, with state and progress of the span's start, or None with a failure."""
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory(prefix="resnet-jax-") as place:
            checkpoints: Any = self
            run = replace(self.job.run, folder=Path(place), checkpoints=checkpoints)
            try:
                state, progress = begin(run)
                self.before = on_host(unstack_blocks(state))
            except InputError as error:
                self.failure, state, progress = str(error), None, None
            yield run, state, progress

    def restore(self, template: Template) -> tuple[TrainState, Record, int] | None:
        """Returns state, record and step of the checkpoint that the span begins at; None at step 0."""
        self.template, step = template, self.span[0]
        if step == 0:
            return None
        return *read_checkpoint(self.job.run.folder, template, str(step)), step

    def save(self, step: int, state: TrainState, record: Record) -> None:
        """Compares a state with the checkpoint that the run kept of it."""
        self.steps.add(step)
        if step not in self.span[1:] or step in self.found:
            return
        assert self.template is not None
        try:
            kept, its_record = read_checkpoint(self.job.run.folder, self.template, str(step))
        except InputError as error:
            self.found[step] = [str(error)]
            return
        differing = compare_arrays(self.job, on_host(kept), on_host(state), self.before, self.span[0], step)
        self.found[step] = differing + ([] if not self.job.exact else compare_records(its_record, record))

    def has(self, step: int) -> bool:
        """Returns whether the replay has come by a step that is saved."""
        return step in self.steps

    def latest(self) -> int | None:
        """Returns None: there is none to go back to."""
        return None

    def settle(self) -> None:
        """Does nothing: nothing is being written."""


def on_host(state: Any) -> dict[str, np.ndarray]:
    """Returns copies of a state's arrays by their addresses; the program that goes on from it takes its memory."""
    return {address: np.array(leaf) for address, leaf in leaves_of(state).items()}


FEW = 3
"""Values, and fields, that are named one by one."""


def compare_arrays(
    job: Job,
    kept: Mapping[str, np.ndarray],
    replayed: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
    start: int,
    end: int,
) -> list[str]:
    """Returns in words how a checkpoint's arrays differ from those of a replay that began with `before`."""
    unequal = [name for name in kept if kept[name].tobytes() != replayed[name].tobytes()]
    beyond = [name for name, share in shares_of_rounding(kept, replayed, before, unequal).items() if share > job.scale]
    if not (unequal if job.exact else beyond):
        return []
    of, whole = f"the replay of steps {start} to {end}", f"{len(unequal)} of its {len(kept)} arrays"
    places = [(name, at) for name in unequal for at in np.argwhere(differing(kept[name], replayed[name]))[: FEW + 1]]
    if len(places) <= FEW:
        named = [
            f"{name}{at.tolist() or ''} is {kept[name][tuple(at)]!r}, and {replayed[name][tuple(at)]!r} in {of}"
            for name, at in places
        ]
        return [f"{len(places)} of its values {'was' if len(places) == 1 else 'were'} changed: {'; '.join(named)}"]
    if not beyond:
        return [
            f"{whole} differ from {of} by rounding alone: so does a run of another kind of processor, or with other "
            "XLA_FLAGS; --rounding allows it"
        ]
    listed = ", ".join(beyond[:FEW]) + (f" and {len(beyond) - FEW} more" if len(beyond) > FEW else "")
    if len(beyond) > len(kept) / 2:
        return [
            f"{whole} differ from {of}, {len(beyond)} by more than rounding: the checkpoint is not the one that this "
            "recipe and these data lead to from there (swapped, or trained otherwise)"
        ]
    return [f"{whole} differ from {of}, by more than rounding: {listed}"]


def differing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns bool of the arrays' shape: where their bytes differ."""
    size, shape = a.dtype.itemsize, a.shape
    rows = (np.frombuffer(x.tobytes(), np.uint8).reshape(-1, size) for x in (a, b))
    return np.asarray(np.not_equal(*rows).any(1)).reshape(shape)


def shares_of_rounding(
    kept: Mapping[str, np.ndarray],
    replayed: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> dict[str, float]:
    """Returns for each named array its difference in parts of the stated rounding; infinite where it is not finite."""

    def norm(a: Any) -> float:
        return float(np.linalg.norm(np.asarray(a, np.float64)))

    changed: dict[str, list[float]] = {}  # squares of what the interval changed, and how many values, by kind
    for name in kept if names else ():
        squares = changed.setdefault(name.partition("/")[0], [0.0, 0.0])
        squares[0] += norm(np.asarray(kept[name], np.float64) - np.asarray(before[name], np.float64)) ** 2
        squares[1] += kept[name].size
    shares = {}
    for name in names:
        a, b, c = (np.asarray(x[name], np.float64) for x in (kept, replayed, before))
        total, count = changed[name.partition("/")[0]]
        allowed = ARRAYS * max(norm(a - c), (total / count * a.size) ** 0.5) + 1e-5 * norm(a)
        distance = norm(a - b)
        shares[name] = distance / allowed if np.isfinite(distance) and allowed > 0 else np.inf
    return shares


def compare_records(kept: Record, replayed: Record) -> list[str]:
    """Returns in words what a checkpoint says beside its state that its replay does not."""
    names = ["sums", "skipped_updates", "skipped", "class_names", "multilabel"]
    if kept["eval_pending"] == replayed["eval_pending"]:  # else one was written before, the other after the evaluation
        names += ["best", "no_better", "result"]
    return [
        f"its record says {name} {to_json(kept[name])}, and the replay {to_json(replayed[name])}"
        for name in names
        if to_json(kept[name]) != to_json(replayed[name])
    ]


def kind_of_line(line: Mapping[str, Any]) -> str:
    """Returns `test`, `validation` or `training`."""
    splits = {name.removeprefix("ema/").partition("/")[0] for name in line}
    return next((split for split in ("test", "validation") if split in splits), "training")


def compare_lines(
    job: Job, lines: Iterable[dict[str, Any]], replayed: Iterable[dict[str, Any]], start: int, end: int
) -> list[Difference]:
    """Returns what differs between a run's lines of an interval and those of its replay, both in their order."""
    found: list[Difference] = []
    ours = {(line["step"], kind_of_line(line)): line for line in replayed if start <= line["step"] <= end}
    theirs: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        address = (line["step"], kind_of_line(line))
        step, kind = address
        if not start <= step <= end or kind == "test":
            continue
        if address in theirs:
            found.append(Difference("metrics.jsonl", step, f"there are several lines of {kind}"))
        theirs[address] = line
        if address not in ours and step > start and not ended_by_hook(job, step):
            found.append(Difference("metrics.jsonl", step, f"there is a line of {kind} that the replay does not write"))
    for address, line in ours.items():
        step, kind = address
        if address not in theirs:
            found.append(Difference("metrics.jsonl", step, f"the line of {kind} is missing"))
            continue
        found += compare_figures(job, theirs[address], line, step, kind, "the replay gives")
    return found


def ended_by_hook(job: Job, step: int) -> bool:
    """Returns whether a run was ended at a step by a hook, which then has an evaluation that was not planned."""
    plan = job.run.plan
    return bool(job.summary and job.summary["steps"] == step < plan.total and step % plan.eval_every)


def compare_figures(
    job: Job, kept: Mapping[str, Any], found: Mapping[str, Any], step: int, kind: str, source: str
) -> list[Difference]:
    """Returns the figures of a line that differ from those that were found."""
    what = []
    for name in dict.fromkeys([*found, *kept]):
        if name in (*TIMES, "step"):
            continue
        if name not in kept or name not in found:
            what.append(f"{name} is {'missing' if name not in kept else 'none that it would have'}")
        elif not same_figure(job, name, kept[name], found[name]):
            what.append(f"{name} is {kept[name]}, and {source} {found[name]}")
    return [Difference("metrics.jsonl", step, f"the line of {kind} was edited: {each}") for each in what]


def same_figure(job: Job, name: str, kept: Any, found: Any) -> bool:
    """Returns whether a figure is the one that was found: exactly, or within rounding."""
    if isinstance(found, float) and not np.isfinite(found):
        found = None
    if job.exact or kept is None or found is None or isinstance(kept, str):
        return kept == found
    if name in EXACT_FIGURES:
        return abs(kept - found) <= 1e-5 * abs(found)
    return abs(kept - found) <= FIGURES * job.scale * max(1.0, abs(found))


def verify_selection(job: Job, lines: Sequence[dict[str, Any]], notes: list[str]) -> list[Difference]:
    """Compares best.json and summary.json with the lines, the checkpoints, and an evaluation of the selected one."""
    found: list[Difference] = []
    folder, summary, last = job.run.folder, job.summary, max(job.records)
    best = best_in(job, lines)
    try:
        noted = best_of(folder)
        if noted != best:
            what = f"it says {shown(noted)}, and the best line of metrics.jsonl is {shown(best)}"
            found.append(Difference("best.json", None, what))
    except InputError as error:
        found.append(Difference("best.json", None, str(error)))
    if summary is None:
        return found
    if summary["steps"] != last:
        what = f"it says that the run ended at step {summary['steps']}, and the last sound checkpoint is of {last}"
        found.append(Difference("summary.json", None, what))
    if summary.get("best") != best:
        what = f"it says that the best is {shown(summary.get('best'))}, and by metrics.jsonl it is {shown(best)}"
        found.append(Difference("summary.json", None, what))
    counted = job.records[last]["skipped_updates"]["total"]
    if summary.get("skipped_updates") != counted and summary["steps"] == last:
        what = f"it says that {summary.get('skipped_updates')} updates were skipped, and the last checkpoint {counted}"
        found.append(Difference("summary.json", None, what))
    selected = summary.get("selected")
    expected = best["step"] if best else summary["steps"]
    if selected != expected:
        what = f"it says that step {selected} was selected, and by metrics.jsonl it is step {expected}"
        found.append(Difference("summary.json", None, what))
    if selected not in job.records:
        notes.append(f"the checkpoint of the selected step {selected} is not there, so its figures were not looked at")
        return found
    result = evaluate_checkpoint(job, selected)
    if result is None:
        return found
    for kind, values in scalars(result).items():
        for name, value in values.items():
            kept = summary.get(kind, {}).get(name)
            if not same_figure(job, name, kept, value):
                what = f"{kind}/{name} is {kept}, and evaluating the checkpoint of step {selected} gives {value}"
                found.append(Difference("summary.json", None, what))
    flat = {f"{kind}/{name}": value for kind, values in result.items() for name, value in values.items()}
    flat = {name: value for name, value in flat.items() if isinstance(value, float)}
    for split in ("validation", "test"):
        wanted = {name: value for name, value in flat.items() if kind_of_line({name: value}) == split}
        kept_lines = [line for line in lines if kind_of_line(line) == split and line["step"] == selected]
        if wanted and not kept_lines:
            found.append(Difference("metrics.jsonl", selected, f"the line of {split} is missing"))
        for line in kept_lines[:1]:
            found += compare_figures(job, line, wanted, selected, split, "the replay gives")
    return found


def best_in(job: Job, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns what best.json would hold after the lines of a run; None where nothing selects."""
    best: dict[str, Any] | None = None
    metric = job.run.metric
    if metric is None:
        return None
    averaged = job.run.config.train.ema_decay is not None
    name = f"{'ema/' if averaged else ''}validation/{metric}"
    for line in lines:
        if name in line and better(
            goal_of(job.run.config, metric), line[name], None if best is None else best["value"]
        ):
            best = {"step": line["step"], "metric": name, "value": line[name]}
    return best


def shown(best: Mapping[str, Any] | None) -> str:
    """Returns what best.json holds, in words."""
    return "nothing" if best is None else f"{best['metric']} {best['value']} of step {best['step']}"


def evaluate_checkpoint(job: Job, step: int) -> Result | None:
    """Returns the evaluations of a kept checkpoint on validation and test, as the run makes them; None where it cannot
    be read.
    """
    say(f"evaluating the checkpoint of step {step}", error=True)
    with Replay(job, [step, step]).opened() as (run, state, _):
        if state is None:
            return None
        config, mesh = run.config, run.mesh
        features = make_features(config, run.model, mesh) if computes_features_once(config) else None
        result: Result = {}
        for split in run.dataset.splits():
            if split != "train":
                bad = BadImages("skip", channels=config.data.channels)
                given = (config, run.model, run.dataset, split, mesh, bad, None, features)
                result |= make_evaluate(*given, parts=run.parts)(state) or {}
        return result
