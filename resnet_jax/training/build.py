"""What a recipe means: a plan in steps, a model, a first state."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, known, sides
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.own_data import is_grey, own_dataset
from resnet_jax.data.sources import in_three_splits, load_dataset
from resnet_jax.files import path_of
from resnet_jax.models.layers import BatchNorm
from resnet_jax.models.registry import create_model, model_fields, stride_of, variable_shapes
from resnet_jax.models.stacking import block_by_block, stack_blocks
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.training.checkpoints import Record, read_checkpoint
from resnet_jax.training.optimizers import OwnOptimizer, make_optimizer, rate_of
from resnet_jax.training.parts import NO_PARTS, Parts, check_parts, kind_of, make_parts, own_outputs
from resnet_jax.training.sharding import state_sharding
from resnet_jax.training.state import TrainState, create_state
from resnet_jax.weights.load import fit_weights
from resnet_jax.weights.sources import find_weights


@dataclass(frozen=True)
class Plan:
    """What happens at which step; all in steps, but for `evaluates`: whether there is a validation split."""

    total: int
    per_epoch: float
    eval_every: int
    save_every: int
    log_every: int
    evaluates: bool = True


def data_of(config: Config, parts: Parts = NO_PARTS, prepare: bool = True) -> Dataset:
    """Returns the user's own data or the recipe's, in three splits; `prepare` and errors: `load_dataset`."""
    hold_out, own = config.train.metric != "none", parts.dataset
    if own is None:
        return load_dataset(config.data, config.train.seed, hold_out, prepare)
    found = own if isinstance(own, Dataset) else own()
    if not isinstance(found, Dataset):
        raise InputError(f"dataset() returned {kind_of(found)}: expected resnet_jax.Dataset(train=...)")
    found = own_dataset(found)
    if config.data.channels == 3 and is_grey(found.train[0][0]):
        grey = "the images have one channel, which is taken three times: data.channels 1 takes it as it is"
        found = dataclasses.replace(found, notes=(*found.notes, grey))
    return in_three_splits(found, config.data, config.train.seed, hold_out)


def make_plan(config: Config, examples: int, evaluates: bool = True) -> Plan:
    """Returns the plan of a run over a number of training examples. An epoch need not be a whole number of steps."""
    per_epoch = examples / config.train.batch_size
    total = config.train.steps or max(1, math.ceil(config.train.epochs * examples / config.train.batch_size))
    eval_every = max(1, round(config.train.eval_every_epochs * per_epoch))
    save_every = config.checkpoint.every_steps or eval_every
    if total * config.train.batch_size >= 2**32:
        raise InputError("the run draws 2**32 images or more, further than the order of the data counts: shorten it")
    return Plan(total, per_epoch, eval_every, save_every, config.log.every_steps, evaluates)


def length_of(config: Config, plan: Plan) -> str:
    """Returns a run's length in words: `43 steps (6 epochs of 7.03 steps, rounded up)`."""
    steps = f"{plan.total:,} steps"
    if config.train.steps is not None:
        return f"{steps}, {plan.total / plan.per_epoch:.3g} epochs"
    rounded = "" if math.isclose(plan.total, config.train.epochs * plan.per_epoch) else ", rounded up"
    epochs = f"{config.train.epochs:g} epoch{'s' * (config.train.epochs != 1)}"
    return f"{steps} ({epochs} of {round(plan.per_epoch, 2):,g} steps{rounded})"


def with_weights(state: TrainState, config: Config, model: nn.Module) -> TrainState:
    """Returns a first state with the recipe's pretrained weights, if it has any; a head that does not fit stays random.

    Raises:
      InputError: the weights cannot be read, or are not those of this model.
    """
    source = config.model.pretrained
    if source is None:
        return state
    weights = find_weights(source)
    try:
        variables = fit_weights(block_by_block(model), weights.tensors, source, state.params.get("head"))
    except InputError as error:
        its = f" of {weights.name}" if weights.name else ", of which model it does not say"
        raise InputError(f"model.pretrained has weights{its}; model.name is {config.model.name}. {error}") from error
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    ema = state.ema and jax.device_put({"params": params, "batch_stats": batch_stats}, may_alias=False)
    return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def build_model(config: Config, classes: int) -> nn.Module:
    """Returns the recipe's model with a head for `model.num_classes`, or for the classes of the data where that is
    None.

    Raises:
      InputError: the head has fewer outputs than the data has classes, or the recipe's fields do not fit the model.
    """
    recipe, name = config.model, known(config.model.name, "model.name")
    if (recipe.num_classes or classes) < classes:
        raise InputError(
            f"model.num_classes {recipe.num_classes} is below the {classes} classes of {config.data.dataset}: "
            "leave it out, or raise it"
        )
    classes = recipe.num_classes or classes
    dtype = jnp.dtype(recipe.compute_dtype)
    fields = {} if config.data.channels == 3 else {"in_channels": config.data.channels}
    model: Any = create_model(name, num_classes=classes, dtype=dtype, **fields, **model_fields(recipe))
    if not hasattr(model, "num_classes"):
        raise InputError(
            f"model.name {name}: the module {type(model).__name__} has no field num_classes, by which its outputs are "
            "known: give it one, `num_classes: int`, in place of a field of another name"
        )
    size, stride = min(sides(config.data.image_size)), stride_of(model)
    if hasattr(model, "image_size"):
        model = model.clone(image_size=size)
    if size < stride:
        raise InputError(
            f"data.image_size {config.data.image_size} is below the stride of {name}, which shrinks images by "
            f"{stride}: enlarge them, or take a network for small ones, such as cifar_resnet20"
        )
    try:
        variable_shapes(model)
    except ValueError as error:
        raise InputError(f"model.name {name} with these fields of model is impossible: {error}") from error
    return model


def images_per_statistic(config: Config, devices: int) -> int:
    """Returns how many images of a step share the statistics of a batch norm, after `parallel.batch_norm`.

    Raises:
      InputError: ghost batches do not divide what a device sees at once.
    """
    scope, parts = config.parallel.batch_norm, config.train.accumulate_steps
    whole, each = config.train.batch_size // parts, config.train.batch_size // parts // devices
    if not scope.startswith("ghost:"):
        return each if scope == "local" else whole
    size, seen = int(scope.removeprefix("ghost:")), whole if config.parallel.strategy == "jit" else each
    if seen % size:
        raise InputError(
            f"parallel.batch_norm {scope}: the {seen} images that go through at once do not divide into groups of "
            f"{size}; the nearest sizes that do are {', '.join(map(str, nearest_divisors(seen, size)))}"
        )
    return size


def nearest_divisors(number: int, size: int) -> list[int]:
    """Returns the divisors of a number just below and just above a size."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < size], [d for d in divisors if d > size]
    return below[-1:] + above[:1]


def norms_of_one_value(config: Config, model: nn.Module, devices: int) -> list[str]:
    """Returns the paths of the batch norms that train on one value a channel, whose output is then their bias alone.

    Args:
      model: of `build_model`.
    """
    if images_per_statistic(config, devices) > 1 or config.finetune.mode == "linear_probe":
        return []
    found: list[str] = []
    rate = rate_of(config.optimizer.rate_rules)

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, called = context.module, context.method_name == "__call__"
        if called and isinstance(module, BatchNorm) and not module.frozen and args[0].size == args[0].shape[-1]:
            path = "/".join(module.path)
            if rate(f"{path}/scale"):
                found.append(path)
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *sides(config.data.image_size), config.data.channels), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(block_by_block(model).init, jax.random.key(0), images)
    return list(dict.fromkeys(found))


def state_maker(
    config: Config, model: nn.Module, schedule: Any, own: OwnOptimizer | None = None
) -> Callable[[], TrainState]:
    """Returns a function without arguments that returns the recipe's first state, block by block, as checkpoints hold
    it.

    Its random bits come from JAX's `rbg` generator, which compiles several times faster than the default one; they are
    the same on any number of devices, but may differ between kinds of devices.
    """
    shape = (*sides(config.data.image_size), config.data.channels)
    optimizer, model = make_optimizer(config.optimizer, schedule, own=own), block_by_block(model)
    key = partial(jax.random.key, config.train.seed, impl="rbg")
    ema = config.train.ema_decay is not None
    return lambda: create_state(model, optimizer, key(), shape, ema)


def in_form(state: TrainState, config: Config) -> TrainState:
    """Returns a state, or its shapes, as the recipe's model takes it: with `model.scan` equal blocks are stacked."""
    return stack_blocks(state) if config.model.scan else state


def sharded_shapes(new_state: Callable[[], TrainState], mesh: Mesh) -> Any:
    """Returns shapes, types and shardings of a state, to restore into."""
    shapes = jax.eval_shape(new_state)
    place = state_sharding(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)


def model_with_parts(config: Config, parts: Parts, classes: int) -> tuple[Any, Parts]:
    """Returns the user's own model or the recipe's, and the parts with the number of outputs of that model.

    Args:
      classes: of the data; 0 where its labels are no classes.

    Raises:
      InputError: the model cannot be called or made, or there are no classes and no loss of the user's own.
    """
    if not classes and parts.loss is None:
        raise InputError(
            "the labels of the data are no classes, for which there is no loss: give one of your own, a function "
            "(logits, batch) -> float32 [batch]; or give the classes' numbers as labels"
        )
    if parts.model is not None:
        return parts.model, dataclasses.replace(parts, outputs=own_outputs(parts.model, config, classes))
    if not classes and config.model.num_classes is None:
        raise InputError(
            "the labels of the data are no classes, so nothing says how many outputs the model has: give "
            "model.num_classes, or a model of your own"
        )
    model: Any = build_model(config, classes)
    return model, dataclasses.replace(parts, outputs=model.num_classes if classes else 0)


def restore(run: str | Path, step: int | Literal["best"] | None = None, **parts: Any) -> tuple[TrainState, int]:
    """Reads the state of a run, as its recipe's model and optimizer have it, on the first device of this process.

    Args:
      run: its folder; nothing in it is touched, and the run may be under way.
      step: of a checkpoint that is kept, or `best`; None takes the newest sound one.
      **parts: `model` and `optimizer` that the run's user brought, as for `train`.

    Returns:
      The state (blocks one by one, also of a run with `model.scan`) and its step.

    Raises:
      InputError: the folder holds no run or no such checkpoint, it is damaged, or of another model or optimizer.

    Example::

      state, step = rj.restore("runs/a")
      model = rj.create_model("cifar_resnet20", num_classes=10)  # that of its recipe
      logits = model.apply(state.variables, images, train=False)
    """
    _, state, _ = read_run(path_of(run, "run"), "latest" if step is None else str(step), make_parts(parts))
    return state, int(state.step)


def read_run(
    folder: Path, checkpoint: str | None, parts: Parts, optimizer: bool = True
) -> tuple[Config, TrainState, Record]:
    """Returns recipe, state and record of a checkpoint; arguments and errors as for `restore` and `read_checkpoint`.

    Args:
      optimizer: read its state too; where it is not, the user's own one need not be given.
    """
    config = recorded_recipe(folder)
    if config is None:
        raise InputError(f"{folder} holds no run: there is no {folder / 'config.json'}")
    check_parts(folder, parts, accept=True, needed=("model", "optimizer") if optimizer else ("model",))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shapes(record: Record) -> Any:
        model = parts.model or build_model(config, len(record["class_names"]))
        new = jax.eval_shape(state_maker(config, model, lambda step: 0.0, parts.optimizer if optimizer else None))
        wanted = new if optimizer else new.replace(opt_state=())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)

    state, record = read_checkpoint(folder, shapes, checkpoint)
    return config, state, record
