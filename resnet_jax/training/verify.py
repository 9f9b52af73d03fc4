"""A run as evidence: replays what lies between its checkpoints, and names what its folder says otherwise.

The replay is the loop of `training.loop` itself, in a temporary folder: from the recorded recipe, the data and the
checkpoint at an interval's start (or, from step 0, a new state) to the checkpoint at its end.
"""

import contextlib
import io
import random
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from resnet_jax.config import Config, InputError, from_dict
from resnet_jax.data.dataset import with_outputs
from resnet_jax.data.fingerprint import changes, described, fingerprint, other_resizer
from resnet_jax.data.fingerprint import load as load_fingerprint
from resnet_jax.data.loader import BadImages
from resnet_jax.data.transforms import resizer
from resnet_jax.files import path_of
from resnet_jax.models.stacking import unstack_blocks
from resnet_jax.output import say
from resnet_jax.recipe_files import recorded
from resnet_jax.runs.folder import device_name, read_summary, versions
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.lock import live_holder
from resnet_jax.runs.reporter import Diverged
from resnet_jax.runs.signals import Stop
from resnet_jax.runs.trackers import split_lines
from resnet_jax.training.build import data_of, make_plan, model_with_parts
from resnet_jax.training.checkpoints import Record, Template, read_checkpoint
from resnet_jax.training.evaluation import Result, make_evaluate, selecting_metric
from resnet_jax.training.linear_probe import computes_features_once, make_features
from resnet_jax.training.loop import Run, begin, fit
from resnet_jax.training.manifest import best_of
from resnet_jax.training.optimizers import make_schedule
from resnet_jax.training.parts import NAMES, Parts, check_recorded, make_parts
from resnet_jax.training.programs import steps_per_call
from resnet_jax.training.sharding import cached_where_sound, make_mesh
from resnet_jax.training.state import TrainState
from resnet_jax.training.verify_compare import (
    ARRAYS,
    BFLOAT16,
    FIGURES,
    Difference,
    Rounding,
    best_in,
    chosen_recipe,
    compare_arrays,
    compare_evaluation,
    compare_lines,
    compare_records,
    on_host,
    read_records,
    shown,
)

COMPUTES = ("jax", "jaxlib", "flax", "optax", "resnet_jax")
"""Packages another version of which may round otherwise."""
ROUNDS = ("model.scan", "model.remat", "parallel.strategy", "parallel.devices", "parallel.fsdp")
"""Fields that a resumed run may change, and that change the rounding."""


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
        found = f"{count} thing{'s differ' if count > 1 else ' differs'}" if count else "nothing differs"
        rows = [f"{self.run}: {found}", f"replayed {how}, steps: {spans}{drawn}"]
        rows += [f"DIFFERS  {difference}" for difference in self.differences]
        return "\n".join(rows + [f"note     {note}" for note in self.notes])


def verify(
    run: str | Path,
    intervals: int | Literal["all"] = 2,
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
        0 compares what the folder says with itself, "all" replays the whole run.
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
    if intervals != "all" and intervals < 0:
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
    if not job.same_kind:
        notes.append(
            f"steps 0 to {chosen[0][1]} were left out: the first parameters are drawn by a generator whose bits "
            "are those of the run's kind of device"
        )
        del chosen[0]
    if intervals == "all" or intervals >= len(chosen):
        seed = None
    else:
        seed = secrets.randbelow(2**31) if seed is None else seed
        chosen = sorted(random.Random(seed).sample(chosen, intervals))
        notes.append(f"{intervals} of the {len(steps)} intervals were replayed; --all replays the whole run")
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
    return Verification(str(folder), tuple(steps), tuple(chosen), job.how.exact, seed, unique, tuple(notes))


@dataclass(frozen=True)
class Job:
    """What all replays of a run share.

    Attributes:
      run: with everything but a place for checkpoints.
      records: step -> what the checkpoint holds beside the state.
      summary: None where the run has not ended.
      how: how equal the replay has to be.
      same_kind: whether the devices are of the run's kind, so that the first state is drawn from the same bits.
    """

    run: Run
    records: dict[int, Record]
    summary: dict[str, Any] | None
    schedule: optax.Schedule
    how: Rounding
    same_kind: bool


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
    how = Rounding(not loose, 1.0 if config.model.compute_dtype == "float32" else BFLOAT16)
    return Job(run, records, summary, schedule, how, same_kind=summary is None or here.endswith(f" x {kind}"))


NO_CHECKPOINTS: Any = None
"""In their place is each replay itself."""


def in_a_temporary_folder(config: Config, devices: int, fsdp: int) -> Config:
    """Returns a recipe with the same programs, of one process, that writes the lines and nothing else."""
    most = steps_per_call(config, config.data.on_device or computes_features_once(config))
    alone: Any = {"distributed": "off"} | dict.fromkeys(("coordinator", "processes", "process_id"))
    return replace(
        config,
        train=replace(config.train, steps_per_call=most),
        data=replace(config.data, workers=0),
        parallel=replace(config.parallel, devices=devices, fsdp=fsdp, **alone),
        log=replace(config.log, tensorboard=False, report=False, profile=None),
    )


def spans_of(intervals: Sequence[tuple[int, int]], job: Job) -> list[list[int]]:
    """Returns the steps of intervals that one replay goes through without a stop, [start, end, end, ...] each.

    It goes through a checkpoint where the run as it is planned writes one, and not one of a signal. Within rounding
    each interval begins at its checkpoint.
    """
    spans: list[list[int]] = []
    for start, end in intervals:
        if spans and spans[-1][-1] == start and job.how.exact:
            record, plan = job.records[start], job.run.plan
            best = start % plan.eval_every == 0 and not record["eval_pending"]
            same_rate = record["rollbacks"] == job.records[end]["rollbacks"]
            if same_rate and (best or start % plan.save_every == 0):
                spans[-1].append(end)
                continue
        spans.append([start, end])
    return spans


def verify_span(job: Job, span: Sequence[int], lines: Sequence[dict[str, Any]]) -> list[Difference]:
    """Replays a span and returns what differs in its checkpoints and lines.

    Where two checkpoints in a row differ from the replay, the second is looked at once more, from the first: so that
    what follows from the first is not held against it.
    """
    replay = Replay(job, span)
    replay.run_through()
    found: list[Difference] = []
    for start, end in pairwise(span):
        seen = replay
        if start != span[0] and replay.found.get(start) and replay.found.get(end, ["not reached"]):
            seen = Replay(job, [start, end])
            seen.run_through()
        name, problems = f"checkpoints/{end}", seen.found.get(end, [])
        if seen.failure:
            problems = [*problems, seen.failure]
        elif end not in seen.found:
            problems = [f"the replay from step {seen.span[0]} ends before it"]
        found += [Difference(name, end, problem) for problem in problems]
        if end in seen.found:
            edited = compare_lines(job.how, lines, seen.lines, start, end, unplanned_evaluation(job))
            if problems and edited:
                rows = ", ".join(str(step) for step in dict.fromkeys(each.step for each in edited))
                edited = [
                    Difference(
                        "metrics.jsonl", None, f"the lines of the steps {rows}, on the way to {name}, differ too"
                    )
                ]
            found += edited
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

    def run_through(self) -> None:
        """Replays the span."""
        job, (first, *_, last) = self.job, self.span
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
                if self.span[0] == 0:
                    raise  # such as weights that cannot be found
                self.failure, state, progress = f"the replay cannot begin at step {self.span[0]}: {error}", None, None
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
        how = self.job.how
        problems = compare_arrays(how, on_host(kept), on_host(state), self.before, self.span[0], step)
        self.found[step] = problems or (compare_records(its_record, record) if how.exact else [])

    def has(self, step: int) -> bool:
        """Returns whether the replay has come by a step that is saved."""
        return step in self.steps

    def latest(self) -> int | None:
        """Returns None: there is none to go back to."""
        return None

    def settle(self) -> None:
        """Does nothing: nothing is being written."""


def unplanned_evaluation(job: Job) -> int | None:
    """Returns the step at which a hook ended a run, with an evaluation that no plan has; None where none did."""
    plan, last = job.run.plan, (job.summary or {}).get("steps", job.run.plan.total)
    return last if last < plan.total and last % plan.eval_every else None


def verify_selection(job: Job, lines: Sequence[dict[str, Any]], notes: list[str]) -> list[Difference]:
    """Compares best.json and summary.json with the lines, the checkpoints, and an evaluation of the selected one."""
    found: list[Difference] = []
    folder, summary, last = job.run.folder, job.summary, max(job.records)
    best = best_in(lines, job.run.config, job.run.metric)
    try:
        noted = best_of(folder)
        if noted != best:
            what = f"it says {shown(noted)}, and the best line of metrics.jsonl is {shown(best)}"
            found.append(Difference("best.json", None, what))
    except InputError as error:
        found.append(Difference("best.json", None, str(error)))
    if summary is None:
        return found
    selected, counted = summary.get("selected"), job.records[last]["skipped_updates"]["total"]
    expected = best["step"] if best else summary["steps"]
    wrong = []
    if summary["steps"] != last:
        wrong.append(f"it says that the run ended at step {summary['steps']}; the last sound checkpoint is of {last}")
    elif summary.get("skipped_updates") != counted:
        wrong.append(f"it says that {summary.get('skipped_updates')} updates were skipped, the checkpoint {counted}")
    if summary.get("best") != best:
        wrong.append(f"it says that the best is {shown(summary.get('best'))}; by metrics.jsonl it is {shown(best)}")
    if selected != expected:
        wrong.append(f"it says that step {selected} was selected; by metrics.jsonl it is step {expected}")
    found += [Difference("summary.json", None, what) for what in wrong]
    if selected not in job.records:
        notes.append(f"the checkpoint of the selected step {selected} is not there, so its figures were not looked at")
        return found
    result = evaluate_checkpoint(job, selected)
    if result is None:
        return found
    return found + compare_evaluation(job.how, summary, lines, selected, result)


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
