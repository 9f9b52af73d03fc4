"""Shows the progress of a run on the terminal."""

import contextlib
import io
import math
import sys
import time
from typing import Any

from resnet_jax.output import say

SECONDS_BETWEEN_LINES = 5.0
"""Where the output is no terminal, such as a file."""
NOTED_WAIT = 0.05
"""Share of the time spent waiting for data from which on a line says so."""
SHARES = ("accuracy", "macro_recall", "macro_f1", "map")
"""Metrics that are shown in percent."""


class Terminal(io.TextIOBase):
    """Standard output as a terminal to draw on, where writing never fails, even if the terminal has been closed."""

    def __init__(self) -> None:
        self._output = sys.stdout

    def write(self, text: str) -> int:
        """Writes a text and returns its length; what the terminal does not take is lost."""
        with contextlib.suppress(OSError, ValueError):
            self._output.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written."""
        with contextlib.suppress(OSError, ValueError):
            self._output.flush()

    def isatty(self) -> bool:
        """Returns True."""
        return True


class Console:
    """Shows a progress bar, or prints a line every few seconds where the output is not a terminal.

    Args:
      start: the step at which this process begins.
      total: the step at which the run ends.
      steps_per_epoch: may be a fraction.
      evaluates: whether the run evaluates, so that the last line waits for the last evaluation.
      metric: by which the best checkpoint is chosen, shown beside the accuracy, or else the loss, of an evaluation.
    """

    def __init__(
        self, start: int, total: int, steps_per_epoch: float, evaluates: bool = True, metric: str = "accuracy"
    ) -> None:
        self._total, self._steps_per_epoch, self._evaluates = total, steps_per_epoch, evaluates
        self._metric = metric
        self._start, self._began, self._last_line = start, 0.0, -math.inf
        self._paused: float | None = None
        self._evaluated = False
        self._live: Any = None
        self._numbers: dict[str, tuple[int, float]] = {}  # name -> step, value: what no line has shown yet
        if sys.stdout is not None and sys.stdout.isatty():
            from rich.console import Console as Rich
            from rich.console import Group
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.text import Text

            steps, left = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[left]}")
            rich = Rich(file=Terminal())  # type: ignore[arg-type]
            self._bar = Progress(steps, BarColumn(30), left, console=rich)
            self._task = self._bar.add_task("", total=total, completed=start, left="")
            self._text = Text("compiling")
            self._live = Live(Group(self._bar, self._text), console=rich, refresh_per_second=4)
            self._live.start()

    def update(self, step: int, numbers: dict[str, float]) -> None:
        """Shows numbers of a step. A line is of its own steps alone: a figure of training is shown with its step or not
        at all, an evaluation once, in the next line, which names its step where that is another one. Those of the test
        split are not shown here.

        Args:
          step: the number of steps done.
          numbers: by their names in metrics.jsonl; names that are not shown are ignored.
        """
        if any(name.startswith(("test/", "ema/test/")) for name in numbers):
            return
        self._numbers |= {name: (step, value) for name, value in numbers.items()}
        evaluation = any(name.startswith(("validation/", "ema/validation/")) for name in numbers)
        ended = step == self._total and (not self._evaluates or evaluation)
        now = time.perf_counter()
        if not self._began and step > self._start:  # after compilation, and an evaluation that was due at the start
            self._start, self._began = step, now
        elif evaluation and not self._evaluated and self._paused is not None:
            self._began += now - self._paused
        self._evaluated |= evaluation
        done = step - self._start if step < self._total else 0
        left = (self._total - step) * (now - self._began) / done if done else None
        if self._live is not None:
            self._bar.update(self._task, completed=step, left="" if left is None else f"{left:.0f} s left")
            self._text.plain = self._line(step)
        elif ended or (now - self._last_line >= SECONDS_BETWEEN_LINES and step < self._total):
            self._last_line = now
            say(f"step {step}/{self._total}  {self._line(step)}" + ("" if left is None else f"  {left:.0f} s left"))
            self._numbers.clear()

    def pause(self) -> None:
        """Notes that training pauses now, to evaluate or to save. The pause of the first evaluation, which compiles,
        does not count for the time that is left.
        """
        self._paused = time.perf_counter()

    def _line(self, step: int) -> str:
        shown = [f"epoch {step / self._steps_per_epoch:.1f}"]
        for name, form in (
            ("train/loss", "train loss {:.4f}"),
            ("images_per_second", "{:,.0f} images/s"),
            ("data_wait", "{:.0%} of it waiting for data"),
        ):
            of, value = self._numbers.get(name, (-1, 0.0))
            if of == step and not (name == "data_wait" and value < NOTED_WAIT):
                shown.append(form.format(value))
        evaluated = {name.rpartition("/")[2] for name in self._numbers if "validation/" in name}
        first = "accuracy" if "accuracy" in evaluated else "loss"
        words = [word for word in dict.fromkeys((first, self._metric)) if word in evaluated]
        if words:
            kind = next(kind for kind in ("ema/validation", "validation") if f"{kind}/{words[0]}" in self._numbers)
            of = self._numbers[f"{kind}/{words[0]}"][0]
            values = [(word, self._numbers[f"{kind}/{word}"][1]) for word in words]
            forms = (f"{value:.2%}" if word in SHARES else f"{value:.4f}" for word, value in values)
            told = [f"{word.replace('_', ' ')} {text}" for word, text in zip(words, forms, strict=True)]
            notes = ["moving average"] * (kind != "validation") + [f"step {of}"] * (of != step)
            shown.append(f"validation {', '.join(told)}" + (f" ({', '.join(notes)})" if notes else ""))
        return "  ".join(shown)

    def close(self) -> None:
        """Stops drawing the progress bar."""
        if self._live is not None:
            self._live.stop()
