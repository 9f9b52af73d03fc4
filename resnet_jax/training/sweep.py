"""Many runs as one: a grid over fields of a recipe, in one folder with a table and a page; see `sweep`."""

import csv
import difflib
import io
import itertools
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from resnet_jax.config import Config, InputError, differences, from_dict, result_fields, to_dict
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.fingerprint import changes, described, fingerprint, load_fingerprint
from resnet_jax.files import path_of, read_json, remove_tree, to_json, write_whole
from resnet_jax.output import say
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.runs.charts import spoken
from resnet_jax.runs.folder import begun
from resnet_jax.runs.lock import hold
from resnet_jax.runs.reporter import Diverged
from resnet_jax.runs.signals import Stopped, stop_signals
from resnet_jax.runs.sweep_page import spoken_value, write_page
from resnet_jax.training.build import data_of
from resnet_jax.training.evaluation import goal_of, open_run, result_of
from resnet_jax.training.loop import train_with
from resnet_jax.training.losses import Loss
from resnet_jax.training.metrics import Metric
from resnet_jax.training.optimizers import OwnOptimizer
from resnet_jax.training.parts import Parts, check_parts, make_parts, record_parts
from resnet_jax.training.resolve import resolve, value_of, with_values
from resnet_jax.training.sweep_members import NO_VALIDATION, train_together
from resnet_jax.training.sweep_programs import Member, Rows, structure_of, why_alone
from resnet_jax.typed import typed

MOST_MEMBERS = 10_000
FILE = "sweep.json"
"""Name of the file in a sweep's folder that holds the recipe, what is varied, and what came out of each member."""
NEVER_VARIED = {
    "train.metric": "members are compared by it",
    "train.metric_goal": "members are compared by it",
    "train.accept_parts": "it changes no result",
}


def sweep(
    config: Config | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    workdir: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | Callable[[], Dataset] | None = None,
    loss: Loss | None = None,
    optimizer: OwnOptimizer | None = None,
    metrics: Mapping[str, Metric] | None = None,
    hooks: Sequence[Any] = (),
    members_per_device: int | Literal["auto"] = 1,
) -> dict[str, Any]:
    """Trains a recipe with every combination of some fields' values, and chooses by the validation split.

    Members that differ in numbers only (learning rate and schedule, weight decay, momentum, smoothing, averaging,
    drop rates, seed, length) are trained by one compiled program, one on each device at a time. On one device, with
    several steps a call, each has the bits of its run alone; over several devices it equals it to rounding. Others
    are groups that run one after another; where the data is not on the device, or a recipe does what one program
    cannot, runs go one by one. A stopped sweep goes on with the same call.

    Args:
      config: the recipe; None with `values` None takes those of the sweep in the folder.
      values: `section.field` of the recipe -> the values it takes, such as `{"train.seed": range(5)}`.
      workdir: the sweep's folder; None makes a new one under `runs/`.
      model, dataset, loss, optimizer, metrics, hooks: as for `train`.
      members_per_device: members that go through a device together, by `vmap`: equal to their runs alone to rounding,
        and on accelerators perhaps faster for small networks. 1 takes one after the other; `auto` tries 1, 2, 4, ...
        for a few steps and takes the fastest.

    Returns:
      What `sweep.json` holds: `recipe`, `varied`, `members` (`name`, `values`, `status`, `value` of the `metric` on the
      validation split, ...), `settings` (values without the seed, `count`, `mean` and `spread` over the seeds, the
      standard deviation), `own_validation` (whether each seed held out a validation split of its own), the `chosen`
      member's name, and `test`: what its evaluation on the test split found, made for it alone.

    Raises:
      InputError: a field or value is not as it must be, or the folder holds another sweep, or one with other parts.
      Stopped: a signal asked for it; all states are saved.

    Example::

      found = rj.sweep(config, {"optimizer.learning_rate": [0.05, 0.1, 0.2], "train.seed": range(5)}, "runs/rates")
      print(found["settings"][0], found["chosen"], found["test"])
    """
    named: dict[str, Any] = {"model": model, "dataset": dataset, "loss": loss, "optimizer": optimizer}
    named |= {"metrics": metrics, "hooks": hooks}
    parts = make_parts(named)
    if members_per_device != "auto" and not 1 <= members_per_device <= MOST_MEMBERS:
        raise InputError(f"members_per_device {members_per_device}: give auto or a number from 1 to {MOST_MEMBERS:,}")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-sweep"
    folder = Path("runs") / stamp if workdir is None else path_of(workdir, "--workdir")
    before = sweep_in(folder)
    config, varied = recipe_and_values(folder, before, config, values)
    accept = config.train.accept_parts or not any(begun(place) for place in (folder / "members").glob("*"))
    for warning in check_parts(folder, parts, accept, what="sweep") if before else ():
        say(f"WARNING: {warning}", error=True)
    if config.parallel.distributed != "off" or jax.process_count() > 1:
        raise InputError("a sweep runs in one process: leave parallel.distributed off")
    if config.train.metric == "none":
        raise InputError(NO_VALIDATION)
    combinations = grid(config, varied)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} of the sweep cannot be written: {error}") from error
    say(f"sweep: {folder}: {members_of(len(combinations))}, {', '.join(f'{len(v)} {n}' for n, v in varied.items())}")
    with hold(folder / "lock") as lock:
        found: dict[str, Any] = {"recipe": to_dict(config), "varied": varied, "members": before.get("members", [])}
        rows = {row["name"]: row for row in found["members"]}

        def note(members: Sequence[Member], results: Rows) -> None:
            for member, result in zip(members, results, strict=True):
                rows[member.name] = {"name": member.name, "values": dict(member.values)} | result
            found["members"] = sorted(rows.values(), key=lambda row: row["name"])
            write_whole(folder / FILE, to_json(found, indent=1) + "\n")

        record_parts(folder, parts)
        note([], [])
        all_members = make_members(combinations, folder, parts)
        check_same_pictures([member for member in all_members if member.name in rows], len(all_members), parts)
        groups = grouped(all_members)
        for number, members in enumerate(groups):
            left = [member for member in members if member.name not in rows]
            reason = why_alone(members[0].config, parts)
            if left and reason is None and len(members) > 1:
                say(f"group {number + 1} of {len(groups)}: {len(members)} members share a program")
                with stop_signals() as stop:
                    how: Any = {"per_device": members_per_device, "stop": stop, "lock": lock, "folder": folder}
                    note(members, train_together(members, folder / "together" / str(number), parts, **how))
                continue
            if left and len(members) > 1:
                say(f"group {number + 1} of {len(groups)}: {len(left)} members one after another: {reason}")
            for member in left:
                say(f"member {member.name}, alone")
                note([member], [train_alone(member, folder, named)])
        found |= outcome(found["members"], config) | {"own_validation": validation_by_seed(all_members)}
        same = found["chosen"] is not None and before.get("chosen") == found["chosen"]
        found["test"] = before["test"] if same else look_at_test(folder, found["chosen"], parts)
        write_whole(folder / FILE, to_json(found, indent=1) + "\n")
        write_whole(folder / "table.csv", as_csv(found))
        if (folder / "together").is_dir():
            remove_tree(folder / "together")  # each member has its own checkpoints now
        found = json.loads(to_json(found))
        page = write_page(folder, found)
        for line in (*format_outcome(found), f"the sweep lies in {folder}; its page: {page}"):
            say(line)
        return found


def sweep_in(folder: Path) -> dict[str, Any]:
    """Returns what a folder's `sweep.json` holds; an empty dict where there is none.

    Raises:
      InputError: it is damaged, or the folder holds a run.
    """
    try:
        return read_json(folder / FILE, dict[str, Any], "the sweep")
    except (FileNotFoundError, NotADirectoryError):
        pass
    if recorded_recipe(folder) is not None:
        raise InputError(f"{folder} holds a run, not a sweep: give another --workdir")
    return {}


def recipe_and_values(
    folder: Path, before: Mapping[str, Any], config: Config | None, values: Mapping[str, Sequence[Any]] | None
) -> tuple[Config, dict[str, list[Any]]]:
    """Returns the recipe of a sweep and the values of each field that it varies, those of the folder where none are
    given.

    Raises:
      InputError: nothing is varied, or the folder holds another sweep.
    """
    if values is None or not values:
        if not before:
            raise InputError(
                "nothing is varied: give a field several values, such as --train.seed 0..4 or "
                "--optimizer.learning_rate 0.05,0.1,0.2"
            )
        accept = config is not None and config.train.accept_parts
        return with_values(from_dict(before["recipe"]), {"train.accept_parts": accept}), before["varied"]
    chosen, varied = config or Config(), checked_values(values)
    if before:
        changed = differences(from_dict(before["recipe"]), chosen)
        changed += [
            f"{name}: {before['varied'].get(name)} -> {varied.get(name)}"
            for name in {**before["varied"], **varied}
            if before["varied"].get(name) != varied.get(name)
        ]
        if changed:
            raise InputError(
                f"{folder} holds another sweep: {'; '.join(changed)}. Give another --workdir, or the --workdir alone "
                "to go on with it"
            )
    return chosen, varied


def checked_values(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Returns the values of each field as JSON types.

    Raises:
      InputError: there is no such field, it cannot be varied, or a value is not of its type, or there twice.
    """
    found = {}
    for name, given in values.items():
        section, _, field = name.partition(".")
        kind = typing.get_type_hints(Config).get(section)
        hints = {} if kind is None else typing.get_type_hints(kind)
        if field not in hints:
            near = difflib.get_close_matches(name, FIELDS, 2, 0.5)
            meant = f": give {' or '.join(near)}" if near else ", such as optimizer.learning_rate"
            raise InputError(f"a sweep cannot vary {name}, which is no field of the recipe{meant}")
        if name in NEVER_VARIED or name not in result_fields(Config()):
            why = NEVER_VARIED.get(name, "it does not change a result")
            raise InputError(f"a sweep cannot vary {name}: {why}")
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise InputError(f"{name} is {given!r}: expected several values, such as [0.05, 0.1]")
        checked = [typed(value, hints[field], name) for value in given]
        if not checked:
            raise InputError(f"{name} has no values: give at least one")
        if twice := [value for i, value in enumerate(checked) if value in checked[:i]]:
            raise InputError(f"{name} has the value {twice[0]} twice: leave one out")
        found[name] = json.loads(to_json(checked))
    return found


FIELDS = tuple(f"{section}.{field}" for section, values in to_dict(Config()).items() for field in values)


def grid(config: Config, varied: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], Config]]:
    """Returns every combination of the fields' values with its recipe, the last field fastest.

    Raises:
      InputError: a recipe is impossible, or there are too many.
    """
    count = math.prod(map(len, varied.values()))
    if count > MOST_MEMBERS:
        raise InputError(f"the grid has {count:,} members: give fewer values, up to {MOST_MEMBERS:,} members")
    found = []
    for combination in itertools.product(*varied.values()):
        values = dict(zip(varied, combination, strict=True))
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        found.append((values, with_values(config, tuples)))
    return found


def make_members(combinations: Sequence[tuple[dict[str, Any], Config]], folder: Path, parts: Parts) -> list[Member]:
    """Returns the members of a sweep, with what their recipes leave open."""
    digits, members, resolved = len(str(len(combinations) - 1)), [], dict[tuple[str, int], Any]()
    names = list(combinations[0][0])
    short = {name: name.rpartition(".")[2] for name in names}
    short = {name: word if list(short.values()).count(word) == 1 else name for name, word in short.items()}
    for i, (values, config) in enumerate(combinations):
        words = [f"{short[name]}={re.sub(r'[^A-Za-z0-9.+-]', '_', str(value))}" for name, value in values.items()]
        name = f"{i:0{digits}d}-{','.join(words)}"[:120]
        place = folder / "members" / name
        before, key = recorded_recipe(place), (structure_of(config), config.train.seed)
        if before is not None or key not in resolved:
            resolved[key] = resolve(config, parts, before)
        of = resolved[key]
        filled = with_values(config, {n: value_of(of.config, n) for n in ("model.name", "data.dataset", *of.origins)})
        members.append(Member(name, values, config, filled, place))
    if line := next(iter(resolved.values())).line():
        say(line)
    return members


def check_same_pictures(finished: Sequence[Member], count: int, parts: Parts) -> None:
    """Compares the pictures with those that the finished ones of `count` members were given.

    Raises:
      InputError: they are others, by which those that are left could not be compared with them.
    """
    for member in finished[:1] if len(finished) < count else ():
        before = load_fingerprint(member.folder)
        if before is None or not (changed := changes(before, fingerprint(data_of(member.config, parts)))):
            continue
        raise InputError(
            f"{member.config.data.dataset} is not as the finished member in {member.folder} was given it "
            f"({described(changed)}), and members on other data cannot be compared with it: give the data as it was, "
            "or start anew in another --workdir"
        )


def grouped(members: Sequence[Member]) -> list[list[Member]]:
    """Returns the members in groups that can share a program."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(structure_of(member.config), []).append(member)
    return list(groups.values())


def train_alone(member: Member, folder: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a member as `train` does, but for the test split; returns a row as `train_together` does.

    Raises:
      InputError: there is no validation split.
      Stopped: a signal asked for it.
    """
    try:
        summary = train_with(member.given, member.folder, named, look_at_test=False)
    except Diverged as error:
        nothing = dict.fromkeys(("step", "metric", "value", "best_step", "result"))
        return {"status": "diverged", "why": error.what} | nothing
    except Stopped as stopped:
        raise Stopped(folder, stopped.step, stopped.signal, stopped.saved, "sweep") from None
    best = summary["best"]
    if best is None:
        raise InputError(NO_VALIDATION)
    result = {name: summary[name] for name in ("validation", "ema/validation") if name in summary}
    row = {"status": "finished", "why": None, "step": summary["steps"], "metric": best["metric"]}
    return row | {"value": best["value"], "best_step": best["step"], "result": result}


def outcome(rows: Rows, config: Config) -> dict[str, Any]:
    """Returns the settings of a sweep, the best first, and the chosen member.

    A setting is a combination of values without the seed. Settings are compared by the mean over their seeds, those of
    which a member diverged after the others; of the best one the member is chosen that is best itself. Between equals
    the first counts.
    """
    metric = next((row["metric"].rpartition("/")[2] for row in rows if row["metric"]), None)
    if metric is None:
        return {"metric": None, "settings": [], "chosen": None}
    goal = goal_of(config, metric)
    sign = 1.0 if goal == "min" else -1.0
    of: dict[str, Rows] = {}
    for row in rows:
        of.setdefault(to_json({n: v for n, v in row["values"].items() if n != "train.seed"}), []).append(row)
    settings = []
    for key, members in of.items():
        values = [row["value"] for row in members if row["value"] is not None]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        mean = float(np.mean(values)) if values else None
        setting = {"values": json.loads(key), "count": len(members), "diverged": len(members) - len(values)}
        settings.append(setting | {"mean": mean, "spread": spread, "members": [row["name"] for row in members]})
    settings.sort(key=lambda s: (s["mean"] is None, s["diverged"] > 0, sign * (s["mean"] or 0.0)))
    there = [row for row in rows if row["name"] in settings[0]["members"] and row["value"] is not None]
    chosen = min(there, key=lambda row: sign * row["value"])["name"] if there else None
    return {"metric": metric, "goal": goal, "settings": settings, "chosen": chosen}


def validation_by_seed(members: Sequence[Member]) -> bool:
    """Returns whether members with different seeds have different validation splits, as those that are held out are."""
    folders = {member.config.train.seed: member.folder for member in members}
    pictures = [load_fingerprint(folder) or {} for folder in folders.values()]
    return len({of["validation"][:, 0].tobytes() for of in pictures if "validation" in of}) > 1


def look_at_test(folder: Path, chosen: str | None, parts: Parts) -> dict[str, Any] | None:
    """Returns what the chosen member's evaluation on the test split finds; None where there is no member or split."""
    if chosen is None:
        return None
    run = open_run(folder / "members" / chosen, parts=parts)
    if run.dataset.test is None:
        return None
    run.check_unseen("test")
    return {"step": int(run.state.step)} | result_of(run, "test", run.evaluate("test") or {})


def as_csv(found: Mapping[str, Any]) -> str:
    """Returns the table of the members, a line each."""
    text = io.StringIO()
    fields = list(found["varied"])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", *fields, "status", "metric", "value", "best_step", "steps"])
    for row in found["members"]:
        words = [row[name] for name in ("status", "metric", "value", "best_step", "step")]
        writer.writerow([row["name"], *(row["values"][name] for name in fields), *words])
    return text.getvalue()


def members_of(count: int) -> str:
    """Returns a number of members in words."""
    return f"{count:,} member{'s' * (count != 1)}"


def format_outcome(found: Mapping[str, Any], most: int = 20) -> list[str]:
    """Returns lines on what came out: the settings, the best first, and the chosen member with its test."""
    if found["chosen"] is None:
        return ["no member came to its end: see why in sweep.json"]
    spreads = any(setting["spread"] is not None for setting in found["settings"])
    lines = [f"validation {found['metric']}{', mean ± standard deviation over the seeds' if spreads else ''}:"]
    if spreads and found["own_validation"]:
        lines = [f"{lines[0][:-1]}, each of which held out a validation split of its own:"]
    for setting in found["settings"][:most]:
        words = ", ".join(f"{name} {value}" for name, value in setting["values"].items()) or "all"
        value = "none" if setting["mean"] is None else spoken_value(found["metric"], setting["mean"])
        spread = "" if setting["spread"] is None else f" ± {spoken_value(found['metric'], setting['spread'])}"
        diverged = f", {setting['diverged']} diverged" if setting["diverged"] else ""
        lines.append(f"  {value}{spread}  {words} ({members_of(setting['count'])}{diverged})")
    if len(found["settings"]) > most:
        lines.append(f"  and {len(found['settings']) - most} more")
    lines.append(f"chosen by validation: {found['chosen']}")
    if found["test"] is not None:
        name = "ema/test" if "ema/test" in found["test"] else "test"
        means = found["test"][name]
        main = "accuracy" if "accuracy" in means else "loss"
        lines.append(f"its {spoken(name + '/' + main)} {spoken_value(main, means[main])} on {means['count']} images")
    return lines
