"""Losses of one example each, in float32."""

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def soft_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """int [batch] -> float32 [batch, classes]: one at the label, of which `smoothing` is spread over all classes."""
    return jax.nn.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Softmax cross-entropy in nats: [batch, classes], [batch, classes] -> [batch]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def binary(logits: Array, targets: Array) -> Array:
    """Sigmoid cross-entropy in nats, averaged over the classes (Wightman et al. 2021): -> [batch]."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).mean(-1)


LOSSES = {"cross_entropy": cross_entropy, "binary": binary}
