"""Metrics: sums over examples in the compiled step, so that any split of the data adds up to the same mean; and on the
host, from predictions, scikit-learn's measures of a classifier and what calibrates it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import InputError
from resnet_jax.training.losses import one_hot
from resnet_jax.weights.tags import Calibration

Array = jax.Array
Sums = dict[str, Any]
Metric: TypeAlias = Callable[[Any, dict[str, Any]], Array]
"""`metric(logits, batch) -> [batch]`, one number for each example."""

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


def predicted_classes(logits: Array, multilabel: bool) -> Array:
    """Returns bool [batch, classes]: the class with the greatest logit, or with `multilabel` or one logit all above
    0.
    """
    return (
        logits > 0
        if multilabel or logits.shape[-1] == 1
        else jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    )


def are_classes(logits: jax.Array, batch: dict[str, Any]) -> bool:
    """Returns whether a batch's `label` says the class of each example, by shapes and types: an integer each, or
    integers of the shape of the logits [batch, classes]. Of one logit an integer each says nothing: 1 may stand for
    yes, or 0 for the first class.
    """
    label = batch.get("label")
    if not (isinstance(logits, Array) and isinstance(label, Array | np.ndarray) and logits.ndim == 2):
        return False
    return jnp.issubdtype(label.dtype, jnp.integer) and (
        label.shape == logits.shape or (label.ndim == 1 and logits.shape[1] > 1)
    )


def one_each(values: Any, count: int, name: str) -> Array:
    """Returns what a loss or a metric gave, as float32 [count].

    Raises:
      InputError: it is not one number for each example.
    """
    if not hasattr(values, "shape") or values.shape != (count,):
        found = f"{values.dtype} {list(values.shape)}" if hasattr(values, "shape") else type(values).__name__
        mean = ": leave out the mean over the batch" if getattr(values, "shape", None) == () else ""
        raise InputError(f"{name} gave {found}; expected one number for each of the {count} images, [{count}]{mean}")
    return values.astype(jnp.float32)


def sums_of(metrics: Mapping[str, Metric], logits: jax.Array, batch: dict[str, Any], mask: Array | None = None) -> Sums:
    """Returns the sum of each metric over a batch, or over its examples where `mask` bool [batch] is true."""
    count, sums = len(batch["image"]), {}
    if taken := sorted({"loss", "count", "skipped"} & set(metrics)):
        raise InputError(f"metrics: {', '.join(taken)} is a name of ours; give yours another one")
    for name, metric in metrics.items():
        values = one_each(metric(logits, batch), count, f"metrics[{name!r}]")
        sums[name] = (values if mask is None else jnp.where(mask, values, 0.0)).sum()
    return sums


def train_sums(losses: Array, logits: jax.Array, batch: dict[str, Any], classes: bool) -> Sums:
    """Returns sums over a batch: `loss`, `count`, and with `classes` `accuracy`, which counts examples that are right,
    in all of their labels.
    """
    sums = {"loss": losses.sum(), "count": jnp.float32(len(losses))}
    if not classes:
        return sums
    labels = batch["label"]
    multilabel = labels.ndim == 2
    right = (predicted_classes(logits, True) == (labels > 0)).all(-1) if multilabel else logits.argmax(-1) == labels
    return sums | {"accuracy": right.sum(dtype=jnp.float32)}


def eval_sums(losses: Array, logits: Array, labels: Array, mask: Array) -> Sums:
    """Returns sums over the examples of a batch where `mask` is true.

    Args:
      losses: float32 [batch].
      logits: float32 [batch, classes].
      labels: int32 [batch], or 0 and 1 [batch, classes] where an image has several.
      mask: bool [batch].

    Returns:
      `loss`, `accuracy`, `top5` (only where there are more than five classes and one label), `count`, and for each
      class, float32 [classes], `class_right` (true positives), `class_count` (examples of the class) and
      `class_predicted` (examples predicted to be of it).

    Example:
      >>> sums = eval_sums(jnp.ones(2), jnp.eye(2), jnp.array([0, 0]), jnp.array([True, True]))
      >>> int(sums["accuracy"]), int(sums["count"])
      (1, 2)
    """
    classes, multilabel = logits.shape[-1], labels.ndim == 2
    member = labels > 0 if multilabel else one_hot(labels, classes, bool)
    member, predicted = member & mask[:, None], predicted_classes(logits, multilabel) & mask[:, None]
    right = mask & (member == predicted).all(-1)
    sums = {
        "loss": jnp.where(mask, losses, 0.0).sum(),
        "accuracy": right.sum(dtype=jnp.float32),
        "count": mask.sum(dtype=jnp.float32),
        "class_right": (member & predicted).sum(0, dtype=jnp.float32),
        "class_count": member.sum(0, dtype=jnp.float32),
        "class_predicted": predicted.sum(0, dtype=jnp.float32),
    }
    if classes > 5 and not multilabel:
        best = jax.lax.top_k(logits, 5)[1]
        sums["top5"] = (mask & (best == labels[:, None]).any(-1)).sum(dtype=jnp.float32)
    return sums


def loss_sums(losses: Array, mask: Array) -> Sums:
    """Returns `loss` and `count`, as `eval_sums` does, where there are no classes."""
    return {"loss": jnp.where(mask, losses, 0.0).sum(), "count": mask.sum(dtype=jnp.float32)}


def add(sums: list[Sums]) -> Sums:
    """Adds sums of several batches on the host, in float64 and in their order."""
    total: Sums = {}
    for part in jax.device_get(sums):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def means(sums: Sums | list[Sums]) -> dict[str, Any]:
    """Returns means from the sums of a step, or of several: `loss` and fractions as floats, `count` as int, and as int
    the number of steps that were `skipped`, where a step says so.

    From those of `eval_sums` also lists over the classes, nan without examples: `class_accuracy` (recall) and
    `class_count`; and `macro_recall` and `macro_f1`, their means over the classes that have examples.

    Raises:
      ValueError: there is no example.

    Example:
      >>> rj.means([{"loss": 3.0, "count": 2}, {"loss": 3.0, "count": 1}])["loss"]  # of two batches
      2.0
    """
    total = add(sums if isinstance(sums, list) else [sums])
    count = float(total["count"])
    if count == 0:
        raise ValueError("there is no example to average over")
    numbers = ("count", "skipped")
    result: dict[str, Any] = {
        name: float(value) / count for name, value in total.items() if name not in numbers and np.ndim(value) == 0
    }
    result |= {name: int(total[name]) for name in numbers if name in total}
    if "class_count" in total:
        right, there, predicted = (total[f"class_{name}"] for name in ("right", "count", "predicted"))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, f1 = right / there, 2 * right / (there + predicted)
        result["class_accuracy"] = recall.tolist()
        result["class_count"] = [int(n) for n in there]
        result |= {"macro_recall": float(recall[there > 0].mean()), "macro_f1": float(f1[there > 0].mean())}
    return result


def probabilities(logits: np.ndarray, multilabel: bool, temperature: float = 1.0) -> np.ndarray:
    """Returns float64 [size, classes]: softmax, or with `multilabel`, or one logit, the sigmoid of each."""
    from scipy.special import expit, softmax

    scaled = logits.astype(np.float64) / temperature
    return expit(scaled) if multilabel or logits.shape[-1] == 1 else softmax(scaled, axis=-1)


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Returns the temperature with the least loss, and with labels [size, classes] each class's threshold with the best
    F1.

    Where every prediction is right, no temperature is the best, and it stays 1.
    """
    from scipy.optimize import minimize_scalar

    multilabel = labels.ndim == 2
    right = (logits > 0) == (labels > 0) if multilabel else logits.argmax(-1) == labels

    def loss(log_temperature: float) -> float:
        p = probabilities(logits, multilabel, float(np.exp(log_temperature))).clip(1e-12, 1 - 1e-12)
        if multilabel:
            return -float(np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))
        return -float(np.log(p[np.arange(len(labels)), labels]).mean())

    best = 0.0 if right.all() else minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x
    temperature = float(np.exp(best))
    if not multilabel:
        return Calibration(temperature)
    p = probabilities(logits, True, temperature)
    return Calibration(temperature, tuple(_best_threshold(p[:, k], labels[:, k]) for k in range(p.shape[1])))


def at_thresholds(logits: np.ndarray, labels: np.ndarray, calibration: Calibration) -> dict[str, Any]:
    """Returns what `means` says of classes (`accuracy`, `macro_recall`, `macro_f1`, the lists over the classes), with a
    class predicted from its threshold on.

    Args:
      logits: float [size, classes].
      labels: 0 and 1 [size, classes].
      calibration: temperature and thresholds; one half where it has none.

    Example:
      >>> logits = np.array([[-1.0, 2.0], [-3.0, -2.0]])
      >>> found = at_thresholds(logits, np.array([[1, 1], [0, 0]]), Calibration(1.0, (0.2, 0.5)))
      >>> found["accuracy"], found["class_accuracy"], found["class_count"]
      (1.0, [1.0, 1.0], [1, 1])
    """
    truth = labels > 0
    predicted = probabilities(logits, True, calibration.temperature) >= np.asarray(calibration.thresholds or 0.5)
    sums = {"count": len(labels), "accuracy": (predicted == truth).all(1).sum()}
    sums |= {"class_right": (predicted & truth).sum(0), "class_count": truth.sum(0)}
    return means(sums | {"class_predicted": predicted.sum(0)})


def _best_threshold(p: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the best F1, halfway between two probabilities, since a prediction rounds them otherwise."""
    from sklearn.metrics import precision_recall_curve

    if truth.min() == truth.max():
        return 0.5
    precision, recall, thresholds = precision_recall_curve(truth, p)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(thresholds[best] + (thresholds[best - 1] if best else 0.0)) / 2


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns mean of the average precision over the classes that some image has; labels 0 and 1 [size, classes]."""
    from sklearn.metrics import average_precision_score

    there = np.flatnonzero(labels.any(0))
    return float(np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in there])) if len(there) else 0.0


def measure(
    logits: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], calibration: Calibration | None = None
) -> dict[str, Any]:
    """Returns all measures of predictions.

    Args:
      logits: float [size, classes].
      labels: int [size], or 0 and 1 [size, classes] where an image has several.
      calibration: of the probabilities; None takes them as they are.

    Returns:
      `count`, `accuracy` (with several labels: all of an image right), `macro_precision`, `macro_recall`, `macro_f1`
      (means over the classes that have images), `auc` (one class against the rest, mean), `ece`, `classes` (a row for
      each: `name`, `precision`, `recall`, `f1`, `support`, `auc`), `reliability` (rows of `confidence`, `accuracy`,
      `count`); with one label an image `confusion` [truth][prediction] and, with more than five classes, `top5`;
      multilabel `map`. None where there is nothing to measure.

    Example:
      >>> found = measure(np.eye(3) * 4, np.array([0, 1, 1]), ("cat", "dog", "owl"))
      >>> round(found["accuracy"], 3), found["confusion"]
      (0.667, [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    multilabel, calibration = labels.ndim == 2, calibration or Calibration()
    p = probabilities(logits, multilabel, calibration.temperature)
    numbers = np.arange(p.shape[1])
    if multilabel:
        predicted: np.ndarray = p >= np.asarray(calibration.thresholds or 0.5)
        truth, right = labels > 0, (predicted == (labels > 0)).all(1)
        confidence, hits = np.maximum(p, 1 - p).ravel(), ((p >= 0.5) == truth).ravel()
    else:
        predicted = p.argmax(1)
        truth, right = labels[:, None] == numbers, predicted == labels
        confidence, hits = p.max(1), right
    target = truth if multilabel else labels
    which = [1] if p.shape[1] == 1 else numbers  # scikit-learn takes a single column for the classes 0 and 1
    rows = precision_recall_fscore_support(target, predicted, labels=which, zero_division=0)
    there = rows[3] > 0  # as in `class_means`: the mean of a training's evaluation has the same name
    macro = [row[there].mean() if there.any() else 0.0 for row in rows[:3]]
    aucs = [_auc(truth[:, k], p[:, k]) for k in numbers]
    known = [auc for auc in aucs if auc is not None]
    reliability, ece = calibration_error(confidence, hits)
    result: dict[str, Any] = {
        "count": len(labels),
        "accuracy": float(right.mean()),
        **{f"macro_{name}": float(value) for name, value in zip(("precision", "recall", "f1"), macro, strict=True)},
        "auc": float(np.mean(known)) if known else None,
        "ece": ece,
        "classes": [
            {"name": name, "precision": float(a), "recall": float(b), "f1": float(c), "support": int(n), "auc": auc}
            for name, a, b, c, n, auc in zip(class_names, *rows, aucs, strict=True)
        ],
        "reliability": reliability,
    }
    if multilabel:
        return result | {"map": mean_average_precision(p, labels)}
    if p.shape[1] > 5:
        best = np.argsort(-p, axis=1, kind="stable")[:, :5]
        result["top5"] = float((best == labels[:, None]).any(1).mean())
    return result | {"confusion": confusion_matrix(labels, predicted, labels=numbers).tolist()}


def _auc(truth: np.ndarray, p: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return None if truth.all() or not truth.any() else float(roc_auc_score(truth, p))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the interval that holds the true share with 95 % confidence, where `share` of `count` examples was found
    (Wilson 1927). Unlike the normal approximation it stays within [0, 1] and holds for few examples.

    Example:
      >>> [round(end, 3) for end in wilson(0.9, 100)]
      [0.826, 0.945]
    """
    z = 1.959964  # of the normal distribution, at 97.5 %
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidence: np.ndarray, hits: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Returns rows of `confidence`, `accuracy` and `count` in equal bins of confidence, and the expected calibration
    error.

    The error is the mean over all predictions of how far their bin's confidence is from its accuracy (Naeini et al.
    2015).
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = [
        {"confidence": float(confidence[bins == b].mean()), "accuracy": float(hits[bins == b].mean()), "count": int(n)}
        for b in range(BINS)
        if (n := (bins == b).sum())
    ]
    total = sum(row["count"] for row in rows)
    return rows, float(sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / total)
