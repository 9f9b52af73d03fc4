"""Optimizers and learning rate schedules from a recipe, on optax."""

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from resnet_jax.config import Config, InputError, OptimizerConfig
from resnet_jax.training.state import path_map

Rules: TypeAlias = tuple[tuple[str, float], ...]
Rates: TypeAlias = Callable[[str], float]
OwnOptimizer: TypeAlias = optax.GradientTransformation | Callable[[optax.Schedule], optax.GradientTransformation]
"""An optimizer, or a function that makes one of a learning rate by step."""


def make_schedule(config: Config, steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns learning rate as a function of the step alone, after `schedule` and `optimizer` of the recipe.

    Args:
      steps: length of the run.
      steps_per_epoch: for the length of the warm-up.

    A warm-up that is as long as the run or longer is shortened, as `warmup_steps` says.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    if config.optimizer.base_batch_size:
        peak *= config.train.batch_size / config.optimizer.base_batch_size
    if schedule.name == "one_cycle":
        return optax.cosine_onecycle_schedule(steps, peak, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    warmup, _ = warmup_steps(config, steps, steps_per_epoch)
    main = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
        "step": lambda: optax.piecewise_constant_schedule(
            peak, {round(share * steps) - warmup: schedule.factor for share in schedule.boundaries}
        ),
    }[schedule.name]()
    if warmup == 0:
        return main
    start = schedule.warmup_factor * peak
    end = peak if schedule.warmup_shape == "linear" else start
    return optax.join_schedules([optax.linear_schedule(start, end, warmup), main], [warmup])


def warmup_steps(config: Config, steps: int, steps_per_epoch: float) -> tuple[int, str]:
    """Returns the length of the warm-up in steps, and a line that says so where the recipe's is no shorter than the
    run, else an empty one: it is then a fifth of the run.
    """
    schedule = config.schedule
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.name == "one_cycle" or warmup < steps:
        return warmup, ""
    short = steps // 5
    return short, (
        f"schedule.warmup_epochs {schedule.warmup_epochs:g} is {warmup} steps, and the run has {steps}: shortened to "
        f"{short}"
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, rates: Rates | None = None, own: OwnOptimizer | None = None
) -> optax.GradientTransformation:
    """Returns SGD with (Nesterov) momentum, Adam, AdamW, LAMB (You et al. 2019) or LARS (You et al. 2017), with
    rules for decay.

    Weight decay is added to the gradient (sgd, adam, lars) or to Adam's update (adamw, lamb).

    Args:
      rates: path of a parameter -> factor of its learning rate, as of `finetune.make_rates`; None takes
        `rate_rules` alone.
      own: an optimizer of the user's own in place of the recipe's; rules for rates count for it too.

    Raises:
      InputError: in `init`, a parameter that no decay rule covers, or a rate rule that matches none.
    """
    if own is not None:
        whole = own if isinstance(own, optax.GradientTransformation) else own(schedule)
        return at_rates(whole, rates or rate_of(config.rate_rules), config.rate_rules)
    decay = decay_by_rule(config.weight_decay, config.decay_rules)
    rate = optax.scale_by_learning_rate(schedule)
    momentum = optax.trace(config.momentum, nesterov=config.nesterov)

    def kernels(params: optax.Params) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    parts = {
        "sgd": lambda: [decay, momentum, rate],
        "adam": lambda: [decay, optax.scale_by_adam(), rate],
        "adamw": lambda: [optax.scale_by_adam(), decay, rate],
        "lamb": lambda: [optax.scale_by_adam(eps=1e-6), decay, optax.scale_by_trust_ratio(), rate],
        "lars": lambda: [
            decay,
            optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), kernels),
            rate,
            optax.trace(config.momentum),
        ],
    }[config.name]()
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    whole = optax.chain(*clip, *parts)
    return at_rates(whole, rates or rate_of(config.rate_rules), config.rate_rules)


def rate_of(rules: Rules, otherwise: Rates = lambda path: 1.0) -> Rates:
    """Returns the factor of the first rule whose expression matches the whole path of a parameter, or what `otherwise`
    says.
    """

    def rate(path: str) -> float:
        return next((factor for pattern, factor in rules if re.fullmatch(pattern, path)), otherwise(path))

    return rate


def at_rates(whole: optax.GradientTransformation, rates: Rates, rules: Rules) -> optax.GradientTransformation:
    """Returns an optimizer, each of whose updates is multiplied by the factor of its parameter's path.

    Raises:
      InputError: in `init`, a rule that is the first for no parameter: it is misspelt, or stands too late.
    """

    def init(params: optax.Params) -> Any:
        used: set[str | None] = set()
        path_map(lambda path, _: used.add(next((p for p, _ in rules if re.fullmatch(p, path)), None)), params)
        if idle := [pattern for pattern, _ in rules if pattern not in used]:
            raise InputError(
                f"optimizer.rate_rules: {', '.join(map(repr, idle))} is the first match of no parameter; paths look "
                "like stage1/block1/conv1/kernel, and the first rule that matches counts"
            )
        return whole.init(params)

    def update(grads: Any, state: Any, params: optax.Params = None) -> tuple[Any, Any]:
        updates, state = whole.update(grads, state, params)
        return path_map(lambda path, u: u if (rate := rates(path)) == 1.0 else u * rate, updates), state

    return optax.GradientTransformation(init, update)


def decay_by_rule(weight_decay: float, rules: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Adds `weight_decay * factor * parameter` to each update; the factor is that of the first rule that matches.

    A rule is a regular expression that matches a whole path, such as `.*/kernel`.
    """

    def factor(path: str, _: Any) -> float:
        for pattern, value in rules:
            if re.fullmatch(pattern, path):
                return value
        raise InputError(f"optimizer.decay_rules: no rule covers the parameter {path}; add one such as ('.*', 0.0)")

    def init(params: optax.Params) -> optax.EmptyState:
        path_map(factor, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: optax.Params = None) -> tuple[Any, optax.EmptyState]:
        factors, decay = path_map(factor, params), jnp.float32(weight_decay)
        return jax.tree.map(lambda u, p, f: u + decay * f * p if f else u, updates, params, factors), state

    return optax.GradientTransformation(init, update)
