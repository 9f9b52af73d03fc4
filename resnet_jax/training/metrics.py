"""Metrics as sums over examples, so that any split of the data adds up to the same mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Sums = dict[str, Any]
TRAIN_SUMS = ("loss", "accuracy", "count")


def predicted_classes(logits: Array, multilabel: bool) -> Array:
    """bool [batch, classes]: the class with the greatest logit, or with `several` labels or one logit all above 0."""
    return (
        logits > 0
        if multilabel or logits.shape[-1] == 1
        else jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    )


def train_sums(losses: Array, logits: Array, labels: Array) -> Sums:
    """Sums over a batch by `TRAIN_SUMS`; `accuracy` counts examples that are right, with several labels in all."""
    multilabel = labels.ndim == 2
    right = (predicted_classes(logits, True) == (labels > 0)).all(-1) if multilabel else logits.argmax(-1) == labels
    return {"loss": losses.sum(), "accuracy": right.sum(dtype=jnp.float32), "count": jnp.float32(labels.shape[0])}


def eval_sums(losses: Array, logits: Array, labels: Array, mask: Array) -> Sums:
    """Sums over the examples of a batch where `mask` is true.

    Args:
      losses: float32 [batch].
      logits: float32 [batch, classes].
      labels: int32 [batch], or 0 and 1 [batch, classes] where an image has several.
      mask: bool [batch].

    Returns:
      `loss`, `accuracy`, `top5` (only where there are more than five classes and one label), `count`, and for each
      class [classes] `class_right`, `class_count` and `class_predicted`: those that are both, in truth, by prediction.
    """
    classes, multilabel = logits.shape[-1], labels.ndim == 2
    member = labels > 0 if multilabel else jax.nn.one_hot(labels, classes, dtype=bool)
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


def add(sums: list[Sums]) -> Sums:
    """Adds sums of several batches on the host, in float64 and in their order."""
    total: Sums = {}
    for part in jax.device_get(sums):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def means(total: Sums) -> dict[str, Any]:
    """Means from sums: `loss` and fractions as floats, `count` as int.

    From those of `eval_sums` also lists over the classes, nan without examples: `class_accuracy` (recall) and
    `class_count`; and `macro_recall` and `macro_f1`, their means over the classes that have examples.

    Raises:
      ValueError: there is no example.
    """
    count = float(total["count"])
    if count == 0:
        raise ValueError("there is no example to average over")
    result: dict[str, Any] = {
        name: float(value) / count for name, value in total.items() if name != "count" and np.ndim(value) == 0
    }
    result["count"] = int(count)
    if "class_count" in total:
        right, there, predicted = (total[f"class_{name}"] for name in ("right", "count", "predicted"))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, f1 = right / there, 2 * right / (there + predicted)
        result["class_accuracy"] = recall.tolist()
        result["class_count"] = [int(n) for n in there]
        result |= {"macro_recall": float(recall[there > 0].mean()), "macro_f1": float(f1[there > 0].mean())}
    return result
