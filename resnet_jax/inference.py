"""Networks for use: norms folded, compiled, and on a CPU fed with parts of the batch that stay in its cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.fold import fold_batch_norm
from resnet_jax.models.resnet import ResNet
from resnet_jax.sharding import compiler_options

LARGE_PART, SMALL_PART = 8, 64
"""Images that a CPU takes at once: of 96 x 96 pixels or more, and smaller ones."""


def make_forward(model: nn.Module, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """`forward(images) -> logits`, as fast as this machine does it.

    Batch normalisation is folded into the convolutions, which changes logits by rounding only. On a CPU a large batch
    goes through in parts, since activations that leave the cache cost more than the arithmetic.

    Args:
      model: a module of `create_model`.
      variables: `{"params", "batch_stats"}` of the model.

    Returns:
      A function of images, float [batch, height, width, channel], normalised; for each shape it compiles once.
    """
    if isinstance(model, ResNet) and model.norm in ("batch", "frozen_batch"):
        model, variables = fold_batch_norm(model, variables)
    program = jax.jit(model.apply, compiler_options=compiler_options())

    def forward(images: jax.Array) -> jax.Array:
        count = len(images)
        part = LARGE_PART if min(images.shape[1:3]) >= 96 else SMALL_PART
        if jax.default_backend() != "cpu" or count <= part:
            return program(variables, images)
        missing = -count % part
        padded = jnp.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
        parts = [program(variables, padded[i : i + part]) for i in range(0, count, part)]
        return jnp.concatenate(parts)[:count]

    return forward
