"""Measures of a classifier from its predictions, mostly scikit-learn's, and what calibrates it. NumPy on the host."""

from typing import Any

import numpy as np

from resnet_jax.weights.tags import Calibration

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


def probabilities(logits: np.ndarray, multilabel: bool, temperature: float = 1.0) -> np.ndarray:
    """float64 [size, classes]: softmax, or with several labels an image, or one logit, the sigmoid of each."""
    from scipy.special import expit, softmax

    scaled = logits.astype(np.float64) / temperature
    return expit(scaled) if multilabel or logits.shape[-1] == 1 else softmax(scaled, axis=-1)


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """The temperature with the least loss, and with labels [size, classes] each class's threshold with the best F1.

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


def _best_threshold(p: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    if truth.min() == truth.max():
        return 0.5
    precision, recall, thresholds = precision_recall_curve(truth, p)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the average precision over the classes that some image has; labels 0 and 1 [size, classes]."""
    from sklearn.metrics import average_precision_score

    there = np.flatnonzero(labels.any(0))
    return float(np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in there])) if len(there) else 0.0


def measure(
    logits: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], calibration: Calibration | None = None
) -> dict[str, Any]:
    """All measures of predictions.

    Args:
      logits: float [size, classes].
      labels: int [size], or 0 and 1 [size, classes] where an image has several.
      calibration: of the probabilities; None takes them as they are.

    Returns:
      `count`, `accuracy` (with several labels: all of an image right), `macro_precision`, `macro_recall`, `macro_f1`,
      `auc` (one class against the rest, mean), `ece`, `classes` (a row for each: `name`, `precision`, `recall`, `f1`,
      `support`, `auc`), `reliability` (rows of `confidence`, `accuracy`, `count`); with one label an image `confusion`
      [truth][prediction] and, with more than five classes, `top5`; with several `map`. None where there is nothing to
      measure.
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
    rows = precision_recall_fscore_support(target, predicted, labels=numbers, zero_division=0)
    macro = precision_recall_fscore_support(target, predicted, labels=numbers, average="macro", zero_division=0)
    aucs = [_auc(truth[:, k], p[:, k]) for k in numbers]
    known = [auc for auc in aucs if auc is not None]
    reliability, ece = calibration_error(confidence, hits)
    result: dict[str, Any] = {
        "count": len(labels),
        "accuracy": float(right.mean()),
        **{f"macro_{name}": float(value) for name, value in zip(("precision", "recall", "f1"), macro[:3], strict=True)},
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


def calibration_error(confidence: np.ndarray, hits: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Rows of `confidence`, `accuracy` and `count` in equal bins of confidence, and the expected calibration error.

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
