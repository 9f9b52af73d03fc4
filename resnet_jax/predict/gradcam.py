"""Grad-CAM (Selvaraju et al. 2016, arXiv:1610.02391): which parts of an image speak for a class."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def grad_cam(model: Any, variables: Any, images: Array, classes: Array, stage: str | None = None) -> Array:
    """Computes what in each image speaks for a class: the channels of a stage, weighted by the mean gradient of that
    logit.

    Args:
      images: float [batch, height, width, channel], normalised.
      classes: int [batch], one for each image.
      stage: `stage1`, `stage2`, ...; None for the last.

    Returns:
      float32 [batch, h, w] of the stage's size; 0 where nothing speaks for the class, 1 at an image's strongest place.

    Raises:
      ValueError: there is no such stage, or it gives tokens and no map, as in a transformer.

    Example:
      >>> model = rj.create_model("cifar_resnet8", stage_sizes=(1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> rj.grad_cam(model, variables, jnp.zeros((2, 32, 32, 3)), jnp.array([3, 7]), stage="stage2").shape
      (2, 16, 16)
    """
    seen = jax.eval_shape(lambda: _forward(model, variables, images, None, 0.0)[1])
    stage = stage or max(seen)
    if stage not in seen:
        raise ValueError(f"there is no stage {stage!r}; choose one of {', '.join(sorted(seen))}")

    if seen[stage].ndim != 4:
        raise ValueError(f"{stage} gives tokens of shape {seen[stage].shape}, not a map to weigh")

    def logits_of(delta: Array) -> tuple[Array, Array]:
        logits, stages = _forward(model, variables, images, stage, delta)
        return jnp.take_along_axis(logits, classes[:, None], 1).sum(), stages[stage]

    delta = jnp.zeros(seen[stage].shape, seen[stage].dtype)
    gradient, maps = jax.grad(logits_of, has_aux=True)(delta)
    weights = gradient.astype(jnp.float32).mean((1, 2), keepdims=True)
    cam = jax.nn.relu((weights * maps.astype(jnp.float32)).sum(-1))
    strongest = cam.max((1, 2), keepdims=True)
    return jnp.where(strongest > 0, cam / jnp.where(strongest > 0, strongest, 1.0), 0.0)


def _forward(
    model: Any, variables: Any, images: Array, stage: str | None, delta: Any
) -> tuple[Array, dict[str, Array]]:
    """Returns logits, and what every stage puts out, with `delta` added to that of one of them."""
    stages = {}

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and len(path) == 1 and re.fullmatch(r"stage\d+", path[0]):
            out = out + delta if path[0] == stage else out
            stages[path[0]] = out
        return out

    with nn.intercept_methods(tap):
        logits = model.apply(variables, images, train=False)
    return logits, stages
