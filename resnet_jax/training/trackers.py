"""Where a run's numbers go: metrics.jsonl, TensorBoard, a picture."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_jax.integrity import write_whole

FLUSHED_EVERY = 5.0
"""Seconds after which events go to the disk, where TensorBoard sees them."""


class Tracker:
    """Writes numbers of a step to `metrics.jsonl`, one object a line, and to TensorBoard.

    Opening it on a run that resumes at `step` drops the lines beyond that step, with `owed` the evaluation of that
    step, and that of the test split, so that each is there once. Lines that the disk has no room for wait.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool, owed: bool = False) -> None:
        path = workdir / "metrics.jsonl"
        last = step - 1 if owed else step
        kept = [
            x
            for x in read_lines(path)
            if (x["step"] <= last or (x["step"] == step and "validation/loss" not in x)) and "test/loss" not in x
        ]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._waiting: list[bytes] = []
        self._events: Events | None = Events(workdir, step) if tensorboard else None

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Appends one line: the step and its numbers."""
        self._waiting.append((json.dumps({"step": step} | numbers) + "\n").encode())
        while self._waiting and append_whole(self._file, self._waiting[0]):
            self._waiting.pop(0)
        if self._events is not None:
            self._events.write(step, numbers)

    def close(self) -> None:
        """Flushes everything."""
        while self._waiting and append_whole(self._file, self._waiting.pop(0)):
            pass
        os.close(self._file)
        if self._events is not None:
            self._events.close()


def append_whole(file: int, line: bytes) -> bool:
    """Appends a line to an open file, or leaves it as it was where there is no room for all of it."""
    size = os.fstat(file).st_size
    try:
        if os.write(file, line) == len(line):
            return True
        os.ftruncate(file, size)
    except OSError:
        pass
    return False


class Events:
    """TensorBoard's events of a run, written in this thread; what the disk has no room for waits or is left out."""

    def __init__(self, workdir: Path, step: int) -> None:
        with torch_hidden():
            from tensorboardX.event_file_writer import EventsWriter

        self._writer, self._flushed = EventsWriter(str(workdir / "events")), 0.0
        if step:  # TensorBoard drops what a killed run wrote beyond it
            self._add(step + 1, session_log={"status": 1})

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Adds the numbers of a step."""
        self._add(step, summary={"value": [{"tag": name, "simple_value": value} for name, value in numbers.items()]})

    def close(self) -> None:
        """Flushes everything."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with contextlib.suppress(OSError):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
            if time.monotonic() - self._flushed > FLUSHED_EVERY:
                self._flushed = time.monotonic()
                self._writer.flush()


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
    """The whole lines of a metrics.jsonl; a torn last one is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


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
            points = [(line["step"], line[f"{prefix}/{quantity}"]) for line in lines if f"{prefix}/{quantity}" in line]
            if points:
                form = {"marker": "D", "linestyle": ""} if prefix.endswith("test") else {"linewidth": 1.5}
                axes.plot(*zip(*points, strict=True), label=label, color=color, **form)
        axes.set_xlabel("step")
        axes.set_title(quantity, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "loss":
            axes.set_yscale("log")
        else:
            axes.legend(frameon=False)
    figure.savefig(workdir / "curves.png", dpi=120)
    return workdir / "curves.png"
