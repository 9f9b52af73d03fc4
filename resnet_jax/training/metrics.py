"""Metrics as sums over examples, so that any split of the data adds up to the same mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Sums = dict[str, Any]


def train_sums(losses: Array, logits: Array, labels: Array) -> Sums:
    """Sums over a batch: `loss`, `accuracy` (examples that are right) and `count`, float32 scalars."""
    right = logits.argmax(-1) == labels
    return {"loss": losses.sum(), "accuracy": right.sum(dtype=jnp.float32), "count": jnp.float32(labels.shape[0])}


def eval_sums(losses: Array, logits: Array, labels: Array, mask: Array) -> Sums:
    """Sums over the examples of a batch where `mask` is true.

    Args:
      losses: float32 [batch].
      logits: float32 [batch, classes].
      labels: int32 [batch].
      mask: bool [batch].

    Returns:
      `loss`, `accuracy`, `top5` (only where there are more than five classes), `count`, and for each class
      `class_accuracy` and `class_count` [classes].
    """
    classes = logits.shape[-1]
    right = mask & (logits.argmax(-1) == labels)
    member = jax.nn.one_hot(labels, classes)
    sums = {
        "loss": jnp.where(mask, losses, 0.0).sum(),
        "accuracy": right.sum(dtype=jnp.float32),
        "count": mask.sum(dtype=jnp.float32),
        "class_accuracy": right.astype(jnp.float32) @ member,
        "class_count": mask.astype(jnp.float32) @ member,
    }
    if classes > 5:
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
    """Means from sums: `loss` and fractions as floats, `count` as int, `class_accuracy` a list (nan without examples).

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
        with np.errstate(invalid="ignore", divide="ignore"):
            result["class_accuracy"] = (total["class_accuracy"] / total["class_count"]).tolist()
        result["class_count"] = [int(n) for n in total["class_count"]]
    return result
