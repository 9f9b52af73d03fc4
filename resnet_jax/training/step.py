"""The training and the evaluation step as pure functions; no other file takes the gradient of training.

`make_train_step` composes small functions: a gradient, of parts of the batch if need be (`accumulated`), averaged over
devices (`averaged`), taken at a worse point nearby (`sharpness_aware`), then the optimizer, the moving average, and
`unless_nonfinite`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnet_jax.data.on_device import normalize
from resnet_jax.training.finetune import frozen_statistics, without_gradient
from resnet_jax.training.losses import Loss, cross_entropy
from resnet_jax.training.metrics import (
    Metric,
    Sums,
    are_classes,
    eval_sums,
    loss_sums,
    one_each,
    sums_of,
    train_sums,
)
from resnet_jax.training.state import PyTree, TrainState

Batch: TypeAlias = dict[str, Any]
"""`image` [batch, height, width, channel] and what loss and metrics need, most often `label`: int32 [batch], 0 and 1
[batch, classes], or any arrays [batch, ...]. A prepared one may also hold `target`, float32 [batch, classes]."""

Prepare: TypeAlias = Callable[[Batch, jax.Array], Batch]
"""`prepare(batch, key) -> batch` makes what the model and the loss are given, in the compiled step."""

TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Sums]]
Gradient: TypeAlias = Callable[[PyTree, PyTree, jax.Array, Batch], tuple[PyTree, PyTree, Sums]]
"""`gradient(params, collections, key, batch) -> (gradient, collections, sums)`; `collections` are all other variables,
`batch_stats` among them."""

AUXILIARY = 0.3
"""Weight of an auxiliary head in the loss (Szegedy et al. 2014)."""

NO_METRICS: Mapping[str, Metric] = MappingProxyType({})


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Metric] = NO_METRICS,
    classes: bool | None = None,
    prepare: Prepare | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    accumulate_steps: int = 1,
    sam_rho: float = 0.0,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
    frozen: Callable[[str], bool] | None = None,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, sums)`: one update from one batch, a pure function to be jitted.

    Under `jit` a batch that is split over devices (`shard_batch`) gives loss, gradient and batch statistics of the
    whole batch; on several CPU devices put `ops.sharded_batch()` around the function, or images travel between them.
    With `mesh` the same update runs on each device's share of the batch (`shard_map`) and averages over the devices;
    with `axis_name` it is a function for one device of a `shard_map` or `pmap` of your own.

    Args:
      model: called as `model(images, train=True)`; may keep `batch_stats` and other collections, draw from `dropout`,
        and sow `auxiliary_logits` (whose loss counts 0.3) and `losses` (which are added to each example's).
      optimizer: whose state `state.opt_state` is.
      loss: `loss(logits, batch) -> float32 [batch]`, one number for each example; the step minimises their mean.
      metrics: name -> `metric(logits, batch) -> [batch]`, of the step's own pass, in training.
      classes: whether `batch["label"]` says the class, of which `accuracy` counts those that are right; None tells by
        shapes and types, but not where there is one logit and an integer for each image: make `label` [batch, 1] then.
      prepare: augments a batch, from a key of the step; None takes batches as they are.
      mean, std: of the pixels, for each channel, in [0, 1]: images become (pixel - mean) / std, of uint8 pixels divided
        by 255. None leaves floats as they are.
      seed: of the random keys, which are `fold_in(key(seed), step)`.
      accumulate_steps: parts of a batch whose gradients are added up one after the other, which saves memory; batch
        normalisation takes the statistics of each part.
      sam_rho: radius of sharpness-aware minimisation (Foret et al. 2020); 0 for none.
      ema_decay: of the moving average of parameters and statistics, which `state.ema` holds; at first
        (1 + step) / (10 + step) where that is less; None for none.
      skip_nonfinite: an update whose loss or values are not finite leaves the state as it was.
      frozen: whether a parameter, by its path, is a constant; the batch statistics of its norm stay too.
      mesh: with an axis `data`.
      axis_name: of the mapped axis that this function runs under.

    Returns:
      A function whose sums are `loss`, `count`, `accuracy` where there are classes, and each metric, over the batch;
      and `skipped` with `skip_nonfinite`. `means(sums)` divides them. Every example of a batch counts: a `mask`, as
      evaluations take it, is for a loss of your own alone.

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train):
      ...         return nn.Dense(10)(images.mean((1, 2)))
      >>> model, tx = Net(), optax.sgd(0.1)
      >>> state = rj.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
      >>> batch = {"image": jnp.zeros((4, 8, 8, 3)), "label": jnp.arange(4)}
      >>> step = jax.jit(rj.make_train_step(model, tx))
      >>> state, sums = step(state, batch)
      >>> int(state.step), sorted(sums)
      (1, ['accuracy', 'count', 'loss'])
    """
    axis = axis_name if mesh is None else "data"
    gradient = make_gradient(model, loss, frozen, metrics, classes)
    if accumulate_steps > 1:
        gradient = accumulated(gradient, accumulate_steps)
    if axis is not None:
        gradient = averaged(gradient, axis)
    if sam_rho:
        gradient = sharpness_aware(gradient, sam_rho)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = of_device(jax.random.split(step_key(seed, state.step), 4)[3], axis)
        before = {"batch_stats": state.batch_stats} | state.collections
        grads, after, sums = gradient(state.params, before, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        others, ema = {name: values for name, values in after.items() if name != "batch_stats"}, state.ema
        if ema_decay is not None:
            new = {"params": params, "batch_stats": after["batch_stats"]}
            ema = moving_average(ema, new, state.step, ema_decay)
        updated = TrainState(state.step + 1, params, after["batch_stats"], opt_state, ema, others)
        return unless_nonfinite(state, updated, sums) if skip_nonfinite else (updated, sums)

    if mesh is not None:
        whole, split = P(), P(axis)
        update = jax.shard_map(update, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        if prepare is not None:
            batch = prepare(batch, of_device(step_key(seed, state.step), axis_name))
        return update(state, batch | {"image": pixels(batch["image"], mean, std)})

    return train_step


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the random key of a step. It is split in four: crops, flips, mixing (`prepare`), and dropout."""
    return jax.random.fold_in(jax.random.key(seed), step)


def of_device(key: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns a device's own key, from that of all devices of a mapped axis; without an axis the key as it is."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def pixels(images: jax.Array, mean: Sequence[float] | None, std: Sequence[float] | None) -> jax.Array:
    """Returns images as floats: uint8 divided by 255, and (pixel - mean) / std where these are given."""
    if mean is None and std is None and images.dtype != jnp.uint8:
        return images
    return normalize(images, tuple(mean or (0.0,)), tuple(std or (1.0,)), jnp.dtype(jnp.float32))


def make_gradient(
    model: nn.Module,
    loss: Loss,
    frozen: Callable[[str], bool] | None = None,
    metrics: Mapping[str, Metric] = NO_METRICS,
    classes: bool | None = None,
) -> Gradient:
    """Returns the gradient of the mean loss of a batch, with the new collections and the sums of `make_train_step`."""

    def objective(
        params: PyTree, others: PyTree, key: jax.Array, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Sums]]:
        variables = {"params": without_gradient(params, frozen) if frozen else params} | others
        with frozen_statistics(frozen) if frozen else nullcontext():
            logits, updated = model.apply(
                variables,
                batch["image"],
                train=True,
                mutable=[*others, "auxiliary_logits", "losses"],
                rngs={"dropout": key},
            )
        count = len(batch["image"])
        losses = one_each(loss(logits, batch), count, "loss")
        for auxiliary in jax.tree.leaves(updated.get("auxiliary_logits", {})):
            losses += AUXILIARY * loss(auxiliary, batch)
        for more in jax.tree.leaves(updated.get("losses", {})):
            losses += more
        sums = train_sums(losses, logits, batch, are_classes(logits, batch) if classes is None else classes)
        sums |= sums_of(metrics, logits, batch)
        return losses.mean(), ({name: updated.get(name, values) for name, values in others.items()}, sums)

    def gradient(params: PyTree, others: PyTree, key: jax.Array, batch: Batch) -> tuple[PyTree, PyTree, Sums]:
        grads, (others, sums) = jax.grad(objective, has_aux=True)(params, others, key, batch)
        return grads, others, sums

    return gradient


def accumulated(gradient: Gradient, parts: int) -> Gradient:
    """Returns the gradient of a batch that is computed in `parts` parts; each of them updates the statistics."""

    def whole(params: PyTree, stats: PyTree, key: jax.Array, batch: Batch) -> tuple[PyTree, PyTree, Sums]:
        def add_part(carried: tuple[PyTree, PyTree], part: tuple[jax.Array, Batch]) -> tuple[PyTree, Sums]:
            grads, stats = carried
            more, stats, sums = gradient(params, stats, *part)
            return (jax.tree.map(jnp.add, grads, more), stats), sums

        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        start = (jax.tree.map(jnp.zeros_like, params), stats)
        (grads, stats), sums = jax.lax.scan(add_part, start, (jax.random.split(key, parts), split))
        return jax.tree.map(lambda g: g / parts, grads), stats, jax.tree.map(lambda s: s.sum(0), sums)

    return whole


def averaged(gradient: Gradient, axis_name: str) -> Gradient:
    """Returns a gradient that is averaged over the devices of a mapped axis, with its statistics; sums are added up."""

    def of_all(params: PyTree, stats: PyTree, key: jax.Array, batch: Batch) -> tuple[PyTree, PyTree, Sums]:
        # Each device's own copy: of a common one, `shard_map` with check_vma adds the gradients up before they come.
        params, stats = jax.tree.map(copy, (params, stats))
        grads, stats, sums = gradient(params, stats, key, batch)
        grads, stats = jax.tree.map(mean, (grads, stats))
        return grads, stats, jax.lax.psum(sums, axis_name)

    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.pcast(x, axis_name, to="varying")

    def mean(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return of_all


def sharpness_aware(gradient: Gradient, rho: float) -> Gradient:
    """Returns the gradient at `rho` times the unit vector along the gradient (Foret et al. 2020, arXiv:2010.01412).

    Batch statistics and sums are those of the first pass.
    """

    def at_worse_point(params: PyTree, stats: PyTree, key: jax.Array, batch: Batch) -> tuple[PyTree, PyTree, Sums]:
        grads, new_stats, sums = gradient(params, stats, key, batch)
        length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))) + 1e-12
        worse = jax.tree.map(lambda p, g: p + rho / length * g, params, grads)
        return gradient(worse, stats, key, batch)[0], new_stats, sums

    return at_worse_point


def moving_average(old: PyTree, new: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Returns old * d + new * (1 - d) with d = min(decay, (1 + step) / (10 + step)), to forget the start soon."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, b: a * d + b * (1.0 - d), old, new)


def unless_nonfinite(before: TrainState, after: TrainState, sums: Sums) -> tuple[TrainState, Sums]:
    """Returns an update, or the state before it where its loss or anything in it is not finite.

    Integers, which count steps, go on in both cases, so that the learning rate keeps its place. The sums of a step that
    was skipped are 0, but for `skipped`, which is 1.
    """
    floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in [sums["loss"], *floats]]).all()

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    state = jax.tree.map(choose, before, after)
    return state, {name: jnp.where(finite, x, 0.0) for name, x in sums.items()} | {"skipped": 1.0 - finite}


def make_eval_step(
    model: nn.Module,
    *,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Metric] = NO_METRICS,
    classes: bool | None = None,
    prepare: Callable[[Batch], Batch] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    flip: bool = False,
) -> Callable[[PyTree, Batch], tuple[Sums, PyTree]]:
    """Returns `eval_step(variables, batch) -> (sums, logits)`: sums over the examples whose `mask` is true.

    Args:
      model: called as `model(images, train=False)`.
      loss, metrics, classes, mean, std: as for `make_train_step`.
      prepare: makes what the model and the loss are given; None takes batches as they are.
      flip: logits are the mean of those of each image and of its mirror image.

    Returns:
      A function of the model's variables (`state.variables`, `state.averages`) and a batch, which may have `mask` bool
      [batch]. Sums are those of `eval_sums` where there are classes, else `loss` and `count`, and each metric; logits
      are what the model gives, for classes float32 [batch, classes].

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images, train):
      ...         return nn.Dense(10)(images.mean((1, 2)))
      >>> model, tx = Net(), optax.sgd(0.1)
      >>> state = rj.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
      >>> batch = {"image": jnp.zeros((4, 8, 8, 3)), "label": jnp.arange(4)}
      >>> evaluate = jax.jit(rj.make_eval_step(model))
      >>> sums, logits = evaluate(state.variables, batch | {"mask": jnp.array([True, True, True, False])})
      >>> int(sums["count"]), logits.shape
      (3, (4, 10))
    """

    def eval_step(variables: PyTree, batch: Batch) -> tuple[Sums, PyTree]:
        batch = batch if prepare is None else prepare(batch)
        images = pixels(batch["image"], mean, std)
        batch = batch | {"image": images}
        forward = partial(model.apply, variables, train=False)
        logits: PyTree = forward(images)
        if flip:
            logits = jax.tree.map(lambda a, b: (a + b) / 2, logits, forward(images[:, :, ::-1]))
        losses = one_each(loss(logits, batch), len(images), "loss")
        mask = batch.get("mask", jnp.ones(len(images), bool))
        counted = are_classes(logits, batch) if classes is None else classes
        sums = eval_sums(losses, logits, batch["label"], mask) if counted else loss_sums(losses, mask)
        return sums | sums_of(metrics, logits, batch, mask), logits

    return eval_step
