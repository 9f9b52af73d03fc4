"""Where a run's numbers go: metrics.jsonl, TensorBoard, a picture."""

import contextlib
import io
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resnet_jax.config import InputError
from resnet_jax.files import in_bucket, parse_json, read_file, to_json, write_whole
from resnet_jax.output import say

GREATEST = 1e300
"""Numbers of a metrics.jsonl lie below it."""


class Tracker:
    """Writes numbers of a step to `metrics.jsonl`, one object a line, and to TensorBoard.

    In a bucket nothing can be appended to: there both are written whole at each `flush`.

    Opening it on a run that resumes at `step` drops the lines beyond that step, with `eval_pending` the evaluation of
    that step, and that of the test split, so that each is there once; what cannot be read goes into
    `metrics.jsonl.damaged`. Lines for which the disk has no room wait until it has.

    Raises:
      InputError: a file cannot be read or written.
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
        self._events: Events | None = Events(workdir, step) if tensorboard else None

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Appends one line: the step and its numbers; those that are not finite are null."""
        self._waiting.append((to_json({"step": step} | numbers) + "\n").encode())
        while self._waiting and self._append(self._waiting[0]):
            self._waiting.pop(0)
        if self._events is not None:
            self._events.write(step, numbers)

    def close(self) -> None:
        """Flushes everything."""
        while self._waiting and self._append(self._waiting.pop(0)):
            pass
        self.flush()
        if self._file is not None:
            os.close(self._file)
        if self._events is not None:
            self._events.close()

    def flush(self) -> None:
        """Writes what a bucket does not have yet; where that fails it is said, and tried again at the next call."""
        if self._file is not None:
            return
        try:
            write_whole(self._path, bytes(self._whole))
            if self._events is not None:
                self._events.flush()
        except OSError as error:
            say(f"WARNING: {self._path} could not be written ({error}); it is tried again later", error=True)

    def _append(self, line: bytes) -> bool:
        if self._file is not None:
            return append_whole(self._file, line)
        self._whole += line
        return True


def new_file(path: Path, flags: int) -> int:
    """Opens an ordinary file to write, and makes it where there is none; a link is not followed but an OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)


def append_whole(file: int, line: bytes) -> bool:
    """Appends a line to an open file, or leaves it as it was where there is no room for all of it."""
    try:
        size = os.fstat(file).st_size
        if os.write(file, line) == len(line):
            return True
        os.ftruncate(file, size)
    except OSError:
        pass
    return False


class Events:
    """TensorBoard's events of a run, written in this thread. Those for which the disk has no room are left out whole,
    so that what is there can be read.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        with torch_hidden():
            from tensorboardX.record_writer import masked_crc32c

        self._checksum: Callable[[bytes], int] = masked_crc32c
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(3)}"
        self._file: int | None = None
        self._path, self._whole = workdir / name, bytearray()
        if not in_bucket(workdir):
            with contextlib.suppress(OSError):
                self._file = new_file(self._path, os.O_APPEND | os.O_EXCL)
        self._begun = False
        self._begin = {"step": step + 1, "session_log": {"status": 1}} if step else None

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Adds the numbers of a step."""
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        self._begun = self._begun or self._start()
        if self._begun:
            self._add(step=step, summary={"value": values})

    def close(self) -> None:
        """Closes the file."""
        self._begun = self._begun or self._start()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def flush(self) -> None:
        """Writes the file whole, in a bucket.

        Raises:
          OSError: the bucket does not take it.
        """
        if self._whole:
            write_whole(self._path, bytes(self._whole))

    def _start(self) -> bool:
        """Writes how the file begins; TensorBoard drops what a killed run wrote beyond the step of `_begin`."""
        return self._add(file_version="brain.Event:2") and (self._begin is None or self._add(**self._begin))

    def _add(self, **content: Any) -> bool:
        from tensorboardX.proto.event_pb2 import Event

        data = Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        whole = length + sums[0] + data + sums[1]
        if in_bucket(self._path):
            self._whole += whole
            return True
        return self._file is not None and append_whole(self._file, whole)


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Within it an import of PyTorch fails. tensorboardX imports it where it is installed, for its annotations alone,
    which takes some two seconds and 200 MB.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read: `step` is a whole number, all other values finite ones or None.
    Those that cannot are counted on standard error.

    Raises:
      InputError: the file cannot be read.
    """
    lines, damaged = split_lines(path)
    if damaged:
        say(f"WARNING: {len(damaged)} lines of {path} cannot be read and are left out", error=True)
    return lines


def split_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a metrics.jsonl, and those that cannot be read, such as one that a killed run did not end.

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
    """Whether a value from JSON is a number that a float can hold, or null."""
    return value is None or (type(value) in (int, float) and abs(value) < GREATEST)


def points(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of all lines that have a value of this name."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def draw_curves(workdir: Path) -> Path:
    """Draws loss and accuracy of a run over its steps into `curves.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(workdir / "metrics.jsonl")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    styles = (
        ("train", "train", "#888888"),
        ("validation", "validation", "#0b62a4"),
        ("ema/validation", "validation, moving average", "#d1495b"),
        ("test", "test, at the end", "#0b62a4"),
        ("ema/test", "test, moving average", "#d1495b"),
    )
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label, color in styles:
            if drawn := points(lines, f"{prefix}/{quantity}"):
                form = {"marker": "D", "linestyle": ""} if prefix.endswith("test") else {"linewidth": 1.5}
                axes.plot(*zip(*drawn, strict=True), label=label, color=color, **form)
        axes.set_xlabel("step")
        axes.set_title(quantity, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "loss":
            axes.set_yscale("log")
        elif axes.lines:
            axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_whole(workdir / "curves.png", picture.getvalue())
    return workdir / "curves.png"
