"""What a recipe means: a plan in steps, a model, a first state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.models.registry import create_model
from resnet_jax.sharding import replicated
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.state import TrainState, create_state


@dataclass(frozen=True)
class Plan:
    """What happens at which step; all in steps."""

    total: int
    per_epoch: float
    eval_every: int
    save_every: int
    log_every: int


def make_plan(config: Config, examples: int) -> Plan:
    """The plan of a run over so many training examples. An epoch need not be a whole number of steps."""
    per_epoch = examples / config.train.batch_size
    total = config.train.steps or max(1, math.ceil(config.train.epochs * per_epoch))
    eval_every = max(1, round(config.train.eval_every_epochs * per_epoch))
    save_every = config.checkpoint.every_steps or eval_every
    if total * config.train.batch_size >= 2**32:
        raise InputError("the run draws 2**32 images or more, further than the order of the data counts: shorten it")
    return Plan(total, per_epoch, eval_every, save_every, config.log.every_steps)


def build_model(config: Config, classes: int) -> nn.Module:
    """The recipe's model with a head for so many classes."""
    recipe = config.model
    overrides = {name: value for name in ("shortcut", "norm") if (value := getattr(recipe, name)) is not None}
    return create_model(
        recipe.name,
        num_classes=recipe.num_classes or classes,
        dtype=jnp.dtype(recipe.compute_dtype),
        unbiased_variance=recipe.unbiased_variance,
        zero_init_last=recipe.zero_init_last,
        **overrides,
    )


def state_maker(config: Config, model: nn.Module, schedule: Any) -> Callable[[], TrainState]:
    """A function without arguments that returns the recipe's first state.

    Its random bits come from JAX's `rbg` generator, which compiles several times faster than the default one; they are
    the same on any number of devices, but may differ between kinds of devices.
    """
    size = config.data.image_size
    optimizer = make_optimizer(config.optimizer, schedule)
    key = partial(jax.random.key, config.train.seed, impl="rbg")
    ema = config.train.ema_decay is not None
    return lambda: create_state(model, optimizer, key(), (size, size, 3), ema)


def sharded_shapes(new_state: Callable[[], TrainState], mesh: Mesh) -> Any:
    """Shapes, types and shardings of a state, to restore into."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(new_state))
