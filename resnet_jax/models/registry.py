"""The table of named models, and how to make one."""

import difflib
import fnmatch
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.config import InputError
from resnet_jax.models.resnet import ResNet

IMAGENET: dict[str, dict[str, Any]] = {
    "resnet18": {"stage_sizes": (2, 2, 2, 2), "block": "basic"},
    "resnet34": {"stage_sizes": (3, 4, 6, 3), "block": "basic"},
    "resnet50": {"stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"stage_sizes": (3, 4, 23, 3)},
    "resnet152": {"stage_sizes": (3, 8, 36, 3)},
    "resnet200": {"stage_sizes": (3, 24, 36, 3)},
    "resnet50d": {"stage_sizes": (3, 4, 6, 3), "stem": "deep", "shortcut": "D"},
    "wide_resnet50_2": {"stage_sizes": (3, 4, 6, 3), "base_width": 128},
    "wide_resnet101_2": {"stage_sizes": (3, 4, 23, 3), "base_width": 128},
    "resnext50_32x4d": {"stage_sizes": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x8d": {"stage_sizes": (3, 4, 23, 3), "cardinality": 32, "base_width": 8},
    "resnetv2_50": {"stage_sizes": (3, 4, 6, 3), "preact": True},
    "resnetv2_101": {"stage_sizes": (3, 4, 23, 3), "preact": True},
    "resnetv2_152": {"stage_sizes": (3, 8, 36, 3), "preact": True},
}


def _cifar(blocks: int, **fields: Any) -> dict[str, Any]:
    """Three stages of `blocks` blocks on a 3x3 stem of 16 channels (He et al. 2015, section 4.2)."""
    row = {"stage_sizes": (blocks,) * 3, "block": "basic", "widths": (16, 32, 64), "stem_width": 16}
    return row | {"stem": "3x3", "stem_pool": False, "num_classes": 10} | fields


CIFAR: dict[str, dict[str, Any]] = {
    **{f"cifar_resnet{n}": _cifar((n - 2) // 6, shortcut="A") for n in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{n}": _cifar((n - 2) // 6, shortcut="none") for n in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_resnetv2_{n}": _cifar((n - 2) // 9, block="bottleneck", preact=True) for n in (164, 1001)},
    "cifar_wrn_28_10": _cifar(4, preact=True, widths=(160, 320, 640)),
    "cifar_resnet18": _cifar(0, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem_width=64),
}

MODELS = IMAGENET | CIFAR


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as `resnext*`, sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The named model as a `flax.linen.Module`; nothing is allocated.

    Args:
      name: a name from `list_models()`.
      **overrides: fields of `ResNet` that differ from the named model's: `num_classes`, `dtype`, `shortcut`, ...

    Raises:
      InputError: the name or a field is unknown; the message has the nearest ones.
    """
    if name not in MODELS:
        raise InputError(f"no model is called {name!r}; {_nearest(name, MODELS)} See `resnet-jax models`.")
    fields = [f for f in ResNet.__dataclass_fields__ if f not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            raise InputError(f"{name} has no field {field!r}; {_nearest(field, fields)}")
    return ResNet(**(MODELS[name] | overrides))


def _nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(words))}."


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values, from shapes alone: running statistics do not count, nothing is allocated."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
