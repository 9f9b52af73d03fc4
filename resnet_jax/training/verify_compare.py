"""Compares what a run's folder says: recipes and records with each other, arrays and lines with those of a replay."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config import Config, InputError, differences, from_dict
from resnet_jax.files import to_json
from resnet_jax.training.checkpoints import Record, leaves_of, read_record
from resnet_jax.training.evaluation import Result, better, goal_of, scalars
from resnet_jax.training.manifest import checkpoints_of, damage, steps_in
from resnet_jax.training.run_progress import RunProgress

ARRAYS = 0.05
"""Rounding of an array: the norm of its difference, in parts of the norm of what the interval changed in it (at least
of what it changed, on the mean, in arrays of the same kind), and 1e-5 of the array's own."""
FIGURES = 0.01
"""Rounding of a figure, such as a loss or an accuracy: the difference, above 1 in parts of the figure."""
EXACT_FIGURES = ("epoch", "learning_rate")
"""Figures that are a function of the step; their rounding is 1e-5 of them."""
BFLOAT16 = 5.0
"""Times both in a run that computes in 16 bits."""

GROWTH = 5.0
"""Times what a change of the last bit at an interval's start grows to by its end: rounding that training amplifies."""

MEASURED = 1e-3
"""Difference up to which a figure of the report is the same: its page shows no more digits."""

TIMES = ("images_per_second", "data_wait")
"""What a line of metrics.jsonl says of speed."""


@dataclass(frozen=True)
class Difference:
    """One thing in a run's folder that a replay or the rest of the folder contradicts.

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
class Rounding:
    """How closely a replay has to agree with the run.

    Attributes:
      exact: bit by bit; otherwise within `ARRAYS` and `FIGURES`.
      times: these two.
      measured: how far rounding was seen to grow, by an array's address (its norm) or a figure's name.
    """

    exact: bool
    times: float
    measured: Mapping[str, float] = field(default_factory=dict)


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
                from_dict(RunProgress.from_record(records[step]).recipe)
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
        chosen = with_result_fields_of(config, recipes[max(recipes)])
        changed = "; ".join(differences(chosen, config))
        what = f"it is not the recipe that the checkpoints hold (theirs -> config.json): {changed}"
        found.append(Difference("config.json", None, what))
    for step, recipe in recipes.items():
        if changed := "; ".join(differences(chosen, recipe)):
            what = f"it is another run's: its recipe is not this one (this run's -> the checkpoint's): {changed}"
            found.append(Difference(f"checkpoints/{step}", step, what))
    return chosen


def with_result_fields_of(config: Config, other: Config) -> Config:
    """Returns a recipe with all fields of another one that can change a result."""
    sections = {}
    for section, values in vars(config).items():
        decisive = [f.name for f in dataclasses.fields(values) if not f.metadata.get("may_change_on_resume")]
        sections[section] = replace(values, **{name: getattr(getattr(other, section), name) for name in decisive})
    return replace(config, **sections)


def on_host(state: Any) -> dict[str, np.ndarray]:
    """Returns copies of a state's arrays by their addresses; the program that goes on from it takes its memory."""
    return {address: np.array(leaf) for address, leaf in leaves_of(state).items()}


FEW = 3
"""Values, and fields, that are named one by one."""


def compare_arrays(
    how: Rounding,
    kept: Mapping[str, np.ndarray],
    replayed: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
    start: int,
    end: int,
) -> list[str]:
    """Returns in words how a checkpoint's arrays differ from those of a replay that began with `before`."""
    unequal = [name for name in kept if kept[name].tobytes() != replayed[name].tobytes()]
    beyond = [name for name, share in shares_of_rounding(how, kept, replayed, before, unequal).items() if share > 1]
    if not (unequal if how.exact else beyond):
        return []
    of, whole = f"the replay of steps {start} to {end}", f"{len(unequal)} of its {len(kept)} arrays"
    places = [(name, at) for name in unequal for at in np.argwhere(differing(kept[name], replayed[name]))[: FEW + 1]]
    if len(places) <= FEW:
        named = [
            f"{name}{at.tolist() or ''} is {kept[name][tuple(at)]!s}, and {replayed[name][tuple(at)]!s} in {of}"
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
    how: Rounding,
    kept: Mapping[str, np.ndarray],
    replayed: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> dict[str, float]:
    """Returns for each named array its difference over the allowed rounding; infinite where it is not finite."""
    changed = distances(kept, before) if names else {}
    shares = {}
    for name in names:
        allowed = ARRAYS * changed[name] + 1e-5 * norm(kept[name])
        allowed = how.times * allowed + how.measured.get(name, 0.0)
        distance = norm(difference(kept[name], replayed[name]))
        shares[name] = distance / allowed if np.isfinite(distance) and allowed > 0 else np.inf
    return shares


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a - b in float64."""
    return np.asarray(a, np.float64) - np.asarray(b, np.float64)


def norm(array: np.ndarray) -> float:
    """Returns the Euclidean norm of all values."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def distances(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the norm of the difference of each two arrays, at least the root mean square difference over all arrays
    of their kind (`params`, `opt_state`, ...) times the root of their size.
    """
    found = {name: norm(difference(a[name], b[name])) for name in a}
    squares: dict[str, list[float]] = {}
    for name, distance in found.items():
        kind = squares.setdefault(name.partition("/")[0], [0.0, 0.0])
        kind[0], kind[1] = kind[0] + distance**2, kind[1] + a[name].size
    means = {kind: total / count if count else 0.0 for kind, (total, count) in squares.items()}
    return {name: max(found[name], (means[name.partition("/")[0]] * a[name].size) ** 0.5) for name in found}


def relative_distance(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]
) -> float:
    """Returns the distance of two replays in the parameters over the distance that the first has come from `before`."""
    names = [name for name in one if name.startswith("params/")]
    distance, changed = (sum(norm(difference(one[n], x[n])) ** 2 for n in names) ** 0.5 for x in (other, before))
    return distance / changed if changed else 0.0


def measure_growth(
    how: Rounding,
    arrays: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    lines: tuple[Iterable[dict[str, Any]], Iterable[dict[str, Any]]],
) -> Rounding:
    """Returns a rounding that also allows `GROWTH` times the differences of two replays, of which the second began
    with other last bits: of their arrays at the end, and of their lines, for each figure the largest.
    """
    measured = {name: GROWTH * distance for name, distance in distances(*arrays).items()}
    for one, other in zip(*lines, strict=False):
        for name in set(one) & set(other) - {*TIMES, *EXACT_FIGURES, "step"}:
            if one[name] is not None and other[name] is not None:
                measured[name] = max(measured.get(name, 0.0), GROWTH * abs(one[name] - other[name]))
    return replace(how, measured=measured)


def compare_records(kept: Record, replayed: Record) -> list[str]:
    """Returns in words what a checkpoint says beside its state that its replay does not."""
    names = ["sums", "skipped_updates", "class_names", "multilabel"]
    if kept["eval_pending"] == replayed["eval_pending"]:  # else one was written before, the other after the evaluation
        names += ["skipped", "best", "no_better", "result"]
    else:
        before, after = sorted((kept, replayed), key=lambda record: not record["eval_pending"])
        names += ["skipped"] * (not set(before["skipped"]) <= set(after["skipped"]))  # the evaluation may add its own
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
    how: Rounding,
    lines: Iterable[dict[str, Any]],
    replayed: Iterable[dict[str, Any]],
    start: int,
    end: int,
    unplanned: int | None = None,
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
        if address not in ours and step > start and step != unplanned:
            found.append(Difference("metrics.jsonl", step, f"there is a line of {kind} that the replay does not write"))
    for address, line in ours.items():
        step, kind = address
        if address not in theirs:
            found.append(Difference("metrics.jsonl", step, f"the line of {kind} is missing"))
            continue
        found += compare_figures(how, theirs[address], line, step, kind)
    return found


def compare_figures(
    how: Rounding, kept: Mapping[str, Any], found: Mapping[str, Any], step: int, kind: str, by: str = "the replay"
) -> list[Difference]:
    """Returns the figures of a line that differ from those that were found, `by` a replay or an evaluation."""
    what = []
    for name in dict.fromkeys([*found, *kept]):
        if name in (*TIMES, "step"):
            continue
        if name not in kept or name not in found:
            what.append(f"{name} is {'missing' if name not in kept else 'none that it would have'}")
        elif not same_figure(how, name, kept[name], found[name]):
            what.append(f"{name} is {kept[name]}, and {by} gives {found[name]}")
    return [Difference("metrics.jsonl", step, f"the line of {kind} was edited: {each}") for each in what]


def same_figure(how: Rounding, name: str, kept: Any, found: Any) -> bool:
    """Returns whether a figure is the one that was found: exactly, or within rounding."""
    if isinstance(found, float) and not np.isfinite(found):
        found = None
    if how.exact or found is None or not isinstance(kept, int | float):
        return kept == found
    if name in EXACT_FIGURES:
        return abs(kept - found) <= 1e-5 * abs(found)
    return abs(kept - found) <= FIGURES * how.times * max(1.0, abs(found)) + how.measured.get(name, 0.0)


def compare_evaluation(
    how: Rounding, summary: Mapping[str, Any], lines: Sequence[dict[str, Any]], selected: int, result: Result
) -> list[Difference]:
    """Returns what differs between summary and lines of a run and an evaluation of its selected checkpoint."""
    found: list[Difference] = []
    for kind, values in scalars(result).items():
        for name, value in values.items():
            kept = summary[kind].get(name) if isinstance(summary.get(kind), dict) else None
            if not same_figure(how, name, kept, value):
                what = f"{kind}/{name} is {kept}, and evaluating the checkpoint of step {selected} gives {value}"
                found.append(Difference("summary.json", None, what))
    flat = {f"{kind}/{name}": value for kind, values in result.items() for name, value in values.items()}
    flat = {name: value for name, value in flat.items() if isinstance(value, float)}
    for split in ("validation", "test"):
        wanted = {name: value for name, value in flat.items() if kind_of_line({name: value}) == split}
        kept_lines = [line for line in lines if kind_of_line(line) == split]
        its_own = [line for line in kept_lines if line["step"] == selected]
        if wanted and not its_own:
            found.append(Difference("metrics.jsonl", selected, f"the line of {split} is missing"))
        for line in its_own[:1]:
            by = f"evaluating the checkpoint of step {selected}"
            found += compare_figures(how, line, wanted, selected, split, by)
        if split == "test" and len(kept_lines) > 1:
            found.append(Difference("metrics.jsonl", None, "there are several lines of test, and a run writes one"))
    return found


def compare_measures(how: Rounding, file: str, kept: Any, found: Any) -> list[Difference]:
    """Returns which of a report's figures differ from those that were found, by more than `MEASURED`, or rounding.

    A report may have been made anew on another device than the run's: bits are not compared. Within rounding, what is
    said of single classes and bins is left aside, where a picture more or less is much.
    """
    allowed = MEASURED if how.exact else FIGURES * how.times
    old, new = dict(flattened(kept)), dict(flattened(found))
    names = [name for name in (new | old) if how.exact or "[" not in name]
    names = [name for name in names if not alike(old.get(name), new.get(name), allowed)]
    what = [f"{name} is {old.get(name)}, and evaluating the checkpoint gives {new.get(name)}" for name in names[:FEW]]
    what += [f"{len(names) - FEW} more of its figures differ"] * (len(names) > FEW)
    return [Difference(file, None, each) for each in what]


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the single values of what a JSON file holds, such as (`classes[0]/recall`, 0.5)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flattened(inner, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from flattened(inner, f"{name}[{i}]")
    else:
        yield name, value


def alike(kept: Any, found: Any, allowed: float) -> bool:
    """Returns whether two values of JSON are equal, numbers up to a difference, above 1 in parts of the number."""
    if isinstance(kept, int | float) and isinstance(found, int | float):
        return abs(kept - found) <= allowed * max(1.0, abs(found))
    return bool(kept == found)


def best_in(lines: Sequence[dict[str, Any]], config: Config, metric: str | None) -> dict[str, Any] | None:
    """Returns what best.json would hold after the lines of a run; None where nothing selects."""
    best: dict[str, Any] | None = None
    if metric is None:
        return None
    averaged = config.train.ema_decay is not None
    name = f"{'ema/' if averaged else ''}validation/{metric}"
    for line in lines:
        if name in line and better(goal_of(config, metric), line[name], None if best is None else best["value"]):
            best = {"step": line["step"], "metric": name, "value": line[name]}
    return best


def shown(best: Any) -> str:
    """Returns what best.json holds, in words."""
    if not isinstance(best, Mapping) or set(best) != {"metric", "value", "step"}:
        return "nothing" if best is None else to_json(best)
    return f"{best['metric']} {best['value']} of step {best['step']}"
