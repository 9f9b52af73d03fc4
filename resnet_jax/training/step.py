"""The training and the evaluation step as pure functions. The only file that takes a gradient."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import Config
from resnet_jax.data import on_device
from resnet_jax.ops import sharded_batch
from resnet_jax.training.finetune import frozen_statistics, without_gradient
from resnet_jax.training.losses import make_loss, soft_targets
from resnet_jax.training.metrics import TRAIN_SUMS, Sums, eval_sums, train_sums
from resnet_jax.training.state import PyTree, TrainState

Batch = dict[str, jax.Array]

AUXILIARY = 0.3
"""What the loss of an auxiliary head counts (Szegedy et al. 2014)."""


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """`train_step(state, batch) -> (state, sums)`: one update from one batch, to be jitted with the state donated.

    The batch holds `image` uint8 [batch, height, width, channel] and `label` int32 [batch]. Crops and flips are drawn
    here when the data lies on the device, otherwise they were made on the host. With the strategy `jit`, a batch that
    is split over a mesh gives loss, gradient and batch statistics of the whole batch; with `shard_map` the same update
    runs for each device of `mesh` and averages over them. `options` are those of `make_update`.
    """
    devices = 1 if mesh is None else mesh.size
    each = config.parallel.strategy == "shard_map"
    update = make_update(with_scope(model, config, devices), optimizer, config, "data" if each else None, **options)
    if each:
        assert mesh is not None
        split, whole = P("data"), P()
        update = jax.shard_map(
            update, mesh=mesh, in_specs=(whole, split, split, split), out_specs=whole, check_vma=False
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        images, targets = prepare(batch, state.step, config, model)
        return update(state, images, targets, batch["label"])

    return sharded_batch(devices > 1)(train_step)


def make_update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None,
    frozen: Callable[[str], bool] | None = None,
    class_weights: np.ndarray | None = None,
) -> Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, Sums]]:
    """`update(state, images, targets, labels) -> (state, sums)`: gradient, optimizer and averages, for all strategies.

    With `optimizer.sam_rho` the gradient is that at the worst point in the neighbourhood.

    Args:
      axis_name: None sees the whole batch; otherwise the function is one device's, and averages over that axis.
      frozen: whether a parameter, by its path, is a constant; the batch statistics of its norm stay too.
      class_weights: [classes], what a class counts in the loss.
    """
    gradient = make_gradient(model, config, axis_name, frozen, class_weights)

    def update(state: TrainState, images: jax.Array, targets: jax.Array, labels: jax.Array) -> tuple[TrainState, Sums]:
        key = jax.random.split(step_key(state.step, config), 4)[3]
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        batch = (images, targets, labels)
        grads, batch_stats, sums = gradient(state.params, state.batch_stats, key, batch)
        if rho := config.optimizer.sam_rho:
            length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))) + 1e-12
            worst = jax.tree.map(lambda p, g: p + rho / length * g, state.params, grads)
            grads, _, _ = gradient(worst, state.batch_stats, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, state.step, config)
        updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        return unless_nonfinite(state, updated, sums) if config.train.on_nonfinite == "skip" else (updated, sums)

    return update


def make_gradient(
    model: nn.Module,
    config: Config,
    axis_name: str | None,
    frozen: Callable[[str], bool] | None,
    class_weights: np.ndarray | None,
) -> Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[PyTree, PyTree, Sums]]:
    """`gradient(params, batch_stats, key, (images, targets, labels)) -> (gradient, batch_stats, sums)`.

    With `train.accumulate_steps` the batch goes through in that many parts, which saves memory: the gradient is that of
    the whole batch, but for batch normalisation, which takes the statistics of each part. Arguments: `make_update`.
    """
    loss_of, parts = make_loss(config.train, class_weights), config.train.accumulate_steps
    constant = frozen or (lambda path: False)

    def objective(params: PyTree, stats: PyTree, part: PyTree) -> tuple[jax.Array, Any]:
        images, targets, labels, key = part
        given = {"params": without_gradient(params, constant) if frozen else params, "batch_stats": stats}
        with frozen_statistics(constant) if frozen else nullcontext():
            logits, updated = model.apply(
                given, images, train=True, mutable=["batch_stats", "auxiliary_logits"], rngs={"dropout": key}
            )
        losses = loss_of(logits, targets)
        for more in jax.tree.leaves(updated.get("auxiliary_logits", {})):
            losses += AUXILIARY * loss_of(more, targets)
        return losses.mean(), (updated.get("batch_stats", {}), train_sums(losses, logits, labels))

    def gradient(params: PyTree, stats: PyTree, key: jax.Array, batch: PyTree) -> tuple[PyTree, PyTree, Sums]:
        def add_part(carried: PyTree, part: PyTree) -> tuple[PyTree, Sums]:
            grads, stats = carried
            more, (stats, sums) = jax.grad(objective, has_aux=True)(params, stats, part)
            return (jax.tree.map(jnp.add, grads, more), stats), sums

        if parts == 1:
            grads, (stats, sums) = jax.grad(objective, has_aux=True)(params, stats, (*batch, key))
        else:
            split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
            start = (jax.tree.map(jnp.zeros_like, params), stats)
            (grads, stats), sums = jax.lax.scan(add_part, start, (*split, jax.random.split(key, parts)))
            grads, sums = jax.tree.map(lambda g: g / parts, grads), jax.tree.map(lambda s: s.sum(0), sums)
        if axis_name is not None:
            grads, stats = jax.lax.pmean((grads, stats), axis_name)
            sums = jax.lax.psum(sums, axis_name)
        return grads, stats, sums

    return gradient


def unless_nonfinite(before: TrainState, after: TrainState, sums: Sums) -> tuple[TrainState, Sums]:
    """An update, or the state before it where its loss or anything in it is not finite.

    Integers, which count steps, go on in both cases, so that the learning rate keeps its place. The sums of a step that
    was skipped are 0, but for `skipped`, which is 1.
    """
    floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in [sums["loss"], *floats]]).all()

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    state = jax.tree.map(choose, before, after)
    return state, {name: jnp.where(finite, x, 0.0) for name, x in sums.items()} | {"skipped": 1.0 - finite}


def make_pmap_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    draw: Callable[[jax.Array, Batch], Batch] | None = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """`step(state, batch) -> (state, sums)` with the classical `pmap` around the update; it compiles itself.

    Args:
      draw: makes the batch of a step from what the step is given: `draw(step, data)`; None where that is a batch.
      **options: of `make_update`.
    """
    devices = mesh.size
    update = make_update(with_scope(model, config, devices), optimizer, config, "data", **options)
    update = sharded_batch(devices > 1)(update)
    each = jax.pmap(
        update,
        axis_name="data",
        in_axes=(None, 0, 0, 0),
        out_axes=None,
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )
    by_device, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @partial(jax.jit, out_shardings=by_device)
    def prepared(step: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        batch = batch if draw is None else draw(step, batch)
        images, targets = prepare(batch, step, config, model)
        return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (images, targets, batch["label"]))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        updated = each(state, *prepared(state.step, batch))
        if whole.is_fully_addressable:
            return updated
        return jax.tree.map(of_all_processes, updated)  # pmap gives each process an array of its own devices

    def of_all_processes(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(x.shape, whole, [shard.data for shard in x.addressable_shards])

    return step


def with_scope(model: Any, config: Config, devices: int) -> Any:
    """The model with batch statistics of the recipe's scope, for the view that its strategy has of the batch."""
    if not hasattr(model, "ghost"):
        return model
    scope, per_device = config.parallel.batch_norm, config.parallel.strategy != "jit"
    parts = config.train.accumulate_steps
    if scope.startswith("ghost:"):
        return model.clone(ghost=int(scope.removeprefix("ghost:")))
    if scope == "local":
        return model if per_device else model.clone(ghost=config.train.batch_size // devices // parts)
    return model.clone(axis_name="data") if per_device else model


def step_key(step: jax.Array, config: Config) -> jax.Array:
    """The random key of a step."""
    return jax.random.fold_in(jax.random.key(config.train.seed), step)


def prepare(batch: Batch, step: jax.Array, config: Config, model: Any) -> tuple[jax.Array, jax.Array]:
    """Images as the network takes them and soft targets, from a batch of pixels, or of features, and labels."""
    targets = soft_targets(batch["label"], model.num_classes, config.train.label_smoothing)
    if "feature" in batch:
        return batch["feature"], targets
    crop_key, flip_key, mix_key, _ = jax.random.split(step_key(step, config), 4)
    images, augment = batch["image"], config.augment
    if config.data.on_device and augment.crop == "pad":
        images = on_device.pad_crop(crop_key, images, augment.pad)
    if config.data.on_device and augment.flip != "none":
        by_chance = jax.random.bernoulli(flip_key, shape=images.shape[:1])
        images = on_device.flip(by_chance if augment.flip == "random" else batch["turn"], images)
    images = on_device.normalize(images, config.data.mean, config.data.std, model.dtype)
    if augment.mixup or augment.cutmix:
        images, targets = on_device.mix(mix_key, images, targets, augment.mixup, augment.cutmix)
    return images, targets


def moving_average(old: PyTree, new: PyTree, step: jax.Array, config: Config) -> PyTree:
    """old * d + new * (1 - d) with d = min(ema_decay, (1 + step) / (10 + step)), to forget the start soon."""
    assert config.train.ema_decay is not None
    decay = jnp.minimum(config.train.ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, b: a * decay + b * (1.0 - decay), old, new)


def make_device_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    config: Config,
    most: int,
    batch_sharding: jax.sharding.Sharding,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Sums]]:
    """`device_step(state, data, n) -> (state, sums)`: n steps on batches drawn from data that lies on the device.

    `data` is a whole split as `draw_batch` takes it; n, an int32 scalar, is at most `most`. Each sum comes back as an
    array [most], of which the first n are filled. Where `most` is 1, n is not looked at.
    """

    def drawn(data: Batch, i: jax.Array | int, step: jax.Array) -> Batch:
        return draw(step, data, config, batch_sharding)

    return _several_steps(train_step, config, most, drawn)


def make_streamed_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    config: Config,
    most: int,
    batch_sharding: jax.sharding.Sharding,
) -> Callable[[TrainState, Sequence[Batch], jax.Array], tuple[TrainState, Sums]]:
    """`streamed_step(state, batches, n) -> (state, sums)`: steps on the first n of `most` batches; sums as above."""

    def one_of(stacked: Batch, i: jax.Array | int, step: jax.Array) -> Batch:
        return jax.lax.with_sharding_constraint({name: x[i] for name, x in stacked.items()}, batch_sharding)

    several_steps = _several_steps(train_step, config, most, one_of)

    def streamed_step(state: TrainState, batches: Sequence[Batch], n: jax.Array) -> tuple[TrainState, Sums]:
        return several_steps(state, {name: jnp.stack([b[name] for b in batches]) for name in batches[0]}, n)

    return streamed_step


def _several_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    config: Config,
    most: int,
    batch_of: Callable[[Batch, jax.Array | int, jax.Array], Batch],
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Sums]]:
    """n steps, the i-th of them, counted from 0, on `batch_of(data, i, state.step)`."""

    def several_steps(state: TrainState, data: Batch, n: jax.Array) -> tuple[TrainState, Sums]:
        if most == 1:
            state, sums = train_step(state, batch_of(data, 0, state.step))
            return state, {name: x[None] for name, x in sums.items()}

        def next_one(i: jax.Array, carried: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
            state, filled = carried
            state, sums = train_step(state, batch_of(data, i, state.step))
            return state, {name: filled[name].at[i].set(x) for name, x in sums.items()}

        names = TRAIN_SUMS + (("skipped",) if config.train.on_nonfinite == "skip" else ())
        return jax.lax.fori_loop(0, n, next_one, (state, {name: jnp.zeros(most) for name in names}))

    return several_steps


def draw(step: jax.Array, data: Batch, config: Config, batch_sharding: jax.sharding.Sharding) -> Batch:
    """The batch of a step from data that lies on the device, split over the devices."""
    batch = on_device.draw_batch(data, step, config.train.batch_size, config.train.seed, config.augment.repeats)
    return jax.lax.with_sharding_constraint(batch, batch_sharding)


def make_eval_step(model: nn.Module, config: Config) -> Callable[[PyTree, Batch], tuple[Sums, jax.Array]]:
    """`eval_step(variables, batch) -> (sums, logits)`: sums over the examples of a batch whose `mask` is true.

    `variables` are `{"params", "batch_stats"}`; logits are float32 [batch, classes]. The loss is the training loss
    without smoothing and weights.
    """
    loss_of = make_loss(config.train)

    def eval_step(variables: PyTree, batch: Batch) -> tuple[Sums, jax.Array]:
        if "feature" in batch:
            logits: Any = model.apply(variables, batch["feature"], train=False)
        else:
            images = on_device.normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
            logits = model.apply(variables, images, train=False)
            if config.augment.eval_flip:
                logits = (logits + model.apply(variables, images[:, :, ::-1], train=False)) / 2
        losses = loss_of(logits, soft_targets(batch["label"], model.num_classes, 0.0))
        return eval_sums(losses, logits, batch["label"], batch["mask"]), logits

    return eval_step
