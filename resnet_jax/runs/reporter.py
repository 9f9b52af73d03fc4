"""Gathers the numbers of a run and reports them: to the terminal, metrics.jsonl and TensorBoard.

Numbers of a step are fetched from the device later than they are computed, so that the loop never waits for them.
"""

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

from resnet_jax import output as outputs
from resnet_jax.config import Config
from resnet_jax.runs.console import Console
from resnet_jax.runs.hooks import Hooks
from resnet_jax.runs.trackers import Tracker
from resnet_jax.training.build import Plan
from resnet_jax.training.metrics import Sums, add, means
from resnet_jax.training.run_progress import RunProgress
from resnet_jax.training.state import TrainState


class Diverged(RuntimeError):
    """Raised when the loss or a parameter is no longer finite.

    Attributes:
      what: what happened, in a few words; the whole message also says what to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        super().__init__(f"{what}; {remedy}")


Part = tuple[int, int, Sums]
"""(step, n, sums): sums over the n steps that end at `step`."""


@dataclass
class Interval:
    """The steps between two lines of metrics.jsonl.

    Attributes:
      parts: sums of these steps, on the device.
      images: how many images they took.
      waited: seconds in which the loop waited for data.
    """

    parts: list[Part] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0


class Reporter:
    """Gathers the sums of steps and writes them one interval late, so that the loop never waits for the device.

    A thread of its own waits for the device: `flush` hands it the newest interval and writes the one before it;
    `settle` writes everything. Only the first process writes.

    Args:
      folder: the run's folder.
      config: the recipe.
      plan: the run's length in steps and epochs.
      schedule: step -> learning rate; None where the optimizer has its own.
      step: the step at which the run begins.
      progress: of the checkpoint that the run resumes from: `eval_pending`, `skipped_updates`, `sums`.
      last_checkpoint: returns the step of the newest checkpoint, or None.
      hooks: are told each line.
      terminal: whether lines are shown there, too.

    Attributes:
      skipped: updates that were left out because they were not finite: `total`, and `in_row` up to now.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        plan: Plan,
        schedule: Callable[[int], Any] | None,
        step: int,
        progress: RunProgress,
        last_checkpoint: Callable[[], int | None],
        hooks: Hooks | None = None,
        terminal: bool = True,
    ) -> None:
        first = jax.process_index() == 0
        self._tracker = Tracker(folder, step, config.log.tensorboard, progress.eval_pending) if first else None
        shown = first and terminal
        metric = "map" if config.train.metric == "auto" else config.train.metric  # auto takes map where there is one
        self._console = Console(step, plan.total, plan.per_epoch, plan.evaluates, metric) if shown else None
        self._batch_size, self._per_epoch, self._schedule = config.train.batch_size, plan.per_epoch, schedule
        self._last_checkpoint, self._hooks = last_checkpoint, hooks or Hooks(())
        self._thread = ThreadPoolExecutor(1)
        self._limit, self._total = config.train.nonfinite_limit, plan.total
        self.skipped = dict(progress.skipped_updates)
        self._now, self._carried = Interval(), progress.sums
        self._handed: tuple[Interval, Future[Any]] | None = None
        self._written: tuple[int, dict[str, float]] = (-1, {})  # step and means of the last line of training
        self._done: float | None = None  # when the first step, the last interval, or a pause, ended
        self._images, self._seconds = 0, 0.0

    def steps(self, step: int, n: int, sums: Sums, waited: float) -> None:
        """Takes the sums of the `n` steps that end at `step`, which stay on the device, and the seconds of waiting.

        The first call, which compiled, is waited for and shown; its time does not count.
        """
        self._now.parts.append((step, n, sums))
        if self._done is None:
            values, self._done = fetch(self._now.parts)
            if self._console is not None and step < self._total:
                self._console.update(step, losses(add(steps_of(values[0], n))))
            return
        self._now.images += n * self._batch_size
        self._now.waited += waited

    def flush(self) -> None:
        """Ends the interval and writes the one before it."""
        handed, self._handed = self._handed, (self._now, self._thread.submit(fetch, self._now.parts))
        self._now = Interval()
        self._write(handed)

    def settle(self, state: TrainState) -> Sums | None:
        """Writes all whole intervals; returns the sums of the unfinished one, or None if it has no steps.

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
        if self._tracker is not None:
            self._tracker.flush()
        return None if self._carried is None else {name: float(value) for name, value in self._carried.items()}

    def evaluation(self, step: int, result: dict[str, dict[str, Any]]) -> None:
        """Writes the means of an evaluation.

        Args:
          step: the number of steps done.
          result: split, or `ema/` and the split -> means of the evaluation.
        """
        line = {
            f"{kind}/{name}": value
            for kind, values in result.items()
            for name, value in values.items()
            if isinstance(value, float)
        }
        since = {} if self._carried is None else losses(self._carried)  # of the steps that no line has told yet
        self._show(step, line, since or (self._written[1] if self._written[0] == step else {}))
        self._hooks.call("on_evaluation", step, line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent in its block out of the training time; call `settle` before."""
        if self._console is not None:
            self._console.pause()
        yield
        if self._done is not None:
            self._done = time.perf_counter()

    def speed(self) -> float:
        """Returns the training images per second so far, without compilation, evaluation and saving."""
        return self._images / self._seconds if self._seconds else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._console is not None:
            self._console.close()
        if self._tracker is not None:
            self._tracker.close(began=self._done is not None)

    def _write(self, handed: tuple[Interval, Future[Any]] | None) -> None:
        if handed is None or not handed[0].parts:
            return
        interval = handed[0]
        sums, seconds = self._sum(*handed)
        self._carried = None
        step, skipped = interval.parts[-1][0], sums.pop("skipped", None)
        line: dict[str, float] = {"epoch": step / self._per_epoch}
        if sums["count"]:
            line |= {f"train/{name}": value for name, value in means(sums).items() if name != "count"}
        if skipped is not None:
            line["skipped_updates"] = int(skipped)
        if self._schedule is not None:
            line["learning_rate"] = float(self._schedule(step - 1))
        if interval.images:
            line |= {"images_per_second": interval.images / seconds, "data_wait": interval.waited / seconds}
        self._written = (step, {name: value for name, value in line.items() if name == "train/loss"})
        self._show(step, line)
        self._hooks.call("on_metrics", step, line)

    def _sum(self, interval: Interval, future: Future[Any]) -> tuple[Sums, float]:
        """Returns the sums of an interval, on the host, and its length in seconds.

        Steps are added one by one in their order, so that a run that resumes within an interval has the same bits.
        """
        assert self._done is not None
        values, ended = future.result()
        seconds, self._done = ended - self._done, ended
        self._images += interval.images
        self._seconds += seconds
        single = [] if self._carried is None else [self._carried]
        for (step, n, _), part in zip(interval.parts, values, strict=True):
            for i, sums in enumerate(steps_of(part, n)):
                single.append(sums)
                self._check(step - n + 1 + i, sums)
        return add(single), seconds

    def _show(self, step: int, line: dict[str, Any], beside: dict[str, float] | None = None) -> None:
        """Writes a line, and shows it with what stands `beside` it on the terminal alone."""
        if self._tracker is not None:
            self._tracker.write(step, line)
        if self._console is not None:
            self._console.update(step, (beside or {}) | line)

    def _check(self, step: int, sums: Sums) -> None:
        if not np.isfinite(sums["loss"]):
            self._diverged(step)
        if sums.get("skipped"):
            self.skipped = {"total": self.skipped["total"] + 1, "in_row": self.skipped["in_row"] + 1}
            if self.skipped["in_row"] >= self._limit:
                self._diverged(step)
        else:
            self.skipped["in_row"] = 0

    def _diverged(self, step: int) -> None:
        saved = self._last_checkpoint()
        rate = f", with learning rate {float(self._schedule(step - 1)):g}" if self._schedule is not None else ""
        good = "there is no checkpoint" if saved is None else f"the last good checkpoint is that of step {saved}"
        row = f" for {self.skipped['in_row']} updates in a row" if self.skipped["in_row"] else ""
        raise Diverged(
            f"the loss or a parameter is not finite at step {step}{row}{rate}",
            f"{good}, and nothing was written over it. Lower optimizer.learning_rate, lengthen schedule.warmup_epochs, "
            "or set optimizer.clip_norm",
        )


def steps_of(part: Sums, n: int) -> list[Sums]:
    """Returns the sums of each of the `n` steps of a call, whose values are [n], or scalars for one step."""
    columns = {name: np.atleast_1d(value) for name, value in part.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(n)]


def losses(sums: Sums) -> dict[str, float]:
    """Returns the mean loss of some steps as `train/loss`; nothing where all of their updates were left out."""
    return {"train/loss": float(means(sums)["loss"])} if sums["count"] else {}


def fetch(parts: list[Part]) -> tuple[list[Sums], float]:
    """Waits for the sums of some steps; returns them, on the host, and the time at which they arrived, in seconds."""
    values = jax.device_get([sums for _, _, sums in parts])
    return values, time.perf_counter()


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns a bool scalar: whether no array of a tree holds an infinity or a nan."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def say(text: str, error: bool = False) -> None:
    """Prints a line as `output.say` does, but in the first process alone."""
    if jax.process_index() == 0:
        outputs.say(text, error)
