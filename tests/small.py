"""A small network as a file."""

from pathlib import Path

import jax
import jax.numpy as jnp

from resnet_jax.models.registry import create_model
from resnet_jax.weights.convert import to_torch
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import Weights
from resnet_jax.weights.tags import Preprocessing


def save_small_network(path: Path) -> None:
    """Writes a random network of ten classes, with what it needs to predict."""
    model = create_model("cifar_resnet8", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    look = Preprocessing((0.5,) * 3, (0.5,) * 3, 8, 8, 1.0, "bilinear")
    save_tensors(path, Weights(to_torch(model, variables), "cifar_resnet8", {"num_classes": 10}, look), "safetensors")
