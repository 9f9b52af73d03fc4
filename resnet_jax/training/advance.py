"""What dispatches the next steps of a run: data on one side, compiled programs on the other."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.data.dataset import Dataset, labels_of
from resnet_jax.data.loader import BadImages, sampling_table, train_batches, whole_split
from resnet_jax.runs.progress import Advance
from resnet_jax.training.finetune import make_phases
from resnet_jax.training.linear_probe import head_of, whole_features
from resnet_jax.training.losses import class_weights
from resnet_jax.training.metrics import Sums
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.recipe import in_form, state_maker
from resnet_jax.training.sharding import batch_sharding, compiler_options, put_everywhere, replicated, state_sharding
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import draw, make_device_step, make_pmap_step, make_streamed_step, make_train_step

Program: TypeAlias = Callable[..., tuple[TrainState, Sums]]
"""Of (state, data on the device or a sequence of batches, number of steps)."""

STEPS_PER_CALL = 5
"""With data on the device, where a recipe does not say: few enough to end soon after a signal; they share what a
dispatch costs and memory."""
STREAMED_PER_CALL = {"cpu": 2}
"""The same by platform with data from the host, elsewhere 1: a CPU finds a step's memory anew for each call, where
`cli.MEMORY` does not keep it."""


def make_advance(
    config: Config,
    model: nn.Module,
    schedule: optax.Schedule,
    dataset: Dataset,
    mesh: Mesh,
    bad: BadImages,
    steps: range,
    ends: Sequence[int] = (),
    features: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Advance:
    """`advance(state, step) -> (state, sums, n, waited)` dispatches the next n steps and does not wait for them.

    `waited` is the time in seconds that it took to get the batches; each of the sums has n entries or more, or none for
    one step.

    Args:
      ends: no call goes over a multiple of any of these.
      features: those of `make_features` for the state's variables; the head alone is trained on what they give.
    """
    table, classes = sampling_table(dataset, config.data.sampling), dataset.label_classes()
    drawn = config.data.on_device or features is not None
    most = steps_per_call(config, drawn)
    program = make_programs(config, model, schedule, dataset, mesh, most, drawn, features is not None)
    numbers = put_everywhere({n: np.int32(n) for n in range(1, most + 1)}, mesh)

    def steps_from(step: int, until: float) -> int:
        return int(min(most, steps.stop - step, until - step, *(every - step % every for every in ends)))

    if not drawn:
        rank, hosts = jax.process_index(), jax.process_count()
        batches = train_batches(dataset.train, config, mesh, bad, steps, rank, hosts, table, classes)

        def advance_host(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
            run, until = program(step)
            n, asked = steps_from(step, until), time.perf_counter()
            given = [next(batches) for _ in range(n)]
            waited = time.perf_counter() - asked
            return *run(state, given + given[-1:] * (most - n), numbers[n]), n, waited

        return advance_host

    if features is None:
        data = put_everywhere(whole_split(dataset.train, config, bad, table, classes), mesh)
    else:
        data = put_everywhere(whole_features(dataset.train, config, mesh, bad, features, table), mesh)

    def advance_device(state: TrainState, step: int) -> tuple[TrainState, Sums, int, float]:
        run, until = program(step)
        n = steps_from(step, until)
        return *run(state, data, numbers[n]), n, 0.0

    return advance_device


def steps_per_call(config: Config, drawn: bool) -> int:
    """Most steps in one call, on batches `drawn` from data that lies on the device, or from the host."""
    if config.train.steps_per_call is not None:
        return config.train.steps_per_call
    if config.parallel.strategy == "pmap" or config.log.profile:
        return 1
    return STEPS_PER_CALL if drawn else STREAMED_PER_CALL.get(jax.default_backend(), 1)


def make_programs(
    config: Config,
    model: Any,
    schedule: optax.Schedule,
    dataset: Dataset,
    mesh: Mesh,
    most: int,
    drawn: bool,
    probe: bool,
) -> Callable[[int], tuple[Program, float]]:
    """`program(step)`: what runs steps from `step` on, and up to which step.

    It is compiled when it is first called, anew for each phase of a fine-tuning.

    Args:
      most: steps in a call.
      drawn: from data that lies on the device; otherwise a call is given `most` batches.
      probe: batches hold features, and the model's head alone is trained.
    """
    new_state = state_maker(config, model, schedule)
    shapes = jax.eval_shape(lambda: in_form(new_state(), config))
    out, on_batch = (state_sharding(shapes, mesh), replicated(mesh)), batch_sharding(mesh)
    phases = make_phases(config, shapes.params, len(dataset.train) / config.train.batch_size)
    starts = [phase.start for phase in phases]
    weights = weights_of_classes(config, dataset, model.num_classes)
    net = head_of(model) if probe else model

    @lru_cache
    def compiled(number: int) -> Program:
        rates = phases[number].rates
        optimizer = make_optimizer(config.optimizer, schedule, rates)
        freezes = config.finetune.mode != "none" or any(factor == 0 for _, factor in config.optimizer.rate_rules)
        options: dict[str, Any] = {"class_weights": weights}
        options["frozen"] = (lambda path: rates(path) == 0.0) if freezes else None
        if config.parallel.strategy == "pmap":
            own_draw = partial(draw, config=config, batch_sharding=on_batch) if drawn else None
            step = make_pmap_step(net, optimizer, config, mesh, own_draw, **options)
            return lambda state, data, n: step(state, data if drawn else data[0])
        step = make_train_step(net, optimizer, config, mesh, **options)
        function = (make_device_step if drawn else make_streamed_step)(step, config, most, on_batch)
        return jax.jit(function, donate_argnums=0, out_shardings=out, compiler_options=compiler_options())

    def program(step: int) -> tuple[Program, float]:
        number = bisect_right(starts, step) - 1
        return compiled(number), starts[number + 1] if number + 1 < len(starts) else math.inf

    return program


def weights_of_classes(config: Config, dataset: Dataset, outputs: int) -> np.ndarray | None:
    """Weights of a model's outputs in the loss, as the recipe has them, 1 for those without a class; None for none.

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
