"""The training and the evaluation step as pure functions. The only file of training that takes a gradient.

`make_train_step` composes small functions: a gradient, of parts of the batch if need be (`accumulated`), averaged over
devices (`averaged`), taken at a worse point nearby (`sharpness_aware`), then the optimizer, the moving average, and
`unless_nonfinite`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnet_jax.training.finetune import frozen_statistics, without_gradient
from resnet_jax.training.losses import Loss, cross_entropy
from resnet_jax.training.metrics import Sums, eval_sums, train_sums
from resnet_jax.training.state import PyTree, TrainState

Batch: TypeAlias = dict[str, jax.Array]
"""`image` [batch, height, width, channel] and `label`, int32 [batch] or 0 and 1 [batch, classes]; a prepared one may
also hold `target`, float32 [batch, classes]."""

Prepare: TypeAlias = Callable[[Batch, jax.Array], Batch]
"""`prepare(batch, key) -> batch` makes what the model and the loss are given, in the compiled step."""

TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Sums]]
Gradient: TypeAlias = Callable[[PyTree, PyTree, jax.Array, Batch], tuple[PyTree, PyTree, Sums]]
"""`gradient(params, batch_stats, key, batch) -> (gradient, batch_stats, sums)`."""

AUXILIARY = 0.3
"""Weight of an auxiliary head in the loss (Szegedy et al. 2014)."""


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    prepare: Prepare | None = None,
    seed: int = 0,
    accumulate_steps: int = 1,
    sam_rho: float = 0.0,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
    frozen: Callable[[str], bool] | None = None,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, sums)`: one update from one batch, to be jitted.

    Under `jit` a batch that is split over devices gives loss, gradient and batch statistics of the whole batch; on
    several CPU devices put `ops.sharded_batch()` around the function, or images travel between them. With `mesh` the
    same update runs on each device's share of the batch (`shard_map`) and averages over the devices.

    Args:
      model: called as `model(images, train=True)`; may keep `batch_stats`, draw from `dropout`, and sow
        `auxiliary_logits`.
      optimizer: whose state `state.opt_state` is.
      loss: `loss(logits, batch) -> float32 [batch]`, one number for each example; the step minimises their mean.
      prepare: augments and normalises a batch, from a key of the step; None takes batches as they are.
      seed: of the random keys, which are `fold_in(key(seed), step)`.
      accumulate_steps: parts of a batch whose gradients are added up one after the other, which saves memory; batch
        normalisation takes the statistics of each part.
      sam_rho: radius of sharpness-aware minimisation (Foret et al. 2020); 0 for none.
      ema_decay: of the moving average of parameters and statistics, which `state.ema` holds; None for none.
      skip_nonfinite: an update whose loss or values are not finite leaves the state as it was.
      frozen: whether a parameter, by its path, is a constant; the batch statistics of its norm stay too.
      mesh: with an axis `data`.

    Returns:
      A function whose sums are `loss`, `accuracy` and `count` over the batch, and `skipped` with `skip_nonfinite`.
    """
    axis_name = None if mesh is None else "data"
    update = make_update(
        model,
        optimizer,
        loss=loss,
        seed=seed,
        accumulate_steps=accumulate_steps,
        sam_rho=sam_rho,
        ema_decay=ema_decay,
        skip_nonfinite=skip_nonfinite,
        frozen=frozen,
        axis_name=axis_name,
    )
    if mesh is not None:
        whole, split = P(), P(axis_name)
        update = jax.shard_map(update, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        return update(state, batch if prepare is None else prepare(batch, step_key(seed, state.step)))

    return train_step


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the random key of a step. It is split in four: crops, flips, mixing (`prepare`), and dropout."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss,
    seed: int = 0,
    accumulate_steps: int = 1,
    sam_rho: float = 0.0,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
    frozen: Callable[[str], bool] | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns `update(state, batch) -> (state, sums)` for a batch that is prepared; arguments: `make_train_step`.

    Args:
      axis_name: None sees the whole batch; otherwise the function is one device's, and averages over that axis.
    """
    gradient = make_gradient(model, loss, frozen)
    if accumulate_steps > 1:
        gradient = accumulated(gradient, accumulate_steps)
    if axis_name is not None:
        gradient = averaged(gradient, axis_name)
    if sam_rho:
        gradient = sharpness_aware(gradient, sam_rho)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.split(step_key(seed, state.step), 4)[3]
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        grads, batch_stats, sums = gradient(state.params, state.batch_stats, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, state.step, ema_decay)
        updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        return unless_nonfinite(state, updated, sums) if skip_nonfinite else (updated, sums)

    return update


def make_gradient(model: nn.Module, loss: Loss, frozen: Callable[[str], bool] | None = None) -> Gradient:
    """Returns the gradient of the mean loss of a batch, with the new batch statistics and `train_sums`."""

    def objective(params: PyTree, stats: PyTree, key: jax.Array, batch: Batch) -> tuple[jax.Array, tuple[PyTree, Sums]]:
        variables = {"params": without_gradient(params, frozen) if frozen else params, "batch_stats": stats}
        with frozen_statistics(frozen) if frozen else nullcontext():
            logits, updated = model.apply(
                variables,
                batch["image"],
                train=True,
                mutable=["batch_stats", "auxiliary_logits"],
                rngs={"dropout": key},
            )
        losses = loss(logits, batch)
        for auxiliary in jax.tree.leaves(updated.get("auxiliary_logits", {})):
            losses += AUXILIARY * loss(auxiliary, batch)
        return losses.mean(), (updated.get("batch_stats", {}), train_sums(losses, logits, batch["label"]))

    def gradient(params: PyTree, stats: PyTree, key: jax.Array, batch: Batch) -> tuple[PyTree, PyTree, Sums]:
        grads, (stats, sums) = jax.grad(objective, has_aux=True)(params, stats, key, batch)
        return grads, stats, sums

    return gradient


def accumulated(gradient: Gradient, parts: int) -> Gradient:
    """Returns the gradient of a batch that goes through in `parts` parts; statistics move with each of them."""

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
        grads, stats, sums = gradient(params, stats, key, batch)
        grads, stats = jax.lax.pmean((grads, stats), axis_name)
        return grads, stats, jax.lax.psum(sums, axis_name)

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
    prepare: Callable[[Batch], Batch] | None = None,
    flip: bool = False,
) -> Callable[[PyTree, Batch], tuple[Sums, jax.Array]]:
    """Returns `eval_step(variables, batch) -> (sums, logits)`: sums over the examples whose `mask` is true.

    Args:
      model: called as `model(images, train=False)`.
      loss: as for `make_train_step`.
      prepare: normalises a batch; None takes batches as they are.
      flip: logits are the mean of those of each image and of its mirror image.

    Returns:
      A function of `{"params", "batch_stats"}` and a batch with `mask` bool [batch]; logits are float32
      [batch, classes], sums those of `eval_sums`.
    """

    def eval_step(variables: PyTree, batch: Batch) -> tuple[Sums, jax.Array]:
        batch = batch if prepare is None else prepare(batch)
        forward = partial(model.apply, variables, train=False)
        logits: jax.Array = forward(batch["image"])  # type: ignore[assignment]
        if flip:
            logits = (logits + forward(batch["image"][:, :, ::-1])) / 2  # type: ignore[operator]
        return eval_sums(loss(logits, batch), logits, batch["label"], batch["mask"]), logits

    return eval_step
