"""Losses of one example each, in float32, and the weights of classes in them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.config import InputError

Array = jax.Array
Loss: TypeAlias = Callable[[Array, dict[str, Array]], Array]
"""`loss(logits, batch) -> float32 [batch]`."""

EFFECTIVE_BETA = 0.999
"""Of `effective_number`: about 1 / (1 - beta) images of a class are taken for as good as all (Cui et al. 2019)."""


def soft_targets(labels: Array, classes: int, smoothing: Any) -> Array:
    """Returns float32 [batch, classes]: one at the label, of which `smoothing` is spread over all classes.

    Args:
      labels: int [batch], or 0 and 1 [batch, classes] where an image has several, which smoothing moves towards 1/2.
    """
    smoothing = jnp.float32(smoothing)  # so that it may be an input of a compiled function, with the same bits
    if labels.ndim == 2:
        return labels * (1.0 - smoothing) + smoothing / 2
    return one_hot(labels, classes) * (1.0 - smoothing) + smoothing * (1.0 / classes)


def one_hot(labels: Array, classes: int, dtype: Any = float) -> Array:
    """Returns [batch, classes], one at each label; unlike JAX's also of int8 and uint8 labels of many classes."""
    return jax.nn.one_hot(labels.astype(jnp.promote_types(labels.dtype, jnp.int32)), classes, dtype=dtype)


def cross_entropy(logits: Array, batch: dict[str, Array]) -> Array:
    """Computes the softmax cross-entropy in nats, float32 [batch], of logits [batch, classes].

    Args:
      batch: with `target` float32 [batch, classes], or else `label` int [batch].

    Example:
      >>> cross_entropy(jnp.zeros((1, 2)), {"label": jnp.array([1])}).round(3)
      Array([0.693], dtype=float32)
    """
    return softmax_cross_entropy(logits, targets_of(logits, batch))


def targets_of(logits: Array, batch: dict[str, Array]) -> Array:
    """Returns a batch's `target`, or where it has none what its `label` says, float32 [batch, classes].

    Raises:
      InputError: it has not the shape of the logits [batch, classes], and would be spread over them.
    """
    name = "target" if "target" in batch else "label"
    targets = batch[name] if name == "target" else soft_targets(batch[name], logits.shape[-1], 0.0)
    if targets.shape != logits.shape:
        column = batch[name].ndim == 2 and batch[name].shape[1] == 1
        remedy = f": take {name}[:, 0], where it is the number of a class" if column else ""
        raise InputError(
            f'batch["{name}"] is {list(batch[name].shape)} for logits {list(logits.shape)}; expected one class for '
            f"each image, [batch], or a number for each class, [batch, classes]{remedy}"
        )
    return targets


def softmax_cross_entropy(logits: Array, targets: Array) -> Array:
    """Computes the softmax cross-entropy in nats: [batch, classes], [batch, classes] -> [batch]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def focal(logits: Array, targets: Array, gamma: float = 2.0) -> Array:
    """Computes the focal loss, [batch]: the cross-entropy with each class's term times (1 - p) ** gamma.

    Source: Lin et al. 2017, arXiv:1708.02002.

    Example:
      >>> logits, targets = jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]])
      >>> focal(logits, targets) / softmax_cross_entropy(logits, targets)  # (1 - 0.5) ** 2
      Array([0.25], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    rest = 1.0 - jnp.exp(log_p)
    factor = jnp.where(rest > 0, rest, 1.0) ** gamma  # the slope of 0 ** gamma is infinite for gamma below 1
    return -(targets * factor * jnp.where(rest > 0, log_p, 0.0)).sum(-1)


def binary(logits: Array, targets: Array, weights: Array | np.ndarray | float = 1.0) -> Array:
    """Computes the sigmoid cross-entropy in nats, averaged over the classes (Wightman et al. 2021): -> [batch].

    Example:
      >>> binary(jnp.zeros((1, 3)), jnp.array([[1.0, 0.0, 1.0]])).round(3)
      Array([0.693], dtype=float32)
    """
    return (optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets) * weights).mean(-1)


def make_loss(kind: str, focal_gamma: float = 2.0, class_weights: np.ndarray | None = None) -> Loss:
    """Returns a loss of the table of losses: `cross_entropy`, `focal` or `binary`.

    Args:
      kind: its name.
      focal_gamma: exponent of `focal`.
      class_weights: [classes], what a term counts; with softmax losses that of the target's class.
    """
    weights = 1.0 if class_weights is None else class_weights
    of: Callable[[Array, Array], Array] = {
        "cross_entropy": lambda logits, targets: softmax_cross_entropy(logits, targets * weights),
        "focal": lambda logits, targets: focal(logits, targets * weights, focal_gamma),
        "binary": lambda logits, targets: binary(logits, targets, weights),
    }[kind]
    return lambda logits, batch: of(logits, targets_of(logits, batch))


def class_weights(kind: str, counts: np.ndarray) -> np.ndarray | None:
    """Returns what each class counts in the loss, float32 [classes]; None for the kind `none`.

    `balanced` is size / (classes * count), which sums to the same over the images of every class; `effective_number`
    is proportional to (1 - beta) / (1 - beta ** count) (Cui et al. 2019, arXiv:1901.05555). The mean over the images is
    1 in both, so that the learning rate keeps its meaning.

    Args:
      counts: images of each class; none of them 0.

    Example:
      >>> class_weights("balanced", np.array([10, 30])).round(3)
      array([2.   , 0.667], dtype=float32)
    """
    if kind == "none":
        return None
    if kind == "balanced":
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)
    inverse = (1.0 - EFFECTIVE_BETA) / (1.0 - EFFECTIVE_BETA**counts)
    return (inverse * counts.sum() / (inverse * counts).sum()).astype(np.float32)
