"""Whether files are whole: written at once, or sealed with checksums by which damage is found."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from resnet_jax.config import InputError
from resnet_jax.pages import read_pages

SEAL = "checksums.json"
LATE = "_CHECKPOINT_METADATA"
"""What Orbax writes once more when a folder is sealed already: only its form is looked at."""

VECTORS = "state/whole."
"""How names of vectors begin: they are nearly all of a checkpoint, and `read_sound` looks at them while it reads."""

T = TypeVar("T")


class Damaged(Exception):
    """A file is not what was sealed."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file such that nobody ever sees half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def seal(folder: Path, known: dict[str, memoryview]) -> None:
    """Writes size and hash (XXH3) of every file under a folder into its `checksums.json`.

    Args:
      known: contents of some files, by their names, which are not read.
    """
    sums = {name: (data.nbytes, xxhash.xxh3_64_hexdigest(data)) for name, data in known.items()}
    sums |= {str(name): _sum(folder / name) for name in _files(folder) if str(name) not in known}
    write_whole(folder / SEAL, json.dumps(sums))


def every(name: str) -> bool:
    """All files are read."""
    return True


def but_vectors(name: str) -> bool:
    """All files but the vectors are read."""
    return not name.startswith(VECTORS)


def none(name: str) -> bool:
    """No file is read: sizes alone count."""
    return False


def sums_in(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash that a file had when its folder was sealed, by name."""
    return json.loads((folder / SEAL).read_text())


def damage(folder: Path, read: Callable[[str], bool] = every) -> str | None:
    """What is wrong with a sealed folder, naming the file; None if nothing is.

    Args:
      read: whether a file is read, by its name, or its size alone compared.
    """
    try:
        name = SEAL
        expected = sums_in(folder)
        name = LATE
        json.loads((folder / LATE).read_text())
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError):
        return f"{name} cannot be read"

    def problem(name: str) -> str | None:
        size, checksum = expected[name]
        try:
            found = os.path.getsize(folder / name)
            if found != size:
                return f"{name} has {found} bytes in place of {size}"
            return f"{name} has other contents" if read(name) and _sum(folder / name)[1] != checksum else None
        except OSError:
            return f"{name} is missing or cannot be read"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(problem, expected)), None)


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, sound or not, the newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)


BEST = "best.json"
"""Names the best checkpoint of a run's folder: `step`, `metric` and `value`."""


def best_of(folder: Path) -> dict[str, Any] | None:
    """What `best.json` of a run's folder says: `step`, `metric` and `value`; None where nothing was selected."""
    try:
        found = json.loads((folder / BEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"step": int, "metric": str, "value": float}
    sound = isinstance(found, dict) and all(type(found.get(name)) is kind for name, kind in kinds.items())
    return found if sound else None


def best_step(folder: Path) -> int | None:
    """Step of the best checkpoint of a run's folder; None where nothing was selected."""
    found = best_of(folder)
    return None if found is None else found["step"]


def checkpoint_step(folder: Path, wanted: str | None) -> int | None:
    """Step that `best`, `latest` or a number means in a run's folder; None for the newest sound one.

    Raises:
      InputError: it is something else, or the run has no such checkpoint.
    """
    if wanted in (None, "latest"):
        return None
    there = steps_in(folder / "checkpoints")
    step = best_step(folder) if wanted == "best" else int(wanted) if wanted and wanted.isdigit() else -1
    if step is None:
        raise InputError(f"the run in {folder} has selected no best checkpoint: take --checkpoint latest")
    if step not in there:
        kept = ", ".join(map(str, there)) or "none"
        raise InputError(f"--checkpoint {wanted}: give best, latest or the step of one that is kept, which are {kept}")
    return step


def read_sound(folder: Path, name: str, checksum: str) -> np.ndarray:
    """The bytes of a file that has this hash.

    Raises:
      Damaged: it has another one, or it cannot be read.
    """
    try:
        found = read_pages(folder / name)
    except OSError as error:
        raise Damaged(f"{name} is missing or cannot be read") from error
    if xxhash.xxh3_64_hexdigest(found.data) != checksum:
        raise Damaged(f"{name} has other contents")
    return found


def newest_sound(
    folder: Path, read: Callable[[int], T], steps: Sequence[int] | None = None
) -> tuple[T | None, dict[int, str]]:
    """What a function reads in the newest sound checkpoint of a folder, and what is wrong with each newer one.

    Args:
      read: is given a step of which all but the vectors is sound, and may find it damaged.
      steps: to try in place of all, one after the other.
    """
    problems: dict[int, str] = {}
    for step in steps_in(folder) if steps is None else steps:
        problem = damage(folder / str(step), but_vectors)
        try:
            if problem is None:
                return read(step), problems
        except Damaged as error:
            problem = str(error)
        problems[step] = problem
    return None, problems


def _files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, LATE))


def _sum(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
