"""Progress on the terminal."""

import contextlib
import io
import math
import sys
import time
from typing import Any

from resnet_jax.output import say

SECONDS_BETWEEN_LINES = 5.0


class Terminal(io.TextIOBase):
    """Standard output for what draws on it; it may go away meanwhile."""

    def __init__(self) -> None:
        self._output = sys.stdout

    def write(self, text: str) -> int:
        """Writes what the terminal takes."""
        with contextlib.suppress(OSError, ValueError):
            self._output.write(text)
        return len(text)

    def flush(self) -> None:
        """Shows what was written."""
        with contextlib.suppress(OSError, ValueError):
            self._output.flush()

    def isatty(self) -> bool:
        """It is one."""
        return True


class Console:
    """Progress on the terminal: a bar, or a line every few seconds where the output is not a terminal."""

    def __init__(self, start: int, total: int, steps_per_epoch: float, evaluates: bool = True) -> None:
        self._total, self._steps_per_epoch, self._evaluates = total, steps_per_epoch, evaluates
        self._start, self._began, self._last_line = start, 0.0, -math.inf
        self._live: Any = None
        self._numbers: dict[str, float] = {}
        if sys.stdout is not None and sys.stdout.isatty():
            from rich.console import Console as Rich
            from rich.console import Group
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            steps = TextColumn("step {task.completed}/{task.total}")
            rich = Rich(file=Terminal())  # type: ignore[arg-type]
            self._bar = Progress(steps, BarColumn(30), TimeRemainingColumn(), console=rich)
            self._task = self._bar.add_task("", total=total, completed=start)
            self._text = Text("compiling")
            self._live = Live(Group(self._bar, self._text), console=rich, refresh_per_second=4)
            self._live.start()

    def update(self, step: int, numbers: dict[str, float]) -> None:
        """Shows the newest numbers of a step; without a terminal, the last step once, with its evaluation. Figures of
        the test split are for the end of the run.
        """
        if "test/accuracy" in numbers:
            return
        self._numbers |= numbers
        ended = step == self._total and (not self._evaluates or "validation/accuracy" in numbers)
        if not self._began:  # the first numbers come after compilation
            self._start, self._began = step, time.perf_counter()
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._text.plain = self._line(step)
        elif ended or (time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES and step < self._total):
            self._last_line = time.perf_counter()
            done = step - self._start
            left = f"  {(self._total - step) * (self._last_line - self._began) / done:.0f} s left" if done else ""
            say(f"step {step}/{self._total}  {self._line(step)}{left}")

    def _line(self, step: int) -> str:
        shown = [f"epoch {step / self._steps_per_epoch:.1f}"]
        for name, form in (
            ("train/loss", "loss {:.4f}"),
            ("images_per_second", "{:.0f} images/s"),
            ("data_wait", "data wait {:.0%}"),
            ("ema/validation/accuracy", "validation accuracy {:.2%} (moving average)"),
            ("validation/accuracy", "validation accuracy {:.2%}"),
        ):
            if name == "validation/accuracy" and "ema/validation/accuracy" in self._numbers:
                continue
            if name in self._numbers:
                shown.append(form.format(self._numbers[name]))
        return "  ".join(shown)

    def close(self) -> None:
        """Ends the bar."""
        if self._live is not None:
            self._live.stop()
