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

OLDER = "checksums.json"
"""What checkpoints of an older layout have in the manifest's place."""

TRIES = 20
"""How often checkpoints are looked for anew that a run deletes while they are read."""

T = TypeVar("T")


class Damaged(Exception):
    """A file is not what was saved."""


def checkpoints_of(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints, whether it is there or not.

    Raises:
      InputError: it, or a checkpoint in it, is a link, which may lead out of the run's folder.
    """
    if in_bucket(workdir):
        return workdir / "checkpoints"
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


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a checkpoint's folder."""
    names = [name for name in _files(folder) if name not in LATER]
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
        if (folder / OLDER).exists():
            return f"it is of an older layout, with {OLDER}, which is read no more"
        return f"{MANIFEST} is missing: it is not whole, or another program's"
    except (NotADirectoryError, InputError) as error:
        return str(error).removeprefix(f"{folder}{os.sep}")
    if not expected:
        return f"{MANIFEST} names no file"
    if outside := next((name for name in expected if os.path.isabs(name) or ".." in Path(name).parts), None):
        return f"{MANIFEST} is damaged: {outside!r} lies outside of the folder"

    def problem(name: str) -> str | None:
        try:
            size = size_of(folder / name)
            if size != expected[name][0]:
                return f"{name} has {size} bytes in place of {expected[name][0]}"
            return f"{name} has other contents" if contents and _sum(folder / name) != expected[name] else None
        except OSError:
            return f"{name} is missing or cannot be read"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(problem, expected)), None)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, sound or not, the newest first."""
    found = [path for path in folder.glob("*") if path.name.isascii() and path.name.isdigit() and not is_begun(path)]
    return sorted((int(path.name) for path in found), reverse=True)


def is_begun(folder: Path) -> bool:
    """Returns whether a checkpoint in a bucket is still being written; on a disk it has another name until then."""
    return in_bucket(folder) and not any((folder / name).exists() for name in (MANIFEST, *LATER[1:]))


BEST = "best.json"
"""Names the best checkpoint of a run's folder."""


class Best(TypedDict):
    """What `best.json` holds; `metric` with its split, such as `validation/accuracy`."""

    step: int
    metric: str
    value: float


def best_of(folder: Path) -> Best | None:
    """Returns what `best.json` of a run's folder says; None where nothing was selected.

    Raises:
      InputError: it is damaged.
    """
    try:
        return read_json(folder / BEST, Best)
    except (FileNotFoundError, NotADirectoryError):
        return None


def checkpoint_step(folder: Path, wanted: str) -> int:
    """Returns the step that `best` or a number means in a run's folder.

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


def newest_sound(
    folder: Path, read: Callable[[int], T], steps: Callable[[], Iterable[int]] | None = None
) -> tuple[T | None, dict[int, str]]:
    """Returns what a function reads in the newest sound checkpoint of a folder, and what is wrong with each newer one.

    A run that goes on meanwhile deletes checkpoints as newer ones come: where the folder changes while it is read, it
    is looked at again.

    Args:
      read: is given a step that is sound; it may raise Damaged all the same, as where it is deleted meanwhile.
      steps: gives those to try in place of all, one after the other.

    Raises:
      InputError: what `read` raises, or the folder changes faster than it can be read.
    """
    for _ in range(TRIES):
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


def _files(folder: Path) -> list[str]:
    inside = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return [
        name
        for path in inside
        for name in ([f"{path.name}/{deeper}" for deeper in _files(path)] if path.is_dir() else [path.name])
    ]


def _sum(path: Path) -> tuple[int, str]:
    whole, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            whole.update(block)
            size += len(block)
    return size, whole.hexdigest()
