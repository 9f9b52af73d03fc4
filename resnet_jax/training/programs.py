"""The compiled programs of a recipe: its training step, several of them in a call, and its evaluation step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError, known, sides
from resnet_jax.data import on_device
from resnet_jax.data.dataset import Dataset, labels_of
from resnet_jax.training.build import images_per_statistic
from resnet_jax.training.finetune import Phase
from resnet_jax.training.losses import class_weights, make_loss, soft_targets
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.parts import NO_PARTS, Parts
from resnet_jax.training.pmap import pmap_step
from resnet_jax.training.several_steps import steps_on_batches, steps_on_device
from resnet_jax.training.sharding import batch_sharding, compiler_options, sharded_over
from resnet_jax.training.state import PyTree, TrainState
from resnet_jax.training.step import (
    Batch,
    Prepare,
    TrainStep,
    make_eval_step,
    make_train_step,
    step_key,
)

Program: TypeAlias = Callable[..., tuple[TrainState, Sums]]
"""Of (state, data on the device or a sequence of batches, number of steps)."""

STEPS_PER_CALL = 5
"""With data on the device, where a recipe does not say: few enough to end soon after a signal; they share what a
dispatch costs and memory."""
STREAMED_PER_CALL = {"cpu": 2}
"""The same by platform with data from the host, elsewhere 1: a CPU finds a step's memory anew for each call, where
`cli.MEMORY` does not keep it."""


def recipe_step(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    frozen: Callable[[str], bool] | None = None,
    weights: np.ndarray | None = None,
    parts: Parts = NO_PARTS,
) -> TrainStep:
    """Returns the training step of a recipe, with its loss, augmentation and strategy (`jit` or `shard_map`).

    Args:
      mesh: needed for `shard_map`, and where batch statistics are those of a device.
      frozen: as for `make_train_step`.
      weights: [classes], what a class counts in the loss; None for 1.
      parts: loss and metrics of the user's own.
    """
    model = with_scope(model, config, 1 if mesh is None else mesh.size)
    each = mesh if config.parallel.strategy == "shard_map" else None
    options = step_options(config, model, frozen, weights, parts)
    step = make_train_step(model, optimizer, prepare=make_prepare(config, model, parts), mesh=each, **options)
    return sharded_over(mesh)(step)


def step_options(
    config: Config,
    model: nn.Module,
    frozen: Callable[[str], bool] | None,
    weights: np.ndarray | None,
    parts: Parts,
) -> dict[str, Any]:
    """Returns the arguments of `make_train_step` that a recipe and its user's own parts give."""
    recipe = config.train
    return {
        "loss": parts.loss or make_loss(recipe.loss, recipe.focal_gamma, weights),
        "metrics": parts.metrics,
        "classes": parts.outputs_of(model) > 0,
        "seed": recipe.seed,
        "accumulate_steps": recipe.accumulate_steps,
        "sam_rho": config.optimizer.sam_rho,
        "ema_decay": recipe.ema_decay,
        "skip_nonfinite": recipe.on_nonfinite == "skip",
        "frozen": frozen,
    }


def names_of_sums(config: Config, model: nn.Module, parts: Parts = NO_PARTS) -> tuple[str, ...]:
    """Returns the names of the sums that the step of a recipe gives."""
    classes = ("accuracy",) if parts.outputs_of(model) > 0 else ()
    skipped = ("skipped",) if config.train.on_nonfinite == "skip" else ()
    return ("loss", *classes, "count", *parts.metrics, *skipped)


def with_scope(model: nn.Module, config: Config, devices: int) -> Any:
    """Returns the model with batch statistics of the recipe's scope, for the part of the batch that its step sees."""
    scope, per_device = config.parallel.batch_norm, config.parallel.strategy != "jit"
    parts = config.train.accumulate_steps
    if not hasattr(model, "ghost"):
        shares = per_device and scope == "global" and hasattr(model, "axis_name")
        return model.clone(axis_name="data") if shares else model
    if scope.startswith("ghost:"):
        return model.clone(ghost=int(scope.removeprefix("ghost:")))
    if scope == "local":
        return model if per_device else model.clone(ghost=config.train.batch_size // devices // parts)
    return model.clone(axis_name="data") if per_device else model


def check_scope(config: Config, model: nn.Module, devices: int) -> None:
    """Checks that batch statistics of a model of the user's own are of as many images as `parallel.batch_norm` says.

    Raises:
      InputError: they are not; the message says what to give the module, or which recipe it fits.
    """
    if hasattr(model, "ghost"):
        return
    per_device, parts = config.parallel.strategy != "jit", config.train.accumulate_steps
    wanted, seen = images_per_statistic(config, devices), config.train.batch_size // parts
    if wanted == (seen // devices if per_device else seen):
        return
    images = jax.ShapeDtypeStruct((2, *sides(config.data.image_size), config.data.channels), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(partial(model.init, train=False), keys, images)

    def updated(variables: PyTree, images: jax.Array) -> PyTree:
        scoped = with_scope(model, config, devices)
        return scoped.apply(variables, images, train=True, mutable=True, rngs=keys)[1].get("batch_stats", {})

    try:
        traced = jax.make_jaxpr(updated)(variables, images).jaxpr
    except NameError:  # it asks for the axis over which the devices are mapped, and so for their statistics
        return
    if all(value in traced.invars for value in traced.outvars):
        return
    scope, strategy = config.parallel.batch_norm, config.parallel.strategy
    name = type(model).__name__
    if per_device and scope == "global":
        raise InputError(
            f"parallel.strategy {strategy}: the batch statistics of {name} would be those of each device's own "
            f"{seen // devices} images. Give its norms axis_name=self.axis_name, a field of the module that is None by "
            "default, or train with --parallel.strategy jit, or say so with --parallel.batch_norm local"
        )
    raise InputError(
        f"parallel.batch_norm {scope} has no effect on {name}, which has no field `ghost`: build it of "
        "resnet_jax.models.layers.BatchNorm(ghost=self.ghost), or leave parallel.batch_norm global"
    )


def make_prepare(config: Config, model: nn.Module, parts: Parts = NO_PARTS) -> Prepare:
    """Returns what makes images as the network takes them and soft `target`s from a batch of pixels and labels.

    Crops and flips are drawn here when the data lies on the device, otherwise they were made on the host. A batch of
    features (`feature`) is taken as it is. Where the labels are no classes there are no targets.
    """
    augment, (mean, std), outputs = config.augment, normalization(config), parts.outputs_of(model)
    dtype = getattr(model, "dtype", None) or jnp.float32
    from_device = known(config.data.on_device, "data.on_device")
    crop, flip = known(augment.crop, "augment.crop"), known(augment.flip, "augment.flip")
    pad = known(augment.pad, "augment.pad") if crop == "pad" else 0

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        label, targets = batch["label"], None
        if outputs:
            targets = soft_targets(label, outputs, config.train.label_smoothing)
        if "feature" in batch:
            return {"image": batch["feature"], "label": label, "target": targets}
        crop_key, flip_key, mix_key, _ = jax.random.split(key, 4)
        images = batch["image"]
        if from_device and crop == "pad":
            images = on_device.pad_crop(crop_key, images, pad)
        if from_device and flip != "none":
            by_chance = jax.random.bernoulli(flip_key, shape=images.shape[:1])
            images = on_device.flip(by_chance if flip == "random" else batch["mirrored"], images)
        images = on_device.normalize(images, mean, std, dtype)
        if targets is None:
            return {"image": images, "label": label}
        if augment.mixup or augment.cutmix:
            images, targets = on_device.mix(mix_key, images, targets, augment.mixup, augment.cutmix)
        return {"image": images, "label": label, "target": targets}

    return prepare


def normalization(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation of the channels, of the recipe or as measured at the start of the run."""
    return known(config.data.mean, "data.mean"), known(config.data.std, "data.std")


def recipe_eval_step(
    config: Config, model: nn.Module, parts: Parts = NO_PARTS
) -> Callable[[PyTree, Batch], tuple[Sums, PyTree]]:
    """Returns the evaluation step of a recipe; its loss is that of training without smoothing and weights, or the
    user's own.
    """
    dtype, (mean, std) = getattr(model, "dtype", None) or jnp.float32, normalization(config)
    outputs = parts.outputs_of(model)

    def prepare(batch: Batch) -> Batch:
        if outputs:
            batch = batch | {"target": soft_targets(batch["label"], outputs, 0.0)}
        if "feature" in batch:
            return batch | {"image": batch["feature"]}
        return batch | {"image": on_device.normalize(batch["image"], mean, std, dtype)}

    loss = parts.loss or make_loss(config.train.loss, config.train.focal_gamma)
    how: dict[str, Any] = {"metrics": parts.metrics, "classes": outputs > 0, "flip": config.augment.eval_flip}
    return make_eval_step(model, loss=loss, prepare=prepare, **how)


def draw_from(config: Config, mesh: Mesh) -> Callable[[Batch, jax.Array], Batch]:
    """Returns `draw(data, step) -> batch` from a whole split on the device, the batch split over the devices."""
    recipe, sharding = config.train, batch_sharding(mesh)

    def draw(data: Batch, step: jax.Array) -> Batch:
        batch = on_device.draw_batch(data, step, recipe.batch_size, recipe.seed, config.augment.repeats)
        return jax.lax.with_sharding_constraint(batch, sharding)

    return draw


def steps_per_call(config: Config, from_device: bool, own_model: bool = False) -> int:
    """Returns the most steps in one call, with data that lies on the device or comes from the host.

    Args:
      own_model: the model is the user's own, whose convolutions may be XLA's: on a CPU they are ten times slower in a
        loop over steps.
    """
    if config.train.steps_per_call is not None:
        return config.train.steps_per_call
    if config.parallel.strategy == "pmap" or config.log.profile or (own_model and jax.default_backend() == "cpu"):
        return 1
    return STEPS_PER_CALL if from_device else STREAMED_PER_CALL.get(jax.default_backend(), 1)


def steps_in_call(step: int, most: int, ends: Sequence[int], every: Sequence[int]) -> int:
    """Returns how many steps the call from `step` on makes: it goes over none of `ends` and no multiple of `every`."""
    return min(most, *(end - step for end in ends if end > step), *(each - step % each for each in every))


def compile_steps(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    out_shardings: Any,
    *,
    from_device: bool,
    most: int,
    frozen: Callable[[str], bool] | None = None,
    weights: np.ndarray | None = None,
    parts: Parts = NO_PARTS,
) -> Program:
    """Returns `steps(state, data, n) -> (state, sums)`, at most `most` steps of a recipe in a call, jitted.

    Args:
      out_shardings: of state and sums.
      from_device: data is a whole split on the device; otherwise `most` batches.
      frozen, weights, parts: as for `recipe_step`.
    """
    if config.parallel.strategy == "pmap":
        model = with_scope(model, config, mesh.size)
        options = step_options(config, model, frozen, weights, parts)
        update = sharded_over(mesh)(make_train_step(model, optimizer, axis_name="data", **options))
        prepare, draw = make_prepare(config, model, parts), draw_from(config, mesh)

        def batch_of(data: Batch, step: jax.Array) -> Batch:
            return prepare(draw(data, step) if from_device else data, step_key(config.train.seed, step))

        one_step = pmap_step(update, mesh, batch_of)
        return lambda state, data, n: one_step(state, data if from_device else data[0])
    step, names = (
        recipe_step(config, model, optimizer, mesh, frozen, weights, parts),
        names_of_sums(config, model, parts),
    )
    if from_device:
        steps: Program = steps_on_device(step, draw_from(config, mesh), most, names)
    else:
        steps = steps_on_batches(step, batch_sharding(mesh), most, names)
    return jax.jit(steps, donate_argnums=0, out_shardings=out_shardings, compiler_options=compiler_options())


def compile_phases(
    config: Config,
    model: nn.Module,
    schedule: optax.Schedule,
    phases: Sequence[Phase],
    mesh: Mesh,
    out_shardings: Any,
    *,
    from_device: bool,
    most: int,
    weights: np.ndarray | None = None,
    parts: Parts = NO_PARTS,
) -> list[Program]:
    """Returns what `compile_steps` does, for each phase of a fine-tuning; the arguments are its own."""
    freezes = config.finetune.mode != "none" or any(factor == 0 for _, factor in config.optimizer.rate_rules)
    programs = []
    for rates in (phase.rates for phase in phases):
        optimizer = make_optimizer(config.optimizer, schedule, rates, parts.optimizer)
        frozen = (lambda path, rates=rates: rates(path) == 0.0) if freezes else None
        how: dict[str, Any] = {"from_device": from_device, "most": most, "frozen": frozen, "weights": weights}
        how["parts"] = parts
        programs.append(compile_steps(config, model, optimizer, mesh, out_shardings, **how))
    return programs


def weights_of_classes(config: Config, dataset: Dataset, outputs: int) -> np.ndarray | None:
    """Returns what a model's outputs count in the loss, after the recipe, 1 for those without a class; None for none.

    Raises:
      InputError: a class has no training image.
    """
    if config.train.class_weights == "none":
        return None
    labels, classes = labels_of(dataset.train), len(dataset.class_names)
    counts = labels.sum(0)[:classes] if dataset.multilabel else np.bincount(labels, minlength=classes)
    if missing := [name for name, n in zip(dataset.class_names, counts, strict=True) if n == 0]:
        raise InputError(f"train.class_weights: the classes {', '.join(missing)} have no training image")
    weights = class_weights(config.train.class_weights, counts)
    return None if weights is None else np.pad(weights, (0, outputs - classes), constant_values=1.0)
