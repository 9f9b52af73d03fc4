"""The profile of `log.profile`: a trace of some steps, for TensorBoard or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from resnet_jax.config import InputError
from resnet_jax.files import in_bucket
from resnet_jax.runs.reporter import say


class Trace:
    """Writes a trace of the steps FIRST:LAST of a run into `folder/profile`; None writes none.

    Raises:
      InputError: the folder cannot take one.
    """

    def __init__(self, steps: str | None, folder: Path) -> None:
        self._place, self._running = folder / "profile", False
        self._first, self._last = (int(step) for step in steps.split(":")) if steps else (0, 0)
        if steps and in_bucket(folder):
            raise InputError(f"log.profile: a trace needs a folder on this machine, and the run is in {folder}")
        if steps and self._place.is_symlink():
            raise InputError(f"{self._place} is a link, which may lead out of the run's folder: remove it")

    def before(self, step: int) -> None:
        """Starts the trace where the steps from `step` on belong to it."""
        if not self._running and self._first <= step < self._last:
            jax.profiler.start_trace(str(self._place))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace where the steps up to `step` were its last; waits for their results."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._running = False
            say(f"the trace of steps {self._first} to {self._last} lies in {self._place}")
