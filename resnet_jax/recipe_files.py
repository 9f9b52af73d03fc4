"""Recipe files, and what the folder of a run says of its recipe and of its user's own parts."""

import contextlib
import dataclasses
import runpy
import sys
import traceback
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, from_dict
from resnet_jax.configs import FOLDER
from resnet_jax.files import local_path, path_of, read_json
from resnet_jax.typed import InputError

PARTS_FILE = "parts.json"
"""Name of the file in a run's folder that says which parts were its user's own."""


class WrongRecipe(InputError):
    """A `config.json` holds JSON, but no recipe, or an impossible one."""


def recipe_names() -> list[str]:
    """Returns the names of the recipes that are shipped, which `--config` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load_config(given: str | Path) -> Config:
    """Returns what a recipe calls `config`; arguments and errors: `load_recipe`."""
    return load_recipe(given)["config"]


def load_recipe(given: str | Path) -> dict[str, Any]:
    """Returns what a recipe defines: `config`, and perhaps `model`, `dataset`, `loss`, `optimizer`, `metrics`, `hooks`
    beside it. The recipe can import what lies beside it, as a script can; it is run once in a process.

    Args:
      given: the path of a Python file, or the name of a recipe that is shipped.

    Raises:
      InputError: there is no such recipe, it cannot be run, or it defines no `config` of type Config.
    """
    path = find_recipe(given)
    content = path.read_bytes()
    if (path, content) in EXECUTED_RECIPES:
        return EXECUTED_RECIPES[path, content]
    defined = run_file(path, "--config ")
    if not isinstance(defined.get("config"), Config):
        raise InputError(f"--config {path}: the file must define `config = Config(...)`")
    EXECUTED_RECIPES[path, content] = defined
    return defined


EXECUTED_RECIPES: dict[tuple[Path, bytes], dict[str, Any]] = {}
"""Recipes that this process has run, by path and content: a command asks for the config and for the parts beside it."""


def recipe_given() -> Path | None:
    """Returns the recipe file of the user's own that this process has run last; None where there was none."""
    return next((path for path, _ in reversed(EXECUTED_RECIPES) if path.parent != FOLDER), None)


def run_file(path: Path, what: str) -> dict[str, Any]:
    """Runs a Python file, which can import what lies beside it, and returns what it defines.

    Args:
      what: begins the message where it cannot be run.

    Raises:
      InputError: it cannot be run; the message names file, line and error.
    """
    sys.path.insert(0, str(path.parent))
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}{place_of(error, path)}: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))


def load_named(given: str) -> Any:
    """Returns what a Python file defines under a name. The file can import what lies beside it, as a script can.

    Args:
      given: FILE:NAME, such as net.py:MyNet.

    Raises:
      InputError: there is no such file or name, or the file cannot be run.
    """
    file, _, name = given.rpartition(":")
    path = local_path(file, "FILE:NAME")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give FILE:NAME, such as net.py:MyNet")
    found = run_file(path, "")
    if name not in found:
        own = [word for word in found if not word.startswith("_")]
        near = sorted(own, key=lambda word: SequenceMatcher(None, word, name).ratio(), reverse=True)[:5]
        raise InputError(f"{path} defines no {name!r}; it has {', '.join(near) or 'no names'}")
    return found[name]


def find_recipe(given: str | Path) -> Path:
    """Returns the path of a recipe: of a file, or of a recipe that is shipped, by its name.

    Raises:
      InputError: there is none; what looks like a name is answered with the names that there are, the nearest first.
    """
    names = recipe_names()
    if str(given) in names:
        return FOLDER / f"{given}.py"
    path = local_path(given, "--config")
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"--config {path}: it is a folder; recipes are Python files such as those in configs/")
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"--config {path}: there is no such file; recipes are Python files such as those in configs/")
    names.sort(key=lambda name: SequenceMatcher(None, name, path.name).ratio(), reverse=True)
    raise InputError(f"--config {path}: there is no recipe of this name; there are {', '.join(names)}")


def place_of(error: BaseException, path: Path) -> str:
    """Returns file and line of a recipe where an error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines and lines[-1] else str(path)


def recorded_recipe(workdir: str | Path | None) -> Config | None:
    """Returns the recipe of the run that a folder holds; None where it holds none.

    Raises:
      InputError: its `config.json` is not as runs write it.
    """
    if workdir is None:
        return None
    file = path_of(workdir, "--workdir") / "config.json"
    try:
        return read_recipe(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError as error:
        raise InputError(f"{error}; put back the one that the run wrote, or give another --workdir") from error


def recorded_parts(folder: Path) -> dict[str, dict[str, str]]:
    """Returns name and hash of each part of the user's own, as `names_and_hashes` gave them when the run or sweep in a
    folder was started; empty where there were none.
    """
    try:
        return read_json(folder / PARTS_FILE, dict[str, dict[str, str]])
    except (FileNotFoundError, NotADirectoryError):
        return {}


def read_recipe(file: Path) -> Config:
    """Reads the recipe in a run's `config.json`. Absent fields, such as those of a newer version, have their defaults.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such file.
      InputError: it is not as runs write it; WrongRecipe where it is JSON all the same.
    """
    try:
        values = read_json(file, dict[str, Any], "the recipe")
    except InputError as error:
        reason = str(error).removeprefix(f"{file} is damaged: ").removeprefix(f"{file} ")
        raise InputError(f"{file} is no recipe of a run: {reason}") from error
    if missing := [section for section in ("model", "data", "train") if section not in values]:
        raise WrongRecipe(f"{file} is no recipe of a run: it has no {', '.join(missing)}")
    try:
        return from_dict(values)
    except InputError as error:
        raise WrongRecipe(f"{file} is no possible recipe: {error}") from error


def starting_recipe(recipe: str | None, workdir: str | None) -> Config:
    """Returns what flags change: the recipe that is named, else that of the run in the folder, else `Config()`,
    which gives nothing.

    Whether a process is one of several, and which, belongs to a start and is not taken from the folder.

    Raises:
      InputError: the recipe or the folder's recipe is not as it must be.
    """
    if recipe is not None:
        return load_config(recipe)
    config = recorded_recipe(workdir) or Config()
    alone = dataclasses.replace(config.parallel, distributed="off", coordinator=None, processes=None, process_id=None)
    return dataclasses.replace(config, parallel=alone)
