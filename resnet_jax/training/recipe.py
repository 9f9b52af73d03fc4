"""What a recipe means: a plan in steps, a model, a first state."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, ModelConfig, sides
from resnet_jax.models.registry import create_model, model_fields, stride_of
from resnet_jax.models.stacking import block_by_block, stack_blocks
from resnet_jax.sharding import state_sharding
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.state import TrainState, copies, create_state
from resnet_jax.weights.load import fit_weights, preprocessing_of
from resnet_jax.weights.sources import Weights, find_weights


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


def complete(config: Config, recorded: Config | None) -> Config:
    """The recipe with the fields of `FROM_WEIGHTS` that it leaves at their defaults taken from its pretrained weights.

    Args:
      recorded: the recipe of the run that is resumed, which then says what the weights said at its start.

    Raises:
      InputError: the weights cannot be found.
    """
    source = config.model.pretrained
    if source is None:
        return config
    if recorded and recorded.model.pretrained == source:
        given = recorded
    else:
        weights = find_weights(source)
        weights = dataclasses.replace(weights, name=weights.name or config.model.name)
        given = recipe_of(dataclasses.replace(weights, preprocessing=preprocessing_of(weights, source)))
    sections = {}
    for section, names in FROM_WEIGHTS.items():
        ours, default, theirs = (getattr(c, section) for c in (config, Config(), given))
        if section == "data" and ours.image_size != default.image_size:
            names = ("mean", "std")
        taken = {name: getattr(theirs, name) for name in names if getattr(ours, name) == getattr(default, name)}
        sections[section] = dataclasses.replace(ours, **taken)
    return dataclasses.replace(config, **sections)


FROM_WEIGHTS = {
    "model": tuple(
        f for f in ModelConfig.__dataclass_fields__ if f not in ("pretrained", "num_classes", "compute_dtype")
    ),
    "data": ("mean", "std", "image_size", "eval_image_size"),
    "augment": ("eval_crop", "interpolation"),
}
"""What weights say of a recipe, by section."""


def recipe_of(weights: Weights) -> Config:
    """What weights say of a recipe; everything else is as in `Config()`."""
    recipe, preprocessing = Config(), weights.preprocessing
    known = {name: value for name, value in weights.fields.items() if name in FROM_WEIGHTS["model"]}
    model = dataclasses.replace(recipe.model, **known, name=weights.name or recipe.model.name)
    if preprocessing is None:
        return dataclasses.replace(recipe, model=model)
    values = dataclasses.asdict(preprocessing)
    data = dataclasses.replace(recipe.data, **{name: values[name] for name in FROM_WEIGHTS["data"]})
    augment = dataclasses.replace(recipe.augment, **{name: values[name] for name in FROM_WEIGHTS["augment"]})
    return dataclasses.replace(recipe, model=model, data=data, augment=augment)


def with_weights(state: TrainState, config: Config, model: nn.Module) -> TrainState:
    """A first state with the recipe's pretrained weights, if it has any; a head that does not fit stays random.

    Raises:
      InputError: the weights cannot be read, or are not those of this model.
    """
    source = config.model.pretrained
    if source is None:
        return state
    weights = find_weights(source)
    try:
        variables = fit_weights(block_by_block(model), weights.tensors, source, state.params["head"])
    except InputError as error:
        its = f" of {weights.name}" if weights.name else ", of which model it does not say"
        raise InputError(f"model.pretrained has weights{its}; model.name is {config.model.name}. {error}") from error
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    ema = state.ema and copies({"params": params, "batch_stats": batch_stats})
    return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def build_model(config: Config, classes: int) -> nn.Module:
    """The recipe's model with a head for so many classes."""
    recipe = config.model
    classes = recipe.num_classes or classes
    dtype = jnp.dtype(recipe.compute_dtype)
    fields = {} if config.data.channels == 3 else {"in_channels": config.data.channels}
    model: Any = create_model(recipe.name, num_classes=classes, dtype=dtype, **fields, **model_fields(recipe))
    size, stride = min(sides(config.data.image_size)), stride_of(model)
    if hasattr(model, "image_size"):
        model = model.clone(image_size=size)
    if size < stride:
        raise InputError(
            f"data.image_size {config.data.image_size} is below the stride of {recipe.name}, which shrinks images by "
            f"{stride}: enlarge them, or take a network for small ones, such as cifar_resnet20"
        )
    return model


def state_maker(config: Config, model: nn.Module, schedule: Any) -> Callable[[], TrainState]:
    """A function without arguments that returns the recipe's first state, block by block, as checkpoints hold it.

    Its random bits come from JAX's `rbg` generator, which compiles several times faster than the default one; they are
    the same on any number of devices, but may differ between kinds of devices.
    """
    shape = (*sides(config.data.image_size), config.data.channels)
    optimizer, model = make_optimizer(config.optimizer, schedule), block_by_block(model)
    key = partial(jax.random.key, config.train.seed, impl="rbg")
    ema = config.train.ema_decay is not None
    return lambda: create_state(model, optimizer, key(), shape, ema)


def in_form(state: TrainState, config: Config) -> TrainState:
    """A state, or its shapes, as the recipe's model takes it: with `model.scan` equal blocks are stacked."""
    return stack_blocks(state) if config.model.scan else state


def sharded_shapes(new_state: Callable[[], TrainState], mesh: Mesh) -> Any:
    """Shapes, types and shardings of a state, to restore into."""
    shapes = jax.eval_shape(new_state)
    place = state_sharding(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)
