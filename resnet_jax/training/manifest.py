"""Which checkpoints a run has, and whether they are whole: each has a manifest, by which damage is found."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict, TypeVar

from resnet_jax.config import InputError
from resnet_jax.files import in_bucket, read_json, size_of, to_json, write_whole
from resnet_jax.output import say

MANIFEST = "manifest.json"
"""Size and SHA-256 of every other file in a checkpoint's folder, by name; written last, so that it makes it count."""

LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes after the manifest, and nothing here reads."""

BEST = "best.json"
"""Names the best checkpoint of a run's folder."""

T = TypeVar("T")


class Best(TypedDict):
    """The best evaluation of a run, as `best.json` holds it; `metric` with its split, such as `validation/accuracy`."""

    step: int
    metric: str
    value: float


class Damaged(InputError):
    """A file is not what was saved."""


def checkpoints_of(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints, whether it is there or not.

    Raises:
      InputError: it, or a checkpoint in it, is a link, which may lead out of the run's folder.
    """
    if in_bucket(workdir):
        return workdir / "checkpoints"
    folder = workdir.resolve() / "checkpoints"
    if link := next((path for path in (folder, *folder.glob("*")) if path.is_symlink()), None):
        raise InputError(
            f"{link} is a link to {os.readlink(link)}, and a run keeps its checkpoints in its own folder: move there "
            "what the link leads to"
        )
    return folder


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, sound or not, the newest first."""
    found = [path for path in folder.glob("*") if path.name.isascii() and path.name.isdigit() and not is_begun(path)]
    return sorted((int(path.name) for path in found), reverse=True)


def is_begun(folder: Path) -> bool:
    """Returns whether a checkpoint in a bucket is still being written; on a disk it has another name until then."""
    return in_bucket(folder) and not any((folder / name).exists() for name in (MANIFEST, *LATER[1:]))


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a checkpoint's folder."""
    names = [name for name in _files(folder) if name not in (MANIFEST, *LATER)]
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: _sum(folder / name), names)
        write_whole(folder / MANIFEST, to_json(dict(zip(names, sums, strict=True))))


def damage(folder: Path, contents: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint's folder, naming the file; None if nothing is.

    Args:
      contents: whether files are read, or their sizes alone compared.
    """
    try:
        expected = read_json(folder / MANIFEST, dict[str, tuple[int, str]])
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it is not whole, or another program's"
    except (NotADirectoryError, InputError) as error:
        return str(error).removeprefix(f"{folder}{os.sep}")

    def problem(name: str) -> str | None:
        try:
            if (size := size_of(folder / name)) != expected[name][0]:
                return f"{name} has {size} bytes in place of {expected[name][0]}"
            return f"{name} has other contents" if contents and _sum(folder / name) != expected[name] else None
        except OSError:
            return f"{name} is missing or cannot be read"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(problem, expected)), None if expected else f"{MANIFEST} names no file")


def best_of(workdir: Path) -> Best | None:
    """Returns what `best.json` of a run's folder says; None where nothing was selected.

    Raises:
      InputError: it is damaged.
    """
    try:
        return read_json(workdir / BEST, Best)
    except (FileNotFoundError, NotADirectoryError):
        return None


def newest_sound(
    folder: Path, read: Callable[[int], T], steps: Callable[[], Iterable[int]] | None = None
) -> tuple[T | None, dict[int, str]]:
    """Returns what a function reads in the newest sound checkpoint of a folder, and what is wrong with each newer one.

    A run that goes on meanwhile deletes checkpoints as newer ones come: where the folder changes while it is read, it
    is looked at again.

    Args:
      read: is given a step that is sound; it may raise Damaged all the same, as where it is deleted meanwhile.
      steps: gives those to try in place of all, one after the other.
    """
    while True:
        problems: dict[int, str] = {}
        there = steps_in(folder)
        for step in there if steps is None else steps():
            problem = damage(folder / str(step))
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
            if selected(workdir):
                return read_chosen(workdir, read, "best")
        except Damaged as error:
            say(f"WARNING: {error}; the newest sound checkpoint is taken in place of the best one", error=True)
    named = None if checkpoint in (None, "latest") else lambda: [_step_of(workdir, str(checkpoint))]
    found, problems = newest_sound(folder, read, named)
    listed = [f"the checkpoint of step {bad} in {workdir} is damaged: {why}" for bad, why in problems.items()]
    if found is None:
        why = listed or ["the run has not written one yet"]
        raise Damaged("; ".join(why if named else [f"{workdir} holds no checkpoint", *why]))
    for problem in listed:
        say(f"WARNING: {problem}; the newest sound one is taken in its place", error=True)
    return found


def selected(workdir: Path) -> bool:
    """Returns whether a run has selected a best checkpoint; raises Damaged where what it wrote of it cannot be read."""
    try:
        return best_of(workdir) is not None
    except InputError as error:
        raise Damaged(str(error)) from error


def _step_of(workdir: Path, wanted: str) -> int:
    """Returns the step that `best` or a number means; raises InputError where the run has no such checkpoint."""
    there, best = steps_in(checkpoints_of(workdir)), best_of(workdir) if wanted == "best" else None
    if wanted == "best" and best is None:
        raise InputError(f"the run in {workdir} has selected no best checkpoint: take --checkpoint latest")
    if (step := str(best["step"] if best else wanted)) not in map(str, there):
        kept = ", ".join(map(str, there)) or "none"
        raise Damaged(f"no checkpoint of step {step} is kept: give best, latest or one of {kept}")
    return int(step)


def _files(folder: Path, begin: str = "") -> list[str]:
    found: list[str] = []
    for path in folder.iterdir():
        found += _files(path, f"{begin}{path.name}/") if path.is_dir() else [begin + path.name]
    return sorted(found)


def _sum(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
