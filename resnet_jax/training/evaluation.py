"""Exact evaluation: every test example counts once, on any number of devices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.data.loader import BadImages, eval_batches
from resnet_jax.data.sources import Dataset, load_dataset
from resnet_jax.models.stacking import block_by_block
from resnet_jax.recipes import recorded
from resnet_jax.sharding import check_batch, compiler_options, make_mesh, replicated
from resnet_jax.training.checkpoints import read_checkpoint
from resnet_jax.training.measures import mean_average_precision
from resnet_jax.training.metrics import Sums, add, means
from resnet_jax.training.probe import Features, head_of
from resnet_jax.training.recipe import build_model, sharded_shapes, state_maker
from resnet_jax.training.signals import Stop
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import make_eval_step
from resnet_jax.training.workdir import best_of

Result = dict[str, dict[str, Any]]

LISTS = ("class_accuracy", "class_count", "predictions")
"""What a result holds beside single numbers."""


@dataclass(frozen=True)
class Predictions:
    """What a network said of each image that could be read, in the order of the split.

    Attributes:
      index: int [size], of the image in its split.
      logits: float32 [size, classes].
      labels: int32 [size], or 0 and 1 [size, classes] where an image has several.
    """

    index: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


def make_evaluate(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    mesh: Mesh,
    bad: BadImages,
    stop: Stop | None = None,
    features: Features | None = None,
    keep: bool = False,
) -> Callable[[TrainState], Result | None]:
    """`evaluate(state) -> {"test": means, "ema": means}` over every test example once; `ema` only where there is one.

    None where `stop` was asked for meanwhile: in one process only, since several would have to agree on a batch.
    Batches stay on the device between evaluations where the training data does.

    Args:
      features: of `make_features`, for a probe.
      keep: the means also hold `predictions`.
    """
    step_function = jax.jit(
        make_eval_step(head_of(model) if features else model, config),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(),
    )
    stored: list[Any] = []
    keep_logits = keep or dataset.several

    def batches(variables: Any) -> Iterator[Any]:
        process, classes = (jax.process_index(), jax.process_count()), len(dataset.class_names)
        read = eval_batches(dataset.test, config, mesh, bad, *process, classes)
        return map(partial(features, variables), read) if features else read

    def evaluate(state: TrainState) -> Result | None:
        variables = {"test": {"params": state.params, "batch_stats": state.batch_stats}}
        if (config.data.on_device or features) and not stored:
            stored.extend(batches(variables["test"]))
        if state.ema is not None:
            variables["ema"] = state.ema
        sums: dict[str, list[Sums]] = {name: [] for name in variables}
        said: dict[str, list[Any]] = {name: [] for name in variables}
        for batch in stored or batches(variables["test"]):
            if stop is not None and stop.asked():
                return None
            for name, values in variables.items():
                part, logits = step_function(values, batch)
                sums[name].append(part)
                if keep_logits:
                    said[name].append((logits, *everywhere((batch["label"], batch["mask"]), mesh)))
        result = {name: means(add(parts)) for name, parts in sums.items()}
        for name, parts in said.items() if keep_logits else ():
            predictions = gathered(parts)
            if dataset.several:
                result[name]["map"] = mean_average_precision(predictions.logits, predictions.labels)
            if keep:
                result[name]["predictions"] = predictions
        return result

    return evaluate


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process can read whole."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree) if jax.process_count() > 1 else tree


def gathered(parts: list[Any]) -> Predictions:
    """The predictions of batches of (logits, labels, mask)."""
    logits, labels, mask = (np.concatenate(values) for values in zip(*jax.device_get(parts), strict=True))
    index = np.flatnonzero(mask)
    return Predictions(index, logits[index], labels[index])


def deciding(config: Config, several: bool) -> str:
    """The metric that decides which checkpoint is best."""
    return ("map" if several else "accuracy") if config.train.metric == "auto" else config.train.metric


def headline(result: Result, metric: str) -> float:
    """That metric, of the moving average where there is one."""
    return float(result.get("ema", result["test"])[metric])


def scalars(result: Result) -> Result:
    """A result without what it says of single classes and images."""
    return {
        kind: {name: value for name, value in values.items() if name not in LISTS} for kind, values in result.items()
    }


def evaluate_run(folder: Path, best: bool = False, per_class: bool = False) -> dict[str, Any]:
    """Evaluates a checkpoint of a run's folder on the test data of its recipe.

    Args:
      best: take the best checkpoint, not the latest; a run with `train.patience` is always its best one.
      per_class: add `classes`: name -> accuracy (None without images) and count.

    Returns:
      `step`, `test` and, where the run kept averages, `ema`, each with loss, accuracy, count, macro_recall, macro_f1
      and, with more than five classes, top5; and `skipped_images`.

    Raises:
      InputError: the folder holds no run, or no checkpoint.
    """
    run = open_run(folder, best)
    result: dict[str, Any] = dict(run.evaluate(run.state) or {})
    for values in result.values():
        accuracy, counts = values.pop("class_accuracy"), values.pop("class_count")
        if per_class:
            values["classes"] = {
                name: {"accuracy": None if n == 0 else a, "count": n}
                for name, a, n in zip(run.dataset.class_names, accuracy, counts, strict=True)
            }
    return {"step": int(run.state.step)} | result | {"skipped_images": sorted(run.bad.names)}


@dataclass(frozen=True)
class FinishedRun:
    """A checkpoint of a run, with its data and what evaluates it."""

    config: Config
    dataset: Dataset
    model: nn.Module
    state: TrainState
    bad: BadImages
    evaluate: Callable[[TrainState], Result | None]


def open_run(folder: Path, best: bool = False, keep: bool = False) -> FinishedRun:
    """What a run's folder holds, to be looked at; `keep` as in `make_evaluate`.

    Raises:
      InputError: the folder holds no run, or no checkpoint.
    """
    config = recorded(folder)
    if config is None:
        raise InputError(f"{folder} holds no run: there is no {folder / 'config.json'}")
    mesh = make_mesh()
    check_batch(config.train.batch_size, mesh)
    dataset = load_dataset(config.data, config.train.seed)
    model = block_by_block(build_model(config, len(dataset.class_names)))
    template = sharded_shapes(state_maker(config, model, lambda step: 0.0), mesh)
    step = best_of(folder)[0] if best or config.train.patience is not None else None
    state, record = read_checkpoint(folder, template, step)
    if record["class_names"] != list(dataset.class_names):
        raise InputError(f"{config.data.dataset} has other classes than the run: {', '.join(dataset.class_names)}")
    bad = BadImages("skip", channels=config.data.channels)
    evaluate = make_evaluate(config, model, dataset, mesh, bad, keep=keep)
    return FinishedRun(config, dataset, model, state, bad, evaluate)
