"""Inference without batch normalisation: its factors go into the convolutions before it."""

from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.models.layers import BatchNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stacking import block_by_block, unstack_blocks

Tree = dict[str, Any]


def fold_batch_norm(model: ResNet, variables: Tree) -> tuple[ResNet, Tree]:
    """Returns a model without batch statistics and its variables, with the same logits in evaluation up to rounding.

    Each norm behind a convolution becomes its bias. A norm with no convolution before it, as the first one of a
    pre-activation block or that behind self-attention, becomes a factor and a bias. The result is for evaluation only.

    Raises:
      ValueError: the model's norm is not batch normalisation, its kernels are standardised, or it is no ResNet.

    Example:
      >>> model = rj.create_model("cifar_resnet8", stage_sizes=(1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> folded, weights = rj.fold_batch_norm(model, variables)
      >>> folded.norm, "batch_stats" in weights
      ('folded', False)
    """
    if not isinstance(model, ResNet) or model.standardized:
        raise ValueError("only a ResNet whose kernels are used as they are can be folded")
    if model.norm not in ("batch", "frozen_batch"):
        raise ValueError(f"norm {model.norm!r} cannot be folded into convolutions; only batch and frozen_batch can")
    model, variables = block_by_block(model), unstack_blocks(variables)
    params = _fold(variables["params"], variables["batch_stats"], model.preact)
    return model.clone(norm="folded"), {"params": params}


def _fold(params: Tree, stats: Tree, preact: bool, in_stage: bool = False) -> Tree:
    folded = dict(params)
    for name, part in params.items():
        if name.startswith("norm"):
            factor = part["scale"] * jax.lax.rsqrt(stats[name]["var"] + BatchNorm.epsilon)
            shift = part["bias"] - stats[name]["mean"] * factor
            conv = _conv_before(name, preact and in_stage)
            if "kernel" in params.get(conv, {}):  # self-attention stands in the place of some
                folded[conv] = {"kernel": params[conv]["kernel"] * factor}
                folded[name] = {"bias": shift}
            else:
                folded[name] = {"scale": factor, "bias": shift}
        elif name.startswith(("stem", "stage", "block", "shortcut")):
            folded[name] = _fold(part, stats.get(name, {}), preact, in_stage or name.startswith("stage"))
    return jax.tree.map(jnp.asarray, folded)


def _conv_before(norm: str, preact_block: bool) -> str:
    """Returns the name of the convolution before a norm: `conv2` for `norm2`, but `conv1` in a pre-activation block."""
    number = norm.removeprefix("norm")
    return f"conv{int(number) - 1}" if preact_block else f"conv{number}"
