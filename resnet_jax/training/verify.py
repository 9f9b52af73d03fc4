"""A run as evidence: replays what lies between its checkpoints, and names what its folder says otherwise.

The replay is the loop of `training.loop` itself, in a temporary folder: from the recorded recipe, the data and the
checkpoint at an interval's start (or, from step 0, a new state) to the checkpoint at its end.
"""

import json
import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax

from resnet_jax.config import Config, InputError, from_dict
from resnet_jax.data.dataset import with_outputs
from resnet_jax.data.fingerprint import changes, described, fingerprint, load_fingerprint, other_resizer
from resnet_jax.data.transforms import resizer
from resnet_jax.files import path_of, read_file, to_json
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.runs.folder import device_name, read_summary, versions
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.lock import live_holder
from resnet_jax.runs.report_page import CALIBRATION, MEASURES, Measures, measured_splits, measures_of
from resnet_jax.runs.signals import Stop
from resnet_jax.runs.trackers import split_lines
from resnet_jax.training.build import data_of, make_plan, model_with_parts
from resnet_jax.training.checkpoints import Record
from resnet_jax.training.evaluation import selecting_metric
from resnet_jax.training.linear_probe import computes_features_once
from resnet_jax.training.loop import Run
from resnet_jax.training.manifest import best_of
from resnet_jax.training.optimizers import make_schedule
from resnet_jax.training.parts import NAMES, Parts, check_parts, make_parts
from resnet_jax.training.programs import steps_per_call
from resnet_jax.training.sharding import make_mesh, uncached_where_it_hangs
from resnet_jax.training.verify_compare import (
    ARRAYS,
    BFLOAT16,
    FIGURES,
    Difference,
    Rounding,
    best_in,
    chosen_recipe,
    compare_evaluation,
    compare_measures,
    kind_of_line,
    read_records,
    shown,
)
from resnet_jax.training.verify_replay import Job, evaluate_checkpoint, spans_of, verify_span, verify_within_rounding
from resnet_jax.typed import from_extra
from resnet_jax.weights.load import names_of_outputs

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
      notes: what a reader has to know beside: what was not compared, other versions, another number of devices.
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
        """Returns whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        spans = ", ".join(f"{a} to {b}" for a, b in self.replayed)
        how = "bit by bit" if self.exact else "within rounding"
        drawn = "" if self.seed is None else f" (drawn with --seed {self.seed})"
        count = len(self.differences)
        found = f"{count} thing{'s differ' if count > 1 else ' differs'}" if count else "nothing differs"
        rows = [f"{self.run}: {found}", f"replayed {how}, steps: {spans}{drawn}"]
        if not self.replayed:
            found = found if count else "what its folder says agrees with itself"
            rows = [f"{self.run}: {found}; no step was replayed, so what training wrote is not checked"]
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
    """Replays a run between its checkpoints from the recorded recipe and data, and returns what it does not reproduce.

    Compared bit by bit are parameters, statistics, optimizer state, averages and the lines of metrics.jsonl (without
    times and speeds); where the run had other versions or devices, or other kinds of programs on its way, within
    `ARRAYS` and `FIGURES`, or `GROWTH` times what a change of the last bit at an interval's start grows to. Beside it
    recipe, pictures, parts of the user's own, best.json and summary.json are compared with the checkpoints, the lines,
    and an evaluation of the selected checkpoint, and the report's measures.json and calibration.json with an evaluation
    of theirs. Events for TensorBoard, times and pages are not looked at. Nothing in
    the folder is written or touched.

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

    Example::

      report = rj.verify("runs/a", "all")
      print(report)
      assert report.ok
    """
    folder = path_of(run, "run")
    config = recorded_recipe(folder)
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
    found += [Difference("parts", None, note) for note in check_parts(folder, given, accept=True, needed=needed)]
    job = make_job(folder, config, given, records, rounding, found, notes)

    steps = sorted(records)
    chosen = list(pairwise([0, *(step for step in steps if step > 0)]))
    if chosen and not job.same_kind:
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
    with uncached_where_it_hangs(job.run.mesh):
        for span in spans_of(chosen, job):
            if job.how.exact:
                found += verify_span(job, span, lines)
            else:
                found += verify_within_rounding(job, span[0], span[-1], lines, notes)
        found += verify_selection(job, lines, notes)
        found += verify_report(job, notes)
    if beyond := sorted({line["step"] for line in lines if line["step"] > steps[-1]}):
        notes.append(f"lines of {len(beyond)} steps after the last checkpoint, {steps[-1]}, were not looked at")
    unique = tuple(dict.fromkeys(found))
    return Verification(str(folder), tuple(steps), tuple(chosen), job.how.exact, seed, unique, tuple(notes))


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
            which = f"summary.json says {name} {there}, and here is {here}"
            (loose if name in COMPUTES else notes).append(which)
    from_device = config.data.on_device or computes_features_once(config)
    most = steps_per_call(config, from_device, parts.model is not None)
    at_once = (summary or {}).get("members_at_once", 0)
    if at_once > 1 or (at_once and most == 1):
        what = f"took {at_once} members at once" if at_once > 1 else "made one step a call"
        loose.append(f"the run is a member of a sweep that {what}")
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
    where = in_a_temporary_folder(config, usable, fsdp, most)
    run = Run(folder, where, plan, module, dataset, metric, mesh, NO_CHECKPOINTS, Stop(), None, parts, Hooks(()))
    schedule = make_schedule(config, plan.total, plan.per_epoch)
    how = Rounding(not loose, 1.0 if config.model.compute_dtype == "float32" else BFLOAT16)
    return Job(run, records, summary, schedule, how, same_kind=summary is None or here.endswith(f" x {kind}"))


NO_CHECKPOINTS: Any = None
"""In their place is each replay itself."""


def in_a_temporary_folder(config: Config, devices: int, fsdp: int, most: int) -> Config:
    """Returns a recipe with the same programs, of one process, that writes the lines and nothing else.

    Args:
      most: steps in a call.
    """
    alone: Any = {"distributed": "off"} | dict.fromkeys(("coordinator", "processes", "process_id"))
    return replace(
        config,
        train=replace(config.train, steps_per_call=most),
        data=replace(config.data, workers=0),
        parallel=replace(config.parallel, devices=devices, fsdp=fsdp, **alone),
        log=replace(config.log, tensorboard=False, report=False, profile=None),
    )


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
    if not isinstance(selected, int) or selected not in job.records:
        notes.append(f"the checkpoint of the selected step {selected} is not there, so its figures were not looked at")
        return found
    splits = [split for split in job.run.dataset.splits() if split != "train"]
    told = {kind_of_line(line) for line in lines} | {name.removeprefix("ema/") for name in summary}
    if "test" in splits and "test" not in told:
        notes.append("the run did not look at its test split, as members of a sweep do not, and nor did this")
        splits.remove("test")
    result = evaluate_checkpoint(job, selected, splits)
    if result is None:
        return found
    return found + compare_evaluation(job.how, summary, lines, selected, result)


def verify_report(job: Job, notes: list[str]) -> list[Difference]:
    """Compares measures.json and calibration.json with a new evaluation of the checkpoint that they are of."""
    found: list[Difference] = []
    folder, parts, dataset = job.run.folder, job.run.parts, job.run.dataset
    computed: dict[int, Measures] = {}
    for file in (MEASURES, CALIBRATION):
        try:
            kept = json.loads(read_file(folder / file))
            step = kept["step"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            found.append(Difference(file, None, f"it is damaged ({error}); resnet-jax report writes it anew"))
            continue
        if "dataset" in kept:
            notes.append(f"{file} is of other data, {kept['dataset']}, so its figures were not looked at")
            continue
        if not isinstance(step, int) or step not in job.records:
            notes.append(f"the checkpoint of step {step} is not there, so the figures of {file} were not looked at")
            continue
        if step not in computed:
            names = names_of_outputs(parts.outputs_of(job.run.model), dataset.class_names, job.run.config.data.dataset)
            result = evaluate_checkpoint(job, step, measured_splits(dataset, names), keep=True)
            if result is None:
                continue
            with from_extra("report", f"verifying {file}"):
                computed[step] = measures_of(result, dataset, names, step, list(parts.metrics))
        now = computed[step].kept if file == MEASURES else computed[step].calibration
        found += compare_measures(job.how, file, kept, json.loads(to_json(now)))
    return found
