"""Hooks: objects of the user's own that a run tells what happens, and that may end it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from resnet_jax.config import Config, InputError
from resnet_jax.output import say


@dataclass(frozen=True)
class RunStart:
    """What `on_start` is given.

    Attributes:
      folder: of the run.
      config: its recipe.
      total_steps: at which it ends.
      step: at which it begins, above 0 where it resumes.

    Example::

      class Announce:
          def on_start(self, run):
              print(f"{run.folder}: steps {run.step} to {run.total_steps}")
    """

    folder: Path
    config: Config
    total_steps: int
    step: int


class Hook:
    """The methods that a hook may have; any object with some of them will do, it need not inherit.

    They are called by the first process alone. `on_metrics`, `on_evaluation` and `on_checkpoint` end the run with what
    is true, after the steps under way: it is then evaluated and saved as at its planned end. An error in a hook is said
    and counted, and the run goes on. A run that was killed may tell a step again when it resumes, in a new process.

    Example:
      A hook that ends a run when it is good enough::

        class Enough:
            def on_evaluation(self, step, metrics):
                return metrics.get("validation/accuracy", 0.0) > 0.98  # not there for the test split
    """

    def on_start(self, run: RunStart) -> None:
        """Is called before the first step."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> Any:
        """Is called with each line of training metrics, such as `train/loss`, `learning_rate`, `images_per_second`."""

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> Any:
        """Is called after each evaluation of the validation split, with its means: `validation/loss`,
        `validation/accuracy`, ..., and those of the moving average, where the run keeps one, as `ema/validation/loss`.

        It is called once more at the end of the run, with `test/loss`, ... and `ema/test/loss`, ... alone. `step` is
        then the selected one, which may lie before the last, and what is returned changes nothing.
        """

    def on_checkpoint(self, step: int, path: Path) -> Any:
        """Is called when a checkpoint is being written."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Is called at the end of a run, with what `summary.json` holds."""


METHODS = {name: method for name, method in vars(Hook).items() if name.startswith("on_")}
"""The methods of a hook by name, as `Hook` has them, which do nothing."""


@dataclass
class Hooks:
    """Calls hooks.

    Attributes:
      hooks: in the order in which they are called.
      ending: one of them asked to end the run.
      errors: how many calls failed.

    Raises:
      InputError: a hook is a class, or has no method that is called.
    """

    hooks: Sequence[Any]
    ending: bool = False
    errors: int = field(default=0)

    def __post_init__(self) -> None:
        for place, hook in enumerate(self.hooks):
            if isinstance(hook, type):
                raise InputError(
                    f"hooks[{place}] is the class {hook.__qualname__}: expected an object, such as {hook.__name__}()"
                )
            own = {name for name in METHODS if hasattr(hook, name)}
            if not any(getattr(type(hook), name, None) is not METHODS[name] for name in own):
                others = [name for name in dir(hook) if name.startswith("on_") and name not in METHODS]
                raise InputError(
                    f"hooks[{place}], of type {type(hook).__qualname__}, has no method that is called: expected some "
                    f"of {', '.join(METHODS)}" + (f"; it has {', '.join(others)}" if others else "")
                )

    def call(self, name: str, *values: Any) -> None:
        """Calls a method of each hook that has it, in the first process."""
        for hook in self.hooks if jax.process_index() == 0 else ():
            method = getattr(hook, name, None)
            if method is None:
                continue
            try:
                self.ending |= bool(method(*values)) and name not in ("on_start", "on_end")
            except Exception as error:
                self.errors += 1
                what = f"{type(hook).__name__}.{name}"
                say(f"WARNING: the hook {what} failed ({type(error).__name__}: {error}); the run goes on", error=True)
