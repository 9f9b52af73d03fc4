"""Models by name: creates and lists them, and counts their parameters and multiply-adds."""

import difflib
import fnmatch
import math
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from resnet_jax.config import InputError, ModelConfig, Size, sides
from resnet_jax.models.attention import SpatialAttention
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.layers import BatchNorm, Conv, GroupNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stacking import block_by_block
from resnet_jax.models.table import DENSENETS, GOOGLENETS, RESNETS, VITS
from resnet_jax.models.vit import SelfAttention, ViT

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (ResNet, row) for name, row in RESNETS.items()},
    **{name: (DenseNet, row) for name, row in DENSENETS.items()},
    **{name: (GoogLeNet, row) for name, row in GOOGLENETS.items()},
    **{name: (ViT, row) for name, row in VITS.items()},
}
"""Name -> module and the fields in which the model differs from the module's defaults."""


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern such as `resnext*`, sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Returns the named model as a `flax.linen.Module`; nothing is allocated.

    Args:
      name: a name from `list_models()`.
      **overrides: fields of its module that differ from the named model's: `num_classes`, `in_channels`, `act`,
        `norm`, `attention`, `anti_alias`, `output_stride`, `drop_rate`, `drop_path_rate`, `global_pool`, `dtype`, ...

    Raises:
      InputError: the name or a field is unknown; the message has the nearest ones.
    """
    if name not in MODELS:
        raise InputError(f"no model is called {name!r}; {nearest(name, MODELS)} See `resnet-jax models`.")
    module, row = MODELS[name]
    fields = [f for f in module.__dataclass_fields__ if f not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            raise InputError(f"{name} has no field {field!r}; {nearest(field, fields)}")
    return module(**(row | overrides))


def model_fields(recipe: ModelConfig) -> dict[str, Any]:
    """Returns the fields in which a recipe's model differs from the named model, but for classes and type."""
    excluded = ("name", "num_classes", "pretrained", "compute_dtype")
    default = ModelConfig()
    names = [name for name in ModelConfig.__dataclass_fields__ if name not in excluded]
    return {name: value for name in names if (value := getattr(recipe, name)) != getattr(default, name)}


def nearest(word: str, words: Any) -> str:
    """Returns a sentence that names the words most like a wrong one, or all where none is."""
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(words))}."


@lru_cache(maxsize=256)
def variable_shapes(model: Any) -> Any:
    """Returns shapes and types of a model's variables; nothing is allocated, and equal blocks are traced once."""
    traced = shortened(model)
    size = getattr(model, "image_size", 64)
    images = jax.ShapeDtypeStruct((1, size, size, model.in_channels), jnp.float32)
    shapes = jax.eval_shape(traced.init, jax.random.key(0), images)
    shapes = {name: values for name, values in shapes.items() if name in ("params", "batch_stats")}
    if traced is not model:
        for values in shapes.values():
            for stage, blocks in enumerate(model.stage_sizes, 1):
                later = {f"block{i}": values[f"stage{stage}"]["block2"] for i in range(3, blocks + 1)}
                values[f"stage{stage}"] |= later
    return shapes


def shortened(model: Any) -> Any:
    """Returns a ResNet with the first two blocks of each stage, which all later ones equal; other models unchanged."""
    if type(model) is not ResNet or model.scan:
        return model
    return model.clone(stage_sizes=tuple(min(blocks, 2) for blocks in model.stage_sizes))


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable values; running statistics do not count, and nothing is allocated."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variable_shapes(model)["params"]))


class Feature(NamedTuple):
    """Describes an endpoint of a model: `stride` is how many times larger the image is."""

    name: str
    channels: int
    stride: int


def feature_info(model: Any) -> list[Feature]:
    """Describes the maps that `model.apply(..., endpoints=True)` returns beside the logits.

    Raises:
      InputError: the model has tokens and no maps.
    """
    if isinstance(model, ViT):
        raise InputError("a transformer has tokens of one width throughout, and no maps")
    images = jax.ShapeDtypeStruct((1, 256, 256, model.in_channels), jnp.float32)
    results = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), jnp.zeros(images.shape), endpoints=True))
    outputs = results[0][1]
    names = ["stem", *sorted(name for name in outputs if name.startswith("stage"))]
    return [Feature(name, outputs[name].shape[-1], 256 // outputs[name].shape[1]) for name in names]


def stride_of(model: Any) -> int:
    """Returns how many times larger than its last map a model's image is."""
    if isinstance(model, ViT):
        return model.patch
    if isinstance(model, DenseNet):
        return 2 ** (len(model.stage_sizes) - 1) * (1 if model.stem == "3x3" else 4)
    if isinstance(model, GoogLeNet):
        return 4 if model.stem == "3x3" else 32
    halvings = (model.stem != "3x3") + (model.stem_pool != "none") + len(model.stage_sizes) - 1
    return min(2**halvings, model.output_stride)


class Cost(NamedTuple):
    """Holds the number of trainable values of a model, and of multiply-adds for one image."""

    parameters: int
    macs: int


def cost(model: Any, size: Size) -> Cost:
    """Counts a model's parameters, and the multiply-adds of an image of that size, as timm's tables do.

    Convolutions, dense layers, products of attention and norms count; an element costs 2 in batch normalisation, 5 in
    group normalisation, and a standardised weight 4. Nothing is allocated; equal blocks of a ResNet are traced once.
    """
    model = block_by_block(model)
    traced, macs = shortened(model), 0

    def repeats(path: Any) -> int:
        """Returns how often a module counts: one in the second block of a stage counts for all later blocks, too."""
        equal = traced is not model and path[0].startswith("stage") and "block2" in path[1:2]
        return model.stage_sizes[int(path[0][-1]) - 1] - 1 if equal else 1

    def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal macs
        out, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return out
        if isinstance(module, Conv):
            kernel = module.kernel_size**2 * args[0].shape[-1] // module.groups
            each = out.size * kernel + (4 * kernel * out.shape[-1] if module.standardized else 0)
        elif isinstance(module, nn.Dense):
            each = out.size * args[0].shape[-1]
        elif isinstance(module, SelfAttention | SpatialAttention):
            places = math.prod(args[0].shape[1:-1])
            each = 2 * places**2 * out.shape[-1]
        elif isinstance(module, BatchNorm | GroupNorm):
            each = out.size * (2 if isinstance(module, BatchNorm) else 5)
        else:
            return out
        macs += each * repeats(module.path)
        return out

    with nn.intercept_methods(count):
        images = jax.ShapeDtypeStruct((1, *sides(size), model.in_channels), jnp.float32)
        params = jax.eval_shape(traced.init, jax.random.key(0), images)["params"]
    leaves = flatten_dict(params).items()
    return Cost(sum(math.prod(leaf.shape) * repeats(path) for path, leaf in leaves), macs)
