"""Recipes as JSON and as Python files, and what differs between two of them."""

import dataclasses
import runpy
import typing
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, InputError

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
    }
)
"""Fields that a resumed run may change, since they do not change its result."""


def to_dict(config: Config) -> dict[str, Any]:
    """The recipe as JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: Any = Config, where: str = "") -> Any:
    """The inverse of `to_dict`; lists become tuples, absent fields their defaults.

    Raises:
      InputError: a field is unknown.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"the recipe has unknown fields: {', '.join(where + name for name in unknown)}")
    parsed = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            parsed[name] = from_dict(value, hints[name], f"{where}{name}.")
        else:
            parsed[name] = _tuples(value)
    return kind(**parsed)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


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
