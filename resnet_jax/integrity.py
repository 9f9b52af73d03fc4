"""Whether files are whole: written at once, or sealed with checksums by which damage is found."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

SEAL = "checksums.json"
LATE = "_CHECKPOINT_METADATA"
"""What Orbax writes once more when a folder is sealed already: only its form is looked at."""


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


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a sealed folder, naming the file; None if nothing is.

    Args:
      contents: read every byte; False compares sizes alone.
    """
    try:
        name = SEAL
        expected = json.loads((folder / SEAL).read_text())
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
            return f"{name} has other contents" if contents and _sum(folder / name)[1] != checksum else None
        except OSError:
            return f"{name} is missing or cannot be read"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(problem, expected)), None)


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, sound or not, the newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def newest_sound(folder: Path) -> tuple[int | None, dict[int, str]]:
    """Step of the newest sound checkpoint in a folder, and what is wrong with each newer one."""
    problems: dict[int, str] = {}
    for step in steps_in(folder):
        problem = damage(folder / str(step))
        if problem is None:
            return step, problems
        problems[step] = problem
    return None, problems


def _files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, LATE))


def _sum(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
