"""Evaluates runs, tags and files of weights on data: one of them in full, or a row for each that a pattern matches."""

import csv
import fnmatch
import glob
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, ModelConfig, TrainConfig, sides
from resnet_jax.data.dataset import Source, default_split, listed
from resnet_jax.data.loader import BadImages
from resnet_jax.data.match_classes import ClassMap, match_classes
from resnet_jax.files import in_bucket, path_of, to_json, write_whole
from resnet_jax.models.registry import channels_of, create_model
from resnet_jax.output import first_line, say
from resnet_jax.training.evaluation import FinishedRun, Predictions, all_of, mesh_for, open_run, result_of, served
from resnet_jax.training.manifest import BEST, MANIFEST
from resnet_jax.training.metrics import at_thresholds, probabilities, wilson
from resnet_jax.training.parts import NO_PARTS, Parts
from resnet_jax.training.sharding import replicated
from resnet_jax.training.state import TrainState
from resnet_jax.weights.load import fit_weights, model_of, names_of_outputs, preprocessing_of
from resnet_jax.weights.sources import FILES, find_weights, read_calibration
from resnet_jax.weights.tags import UNCALIBRATED, Calibration, all_tags, find_tag

BATCH = 64
"""Images that go through the network at once, where nothing says it."""


@dataclass(frozen=True)
class Wanted:
    """Which data a source is evaluated on, and how.

    Attributes:
      dataset: as `data.dataset` of a recipe; None takes the run's own.
      split: `validation` or `test`; None takes test where the data has it.
      name: of the model, where a file does not say.
      checkpoint: of a run, as for `find_weights`.
      accept_changes: as for `evaluate_run`.
      classes: which class of the network each class of the data is; None goes by their names.
      valid_labels: the classes of the data alone can be predicted.
      real: ReaL labels, the numbers of the valid classes of each image in the order of the files' names.
      batch: images at once; None takes the run's, or `BATCH`.
      per_class: the result has the recall of each class too.
      keep: the result of `evaluate_source` comes with the predictions.
      parts: of the user's own.
    """

    dataset: str | None = None
    split: str | None = None
    name: str | None = None
    checkpoint: str | None = None
    accept_changes: bool = False
    classes: ClassMap | None = None
    valid_labels: bool = False
    real: tuple[frozenset[int], ...] | None = None
    batch: int | None = None
    per_class: bool = False
    keep: bool = False
    parts: Parts = NO_PARTS

    @property
    def on_host(self) -> bool:
        """Returns whether the logits of each image are needed."""
        return self.keep or self.valid_labels or self.real is not None


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
      result: as `result_of`, with `step` of a run or `model` of other weights, `parameters` and `image_size`; with ReaL
        labels also `real_accuracy` and the like. Where images have several labels, `thresholds` says from which
        probability on each class is predicted, None for one half; with thresholds, `at_one_half` has the shares of one
        half beside.
      images_per_second: of reading and the network together, after the first batch.
      source: the examples.
      class_names: of the columns of the logits.
      predictions: of what is served; None unless `Wanted.on_host`, or images have several labels.
      calibration: of the probabilities.
    """

    result: dict[str, Any]
    images_per_second: float
    source: Source
    class_names: tuple[str, ...]
    predictions: Predictions | None
    calibration: Calibration

    @property
    def means(self) -> dict[str, Any]:
        """Returns the means of what is served: of the moving average where there is one."""
        return served(self.result, self.result["split"])[1]


class Pace:
    """Counts batches and notes when the first one, which compiled the program, had ended."""

    def __init__(self, progress: Callable[[], None] | None = None) -> None:
        self.calls, self.progress = 0, progress
        self.started = self.compiled = time.perf_counter()

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls == 2:
            self.compiled = time.perf_counter()
        if self.progress is not None and self.calls > 1:
            self.progress()
        return False

    def rate(self, count: int, batch: int) -> float:
        """Returns images per second after the first batch, or of all where there is no other batch."""
        now = time.perf_counter()
        return (count - batch) / (now - self.compiled) if count > batch else count / (now - self.started)


def names_a_run(path: Path) -> bool:
    """Returns whether a path is taken for the folder of a run: it is a folder, and none of weights; or nothing is
    there, and it is neither a tag nor called as a file of weights.
    """
    if not path.exists():
        return len(path.parts) > 1 and path.suffix not in FILES
    if not path.is_dir():
        return False
    return (path / "checkpoints").is_dir() or not any(child.suffix in FILES for child in path.iterdir())


def open_a_run(source: str, wanted: Wanted) -> tuple[FinishedRun, Calibration]:
    """Opens a run, with its own data or what is wanted; errors as for `open_run`."""
    path = path_of(source, "SOURCE")
    how: dict[str, Any] = {"dataset": wanted.dataset, "accept_changes": wanted.accept_changes, "parts": wanted.parts}
    run = open_run(path, wanted.checkpoint, wanted.on_host, **how, classes=wanted.classes, batch=wanted.batch)
    if not run.class_names:
        return run, UNCALIBRATED
    return run, read_calibration(path, int(run.state.step), len(run.class_names))


def open_weights(source: str, wanted: Wanted) -> tuple[FinishedRun, Calibration]:
    """Opens a tag or a file of weights, with the data that is wanted.

    Raises:
      InputError: it cannot be read, does not say how images are prepared, has no classes, or no data is given for it.
    """
    if not source.startswith("hf-hub:") and not path_of(source, "SOURCE").exists():
        find_tag(source)
    if wanted.dataset is None and wanted.parts.dataset is None:
        raise InputError(
            f"{source} holds no run, whose data it would be evaluated on: give --data.dataset folder:PATH, or another "
            "kind of data"
        )
    weights = find_weights(source, wanted.name, wanted.checkpoint)
    name, fields = model_of(weights, source)
    model: Any = create_model(name, **fields)
    outputs = getattr(model, "num_classes", fields["num_classes"])
    if not outputs:
        raise InputError(f"{source} has no classifier: there is nothing to evaluate")
    look = preprocessing_of(weights, source)
    if look is None:
        raise InputError(f"{source} does not say how pictures are prepared; take the run, or what it exports")
    names = names_of_outputs(outputs, weights.class_names, source)
    data = DataConfig(
        dataset=wanted.dataset or "own",
        image_size=look.image_size,
        eval_image_size=look.eval_image_size,
        channels=channels_of(model),
        mean=look.mean,
        std=look.std,
        on_device=False,
    )
    seen: dict[str, Any] = {name: getattr(look, name) for name in ("eval_crop", "interpolation", "eval_flip")}
    augment = AugmentConfig(crop="none", flip="none", **seen)
    train = TrainConfig(batch_size=wanted.batch or BATCH, loss="binary" if weights.multilabel else "cross_entropy")
    config = Config(model=ModelConfig(name=name), data=data, augment=augment, train=train)
    own = Parts(dataset=None if wanted.dataset else wanted.parts.dataset)
    given: dict[str, Any] = {"multilabel": weights.multilabel, "given": wanted.classes}
    found, line = match_classes(all_of(config, own), names, source, named=bool(weights.class_names), **given)
    if line:
        say(line, error=True)
    mesh = mesh_for(config.train.batch_size)
    variables = jax.device_put(fit_weights(model, weights.tensors, source), replicated(mesh))
    state = TrainState(jnp.int32(0), variables["params"], variables.get("batch_stats", {}), (), None)
    bad = BadImages("skip", channels=channels_of(model))
    parts = Parts(outputs=outputs)
    return FinishedRun(config, found, model, mesh, names, state, bad, {}, wanted.on_host, parts), weights.calibration


def evaluate_source(
    source: str, wanted: Wanted, progress: Callable[[int], Callable[[], None]] | None = None
) -> Evaluated:
    """Evaluates a run, a tag or a file of weights.

    Args:
      progress: is given the number of batches, and returns what is called after each.

    Raises:
      InputError: as for `open_run` and `open_weights`; or the data has no such split, holds pictures that the run was
        trained on, or has another number of images than there are ReaL labels.
    """
    from_weights = source.startswith("hf-hub:") or not names_a_run(path_of(source, "SOURCE"))
    run, calibration = (open_weights if from_weights else open_a_run)(source, wanted)
    split = wanted.split or default_split(run.dataset)
    run.check_unseen(split)
    examples, batch = run.dataset.split(split), run.config.train.batch_size
    if wanted.on_host and not run.class_names:
        raise InputError(
            f"the outputs of {source} are no classes: there are no predictions of classes to write or count"
        )
    multilabel = run.dataset.multilabel
    run = replace(run, keep=run.keep or multilabel)  # thresholds need the logits
    pace = Pace(None if progress is None else progress(math.ceil(len(examples) / batch)))
    found = run.evaluate(split, pace) or {}
    rate = pace.rate(len(examples), batch)
    predictions: Any = served(found, split)[1].get("predictions")
    if wanted.valid_labels:
        found = {kind: of_valid_labels(means["predictions"]) for kind, means in found.items()}
        predictions = served(found, split)[1]["predictions"]
    if multilabel and calibration.thresholds is not None:
        found = {kind: of_thresholds(means, calibration) for kind, means in found.items()}
    result = result_of(run, split, found, wanted.per_class)
    if multilabel:
        fitted = calibration.thresholds
        result["thresholds"] = None if fitted is None else dict(zip(run.class_names, fitted, strict=True))
    if wanted.real is not None:
        result[served(found, split)[0]] |= real_accuracy(predictions, examples, wanted.real)
    of = {"model": run.config.model.name} if from_weights else {"step": int(run.state.step)}
    size = run.config.data.eval_image_size or run.config.data.image_size
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    more = {"parameters": parameters, "image_size": size}
    return Evaluated(of | result | more, rate, examples, run.class_names, predictions, calibration)


def of_valid_labels(predictions: Predictions) -> dict[str, Any]:
    """Returns means as an evaluation does, where the classes that images of the data have are the only ones to choose.

    Raises:
      InputError: images have several labels.
    """
    labels = predictions.labels
    if labels.ndim == 2:
        raise InputError("--valid_labels chooses one class an image, and these have several: leave it out")
    there = np.unique(labels)
    others = np.setdiff1d(np.arange(predictions.logits.shape[1]), there)
    logits = predictions.logits.astype(np.float64)
    logits[:, others] = -np.inf
    shifted = logits - logits.max(1, keepdims=True)
    log_likelihood = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(1))
    right = logits.argmax(1) == labels
    means: dict[str, Any] = {"loss": float(-log_likelihood.mean()), "accuracy": float(right.mean())}
    if len(there) > 5:
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        means["top5"] = float((best == labels[:, None]).any(1).mean())
    counts = np.bincount(labels, minlength=logits.shape[1])
    rights = np.bincount(labels[right], minlength=logits.shape[1])
    with np.errstate(invalid="ignore"):
        means |= {"count": len(labels), "class_accuracy": (rights / counts).tolist(), "class_count": counts.tolist()}
    return means | {"predictions": replace(predictions, logits=logits)}


def of_thresholds(means: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """Returns means as an evaluation does, with each class predicted from its threshold on, as `predict` does; those of
    one half stand in `at_one_half`.
    """
    predictions: Predictions = means["predictions"]
    before = {name: means[name] for name in ("accuracy", "macro_recall", "macro_f1")}
    return means | at_thresholds(predictions.logits, predictions.labels, calibration) | {"at_one_half": before}


def real_accuracy(predictions: Predictions, examples: Source, real: tuple[frozenset[int], ...]) -> dict[str, Any]:
    """Returns the accuracy by ReaL labels, over the images that have a valid one: `real_accuracy`, `real_count`,
    `real_accuracy_right`, `real_accuracy_interval`.

    Raises:
      InputError: there is another number of images, or two of them have the same name, so that their order is unknown.
    """
    if len(real) != len(examples):
        raise InputError(f"--real has labels for {len(real):,} images, and the split has {len(examples):,}")
    files = [examples.key(i).rpartition("/")[2] for i in range(len(examples))]
    order = sorted(range(len(files)), key=files.__getitem__)
    if doubled := [files[a] for a, b in pairwise(order) if files[a] == files[b]]:
        raise InputError(f"--real goes by the order of the files' names, and {doubled[0]} is there twice")
    valid = dict(zip(order, real, strict=True))
    chosen = predictions.logits.argmax(1)
    hits = [int(k) in valid[int(i)] for i, k in zip(predictions.index, chosen, strict=True) if valid[int(i)]]
    if not hits:
        raise InputError("--real gives no image a valid label: there is nothing to count")
    share, count = sum(hits) / len(hits), len(hits)
    found = {"real_accuracy": share, "real_count": count, "real_accuracy_right": sum(hits)}
    return found | {"real_accuracy_interval": list(wilson(share, count))}


PREDICTION = ("example", "label", "predicted", "probability", "right")
"""Columns of a table of predictions."""


def prediction_rows(evaluated: Evaluated) -> Iterator[tuple[str, str, str, str, int]]:
    """Yields the rows of the table of predictions, in the order of the split: path or name of the example, its label,
    what is predicted, with which probability, and 1 where that is right, else 0. Several classes are joined by `;`.
    """
    predictions, names, calibration = evaluated.predictions, evaluated.class_names, evaluated.calibration
    assert predictions is not None
    multilabel = predictions.labels.ndim == 2
    p = probabilities(predictions.logits, multilabel, calibration.temperature)
    reached = p >= np.asarray(calibration.thresholds or 0.5)
    for i, (index, label) in enumerate(zip(predictions.index, predictions.labels, strict=True)):
        truth = np.flatnonzero(label) if multilabel else np.asarray([label])
        chosen = np.flatnonzero(reached[i]) if multilabel else p[i].argmax(keepdims=True)
        shown, wanted = (";".join(names[k] for k in numbers) for numbers in (chosen, truth))
        right = int(np.array_equal(truth, chosen))
        yield evaluated.source.describe(int(index)), wanted, shown, ";".join(f"{p[i, k]:.6g}" for k in chosen), right


def write_predictions(evaluated: Evaluated, file: Path) -> str:
    """Writes the table of predictions as comma-separated values; returns a line that says so.

    Raises:
      InputError: it cannot be written.
    """
    rows = list(prediction_rows(evaluated))
    write_table(file, [PREDICTION, *rows])
    if evaluated.calibration.thresholds is None:
        return f"every prediction: {file}"
    right = f"{sum(row[-1] for row in rows)} of {len(rows)}"
    return f"every prediction, with the thresholds of the run's report, by which {right} are right: {file}"


def write_table(file: Path, rows: list[Any]) -> None:
    """Writes rows as comma-separated values, all or nothing.

    Raises:
      InputError: the file cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        write_whole(file, text.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from error


COLUMNS = (
    *("name", "dataset", "split", "top1", "top5", "low", "high", "count"),
    *("images_per_second", "parameters", "image_size", "real", "error", "options", "changed"),
)
"""Of the table of many sources; `low` and `high` are the ends of the interval of top1, shares lie in [0, 1]. Where
images have several labels, top1 is the share with all of them right, by the thresholds that `predict` takes. `options`
are those of the command that count, and `changed` is the time in nanoseconds at which the weights were written."""


def is_pattern(source: str) -> bool:
    """Returns whether a source is a shell pattern, and no path that there is."""
    return any(sign in source for sign in "*?[") and not path_of(source, "SOURCE").exists()


def matching(pattern: str) -> list[str]:
    """Returns runs, folders and files of weights, and tags with a classifier, that match a shell pattern, sorted.

    Raises:
      InputError: nothing does.
    """
    paths = [path for path in glob.glob(str(path_of(pattern, "SOURCE")), recursive=True) if is_weights(Path(path))]
    tags = [name for name, tag in all_tags().items() if tag.num_classes and fnmatch.fnmatchcase(name, pattern)]
    if not paths and not tags:
        raise InputError(f"no run, file of weights or tag matches {pattern!r}; `resnet-jax models` lists the tags")
    return sorted(paths) + sorted(tags)


def is_weights(path: Path) -> bool:
    """Returns whether a path is the folder of a run, or holds weights."""
    if path.is_dir():
        return (path / "checkpoints").is_dir() or any(child.suffix in FILES for child in path.iterdir())
    return path.suffix in FILES


def evaluate_matching(
    pattern: str,
    wanted: Wanted,
    file: Path,
    done: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int], Callable[[], None]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates all that a pattern matches, and writes a row each into a table; returns the rows of what matches.

    A source that has a result for the same data and options in the table, and whose weights were not written since, is
    left as it is; one that failed is tried again. A failure is a row with its reason, and the rest goes on.

    Args:
      file: of comma-separated values with `COLUMNS`; rows of other data, options and sources stay.
      done: is given each row when it is there.
      progress: as for `evaluate_source`.

    Raises:
      InputError: nothing matches, no data is given for what is no run, or the file is another one or cannot be written.
    """
    names = matching(pattern)
    if wanted.dataset is None and not all(names_a_run(path_of(name, "SOURCE")) for name in names):
        raise InputError("say what to evaluate on: --data.dataset folder:PATH, or another kind of data")
    rows = read_rows(file)
    found = []
    for name in names:
        key, changed = (name, wanted.dataset or "", wanted.split or "", options_of(wanted)), str(changed_at(name))
        before = rows.get(key)
        if before is None or before["error"] or before["changed"] != changed:
            known = dict(zip((*COLUMNS[:3], "options"), key, strict=True)) | {"changed": changed}
            rows[key] = dict.fromkeys(COLUMNS, "") | known | row_of(name, wanted, progress)
            write_table(file, [COLUMNS, *([row[column] for column in COLUMNS] for row in rows.values())])
            jax.clear_caches()
        found.append(rows[key])
        if done is not None:
            done(rows[key])
    return found


def options_of(wanted: Wanted) -> str:
    """Returns in words the options of an evaluation that change its result, beside the data and the split."""
    words = [f"{name} {value}" for name in ("name", "checkpoint") if (value := getattr(wanted, name))]
    words += ["valid_labels"] if wanted.valid_labels else []
    given = {"classes": wanted.classes, "real": wanted.real and [sorted(labels) for labels in wanted.real]}
    digests = {name: hashlib.sha256(to_json(value).encode()).hexdigest() for name, value in given.items() if value}
    return " ".join([*words, *(f"{name} {digest[:12]}" for name, digest in digests.items())])


def changed_at(source: str) -> int:
    """Returns when the weights of a source, or its calibration, were written last, in nanoseconds; 0 of a tag and in a
    bucket.
    """
    path = path_of(source, "SOURCE")
    if in_bucket(path) or not path.exists():
        return 0
    files = [*path.glob("*"), *path.glob("checkpoints/*/*")] if path.is_dir() else [path]
    weights = [file for file in files if file.suffix in FILES or file.name in (BEST, MANIFEST, "calibration.json")]
    return max((file.stat().st_mtime_ns for file in weights), default=0)


def row_of(name: str, wanted: Wanted, progress: Any) -> dict[str, Any]:
    """Returns what the table of many sources says of one: its figures, or why there are none."""
    try:
        evaluated = evaluate_source(name, wanted, progress)
    except Exception as error:  # whatever ends one of many, such as the memory of the device
        return {"error": first_line(error)}
    means, result = evaluated.means, evaluated.result
    if "accuracy" not in means:
        return {"error": "its outputs are no classes"}
    low, high = (round(end, 6) for end in means["accuracy_interval"])
    return {
        "top1": means["accuracy"],
        "top5": means.get("top5", ""),
        "low": low,
        "high": high,
        "count": means["count"],
        "images_per_second": round(evaluated.images_per_second, 2),
        "parameters": result["parameters"],
        "image_size": "x".join(map(str, dict.fromkeys(sides(result["image_size"])))),
        "real": means.get("real_accuracy", ""),
    }


def read_rows(file: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Returns the rows of a table of many sources, by name, data, split and options; none where there is no file.

    Raises:
      InputError: it is another kind of table.
    """
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            table = csv.DictReader(text)
            if tuple(table.fieldnames or COLUMNS) != COLUMNS:
                raise InputError(
                    f"{file} has the columns {listed(table.fieldnames or [])}: name a new file for the table"
                )
            return {(row["name"], row["dataset"], row["split"], row["options"]): row for row in table}
    except FileNotFoundError:
        return {}
    except (OSError, csv.Error) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


SHOWN = {"accuracy": "top-1", "top5": "top-5"}
"""How measures of an evaluation are called in its table, where metrics of the user's own stand too."""
NOT_SHOWN = ("loss", "count", "classes", "macro_recall", "macro_f1", "map")


def format_result(evaluated: Evaluated) -> str:
    """Returns the table that `resnet-jax evaluate` prints."""
    result, rate = evaluated.result, evaluated.images_per_second
    split = result["split"]
    of = f"step {result['step']}" if "step" in result else result["model"]
    rows = [f"{of}, {split} split, {result[split]['count']} images, {rate:,.1f} a second"]
    for kind, label in ((split, "parameters"), (f"ema/{split}", "their moving average")):
        if kind in result:
            rows.append(f"{label:<21} {'   '.join(shown_means(result[kind]))}")
    if any("accuracy" in values for kind, values in result.items() if kind.endswith(split)):
        rows.append("in brackets: the interval of 95 % confidence, after Wilson")
    served = f"ema/{split}" if f"ema/{split}" in result else split
    thresholds = result.get("thresholds")
    if "thresholds" in result:
        rows.append(thresholds_in_words(result[served].get("at_one_half")))
    if result["skipped_images"]:
        rows.append(f"not counted, since they cannot be decoded: {', '.join(result['skipped_images'])}")
    classes = result[served].get("classes", {})
    if classes:
        of = ", with the moving average, which is what is served" if served != split else ""
        rows.append(f"{split} recall of each class{of}:")
    for name, values in classes.items():
        recall = "no images" if values["recall"] is None else f"{values['recall']:7.2%} of {values['count']}"
        threshold = f", threshold {thresholds[name]:.4f}" if thresholds else ""
        rows.append(f"  {name:<24} {recall}{threshold}")
    return "\n".join(rows)


def thresholds_in_words(half: dict[str, float] | None) -> str:
    """Returns a line on the thresholds of an evaluation; `half` has its shares with one half, where it has others."""
    if half is None:
        return "threshold of each class: one half; the report of a run with a validation split fits others"
    shares = f"all labels right {half['accuracy']:.2%}, macro recall {half['macro_recall']:.2%}, macro F1 "
    return (
        "threshold of each class: that of the report, as predict takes it, fitted on the run's validation split, where "
        f"what is counted by it is optimistic\nwith one half in its place: {shares}{half['macro_f1']:.2%}"
    )


def shown_means(values: dict[str, Any]) -> list[str]:
    """Returns the figures of an evaluation as words: loss, accuracies with interval and count, the user's metrics."""
    shown, words = [f"loss {values['loss']:.4f}"], SHOWN | ({"accuracy": "all labels right"} if "map" in values else {})
    shown += [f"{word} {in_percent(values, name)}" for name, word in words.items() if name in values]
    if "map" in values:
        shown += [f"macro recall {values['macro_recall']:.2%}", f"macro F1 {values['macro_f1']:.2%}"]
        shown.append(f"mean average precision {values['map']:.4f}")
    if "real_accuracy" in values:
        shown.append(f"ReaL {in_percent(values, 'real_accuracy')} of {values['real_count']}")
    rest = [name for name in values if name not in (*SHOWN, *NOT_SHOWN) and not name.startswith("real_")]
    return shown + [f"{name} {values[name]:.4f}" for name in rest if isinstance(values[name], float)]


def in_percent(values: dict[str, Any], name: str) -> str:
    """Returns an accuracy with its interval and the number that is right, such as `97.50% [95.33, 98.68] (351)`."""
    low, high = values[f"{name}_interval"]
    return f"{values[name]:.2%} [{low * 100:.2f}, {high * 100:.2f}] ({values[f'{name}_right']} right)"


def format_row(row: dict[str, Any]) -> str:
    """Returns the line that `resnet-jax evaluate PATTERN` prints of a source."""
    if row["error"]:
        return f"{row['name']:<44} not evaluated: {row['error']}"
    shares = [float(row[name]) for name in ("top1", "low", "high")]
    top1 = f"top-1 {shares[0]:7.2%} [{shares[1] * 100:.2f}, {shares[2] * 100:.2f}]"
    top5 = f"   top-5 {float(row['top5']):7.2%}" if row["top5"] != "" else ""
    rest = (
        f"{row['count']} images, {float(row['images_per_second']):,.1f} a second, {int(row['parameters']):,} parameters"
    )
    return f"{row['name']:<44} {top1}{top5}   {rest}, {row['image_size']} pixels"
