"""Recipes as JSON and as Python files, what differs between two of them, and what is impossible."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, InputError
from resnet_jax.files import read_json
from resnet_jax.typed import typed

FREE_FIELDS = frozenset(
    {
        "model.remat",
        "model.scan",
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
      InputError: there is no such file, or it defines no `config` of type Config.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--config {path}: there is no such file; recipes are Python files such as those in configs/")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, Config):
        raise InputError(f"--config {path}: the file must define `config = Config(...)`")
    return config


def recorded(workdir: str | Path | None) -> Config | None:
    """The recipe of the run that a folder holds, if it holds one.

    Raises:
      InputError: its `config.json` is not as runs write it.
    """
    if workdir is None:
        return None
    file = Path(workdir).expanduser() / "config.json"
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
    if file:
        return load_config(file)
    config = recorded(workdir) or Config()
    alone = dataclasses.replace(config.parallel, distributed="off", coordinator=None, processes=None, process_id=None)
    return dataclasses.replace(config, parallel=alone)


def check(config: Config) -> None:
    """Raises InputError where fields are impossible or contradict each other."""
    several = 1 if config.train.steps_per_call is None else config.train.steps_per_call
    problems = [
        (config.train.batch_size < 1, "train.batch_size must be at least 1"),
        (config.train.steps is None and config.train.epochs <= 0, "train.epochs must be above 0"),
        (config.train.steps is not None and config.train.steps < 1, "train.steps must be at least 1"),
        (config.train.eval_every_epochs <= 0, "train.eval_every_epochs must be above 0"),
        (config.train.accumulate_steps < 1, "train.accumulate_steps must be at least 1"),
        (config.train.nonfinite_limit < 1, "train.nonfinite_limit must be at least 1"),
        (config.data.timeout <= 0, "data.timeout must be above 0"),
        (several < 1, "train.steps_per_call must be at least 1"),
        (not 0 < config.data.validation_fraction < 1, "data.validation_fraction must lie between 0 and 1"),
        (not 0 <= config.train.label_smoothing < 1, "train.label_smoothing must lie in [0, 1)"),
        (
            config.train.ema_decay is not None and not 0 < config.train.ema_decay < 1,
            "train.ema_decay must lie between 0 and 1; None turns it off",
        ),
        (not 0 < config.augment.eval_crop <= 1, "augment.eval_crop must lie in (0, 1]"),
        (not 0 <= config.augment.randaugment <= 10, "augment.randaugment must lie in 0..10"),
        (not 0 <= config.augment.erasing <= 1, "augment.erasing must lie in [0, 1]"),
        (not 0 <= config.augment.color_jitter < 1, "augment.color_jitter must lie in [0, 1)"),
        (config.augment.repeats < 1, "augment.repeats must be at least 1"),
        (config.data.channels < 1, "data.channels must be at least 1"),
        (not 0 < config.finetune.layer_decay <= 1, "finetune.layer_decay must lie in (0, 1]"),
        (config.finetune.thaw_every_epochs <= 0, "finetune.thaw_every_epochs must be above 0"),
        (config.train.patience is not None and config.train.patience < 1, "train.patience must be at least 1"),
        (config.train.focal_gamma < 0, "train.focal_gamma must be at least 0"),
        (config.optimizer.sam_rho < 0, "optimizer.sam_rho must be at least 0"),
        (
            config.model.scan and bool(config.model.drop_path_rate),
            "model.scan needs equal blocks, and model.drop_path_rate gives each its own rate: leave one of them out",
        ),
        (
            config.model.scan and config.optimizer.name in ("lars", "lamb"),
            f"optimizer.name {config.optimizer.name} takes the norm of each layer, and model.scan stacks them: leave "
            "model.scan out, or take sgd or adamw",
        ),
        (config.log.every_steps < 1, "log.every_steps must be at least 1"),
        (
            config.log.profile is not None and not _is_span(config.log.profile),
            f"log.profile {config.log.profile!r} is no START:STOP: give two steps, such as 20:25",
        ),
        (config.checkpoint.keep < 1, "checkpoint.keep must be at least 1"),
    ]
    for wrong, message in problems + _image_problems(config) + _parallel_problems(config):
        if wrong:
            raise InputError(message)


def _is_span(text: str) -> bool:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return match is not None and int(match[1]) < int(match[2])


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
        (recipe.fsdp < 1, "parallel.fsdp must be at least 1"),
        (
            recipe.fsdp > 1 and recipe.strategy != "jit",
            f"parallel.fsdp needs parallel.strategy jit: {recipe.strategy} keeps all of the state on each device",
        ),
        (
            recipe.strategy == "pmap" and steps_per_call > 1,
            "parallel.strategy pmap runs one step a call: leave train.steps_per_call at 1, or take jit",
        ),
        (
            not re.fullmatch(r"global|local|ghost:[1-9]\d*", recipe.batch_norm),
            f"parallel.batch_norm {recipe.batch_norm!r} is unknown; choose global, local or ghost:N",
        ),
        (
            any(given) and not (all(given) and recipe.distributed == "auto"),
            "parallel.coordinator, processes and process_id belong together, with parallel.distributed auto",
        ),
    ]
