"""Recipes as JSON and as Python files, what differs between two of them, and what is impossible."""

import dataclasses
import math
import re
import runpy
import traceback
import typing
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, InputError, local_path, path_of, sides
from resnet_jax.files import read_json
from resnet_jax.typed import shown, typed

FREE_FIELDS = frozenset(
    {
        "model.remat",
        "model.scan",
        "data.dataset",
        "data.accept_changes",
        "data.data_dir",
        "data.workers",
        "data.timeout",
        "parallel.devices",
        "parallel.strategy",
        "parallel.fsdp",
        "parallel.distributed",
        "parallel.coordinator",
        "parallel.processes",
        "parallel.process_id",
        "parallel.join_within",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "log.every_steps",
        "log.tensorboard",
        "log.profile",
        "log.report",
    }
)
"""Fields that a resumed run may change, since they do not change its result."""


def to_dict(config: Config) -> dict[str, Any]:
    """The recipe as JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """The inverse of `to_dict`; lists become tuples, absent fields their defaults.

    Raises:
      InputError: a field is unknown or of another type, or a section is no object; the message names it.
    """
    return typed(values, Config, "the recipe")


def result_fields(config: Config) -> dict[str, Any]:
    """`section.field` -> value of all that can change a run's result."""
    return {
        f"{section}.{name}": value
        for section, fields in to_dict(config).items()
        for name, value in fields.items()
        if f"{section}.{name}" not in FREE_FIELDS
    }


def differences(old: Config, new: Config) -> list[str]:
    """`field: old -> new` for every field that differs and changes the result."""
    before = result_fields(old)
    return [
        f"{name}: {before[name]!r} -> {value!r}" for name, value in result_fields(new).items() if value != before[name]
    ]


def load_config(path: str | Path) -> Config:
    """The variable `config` of a Python file.

    Raises:
      InputError: there is no such file, it cannot be run, or it defines no `config` of type Config.
    """
    path = local_path(path, "--config")
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise InputError(f"--config {path}: {what}; recipes are Python files such as those in configs/")
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise InputError(f"--config {_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config {path}: the file must define `config = Config(...)`")
    return config


def _place(error: BaseException, path: Path) -> str:
    """File and line of a recipe where an error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines and lines[-1] else str(path)


def recorded(workdir: str | Path | None) -> Config | None:
    """The recipe of the run that a folder holds, if it holds one.

    Raises:
      InputError: its `config.json` is not as runs write it.
    """
    if workdir is None:
        return None
    file = path_of(workdir, "--workdir") / "config.json"
    try:
        config = read_recipe(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError as error:
        raise InputError(f"{error}; put back the one that the run wrote, or give another --workdir") from error
    try:
        check(config)
    except InputError as error:
        raise InputError(f"{file} is no recipe that can run: {error}") from error
    return config


def read_recipe(file: Path) -> Config:
    """The recipe in a run's `config.json`; absent fields, which a newer version may have added, have their defaults.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such file.
      InputError: it is not as runs write it.
    """
    try:
        values = read_json(file, dict[str, Any], "the recipe")
        if missing := [section for section in ("model", "data", "train") if section not in values]:
            raise InputError(f"it has no {', '.join(missing)}")
        return from_dict(values)
    except InputError as error:
        reason = str(error).removeprefix(f"{file} is damaged: ").removeprefix(f"{file} ")
        raise InputError(f"{file} is no recipe of a run: {reason}") from error


def starting_recipe(file: str | None, workdir: str | None) -> Config:
    """What flags change: the recipe of the file, else that of the run in the folder, else the digits.

    Whether a process is one of several, and which, belongs to a start and is not taken from the folder.

    Raises:
      InputError: the file or the folder's recipe is not as it must be.
    """
    if file is not None:
        return load_config(file)
    config = recorded(workdir) or Config()
    alone = dataclasses.replace(config.parallel, distributed="off", coordinator=None, processes=None, process_id=None)
    return dataclasses.replace(config, parallel=alone)


MOST = 2**31 - 1
"""The largest number of a field that has no other bound."""

LIMITS: dict[str, str] = {
    "model.num_classes": "[1, 10000000]",
    "model.drop_rate": "[0, 1)",
    "model.drop_path_rate": "[0, 1)",
    "data.image_size": "[1, 16384]",
    "data.eval_image_size": "[1, 16384]",
    "data.channels": "[1, 4096]",
    "data.validation_fraction": "[0, 1)",
    "data.mean": f"[-{MOST}, {MOST}]",
    "data.std": f"[1e-30, {MOST}]",
    "data.workers": "[0, 1024]",
    "data.timeout": f"(0, {MOST}]",
    "data.synthetic_size": f"[1, {MOST}]",
    "data.synthetic_classes": "[1, 10000000]",
    "augment.pad": "[0, 1024]",
    "augment.area": "(0, 1]",
    "augment.color_jitter": "[0, 1)",
    "augment.randaugment": "[0, 10]",
    "augment.erasing": "[0, 1]",
    "augment.repeats": f"[1, {MOST}]",
    "augment.mixup": "[0, 1000]",
    "augment.cutmix": "[0, 1000]",
    "augment.eval_crop": "[0.01, 1]",
    "optimizer.learning_rate": "[0, 1e+30]",
    "optimizer.base_batch_size": f"[1, {MOST}]",
    "optimizer.momentum": "[0, 1)",
    "optimizer.weight_decay": "[0, 1000000]",
    "optimizer.clip_norm": f"(0, {MOST}]",
    "optimizer.sam_rho": "[0, 1000]",
    "schedule.warmup_epochs": f"[0, {MOST}]",
    "schedule.warmup_factor": "[0, 1]",
    "schedule.boundaries": "(0, 1)",
    "schedule.factor": "(0, 1000]",
    "finetune.layer_decay": "(0, 1]",
    "finetune.thaw_every_epochs": f"(0, {MOST}]",
    "train.epochs": f"(0, {MOST}]",
    "train.steps": f"[1, {MOST}]",
    "train.batch_size": "[1, 1000000]",
    "train.seed": f"[0, {2**32 - 1}]",
    "train.focal_gamma": "[0, 100]",
    "train.label_smoothing": "[0, 1)",
    "train.ema_decay": "(0, 1)",
    "train.nonfinite_limit": f"[1, {MOST}]",
    "train.accumulate_steps": f"[1, {MOST}]",
    "train.steps_per_call": "[1, 1000]",
    "train.eval_every_epochs": f"(0, {MOST}]",
    "train.patience": f"[1, {MOST}]",
    "parallel.devices": f"[1, {MOST}]",
    "parallel.fsdp": f"[1, {MOST}]",
    "parallel.join_within": "(0, 1000000]",
    "parallel.processes": f"[1, {MOST}]",
    "parallel.process_id": f"[0, {MOST}]",
    "checkpoint.every_steps": f"[1, {MOST}]",
    "checkpoint.keep": f"[1, {MOST}]",
    "log.every_steps": f"[1, {MOST}]",
}
"""`section.field` -> where its number must lie, or each of its numbers; every field of numbers is here."""

SYNTHETIC_BYTES = 2**35
"""Most that the synthetic images of a recipe may take."""


def check(config: Config) -> None:
    """Raises InputError where fields are impossible or contradict each other."""
    for section, recipe in vars(config).items():
        kind = type(getattr(Config(), section))
        if type(recipe) is not kind:
            raise InputError(f"{section} is {shown(recipe)} and must be {kind.__name__}(...)")
        hints = typing.get_type_hints(kind)
        for field, value in vars(recipe).items():
            name = f"{section}.{field}"
            typed(value, hints[field], name)
            for number in _each(value) if name in LIMITS else ():
                if bound := _outside(number, LIMITS[name]):
                    raise InputError(f"{name} must {bound}, and is {shown(value)}")
    problems = _contradictions(config) + _rule_problems(config) + _image_problems(config) + _parallel_problems(config)
    for wrong, message in problems:
        if wrong:
            raise InputError(message)
    for name, path in _paths(config).items():
        (local_path if name == "data.data_dir" or config.data.dataset.startswith("tfds:") else path_of)(path, name)


def _each(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _outside(number: float, limits: str) -> str | None:
    """What a number that is not within limits such as `[0, 1)` must do instead; not a number is never within."""
    low, high = (float(end) for end in limits[1:-1].split(", "))
    large_enough = number >= low if limits[0] == "[" else number > low
    if large_enough and (number <= high if limits[-1] == "]" else number < high):
        return None
    if low < 0 or high < 1_000_000:
        return f"lie between {low:g} and {high:g}" if limits[0] + limits[-1] == "()" else f"lie in {limits}"
    if large_enough and number != math.inf:
        return f"be at most {high:.0f}"
    return f"be {'at least' if limits[0] == '[' else 'above'} {low:g}"


def _contradictions(config: Config) -> list[tuple[bool, str]]:
    """What does not go together."""
    data, augment, boundaries = config.data, config.augment, config.schedule.boundaries
    synthetic = data.synthetic_size * math.prod(sides(data.image_size)) * data.channels
    return [
        (
            data.dataset == "synthetic" and synthetic > SYNTHETIC_BYTES,
            f"data.synthetic_size {data.synthetic_size}: its images take {synthetic / 2**30:,.0f} GiB of memory; take "
            f"fewer or smaller ones, up to {SYNTHETIC_BYTES // 2**30} GiB",
        ),
        *(
            (
                len(values) not in (1, 3, data.channels),
                f"data.{name} has {len(values)} values: give one for each of the {data.channels} channels",
            )
            for name, values in (("mean", data.mean), ("std", data.std))
        ),
        (augment.area[0] > augment.area[1], f"augment.area {augment.area}: the least share comes first"),
        (
            list(boundaries) != sorted(set(boundaries)),
            f"schedule.boundaries {boundaries}: give shares of the run that rise",
        ),
        (
            config.train.metric == "none" and config.train.patience is not None,
            "train.patience needs a metric to wait for: leave train.metric none out",
        ),
        (
            config.model.scan and bool(config.model.drop_path_rate),
            "model.scan needs equal blocks, and model.drop_path_rate gives each its own rate: leave one of them out",
        ),
        (
            config.model.scan and config.optimizer.name in ("lars", "lamb"),
            f"optimizer.name {config.optimizer.name} takes the norm of each layer, and model.scan stacks them: leave "
            "model.scan out, or take sgd or adamw",
        ),
        (
            config.log.profile is not None and not _is_span(config.log.profile),
            f"log.profile {config.log.profile!r} is no START:STOP: give two steps, such as 20:25",
        ),
    ]


def _is_span(text: str) -> bool:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    return match is not None and int(match[1]) < int(match[2])


def _rule_problems(config: Config) -> list[tuple[bool, str]]:
    """Rules that are no regular expressions, that could take for ever, or whose factor is negative or infinite."""
    found = []
    for name in ("decay_rules", "rate_rules"):
        for pattern, factor in getattr(config.optimizer, name):
            about = f"optimizer.{name} {pattern[:200]!r}"
            found.append((not 0 <= factor <= MOST, f"{about}: its factor {shown(factor)} must be at least 0"))
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                found.append((True, f"{about} is no regular expression: {error}"))
            found.append(
                (_repeats_a_group(pattern), f"{about}: it is too long, or repeats a group, which could take for ever")
            )
    return found


def _repeats_a_group(pattern: str) -> bool:
    """Whether a regular expression has a group under `*`, `+` or `{}`: a match can then take exponential time."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    return len(pattern) > 1000 or re.search(r"\)\s*[*+{]|\(\?(#|[a-zA-Z]*x)", plain) is not None


def _paths(config: Config) -> dict[str, str]:
    """`section.field` -> the path in it, where it holds one."""
    kind, _, rest = config.data.dataset.partition(":")
    paths = {"data.dataset": rest if kind in ("folder", "csv", "tfds") and rest else None}
    paths |= {"data.data_dir": config.data.data_dir, "model.pretrained": config.model.pretrained}
    return {name: path for name, path in paths.items() if path is not None}


def _image_problems(config: Config) -> list[tuple[bool, str]]:
    augment, channels = config.augment, config.data.channels
    on_host = {
        "crop random_resized": augment.crop == "random_resized",
        "flip_vertical": augment.flip_vertical,
        "color_jitter": augment.color_jitter > 0,
        "randaugment": augment.randaugment > 0,
        "trivial_augment": augment.trivial_augment,
        "erasing": augment.erasing > 0,
    }
    colours = ("color_jitter", "randaugment", "trivial_augment")
    return [
        (config.data.on_device and wanted, f"augment.{name} works on the host: add --data.no_on_device")
        for name, wanted in on_host.items()
    ] + [
        (channels != 3 and on_host[name], f"augment.{name} is for RGB: leave it out with data.channels {channels}")
        for name in colours
    ]


def _parallel_problems(config: Config) -> list[tuple[bool, str]]:
    recipe, steps_per_call = config.parallel, config.train.steps_per_call or 1
    given = [value is not None for value in (recipe.coordinator, recipe.processes, recipe.process_id)]
    return [
        (
            recipe.fsdp > 1 and recipe.strategy != "jit",
            f"parallel.fsdp needs parallel.strategy jit: {recipe.strategy} keeps all of the state on each device",
        ),
        (
            recipe.strategy == "pmap" and steps_per_call > 1,
            "parallel.strategy pmap runs one step a call: leave train.steps_per_call at 1, or take jit",
        ),
        (
            not re.fullmatch(r"global|local|ghost:[1-9][0-9]{0,8}", recipe.batch_norm),
            f"parallel.batch_norm {recipe.batch_norm!r} is unknown; choose global, local or ghost:N",
        ),
        (
            any(given) and not (all(given) and recipe.distributed == "auto"),
            "parallel.coordinator, processes and process_id belong together, with parallel.distributed auto",
        ),
        (
            recipe.coordinator is not None and not re.fullmatch(r".+:[0-9]{1,5}", recipe.coordinator),
            f"parallel.coordinator {recipe.coordinator!r}: give a host and a port, such as 10.0.0.1:1234",
        ),
        (
            (recipe.process_id or 0) >= (recipe.processes or MOST),
            f"parallel.process_id {recipe.process_id}: of {recipe.processes} processes the first is 0",
        ),
    ]
