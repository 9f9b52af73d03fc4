"""Trains small networks for the experiments, with all data on the device; nothing is written to disk."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from resnet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InputError,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from resnet_jax.data.dataset import default_split
from resnet_jax.data.loader import BadImages, whole_split
from resnet_jax.data.on_device import normalize
from resnet_jax.data.sources import load_dataset
from resnet_jax.models.registry import create_model
from resnet_jax.recipe_files import load_config
from resnet_jax.training.build import state_maker
from resnet_jax.training.metrics import add, means
from resnet_jax.training.optimizers import make_optimizer, make_schedule
from resnet_jax.training.programs import draw_from, normalization, recipe_eval_step, recipe_step
from resnet_jax.training.resolve import filled
from resnet_jax.training.several_steps import steps_on_device
from resnet_jax.training.sharding import compiler_options, make_mesh, replicated
from resnet_jax.training.state import TrainState
from resnet_jax.training.sweep_programs import with_inputs

Rows: TypeAlias = list[dict[str, float]]
"""Points of a curve."""

EVAL_BATCH = 256
EVALUATED = 2000
"""How many images of a split are evaluated at most."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"shortcut": "none"},
    "residual": {},
    "preact": {"preact": True, "shortcut": "B"},
}


@dataclass(frozen=True)
class Data:
    """A dataset in memory: `train` and `test` hold `image` uint8 [size, height, width, 3] and `label` int32 [size]."""

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    classes: int

    @property
    def size(self) -> int:
        """Returns the side of the images in pixels."""
        return self.train["image"].shape[1]


def load(dataset: str, train: int | None = None, test: int | None = None) -> Data:
    """Loads a dataset into memory, in a random order that is always the same.

    Args:
      dataset: `digits`, at 8 x 8 pixels, or any `data.dataset` of a recipe, at 32 x 32.
      train: how many training images to take; None takes all.
      test: how many images of the test split, or of the validation split if there is no test split.
    """
    size = 8 if dataset == "digits" else 32
    config = filled(Config(data=DataConfig(dataset=dataset, image_size=size)), load_config("digits_resnet20"))
    found = load_dataset(config.data, 0, hold_out=False)
    splits = []
    for source, count in ((found.train, train), (found.split(default_split(found)), test)):
        whole = whole_split(source, config, BadImages("error"))
        order = np.random.default_rng(0).permutation(len(whole["label"]))[:count]
        splits.append({name: values[order] for name, values in whole.items()})
    return Data(dataset, splits[0], splits[1], len(found.class_names))


def recipe(data: Data, epochs: float, seed: int = 0, **sections: Any) -> Config:
    """Returns the experiments' common recipe: SGD with momentum, a short warm-up, a cosine, random crops, no average.

    Args:
      data: what to train on.
      epochs: length of the training.
      seed: of the first parameters and the order of the data.
      **sections: sections of `Config` that replace these.
    """
    given: dict[str, Any] = {
        "data": DataConfig(dataset=data.name, image_size=data.size),
        "augment": AugmentConfig(crop="pad", pad=data.size // 8),
        "optimizer": OptimizerConfig(learning_rate=0.1),
        "schedule": ScheduleConfig(warmup_epochs=min(1.0, 0.2 * epochs)),
        "train": TrainConfig(epochs=epochs, batch_size=96, seed=seed, ema_decay=None),
    }
    return filled(dataclasses.replace(Config(), **(given | sections)), load_config("digits_resnet20"))


def network(name: str, data: Data, **fields: Any) -> nn.Module:
    """Returns a registered model with as many classes as the data, and its image size if the model needs to know it."""
    model: Any = create_model(name, num_classes=data.classes, **fields)
    return model.clone(image_size=data.size) if hasattr(model, "image_size") else model


def fit(
    model: nn.Module,
    data: Data,
    config: Config,
    watch: Callable[[int, TrainState], None] | None = None,
    points: int = 6,
) -> tuple[TrainState, Rows]:
    """Trains a model; returns the last state and a curve.

    Args:
      model: the network.
      data: what to train and to evaluate on.
      config: as `recipe` returns it; sections that concern a run's folder have no effect.
      watch: called with the step and the state at each point of the curve, the first one included.
      points: how many points the curve has, evenly spaced, besides the one before training.

    Returns:
      The state, and rows of `step`, `epoch`, `train_loss`, `train_error`, `test_loss`, `test_error`. Errors are
      fractions; the training error is measured in evaluation mode, on images without augmentation.
    """
    return fit_seeds(model, data, config, (config.train.seed,), watch, points)[0]


def fit_seeds(
    model: nn.Module,
    data: Data,
    config: Config,
    seeds: Sequence[int],
    watch: Callable[[int, TrainState], None] | None = None,
    points: int = 6,
) -> list[tuple[TrainState, Rows]]:
    """Trains a model once for each seed, by one compiled program; returns for each what `fit` does.

    The seed is an input of the program, as in a sweep. On a CPU as many trainings are under way at a time as
    there are cores.
    """
    per_epoch = len(data.train["label"]) / config.train.batch_size
    steps = max(points, round(config.train.epochs * per_epoch))
    schedule = make_schedule(config, steps, per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    mesh = make_mesh(1)

    def of_seed(seed: Any) -> Config:
        return with_inputs(config, {"train.seed": seed})

    def train_step(state: TrainState, values: Any, seed: jax.Array) -> TrainState:
        one = of_seed(seed)
        return steps_on_device(recipe_step(one, model, optimizer), draw_from(one, mesh), 1)(
            state, values, jnp.int32(1)
        )[0]

    options: dict[str, Any] = {"out_shardings": replicated(mesh), "compiler_options": compiler_options()}
    start = jax.jit(lambda seed: state_maker(of_seed(seed), model, schedule)(), **options)
    numbers = [jax.device_put(np.uint32(seed), replicated(mesh)) for seed in seeds]
    states = [start(number) for number in numbers]
    on_device = jax.device_put(data.train, replicated(mesh))
    take_step = jax.jit(train_step, donate_argnums=0, **options).lower(states[0], on_device, numbers[0]).compile()
    evaluate = evaluator(model, config)
    marks = {round(i * steps / points) for i in range(points + 1)}

    def train_one(place: int) -> tuple[TrainState, Rows]:
        curve: Rows = []
        for step in range(steps + 1):
            if step in marks:
                if watch is not None:
                    watch(step, states[place])
                row: dict[str, float] = {"step": step, "epoch": step / per_epoch}
                for split, values in (("train", data.train), ("test", data.test)):
                    found = evaluate(states[place].variables, values)
                    row |= {f"{split}_loss": found["loss"], f"{split}_error": 1.0 - found["accuracy"]}
                curve.append(row)
            if step < steps:
                states[place] = take_step(states[place], on_device, numbers[place])
        return states[place], curve

    at_once = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(min(at_once, len(seeds))) as threads:
        return list(threads.map(train_one, range(len(seeds))))


def evaluator(model: nn.Module, config: Config) -> Callable[[Any, dict[str, np.ndarray]], dict[str, Any]]:
    """Returns `evaluate(variables, split) -> means` over at most EVALUATED images of a split; it is compiled once."""
    program = jax.jit(recipe_eval_step(config, model), compiler_options=compiler_options())

    def evaluate(variables: VariableDict, split: dict[str, np.ndarray]) -> dict[str, Any]:
        count, parts = min(EVALUATED, len(split["label"])), []
        for start in range(0, count, EVAL_BATCH):
            place = np.minimum(np.arange(start, start + EVAL_BATCH), count - 1)
            batch = {name: jnp.asarray(values[place]) for name, values in split.items()}
            mask = jnp.arange(start, start + EVAL_BATCH) < count
            parts.append(program(variables, batch | {"mask": mask})[0])
        return means(add(parts))

    return evaluate


def pixels(data: Data, count: int, config: Config) -> tuple[jax.Array, np.ndarray]:
    """Returns the first training images, float32 [count, height, width, 3], normalized, and labels, int32 [count]."""
    images = jnp.asarray(data.train["image"][:count])
    return normalize(images, *normalization(config), jnp.dtype("float32")), data.train["label"][:count]


def cifar_net(kind: str, depth: int, data: Data, **fields: Any) -> nn.Module:
    """Returns a network of 6n + 2 layers: `plain`, `residual` (He et al. 2015) or `preact` (He et al. 2016).

    Raises:
      InputError: there is no such depth.
    """
    if depth < 8 or (depth - 2) % 6:
        raise InputError(f"there is no network of {depth} layers of this kind: depths are 6n + 2, such as 8, 20, 56")
    return network("cifar_resnet20", data, stage_sizes=((depth - 2) // 6,) * 3, **KINDS[kind], **fields)
