"""Whole files between disk and memory in pages, past the system's own memory of files where the disk allows it.

A copy there would cost a step beside it time, and the reader new memory once more.
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

PAGE = 4096
"""Bytes at whose multiples contents begin in memory: disks take them from there, and JAX on a CPU takes them over."""


def new(size: int) -> np.ndarray:
    """Memory for so many bytes, with anything in it."""
    room = np.empty(size + PAGE, np.uint8)
    return room[-room.ctypes.data % PAGE :][:size]


def write_pages(path: Path, data: memoryview) -> None:
    """Makes a file of bytes that `new` gave, and has it on the disk when it returns.

    Raises:
      OSError: the disk takes no more, or it is broken.
    """
    done, whole = 0, len(data) // PAGE * PAGE
    path.touch()
    with suppress(AttributeError, OSError):  # there is no such way here, or what is wrong shows below once more
        straight = os.open(path, os.O_WRONLY | os.O_DIRECT)
        with open(straight, "wb", buffering=0) as file:
            while done < whole:
                done += file.write(data[done:whole])
    with path.open("r+b") as file:
        file.truncate(done)
        file.seek(done)
        file.write(data[done:])
        file.flush()
        os.fsync(file.fileno())


def read_pages(path: Path) -> np.ndarray:
    """The bytes of a file, in memory as `new` gives it.

    Raises:
      OSError: there is no such file, it cannot be read, or it became shorter meanwhile.
    """
    size = path.stat().st_size
    found, done, whole = new(size), 0, size // PAGE * PAGE
    with suppress(AttributeError, OSError):
        straight = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with open(straight, "rb", buffering=0) as file:
            while done < whole and (more := file.readinto(found[done:whole].data)):
                done += more
    with path.open("rb") as file:
        file.seek(done)
        if file.readinto(found[done:].data) != size - done:
            raise OSError(f"{path} became shorter while it was read")
    return found
