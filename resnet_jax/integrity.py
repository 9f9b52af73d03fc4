"""Whether checkpoints are whole: sealed with checksums by which damage is found."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import xxhash

from resnet_jax.config import InputError
from resnet_jax.files import read_json, to_json, write_whole
from resnet_jax.output import say
from resnet_jax.pages import read_pages

SEAL = "checksums.json"
LATE = "_CHECKPOINT_METADATA"
"""What Orbax writes once more when a folder is sealed already: only its form is looked at."""

VECTORS = "state/whole."
"""How names of vectors begin: they are nearly all of a checkpoint, and `read_sound` looks at them while it reads."""

TRIES = 20
"""How often checkpoints are looked for anew that a run deletes while they are read."""

T = TypeVar("T")


class Damaged(Exception):
    """A file is not what was sealed."""


def checkpoints_of(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints, whether it is there or not.

    Raises:
      InputError: it, or a checkpoint in it, is a link, which may lead out of the run's folder.
    """
    folder = workdir.resolve() / "checkpoints"
    try:
        entries = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
        if link := next((entry for entry in entries if entry.is_symlink()), None):
            raise InputError(
                f"{link} is a link to {os.readlink(link)}, and a run keeps its checkpoints in its own folder: "
                "move there what the link leads to"
            )
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    return folder


def seal(folder: Path, known: dict[str, memoryview]) -> None:
    """Writes size and hash (XXH3) of every file under a folder into its `checksums.json`.

    Args:
      known: contents of some files, by their names, which are not read.
    """
    sums = {name: (data.nbytes, xxhash.xxh3_64_hexdigest(data)) for name, data in known.items()}
    sums |= {str(name): _sum(folder / name) for name in _files(folder) if str(name) not in known}
    write_whole(folder / SEAL, to_json(sums))


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
    """Size and hash that a file had when its folder was sealed, by name.

    Raises:
      FileNotFoundError: the folder was not sealed.
      InputError: its `checksums.json` is damaged.
    """
    sums = read_json(folder / SEAL, dict[str, tuple[int, str]])
    if outside := next((name for name in sums if os.path.isabs(name) or ".." in Path(name).parts), None):
        raise InputError(f"{folder / SEAL} is damaged: {outside!r} lies outside of the folder")
    return sums


def damage(folder: Path, read: Callable[[str], bool] = every) -> str | None:
    """What is wrong with a sealed folder, naming the file; None if nothing is.

    Args:
      read: whether a file is read, by its name, or its size alone compared.
    """
    name = SEAL
    try:
        expected = sums_in(folder)
        if not expected:
            return f"{SEAL} names no file"
        name = LATE
        read_json(folder / LATE, dict[str, Any])
    except FileNotFoundError:
        return f"{name} is missing"
    except InputError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")

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
    names = [path.name for path in folder.glob("*")]
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


BEST = "best.json"
"""Names the best checkpoint of a run's folder."""


class Best(TypedDict):
    """What `best.json` holds; `metric` with its split, such as `validation/accuracy`."""

    step: int
    metric: str
    value: float


def best_of(folder: Path) -> Best | None:
    """What `best.json` of a run's folder says; None where nothing was selected.

    Raises:
      InputError: it is damaged.
    """
    try:
        return read_json(folder / BEST, Best)
    except (FileNotFoundError, NotADirectoryError):
        return None


def checkpoint_step(folder: Path, wanted: str) -> int:
    """Step that `best` or a number means in a run's folder.

    Raises:
      InputError: it is something else, or the run has no such checkpoint.
    """
    there = steps_in(checkpoints_of(folder))
    if wanted == "best":
        best = best_of(folder)
        if best is None:
            raise InputError(f"the run in {folder} has selected no best checkpoint: take --checkpoint latest")
        wanted = str(best["step"])
    step = int(wanted) if wanted.isascii() and wanted.isdigit() else -1
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
    folder: Path, read: Callable[[int], T], steps: Callable[[], Iterable[int]] | None = None
) -> tuple[T | None, dict[int, str]]:
    """What a function reads in the newest sound checkpoint of a folder, and what is wrong with each newer one.

    A run that goes on meanwhile deletes checkpoints as newer ones come: where the folder changes while it is read, it
    is looked at again.

    Args:
      read: is given a step of which all but the vectors is sound, and may find it damaged.
      steps: gives those to try in place of all, one after the other.

    Raises:
      InputError: what `read` raises, or the folder changes faster than it can be read.
    """
    for _ in range(TRIES):
        problems: dict[int, str] = {}
        there = steps_in(folder)
        for step in there if steps is None else steps():
            problem = damage(folder / str(step), but_vectors)
            try:
                if problem is None:
                    return read(step), problems
            except Damaged as error:
                problem = str(error)
            if steps_in(folder) != there:
                break  # it may have been deleted, not damaged
            problems[step] = problem
        else:
            return None, problems
    raise InputError(
        f"the run in {folder.parent} saves and deletes checkpoints faster than one can be read; copy one, or save less "
        "often with --checkpoint.every_steps, or keep more with --checkpoint.keep"
    )


def read_chosen(workdir: Path, read: Callable[[int], T], checkpoint: str | None = None) -> T:
    """Returns what a function reads in a checkpoint of a run; standard error says where a damaged one is replaced.

    Args:
      read: as for `newest_sound`.
      checkpoint: `best`, `latest` or a step; None takes the best one where the run selected one, else the latest.

    Raises:
      InputError: there is no such checkpoint, or the one that was asked for is damaged.
    """
    folder = checkpoints_of(workdir)
    if checkpoint is None:
        try:
            if best_of(workdir) is not None:
                return read_chosen(workdir, read, "best")
        except InputError as error:
            say(f"WARNING: {error}; the newest sound checkpoint is taken in place of the best one", error=True)
        checkpoint = "latest"
    named = None if checkpoint == "latest" else lambda: [checkpoint_step(workdir, checkpoint)]
    found, problems = newest_sound(folder, lambda step: (step, read(step)), named)
    if found is None:
        listed = "; ".join(f"that of step {bad} is damaged: {problem}" for bad, problem in problems.items())
        if named is None:
            raise InputError(f"{workdir} holds no checkpoint; {listed or 'the run ended before its first one'}")
        step, problem = problems.popitem()
        raise InputError(f"the checkpoint of step {step} in {workdir} is damaged: {problem}")
    for bad, problem in problems.items():
        say(
            f"WARNING: the checkpoint of step {bad} in {workdir} is damaged ({problem}); taking that of step "
            f"{found[0]} in its place",
            error=True,
        )
    return found[1]


def _files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, LATE))


def _sum(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
