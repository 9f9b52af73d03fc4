"""How a pretrained network is tuned: which of its parts learn, how fast, and from when on."""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from resnet_jax.config import Config, InputError
from resnet_jax.models.layers import BatchNorm, ConvNorm
from resnet_jax.training.optimizers import Rates, rate_of
from resnet_jax.training.state import PyTree, path_map


@dataclass(frozen=True)
class Phase:
    """From step `start` on, parameters learn at `rates`: path -> factor of the learning rate."""

    start: int
    rates: Rates


def make_phases(config: Config, names: Iterable[str], per_epoch: float) -> list[Phase]:
    """Returns the phases of a run; there is one but for `finetune.mode gradual`.

    Args:
      names: of the top modules of the model, as its parameters have them.
      per_epoch: steps.

    Raises:
      InputError: the head alone is to learn at first, and the model has no part of this name.
    """
    parts = part_numbers(names)
    recipe, head = config.finetune, max(parts.values())
    if recipe.mode in ("linear_probe", "gradual") and "head" not in parts:
        raise InputError(
            f"finetune.mode {recipe.mode} begins with the part `head`, and the model has {', '.join(parts)}: call its "
            "last layer head, or take another mode"
        )

    def rates(lowest: int) -> Rates:
        def rate(path: str) -> float:
            part = parts[path.split("/")[0]]
            return recipe.layer_decay ** (head - part) if part >= lowest else 0.0

        return rate_of(config.optimizer.rate_rules, rate)

    if recipe.mode == "gradual":
        every = recipe.thaw_every_epochs * per_epoch
        return [Phase(round(i * every), rates(head - i)) for i in range(head + 1)]
    if recipe.mode == "none":
        return [Phase(0, rate_of(config.optimizer.rate_rules))]
    return [Phase(0, rates(head if recipe.mode == "linear_probe" else 0))]


def part_numbers(names: Iterable[str]) -> dict[str, int]:
    """Returns top module -> number of its part, from the bottom up: 0 the stem, 1 the first stage, ..., and last the
    head.

    What lies between two stages belongs to the one before it, the last norm to the last stage.
    """
    names = list(names)
    stages = {name: int(match[1]) for name in names if (match := re.fullmatch(r"(?:stage|transition)(\d+)", name))}
    last = max(stages.values(), default=0)
    return {name: stages.get(name, {"norm": last, "head": last + 1}.get(name, 0)) for name in names}


def without_gradient(params: PyTree, frozen: Callable[[str], bool]) -> PyTree:
    """Returns parameters of which the frozen ones are constants to `jax.grad`: what only they need is not computed."""
    return path_map(lambda path, p: jax.lax.stop_gradient(p) if frozen(path) else p, params)


def frozen_statistics(frozen: Callable[[str], bool]) -> AbstractContextManager[None]:
    """Returns a context in which norms with frozen parameters take their running statistics, which stay as they are."""

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module.norm if isinstance(context.module, ConvNorm) else context.module
        normalises = isinstance(module, BatchNorm) and context.method_name == "__call__"
        if normalises and frozen("/".join((*module.path, "scale"))):
            return call(args[0], False)
        return call(*args, **kwargs)

    return nn.intercept_methods(tap)
