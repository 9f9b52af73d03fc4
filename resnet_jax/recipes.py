"""Recipe files and the recipes of runs."""

import dataclasses
import runpy
import traceback
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, from_dict
from resnet_jax.files import local_path, path_of, read_json
from resnet_jax.typed import InputError


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
