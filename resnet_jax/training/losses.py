"""Losses of one example each, in float32, and the weights of classes in them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.config import TrainConfig

Array = jax.Array

EFFECTIVE_BETA = 0.999
"""Of `effective_number`: about 1 / (1 - beta) images of a class are taken for as good as all (Cui et al. 2019)."""


def soft_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """float32 [batch, classes]: one at the label, of which `smoothing` is spread over all classes.

    Args:
      labels: int [batch], or 0 and 1 [batch, classes] where an image has several, which smoothing moves towards 1/2.
    """
    if labels.ndim == 2:
        return labels * (1.0 - smoothing) + smoothing / 2
    return jax.nn.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Softmax cross-entropy in nats: [batch, classes], [batch, classes] -> [batch]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def focal(logits: Array, targets: Array, gamma: float = 2.0) -> Array:
    """Softmax cross-entropy with each class's term times (1 - p) ** gamma (Lin et al. 2017, arXiv:1708.02002)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(targets * (1.0 - jnp.exp(log_p)) ** gamma * log_p).sum(-1)


def binary(logits: Array, targets: Array, weights: Any = 1.0) -> Array:
    """Sigmoid cross-entropy in nats, averaged over the classes (Wightman et al. 2021): -> [batch]."""
    return (optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets) * weights).mean(-1)


def make_loss(recipe: TrainConfig, class_weights: np.ndarray | None = None) -> Callable[[Array, Array], Array]:
    """The recipe's loss, `loss(logits, targets) -> [batch]`.

    Args:
      class_weights: [classes], what a term counts; with softmax losses that of the target's class.
    """
    if recipe.loss == "binary":
        return lambda logits, targets: binary(logits, targets, 1.0 if class_weights is None else class_weights)
    of = cross_entropy if recipe.loss == "cross_entropy" else lambda x, t: focal(x, t, recipe.focal_gamma)
    return of if class_weights is None else lambda logits, targets: of(logits, targets * class_weights)


def class_weights(kind: str, counts: np.ndarray) -> np.ndarray | None:
    """float32 [classes], None for `none`.

    `balanced` is size / (classes * count), which sums to the same over the images of every class; `effective_number`
    is proportional to (1 - beta) / (1 - beta ** count) (Cui et al. 2019, arXiv:1901.05555). The mean over the images is
    1 in both, so that the learning rate keeps its meaning.

    Args:
      counts: images of each class; none of them 0.
    """
    if kind == "none":
        return None
    if kind == "balanced":
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)
    inverse = (1.0 - EFFECTIVE_BETA) / (1.0 - EFFECTIVE_BETA**counts)
    return (inverse * counts.sum() / (inverse * counts).sum()).astype(np.float32)
