"""What dispatches the next steps of a run: data on one side, compiled programs on the other."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.data.loader import BadImages, sampling_table, train_batches, whole_split
from resnet_jax.data.sources import Dataset, labels_of
from resnet_jax.sharding import batch_sharding, compiler_options, put_everywhere, replicated, state_sharding
from resnet_jax.training.finetune import make_phases
from resnet_jax.training.losses import class_weights
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.probe import head_of, whole_features
from resnet_jax.training.recipe import in_form, state_maker
from resnet_jax.training.report import Advance
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import draw, make_device_step, make_pmap_step, make_train_step

Program: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, Sums]]


def make_advance(
    config: Config,
    model: nn.Module,
    schedule: optax.Schedule,
    dataset: Dataset,
    mesh: Mesh,
    bad: BadImages,
    steps: range,
    features: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Advance:
    """`advance(state, step) -> (state, sums, n, waited)` dispatches the next n steps and does not wait for them.

    `waited` is the time in seconds that it took to get the batch; each of the sums has n entries, or none for one step.
    With `features`, those of `make_features` for the state's variables, the head alone is trained on what they give.
    """
    table = sampling_table(dataset, config.data.sampling)
    program = make_programs(config, model, schedule, dataset, mesh, features is not None)
    if features is None and not config.data.on_device:
        rank, hosts = jax.process_index(), jax.process_count()
        batches = train_batches(dataset.train, config, mesh, bad, steps, rank, hosts, table)

        def advance_host(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
            asked = time.perf_counter()
            batch = next(batches)
            return *program(step, 0)[0](state, batch), 1, time.perf_counter() - asked

        return advance_host

    if features is None:
        data = put_everywhere(whole_split(dataset.train, config, bad, table), mesh)
    else:
        data = put_everywhere(whole_features(dataset.train, config, mesh, bad, features, table), mesh)
    several = config.train.steps_per_call

    def advance_device(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
        one, until = program(step, 1)
        n = several if step % several == 0 and step + several <= min(steps.stop, until) else 1
        return *(one if n == 1 else program(step, n)[0])(state, data), n, 0.0

    return advance_device


def make_programs(
    config: Config, model: nn.Module, schedule: optax.Schedule, dataset: Dataset, mesh: Mesh, probe: bool
) -> Callable[[int, int], tuple[Program, float]]:
    """`program(step, n)`: what runs n steps from `step` on, on data that lies on the device, and up to which step.

    For n = 0 it is one step on a batch. It is compiled when it is first called, anew for each phase of a fine-tuning.

    Args:
      probe: batches hold features, and the model's head alone is trained.
    """
    new_state = state_maker(config, model, schedule)
    shapes = jax.eval_shape(lambda: in_form(new_state(), config))
    out, on_batch = (state_sharding(shapes, mesh), replicated(mesh)), batch_sharding(mesh)
    phases = make_phases(config, shapes.params, len(dataset.train) / config.train.batch_size)
    starts = [phase.start for phase in phases]
    weights = weights_of_classes(config, dataset)
    net = head_of(model) if probe else model

    @lru_cache
    def compiled(number: int, n: int) -> Program:
        rates = phases[number].rates
        optimizer = make_optimizer(config.optimizer, schedule, rates)
        freezes = config.finetune.mode != "none" or any(factor == 0 for _, factor in config.optimizer.rate_rules)
        options: dict[str, Any] = {"class_weights": weights}
        options["frozen"] = (lambda path: rates(path) == 0.0) if freezes else None
        if config.parallel.strategy == "pmap":
            drawn = partial(draw, config=config, batch_sharding=on_batch) if n else None
            return make_pmap_step(net, optimizer, config, mesh, drawn, **options)
        step = make_train_step(net, optimizer, config, mesh, **options)
        function = make_device_step(step, config, n, on_batch) if n else step
        return jax.jit(function, donate_argnums=0, out_shardings=out, compiler_options=compiler_options())

    def program(step: int, n: int) -> tuple[Program, float]:
        number = bisect_right(starts, step) - 1
        return compiled(number, n), starts[number + 1] if number + 1 < len(starts) else math.inf

    return program


def weights_of_classes(config: Config, dataset: Dataset) -> np.ndarray | None:
    """Weights of the classes in the loss, as the recipe has them; None for none.

    Raises:
      InputError: a class has no training image.
    """
    if config.train.class_weights == "none":
        return None
    labels, classes = labels_of(dataset.train), len(dataset.class_names)
    counts = labels.sum(0) if dataset.several else np.bincount(labels, minlength=classes)
    if missing := [name for name, n in zip(dataset.class_names, counts, strict=True) if n == 0]:
        raise InputError(f"train.class_weights: the classes {', '.join(missing)} have no training image")
    return class_weights(config.train.class_weights, counts)
