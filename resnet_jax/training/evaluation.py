"""Exact evaluation: every test example counts once, on any number of devices."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.data.loader import BadImages, eval_batches
from resnet_jax.data.sources import Dataset, load_dataset
from resnet_jax.models.stacking import block_by_block
from resnet_jax.recipes import from_dict
from resnet_jax.sharding import check_batch, compiler_options, make_mesh, replicated
from resnet_jax.training.checkpoints import read_checkpoint
from resnet_jax.training.metrics import Sums, add, means
from resnet_jax.training.recipe import build_model, sharded_shapes, state_maker
from resnet_jax.training.signals import Stop
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import make_eval_step
from resnet_jax.training.workdir import best_of

Result = dict[str, dict[str, Any]]


def make_evaluate(
    config: Config, model: nn.Module, dataset: Dataset, mesh: Mesh, bad: BadImages, stop: Stop | None = None
) -> Callable[[TrainState], Result | None]:
    """`evaluate(state) -> {"test": means, "ema": means}` over every test example once; `ema` only where there is one.

    None where `stop` was asked for meanwhile: in one process only, since several would have to agree on a batch.
    Batches stay on the device between evaluations where the training data does.
    """
    step_function = jax.jit(
        make_eval_step(model, config), out_shardings=replicated(mesh), compiler_options=compiler_options()
    )
    kept: list[Any] = []

    def batches() -> Iterator[Any]:
        return eval_batches(dataset.test, config, mesh, bad, jax.process_index(), jax.process_count())

    def evaluate(state: TrainState) -> Result | None:
        if config.data.on_device and not kept:
            kept.extend(batches())
        variables = {"test": {"params": state.params, "batch_stats": state.batch_stats}}
        if state.ema is not None:
            variables["ema"] = state.ema
        sums: dict[str, list[Sums]] = {name: [] for name in variables}
        for batch in kept or batches():
            if stop is not None and stop.asked():
                return None
            for name, values in variables.items():
                sums[name].append(step_function(values, batch))
        return {name: means(add(parts)) for name, parts in sums.items()}

    return evaluate


def headline(result: Result) -> float:
    """The accuracy that decides which checkpoint is best: of the moving average where there is one."""
    return float(result.get("ema", result["test"])["accuracy"])


def scalars(result: Result) -> Result:
    """A result without what it says of single classes."""
    return {
        kind: {name: value for name, value in values.items() if not isinstance(value, list)}
        for kind, values in result.items()
    }


def evaluate_run(folder: Path, best: bool = False, per_class: bool = False) -> dict[str, Any]:
    """Evaluates a checkpoint of a run's folder on the test data of its recipe.

    Args:
      best: take the best checkpoint, not the latest.
      per_class: add `classes`: name -> accuracy (None without images) and count.

    Returns:
      `step`, `test` and, where the run kept averages, `ema`, each with loss, accuracy, count and, with more than
      five classes, top5; and `skipped_images`.

    Raises:
      InputError: the folder holds no run, or no checkpoint.
    """
    recipe = folder / "config.json"
    if not recipe.is_file():
        raise InputError(f"{folder} holds no run: there is no {recipe}")
    config = from_dict(json.loads(recipe.read_text()))
    mesh = make_mesh()
    check_batch(config.train.batch_size, mesh)
    dataset = load_dataset(config.data, config.train.seed)
    model = block_by_block(build_model(config, len(dataset.class_names)))
    template = sharded_shapes(state_maker(config, model, lambda step: 0.0), mesh)
    state, record = read_checkpoint(folder, template, best_of(folder)[0] if best else None)
    names = record["class_names"]
    if names != list(dataset.class_names):
        raise InputError(f"{config.data.dataset} has other classes than the run: {', '.join(dataset.class_names)}")
    bad = BadImages("skip")
    result: dict[str, Any] = dict(make_evaluate(config, model, dataset, mesh, bad)(state) or {})
    for values in result.values():
        accuracy, counts = values.pop("class_accuracy"), values.pop("class_count")
        if per_class:
            values["classes"] = {
                name: {"accuracy": None if n == 0 else a, "count": n}
                for name, a, n in zip(names, accuracy, counts, strict=True)
            }
    return {"step": int(state.step)} | result | {"skipped_images": sorted(bad.names)}
