"""Where a run's numbers go: metrics.jsonl, TensorBoard, a picture; gathered so that the loop never waits for them."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config
from resnet_jax.training.console import Console
from resnet_jax.training.metrics import Sums, add, means
from resnet_jax.training.recipe import Plan
from resnet_jax.training.state import TrainState


class Diverged(RuntimeError):
    """The loss or a parameter is no longer finite."""


class Tracker:
    """Writes numbers of a step to `metrics.jsonl`, one object a line, and to TensorBoard.

    Opening it on a run that resumes at `step` drops the lines beyond that step, so that each is there once.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool) -> None:
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Appends one line: the step and its numbers."""
        self._file.write(json.dumps({"step": step} | numbers) + "\n")
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        if self._events is not None:
            self._events.close()


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
    styles = (("train", "training", "#888888"), ("eval", "test", "#0b62a4"), ("ema", "test, averaged", "#d1495b"))
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label, color in styles:
            points = [(line["step"], line[f"{prefix}/{quantity}"]) for line in lines if f"{prefix}/{quantity}" in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.5)
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


Part = tuple[int, int, Sums]
"""(step, n, sums) of the n steps that end at a step."""


@dataclass
class Interval:
    """Steps between two lines of the log; `waited` is in seconds."""

    parts: list[Part] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0


class Report:
    """Gathers the sums of steps and writes them late, so that the loop never waits for a number.

    A thread of its own waits for the device: `flush` hands it the newest interval and writes the one before it;
    `settle` writes everything.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        plan: Plan,
        schedule: Callable[[int], Any],
        step: int,
        carried: Sums | None,
        last_checkpoint: Callable[[], int | None],
    ) -> None:
        first = jax.process_index() == 0
        self._tracker = Tracker(folder, step, config.log.tensorboard) if first else None
        self._console = Console(step, plan.total, plan.per_epoch) if first else None
        self._batch_size, self._per_epoch, self._schedule = config.train.batch_size, plan.per_epoch, schedule
        self._last_checkpoint = last_checkpoint
        self._thread = ThreadPoolExecutor(1)
        self._now, self._carried = Interval(), carried
        self._handed: tuple[Interval, Future[Any]] | None = None
        self._done: float | None = None  # when the last interval, or a pause, ended
        self._images, self._seconds = 0, 0.0

    def steps(self, step: int, n: int, sums: Sums, waited: float) -> None:
        """Takes the sums of the `n` steps that end at `step`; they stay on the device."""
        self._now.parts.append((step, n, sums))
        if self._done is None:
            self._done = time.perf_counter()  # the first call compiled: it does not count
            return
        self._now.images += n * self._batch_size
        self._now.waited += waited

    def flush(self) -> None:
        """Ends the interval, and writes the one before it."""
        handed, self._handed = self._handed, (self._now, self._thread.submit(fetch, self._now.parts))
        self._now = Interval()
        self._write(handed)

    def settle(self, state: TrainState) -> Sums | None:
        """Writes all whole intervals; returns the sums of the one that is under way, None where there are none.

        Raises:
          Diverged: a loss, or a parameter or statistic of the state, is not finite.
        """
        self._write(self._handed)
        self._handed = None
        if self._now.parts:
            self._carried, _ = self._sum(self._now, self._thread.submit(fetch, self._now.parts))
            self._now = Interval()
        if not all_finite((state.params, state.batch_stats)):
            self._diverged(int(state.step))
        return None if self._carried is None else {name: float(value) for name, value in self._carried.items()}

    def evaluation(self, step: int, result: dict[str, dict[str, Any]]) -> None:
        """Writes means over the test set."""
        names = {"test": "eval", "ema": "ema"}
        line = {
            f"{names[kind]}/{name}": value
            for kind, values in result.items()
            for name, value in values.items()
            if name in ("loss", "accuracy", "top5")
        }
        self._show(step, line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work whose time does not count as training; everything must be settled before."""
        yield
        if self._done is not None:
            self._done = time.perf_counter()

    def speed(self) -> float:
        """Training images a second so far, compilation, evaluation and saving apart."""
        return self._images / self._seconds if self._seconds else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for output in (self._console, self._tracker):
            if output is not None:
                output.close()

    def _write(self, handed: tuple[Interval, Future[Any]] | None) -> None:
        if handed is None or not handed[0].parts:
            return
        interval = handed[0]
        sums, seconds = self._sum(*handed)
        self._carried = None
        step, mean = interval.parts[-1][0], means(sums)
        line = {"epoch": step / self._per_epoch, "train/loss": mean["loss"], "train/accuracy": mean["accuracy"]}
        line["learning_rate"] = float(self._schedule(step - 1))
        if interval.images:
            line |= {"images_per_second": interval.images / seconds, "data_wait": interval.waited / seconds}
        self._show(step, line)

    def _sum(self, interval: Interval, future: Future[Any]) -> tuple[Sums, float]:
        """Sums of an interval on the host and its length in seconds.

        Step is added to step in order, so that a run that resumes within an interval comes to the same bits.
        """
        assert self._done is not None
        values, ended = future.result()
        seconds, self._done = ended - self._done, ended
        self._images += interval.images
        self._seconds += seconds
        single = [] if self._carried is None else [self._carried]
        for (step, n, _), part in zip(interval.parts, values, strict=True):
            columns = {name: np.atleast_1d(value) for name, value in part.items()}
            for i in range(n):
                single.append({name: column[i] for name, column in columns.items()})
                if not np.isfinite(columns["loss"][i]):
                    self._diverged(step - n + 1 + i)
        return add(single), seconds

    def _show(self, step: int, line: dict[str, Any]) -> None:
        if self._tracker is not None and self._console is not None:
            self._tracker.write(step, line)
            self._console.update(step, line)

    def _diverged(self, step: int) -> None:
        rate, saved = float(self._schedule(step - 1)), self._last_checkpoint()
        good = "there is no checkpoint" if saved is None else f"the last good checkpoint is that of step {saved}"
        raise Diverged(
            f"the loss or a parameter is not finite at step {step}, with learning rate {rate:g}; {good}, and nothing "
            "was written over it. Lower optimizer.learning_rate, lengthen schedule.warmup_epochs, or set "
            "optimizer.clip_norm"
        )


def fetch(parts: list[Part]) -> tuple[list[Sums], float]:
    """Waits for the sums of some steps; they, on the host, and the time at which they were there."""
    values = jax.device_get([sums for _, _, sums in parts])
    return values, time.perf_counter()


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds an infinity or a nan: bool scalar."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def say(text: str) -> None:
    """Prints in the first process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


Advance = Callable[[TrainState, int], tuple[TrainState, Sums, int, float]]
"""`advance(state, step) -> (state, sums, n, waited)`: what dispatches the next n steps of a run."""


def traced(advance: Advance, config: Config, folder: Path) -> Advance:
    """`advance` that writes a trace of the steps of `log.profile` into `folder/profile`; the device is waited for."""
    if config.log.profile is None:
        return advance
    first, last = config.log.profile
    running = False

    def advance_traced(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
        nonlocal running
        if not running and first <= step < last:
            jax.profiler.start_trace(str(folder / "profile"))
            running = True
        result = advance(state, step)
        if running and step + result[2] >= last:
            jax.block_until_ready(result[0])
            jax.profiler.stop_trace()
            running = False
            say(f"the trace of steps {first} to {last} lies in {folder / 'profile'}")
        return result

    return advance_traced
