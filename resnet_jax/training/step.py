"""The training and the evaluation step as pure functions. The only file that takes a gradient."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resnet_jax.config import Config
from resnet_jax.data import on_device
from resnet_jax.training.losses import LOSSES, soft_targets
from resnet_jax.training.metrics import Sums, eval_sums, train_sums
from resnet_jax.training.state import PyTree, TrainState

Batch = dict[str, jax.Array]


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """`train_step(state, batch) -> (state, sums)`: one update from one batch, to be jitted with the state donated.

    The batch holds `image` uint8 [batch, height, width, channel] and `label` int32 [batch]. Crops and flips are drawn
    here when the data lies on the device, otherwise they were made on the host. Under `jit` with a batch that is split
    over a mesh, loss, gradient and batch statistics are those of the whole batch.
    """
    loss_of = LOSSES[config.train.loss]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        images, targets = prepare(batch, key, config, model)
        dropout_key = jax.random.split(key, 4)[3]

        def objective(params: PyTree) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(
                variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
            )
            losses = loss_of(logits, targets)
            return losses.mean(), (losses, logits, updates.get("batch_stats", {}))

        grads, (losses, logits, batch_stats) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, state.step, config)
        sums = train_sums(losses, logits, batch["label"])
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema), sums

    return train_step


def prepare(batch: Batch, key: jax.Array, config: Config, model: nn.Module) -> tuple[jax.Array, jax.Array]:
    """Images as the network takes them and soft targets, from a batch of uint8 images and labels."""
    crop_key, flip_key, mix_key, _ = jax.random.split(key, 4)
    images, augment = batch["image"], config.augment
    if config.data.on_device and augment.crop == "pad":
        images = on_device.pad_crop(crop_key, images, augment.pad)
    if config.data.on_device and augment.flip != "none":
        by_chance = jax.random.bernoulli(flip_key, shape=batch["label"].shape)
        images = on_device.flip(by_chance if augment.flip == "random" else batch["turn"], images)
    images = on_device.normalize(images, config.data.mean, config.data.std, model.dtype)
    targets = soft_targets(batch["label"], model.num_classes, config.train.label_smoothing)
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
    steps: int,
    batch_sharding: jax.sharding.Sharding,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """`device_step(state, data) -> (state, sums)`: `steps` steps on batches drawn from data that lies on the device.

    `data` is a whole split as `draw_batch` takes it; each sum comes back as an array [steps]. On a CPU the steps are
    unrolled, since XLA runs convolutions inside a loop many times slower there.
    """

    def one(state: TrainState, data: Batch) -> tuple[TrainState, Sums]:
        batch = on_device.draw_batch(data, state.step, config.train.batch_size, config.train.seed)
        return train_step(state, jax.lax.with_sharding_constraint(batch, batch_sharding))

    def device_step(state: TrainState, data: Batch) -> tuple[TrainState, Sums]:
        if steps > 1 and jax.default_backend() != "cpu":
            return jax.lax.scan(lambda carried, _: one(carried, data), state, length=steps)
        parts = []
        for _ in range(steps):
            state, sums = one(state, data)
            parts.append(sums)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *parts)

    return device_step


def make_eval_step(model: nn.Module, config: Config) -> Callable[[PyTree, Batch], Sums]:
    """`eval_step(variables, batch) -> sums` over the examples of a batch whose `mask` is true.

    `variables` are `{"params", "batch_stats"}`. The loss is the training loss without smoothing.
    """
    loss_of = LOSSES[config.train.loss]

    def eval_step(variables: PyTree, batch: Batch) -> Sums:
        images = on_device.normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
        logits: Any = model.apply(variables, images, train=False)
        if config.augment.eval_flip:
            logits = (logits + model.apply(variables, images[:, :, ::-1], train=False)) / 2
        losses = loss_of(logits, soft_targets(batch["label"], model.num_classes, 0.0))
        return eval_sums(losses, logits, batch["label"], batch["mask"])

    return eval_step
