"""Exact evaluation: every example of a split counts once, on any number of devices."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.typing import VariableDict
from jax.sharding import Mesh

from resnet_jax.config import Config, InputError
from resnet_jax.data.dataset import Dataset, default_split, listed, with_outputs
from resnet_jax.data.fingerprint import changes, count_trained_on, described, fingerprint, load_fingerprint, shares_of
from resnet_jax.data.loader import BadImages, eval_batches
from resnet_jax.data.match_classes import ClassMap, match_classes
from resnet_jax.files import path_of
from resnet_jax.models.stacking import block_by_block
from resnet_jax.output import say
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.training.build import data_of, model_with_parts, sharded_shapes, state_maker
from resnet_jax.training.checkpoints import Record, read_checkpoint
from resnet_jax.training.linear_probe import Features, head_of
from resnet_jax.training.metrics import Sums, mean_average_precision, means, wilson
from resnet_jax.training.parts import NAMES, NO_PARTS, Parts, check_parts
from resnet_jax.training.programs import recipe_eval_step
from resnet_jax.training.sharding import check_batch, compiler_options, make_mesh, replicated, sharded_over
from resnet_jax.training.state import TrainState
from resnet_jax.weights.load import names_of_outputs

Result = dict[str, dict[str, Any]]

LISTS = ("class_accuracy", "class_count", "predictions")
"""What a result holds beside single numbers."""


@dataclass(frozen=True)
class Predictions:
    """What a network predicted for each image that could be read, in the order of the split.

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
    split: str,
    mesh: Mesh,
    bad: BadImages,
    stopped: Callable[[], bool] | None = None,
    features: Features | None = None,
    keep: bool = False,
    parts: Parts = NO_PARTS,
) -> Callable[[TrainState], Result | None]:
    """Returns `evaluate(state) -> {split: means, "ema/" + split: means}` over every example of the split once.

    The entry of the moving average is there only where the state has one. None is returned where `stopped()` is true
    meanwhile: in one process only, since several would have to agree on a batch. Batches stay on the device between
    evaluations where the training data does.

    Args:
      split: `validation` or `test`.
      features: of `make_features`, for a probe.
      keep: the means also hold `predictions`, where there are classes.
      parts: loss and metrics of the user's own.

    Raises:
      InputError: the data has no such split.
    """
    source = dataset.split(split)
    step_function = jax.jit(
        sharded_over(mesh)(recipe_eval_step(config, head_of(model) if features else model, parts)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(),
    )
    kept_batches: list[Any] = []
    keep = keep and bool(dataset.class_names)
    keep_logits = keep or dataset.multilabel

    def batches(variables: VariableDict) -> Iterator[Any]:
        process, classes = (jax.process_index(), jax.process_count()), dataset.label_classes()
        read = eval_batches(source, config, mesh, bad, *process, classes)
        return map(partial(features, variables), read) if features else read

    def evaluate(state: TrainState) -> Result | None:
        variables = {split: state.variables}
        if (config.data.on_device or features) and not kept_batches:
            kept_batches.extend(batches(variables[split]))
        if state.averages is not None:
            variables[f"ema/{split}"] = state.averages
        sums: dict[str, list[Sums]] = {name: [] for name in variables}
        outputs: dict[str, list[Any]] = {name: [] for name in variables}
        for batch in kept_batches or batches(variables[split]):
            if stopped is not None and stopped():
                return None
            for name, values in variables.items():
                part, logits = step_function(values, batch)
                sums[name].append(part)
                if keep_logits:
                    outputs[name].append((logits, *everywhere((batch["label"], batch["mask"]), mesh)))
        result = {name: means(values) for name, values in sums.items()}
        for name, batches_of in outputs.items() if keep_logits else ():
            predictions = gathered(batches_of)
            if dataset.multilabel:
                result[name]["map"] = mean_average_precision(predictions.logits, predictions.labels)
            if keep:
                result[name]["predictions"] = predictions
        return result

    return evaluate


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays that every process can read whole."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree) if jax.process_count() > 1 else tree


def gathered(parts: list[Any]) -> Predictions:
    """Returns the predictions of batches of (logits, labels, mask)."""
    logits, labels, mask = (np.concatenate(values) for values in zip(*jax.device_get(parts), strict=True))
    index = np.flatnonzero(mask)
    return Predictions(index, logits[index], labels[index])


def selecting_metric(config: Config, dataset: Dataset, parts: Parts = NO_PARTS) -> str | None:
    """Returns the metric that decides on the validation split which checkpoint is the best; None where nothing does.

    Raises:
      InputError: the recipe waits for a metric, and the data has no validation split; or there is no such metric.
    """
    metric = config.train.metric
    if metric == "none":
        return None
    known = ["loss", *(("accuracy", "macro_recall", "macro_f1") if dataset.class_names else ()), *parts.metrics]
    known += ["map"] if dataset.multilabel else []
    if metric not in ("auto", *known):
        why = ""
        if metric == "map":
            why = ", since map needs images with several labels"
        elif not dataset.class_names:
            why = ", since the labels are no classes"
        raise InputError(f"train.metric {metric} is none of auto, none, {', '.join(known)}{why}")
    if metric in parts.metrics and config.train.metric_goal == "auto":
        raise InputError(f"train.metric {metric} is of your own: say --train.metric_goal max or min")
    if dataset.validation is None:
        if config.train.patience is not None or metric != "auto":
            what = "train.patience" if config.train.patience is not None else f"train.metric {metric}"
            raise InputError(
                f"{what} selects on a validation split, and there is none: set data.validation_fraction above 0, or "
                "give the data one"
            )
        return None
    if metric != "auto":
        return metric
    return ("map" if dataset.multilabel else "accuracy") if dataset.class_names else "loss"


def goal_of(config: Config, metric: str) -> str:
    """Returns whether less (`min`) or more (`max`) of a metric is better."""
    if config.train.metric_goal != "auto":
        return config.train.metric_goal
    return "min" if metric == "loss" else "max"


def better(goal: str, new: float | None, old: float | None) -> bool:
    """Returns whether a value is better than another one: with the goal `min` the lower, with `max` the higher.

    What is None or not a number is worse than any number, and never better than anything.
    """
    if new is None or math.isnan(new):
        return False
    if old is None or math.isnan(old):
        return True
    return new < old if goal == "min" else new > old


def served(result: Result, split: str) -> tuple[str, dict[str, Any]]:
    """Returns name and means of what is used later: the moving average where there is one, else the parameters."""
    name = f"ema/{split}" if f"ema/{split}" in result else split
    return name, result[name]


def scalars(result: Result) -> Result:
    """Returns a result without what it says of single classes and images."""
    return {
        kind: {name: value for name, value in values.items() if name not in LISTS} for kind, values in result.items()
    }


def evaluate_run(
    folder: Path,
    checkpoint: str | None = None,
    split: str | None = None,
    per_class: bool = False,
    dataset: str | None = None,
    accept_changes: bool = False,
    parts: Parts = NO_PARTS,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run's folder on a split of its recipe's data, or on other data.

    Args:
      checkpoint: `best`, `latest` or a step; None takes the best one where the run selected one, else the latest.
      split: `validation` or `test`; None takes test where the data has it.
      per_class: add `classes`: name -> recall (None without images), also as accuracy with one label an image, and
        count.
      dataset: what to evaluate on in place of the recipe's `data.dataset`: where that lies now, or other data.
      accept_changes: evaluate although the run's data has changed where `dataset` says it lies.
      parts: those of the user's own that the run was trained with.

    Returns:
      `step`, and what `result_of` does; where images have several labels, with one half as the threshold of each
      class, as while training.

    Raises:
      InputError: the folder holds no run or no such checkpoint, the data has no such split, or it was trained on.
    """
    run = open_run(folder, checkpoint, dataset=dataset, accept_changes=accept_changes, parts=parts)
    split = split or default_split(run.dataset)
    run.check_unseen(split)
    return {"step": int(run.state.step)} | result_of(run, split, run.evaluate(split) or {}, per_class)


def result_of(run: "FinishedRun", split: str, found: Result, per_class: bool = False) -> dict[str, Any]:
    """Returns what an evaluation found, to be shown or written as JSON.

    Args:
      found: of `run.evaluate(split)`.
      per_class: as for `evaluate_run`.

    Returns:
      `split`, and under the split's name, and `ema/` with it where the run kept averages, loss, count, metrics of the
      user's own, and where there are classes accuracy, macro_recall, macro_f1 and, with more than five classes, top5;
      for accuracy and top5 also the number that is right, such as `accuracy_right`, and the interval of 95 %
      confidence, such as `accuracy_interval`; and `skipped_images`.
    """
    result: dict[str, Any] = {}
    for kind, means_of in found.items():
        values = {name: value for name, value in means_of.items() if name not in LISTS}
        values |= with_intervals(values)
        if per_class and "class_accuracy" in means_of:
            lists = (means_of["class_accuracy"], means_of["class_count"])
            names = ["recall"] if run.dataset.multilabel else ["recall", "accuracy"]  # one number with one label
            values["classes"] = {
                name: dict.fromkeys(names, None if n == 0 else share) | {"count": n}
                for name, share, n in zip(run.class_names, *lists, strict=True)
            }
        result[kind] = values
    return {"split": split} | result | {"skipped_images": sorted(run.bad.names)}


def with_intervals(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the number of images that are right, and the interval of 95 % confidence, of each accuracy there is."""
    found: dict[str, Any] = {}
    for name in ("accuracy", "top5"):
        if name in values:
            found[f"{name}_right"] = round(values[name] * values["count"])
            found[f"{name}_interval"] = list(wilson(values[name], values["count"]))
    return found


@dataclass(frozen=True)
class FinishedRun:
    """A checkpoint of a run, with its data.

    Attributes:
      state: without that of the optimizer.
      trained_on: how many examples of each other split are among those that the run was trained on.
      keep: evaluations hold the predictions.
      parts: the user's own.
      other: the data is not that of the run.
    """

    config: Config
    dataset: Dataset
    model: Any
    mesh: Mesh
    class_names: tuple[str, ...]
    state: TrainState
    bad: BadImages
    trained_on: dict[str, int]
    keep: bool
    parts: Parts
    other: bool = False

    def evaluate(self, split: str, stopped: Callable[[], bool] | None = None) -> Result | None:
        """Returns what `make_evaluate` does, of a split."""
        given = (self.config, self.model, self.dataset, split, self.mesh, self.bad, stopped)
        return make_evaluate(*given, keep=self.keep, parts=self.parts)(self.state)

    def check_unseen(self, split: str) -> None:
        """Raises InputError where a split holds pictures that the run was trained on."""
        if count := self.trained_on.get(split):
            raise InputError(
                f"{count:,} of the {len(self.dataset.split(split)):,} {split} pictures of {self.config.data.dataset} "
                "were trained on by this run: a figure on them would say nothing. Give the data as it was; other "
                "pictures of the same names are taken with --data.accept_changes"
            )


def mesh_for(batch_size: int) -> Mesh:
    """Returns a mesh over all devices, or over as many of this process's as a batch divides over."""
    if jax.process_count() > 1:
        check_batch(batch_size, make_mesh())
        return make_mesh()
    return make_mesh(max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0))


def open_run(
    folder: Path,
    checkpoint: str | None = None,
    keep: bool = False,
    dataset: str | None = None,
    accept_changes: bool = False,
    parts: Parts = NO_PARTS,
    classes: ClassMap | None = None,
    batch: int | None = None,
) -> FinishedRun:
    """Opens what a run's folder holds, to evaluate it; arguments as for `evaluate_run`.

    Args:
      classes: which class of the run each class of other data is; None goes by their names.
      batch: images that go through the network at once; None takes the recipe's.

    Raises:
      InputError: the folder holds no run or no such checkpoint, the run's data has changed where `dataset` says it
        lies, or other data has classes that the run lacks.
    """
    folder = path_of(folder, "WORKDIR")
    config = recorded_recipe(folder)
    if config is None:
        raise InputError(f"{folder} holds no run: there is no {folder / 'config.json'}")
    needed = [name for name in NAMES if name != "optimizer" and (name != "dataset" or dataset is None)]
    for note in check_parts(folder, parts, accept=True, needed=needed):
        say(f"WARNING: {note}", error=True)
    if dataset is not None:
        config, parts = replace(config, data=replace(config.data, dataset=dataset)), replace(parts, dataset=None)
    if batch is not None:
        config = replace(config, train=replace(config.train, batch_size=batch, accumulate_steps=1))
    mesh = mesh_for(config.train.batch_size)
    seen = load_fingerprint(folder)
    other, strangers = False, False
    if dataset is not None and seen is not None:
        whole = all_of(config, parts)
        known, same = shares_of(seen, fingerprint(whole))
        strangers = same is not None and same < 0.5
        other = strangers or known < 0.5
    if other:
        found = whole
        config = replace(config, data=replace(config.data, on_device=False))
        say(f"{dataset} is other data than that of the run in {folder}", error=True)
    else:
        found = data_of(config, parts, prepare=False)
    now = fingerprint(found)
    if seen is not None and not other and (changed := changes(seen, now)):
        note = f"{config.data.dataset} is not as the run in {folder} was given it ({described(changed)})"
        if dataset is not None and not accept_changes:
            raise InputError(f"{note}; give the same data, or take this with --data.accept_changes")
        say(f"WARNING: {note}", error=True)
    trained = {} if seen is None else {name: count_trained_on(seen, now, name) for name in now if name != "train"}
    if strangers or (other and accept_changes):
        trained = {}
    # Regular expressions out of somebody else's folder are not executed.
    without_rules = replace(config.optimizer, decay_rules=((".*", 0.0),), rate_rules=())
    plain = replace(config, optimizer=without_rules)
    made: dict[str, Any] = {}

    def shapes(record: Record) -> Any:
        data = found
        if (other or classes is not None) and record["class_names"]:
            names = tuple(record["class_names"])
            given: dict[str, Any] = {"multilabel": record["multilabel"], "given": classes}
            data, line = match_classes(found, names, f"the run in {folder}", **given)
            if line:
                say(line, error=True)
        module, own = model_with_parts(config, parts, len(data.class_names))
        model: Any = block_by_block(module)
        made.update(model=model, parts=own, dataset=with_outputs(data, own.outputs_of(model)))
        return sharded_shapes(state_maker(plain, model, lambda step: 0.0), mesh).replace(opt_state=())

    state, record = read_checkpoint(folder, shapes, checkpoint)
    model, parts, found = made["model"], made["parts"], made["dataset"]
    names = names_of_outputs(parts.outputs_of(model), found.class_names, config.data.dataset)
    if record["class_names"] != list(names):
        raise InputError(f"{config.data.dataset} has other classes than the run: {listed(found.class_names)}")
    bad = BadImages("skip", channels=config.data.channels)
    return FinishedRun(config, found, model, mesh, names, state, bad, trained, keep, parts, other)


def all_of(config: Config, parts: Parts = NO_PARTS) -> Dataset:
    """Returns data of which nothing was held out, to evaluate on: where it has neither a validation nor a test split,
    all of it is the test split.

    Raises:
      InputError: as for `data_of`.
    """
    whole = replace(config, data=replace(config.data, validation_fraction=0.0))
    found = data_of(whole, parts, prepare=False)
    if found.validation is not None or found.test is not None:
        return found
    return replace(found, train=None, test=found.train)
