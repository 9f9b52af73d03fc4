"""The numbers of a run: `metrics.jsonl`, and events for TensorBoard."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from resnet_jax.config import InputError
from resnet_jax.files import in_bucket, parse_json, path_of, read_file, size_of, to_json, write_whole
from resnet_jax.output import say

LIMIT = 1e300
"""A line of metrics.jsonl with a number of this size or larger counts as damaged."""


class Tracker:
    """Writes the numbers of each step to `metrics.jsonl`, one JSON object a line, and to TensorBoard.

    A file in a bucket cannot be appended to: there both files are written anew at each `flush`.

    A run that resumes at `step` drops the lines of later steps and the line of the test split, which it will write
    again; with `eval_pending` it also drops the evaluation of `step` itself. Lines that cannot be read are moved to
    `metrics.jsonl.damaged`. Lines for which the disk has no room are kept in memory until there is room.

    Args:
      workdir: the run's folder.
      step: the step at which the run begins; 0 in a new run.
      tensorboard: whether to write events too.
      eval_pending: whether the evaluation of `step` is still to be done.

    Raises:
      InputError: `metrics.jsonl` cannot be read or written.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool, eval_pending: bool = False) -> None:
        path = workdir / "metrics.jsonl"
        last = step - 1 if eval_pending else step
        try:
            lines, damaged = split_lines(path)
            kept = [
                x
                for x in lines
                if (x["step"] <= last or (x["step"] == step and "validation/loss" not in x)) and "test/loss" not in x
            ]
            if damaged:
                aside = path.with_name(f"{path.name}.damaged")
                linked = not in_bucket(aside) and aside.is_symlink()
                before = read_file(aside) if aside.is_file() and not linked else b""
                write_whole(aside, before + b"".join(line + b"\n" for line in damaged))
                say(f"WARNING: {len(damaged)} lines of {path} cannot be read and were moved to {aside}", error=True)
            whole = "".join(to_json(line) + "\n" for line in kept)
            write_whole(path, whole)
            self._path, self._whole = path, bytearray(whole.encode())
            self._file = None if in_bucket(path) else new_file(path, os.O_APPEND)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        self._waiting: list[bytes] = []
        self._suffix = f".{os.getpid()}.{secrets.token_hex(3)}"
        self._events = open_events(workdir, step, self._suffix) if tensorboard else None

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Appends a line with the step and its numbers; a number that is not finite is written as null."""
        self._waiting.append((to_json({"step": step} | numbers) + "\n").encode())
        while self._waiting and self._append(self._waiting[0]):
            self._waiting.pop(0)
        if self._events is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes both files to the bucket, if the run is in one; a failure is a warning, and the next call retries."""
        if self._file is not None:
            return
        try:
            write_whole(self._path, bytes(self._whole))
        except OSError as error:
            say(f"WARNING: {self._path} could not be written ({error}); it is tried again later", error=True)
        if self._events is not None:
            self._events.flush()

    def close(self, began: bool = True) -> None:
        """Writes what is left and closes the files; without a step that `began`, both are removed where the first is
        empty.
        """
        while self._waiting and self._append(self._waiting.pop(0)):
            pass
        self.flush()
        if self._file is not None:
            os.close(self._file)
        if self._events is not None:
            self._events.close()
        with contextlib.suppress(OSError):
            if not began and not size_of(self._path):
                for path in (self._path, *self._path.parent.glob(f"events.out.tfevents.*{self._suffix}")):
                    path.unlink()

    def _append(self, line: bytes) -> bool:
        if self._file is not None:
            return append_whole(self._file, line)
        self._whole += line
        return True


def new_file(path: Path, flags: int) -> int:
    """Opens an ordinary file for writing, created if missing, and returns its descriptor.

    Raises:
      OSError: the path is a link, which is not followed, or it cannot be opened.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)


def append_whole(file: int, data: bytes) -> bool:
    """Appends all of `data` to an open file and returns True; without room for all of it appends nothing: False."""
    try:
        size = os.fstat(file).st_size
        if os.write(file, data) == len(data):
            return True
        os.ftruncate(file, size)
    except OSError:
        pass
    return False


EVENTS = "run"
"""The prefix by which tensorboardX calls `EventsFile`, as it calls its own storage by gs: and s3:."""


def open_events(workdir: Path, step: int, suffix: str) -> Any:
    """Returns a `tensorboardX.SummaryWriter` for a run that begins at `step`, or None, with a warning, if it fails. The
    name of its file ends with `suffix`.

    TensorBoard then hides what an earlier process of the run wrote beyond `step`.
    """
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory

    register_writer_factory(EVENTS, EventsFile)
    folder = workdir if in_bucket(workdir) else workdir.absolute()
    try:
        return SummaryWriter(
            f"{EVENTS}:{folder}",
            purge_step=step + 1 if step else None,
            flush_secs=60 if in_bucket(workdir) else 5,
            filename_suffix=suffix,
        )
    except OSError as error:
        say(f"WARNING: events for TensorBoard cannot be written to {workdir}: {error}", error=True)
        return None


class EventsFile:
    """Takes what tensorboardX writes and puts it into the run's file of events, without ever raising in its thread.

    On a disk whole events are appended, and kept in memory while there is no room: a failed write would end the thread,
    and the loop would wait for it for good. In a bucket the file is written anew at each flush.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._data = path, bytearray()
        self._file = None if in_bucket(path) else new_file(path, os.O_APPEND | os.O_EXCL)

    @classmethod
    def open(cls, path: str) -> "EventsFile":
        """Returns a new file; `path` begins with the prefix."""
        return cls(path_of(path.removeprefix(f"{EVENTS}:"), "the run's folder"))

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: the run's folder is there."""

    def write(self, data: bytes) -> None:
        """Takes a part of an event."""
        self._data += data

    def flush(self) -> None:
        """Writes the events taken so far; tensorboardX calls it between two events."""
        if self._file is not None:
            if append_whole(self._file, bytes(self._data)):
                self._data.clear()
            return
        try:
            write_whole(self._path, bytes(self._data))
        except OSError as error:
            say(f"WARNING: {self._path} could not be written ({error}); it is tried again later", error=True)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.flush()
        if self._file is not None:
            os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl that can be read; how many cannot is said on standard error.

    In each line `step` is an int, and every other value is a finite number or None.

    Raises:
      InputError: the file cannot be read.
    """
    lines, damaged = split_lines(path)
    if damaged:
        say(f"WARNING: {len(damaged)} lines of {path} cannot be read and are left out", error=True)
    return lines


def split_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Returns the lines of a metrics.jsonl, parsed, and those that cannot be read, such as the half line that a killed
    run left; without such a file there are none.

    Raises:
      InputError: the file cannot be read.
    """
    lines, damaged = [], []
    try:
        data = read_file(path)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in filter(None, data.split(b"\n")):
        try:
            found = parse_json(line, Any, "the line")
        except InputError:
            found = None
        right = isinstance(found, dict) and type(found.get("step")) is int and all(map(is_number, found.values()))
        lines.append(found) if right else damaged.append(line)
    return lines, damaged


def is_number(value: Any) -> bool:
    """Returns whether a value from JSON is null or a number below `LIMIT`."""
    return value is None or (type(value) in (int, float) and abs(value) < LIMIT)


def points(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Returns (step, value) for each line that has a value of this name."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
