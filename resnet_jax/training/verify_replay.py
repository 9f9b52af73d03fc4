"""Replays what lies between a run's checkpoints, in a temporary folder, by the loop of `training.loop` itself."""

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.config import InputError
from resnet_jax.data.loader import BadImages
from resnet_jax.models.stacking import unstack_blocks
from resnet_jax.output import say
from resnet_jax.runs.reporter import Diverged
from resnet_jax.runs.trackers import split_lines
from resnet_jax.training.checkpoints import Record, Template, read_checkpoint
from resnet_jax.training.evaluation import Result, make_evaluate
from resnet_jax.training.linear_probe import computes_features_once, make_features
from resnet_jax.training.loop import Run, begin, fit
from resnet_jax.training.state import TrainState
from resnet_jax.training.verify_compare import (
    GROWTH,
    Difference,
    Rounding,
    compare_arrays,
    compare_lines,
    compare_records,
    measure_growth,
    on_host,
    relative_distance,
)


@dataclass(frozen=True)
class Job:
    """What all replays of a run share.

    Attributes:
      run: with everything but a place for checkpoints.
      records: step -> what the checkpoint holds beside the state.
      summary: None where the run has not ended.
      how: how closely the replay has to agree.
      same_kind: whether the devices are of the run's kind, so that the first state is drawn from the same bits.
    """

    run: Run
    records: dict[int, Record]
    summary: dict[str, Any] | None
    schedule: optax.Schedule
    how: Rounding
    same_kind: bool


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
        found += compare_interval(job, job.how, seen, start, end, lines)
    return found


def verify_within_rounding(
    job: Job, start: int, end: int, lines: Sequence[dict[str, Any]], notes: list[str]
) -> list[Difference]:
    """Replays an interval and returns what differs by more than rounding.

    Where something does, a second replay, that begins with other last bits, shows how far rounding grows.
    """
    replay = Replay(job, [start, end])
    replay.run_through()
    found = compare_interval(job, job.how, replay, start, end, lines)
    if found and end in replay.ends:
        other = Replay(job, [start, end], nudged=True)
        other.run_through()
        if end in other.ends:
            arrays = replay.ends[end][1], other.ends[end][1]
            how, grown = (
                measure_growth(job.how, arrays, (replay.lines, other.lines)),
                relative_distance(*arrays, replay.before),
            )
            notes.append(
                f"steps {start} to {end}: a change of the last bit grows to {grown:.2%} of what they change in the "
                f"parameters, and {GROWTH:g} times as much was taken for rounding"
            )
            replay.found[end] = compare_arrays(how, *replay.ends[end], replay.before, start, end)
            found = compare_interval(job, how, replay, start, end, lines)
    return found


def compare_interval(
    job: Job, how: Rounding, replay: "Replay", start: int, end: int, lines: Sequence[dict[str, Any]]
) -> list[Difference]:
    """Returns what differs in the checkpoint at an interval's end, and in its lines, from a replay."""
    name, problems = f"checkpoints/{end}", replay.found.get(end, [])
    if replay.failure:
        problems = [*problems, replay.failure]
    elif end not in replay.found:
        problems = [f"the replay from step {replay.span[0]} ends before it"]
    found = [Difference(name, end, problem) for problem in problems]
    if end not in replay.found:
        return found
    edited = compare_lines(how, lines, replay.lines, start, end, unplanned_evaluation(job))
    if problems and edited:
        rows = ", ".join(str(step) for step in dict.fromkeys(each.step for each in edited))
        edited = [Difference("metrics.jsonl", None, f"the lines of the steps {rows}, on the way to {name}, differ too")]
    return found + edited


@dataclass
class Replay:
    """Replays a span in a temporary folder; takes the place of `Checkpoints` in the run, and writes none.

    Attributes:
      span: steps of the checkpoint that it begins at, or 0, and of those that it compares.
      found: step -> what differs in the checkpoint, in words; only for those that were reached.
      lines: that it wrote to its metrics.jsonl.
      nudged: begin with parameters whose last bit is another.
      ends: step -> arrays that were kept and replayed, where they are compared within rounding.
      failure: why it could not be replayed to its end.
      best: set by the loop.
    """

    job: Job
    span: Sequence[int]
    nudged: bool = False
    ends: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = field(default_factory=dict)
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
                if self.nudged:
                    state = state.replace(params=jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), state.params))
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
        how, arrays = self.job.how, (on_host(kept), on_host(state))
        if not how.exact:
            self.ends[step] = arrays
        problems = compare_arrays(how, *arrays, self.before, self.span[0], step)
        self.found[step] = problems or (compare_records(its_record, record) if how.exact else [])

    def has(self, step: int) -> bool:
        """Returns whether the replay has reached this step and it is one that is saved."""
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


def evaluate_checkpoint(job: Job, step: int, splits: Sequence[str], keep: bool = False) -> Result | None:
    """Returns the evaluations of a kept checkpoint on some splits, as the run makes them; with predictions where `keep`
    is set. None where it cannot be read.
    """
    say(f"evaluating the checkpoint of step {step}", error=True)
    with Replay(job, [step, step]).opened() as (run, state, _):
        if state is None:
            return None
        config, mesh = run.config, run.mesh
        features = make_features(config, run.model, mesh) if computes_features_once(config) else None
        result: Result = {}
        for split in splits:
            bad = BadImages("skip", channels=config.data.channels)
            given = (config, run.model, run.dataset, split, mesh, bad, None, features)
            result |= make_evaluate(*given, keep=keep, parts=run.parts)(state) or {}
        return result
