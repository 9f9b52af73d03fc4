"""Models by name: creates, lists and registers them, and counts their parameters and multiply-adds."""

import difflib
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

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
"""Name -> module, or a function that returns one, and the fields in which the model differs from its defaults."""

OURS = frozenset(MODELS)
"""Names of the models of this package; all others are users' own."""

Maker = TypeVar("Maker", bound=Callable[..., nn.Module])


def register_model(name: str) -> Callable[[Maker], Maker]:
    """Puts a module of your own among the named models: `@register_model("mynet")` above its definition.

    What is registered is a `flax.linen.Module` class, or a function that returns a module; it is called with
    `num_classes`, with `dtype` and `in_channels` where it takes them, and with the fields that are asked for. The
    module is called as `module(images, train=...)` and returns logits, float32 [batch, num_classes]; what is trained by
    its name has a field `num_classes`. A field `image_size` is set to the side of the images: a module whose shapes
    depend on it needs one, and a function that makes it has to take it. A dense layer called `head` is made anew where
    weights have other classes. In files of weights tensors have the module's paths, with PyTorch's words and axes:
    `conv/kernel` is `conv.weight`.

    The same definition may be registered again, as a notebook's cell that is run twice does: the newer one counts.

    Args:
      name: letters, digits, `_` and `-`. A recipe's `model.name` takes it, where the file of `--config` registers it.

    Raises:
      InputError: the name is taken or impossible, or what is registered takes no `num_classes`.

    Example:
      >>> @rj.register_model("mean_colour")
      ... class MeanColour(nn.Module):
      ...     num_classes: int = 10
      ...
      ...     @nn.compact
      ...     def __call__(self, images, train=False):
      ...         return nn.Dense(self.num_classes, name="head")(images.mean((1, 2)))
      >>> rj.create_model("mean_colour", num_classes=3).num_classes
      3
    """

    def register(make: Maker) -> Maker:
        what = getattr(make, "__qualname__", repr(make))
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"register_model({name!r}): a name is made of letters, digits, _ and -")
        if name in MODELS and not (name not in OURS and _place(MODELS[name][0]) == _place(make)):
            raise InputError(f"register_model: {name!r} is taken already; give {what} another name")
        if not callable(make) or not _takes(make, "num_classes"):
            raise InputError(
                f"register_model({name!r}): {what} takes no num_classes, with which it is called; give the module such "
                "a field, or the function such an argument"
            )
        MODELS[name] = (make, {})
        return make

    return register


def _place(make: Callable[..., nn.Module]) -> tuple[Any, Any]:
    """Returns where something is defined."""
    return getattr(make, "__module__", None), getattr(make, "__qualname__", make)


def _parameters(make: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """Returns what a class or function is called with; of a module its fields."""
    found = inspect.signature(make).parameters
    module = isinstance(make, type) and issubclass(make, nn.Module)
    return {name: parameter for name, parameter in found.items() if not (module and name in ("parent", "name"))}


def _takes(make: Callable[..., nn.Module], name: str) -> bool:
    """Returns whether a class or function can be called with an argument of this name."""
    parameters = _parameters(make)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern such as `resnext*`, sorted.

    Example:
      >>> rj.list_models("resnet18*")
      ['resnet18', 'resnet18d']
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def check_name(name: str) -> None:
    """Raises InputError where no model has this name; the message has the nearest ones."""
    if name not in MODELS:
        raise InputError(
            f"no model is called {name!r}; {nearest(name, MODELS)} See `resnet-jax models`; one of your own is there "
            "after `register_model`, such as in the file of --config"
        )


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Returns the named model as a `flax.linen.Module`; nothing is allocated.

    Args:
      name: a name from `list_models()`.
      **overrides: fields of its module that differ from the named model's: `num_classes`, `in_channels`, `act`,
        `norm`, `attention`, `anti_alias`, `output_stride`, `drop_rate`, `drop_path_rate`, `global_pool`, `dtype`, ...

    Raises:
      InputError: the name or a field is unknown; the message has the nearest ones.

    Example:
      >>> model = rj.create_model("cifar_resnet20", num_classes=4, act="silu")
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> variables["params"]["head"]["kernel"].shape
      (64, 4)
    """
    check_name(name)
    make, row = MODELS[name]
    fields = _parameters(make)
    given = row | {
        field: value for field, value in overrides.items() if _takes(make, field) or not _plain(field, value)
    }
    for field in given:
        if not _takes(make, field):
            raise InputError(f"{name} has no field {field!r}; {nearest(field, fields)}")
    needed = [f for f, p in fields.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [field for field in needed if field not in given]:
        raise InputError(f"{name} needs {', '.join(missing)}: give {'it' if len(missing) == 1 else 'them'}")
    module = make(**given)
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}: {_place(make)[1]} gave {type(module).__name__}, expected a flax.linen.Module")
    return module


def _plain(field: str, value: object) -> bool:
    """Returns whether a field has the value with which modules without this field compute anyway."""
    return (field == "dtype" and value == jnp.float32) or (field == "in_channels" and value == 3)


def default_classes(name: str) -> int:
    """Returns how many outputs the named model has where nobody says; 1000 where its module has no default."""
    make, row = MODELS[name]
    default = row.get("num_classes", getattr(_parameters(make).get("num_classes"), "default", None))
    return default if isinstance(default, int) else 1000


def channels_of(model: nn.Module) -> int:
    """Returns the number of channels of a model's images."""
    return getattr(model, "in_channels", 3)


def dtype_of(model: nn.Module) -> Any:
    """Returns the type in which a model computes, and takes its images."""
    return getattr(model, "dtype", None) or jnp.float32


def own_models() -> list[str]:
    """Returns the names that `register_model` was given, in that order."""
    return [name for name in MODELS if name not in OURS]


def model_fields(recipe: ModelConfig) -> dict[str, Any]:
    """Returns the fields in which a recipe's model differs from the named model, but for classes and type."""
    excluded = ("name", "num_classes", "pretrained", "compute_dtype")
    default = ModelConfig()
    names = [name for name in ModelConfig.__dataclass_fields__ if name not in excluded]
    return {name: value for name in names if (value := getattr(recipe, name)) != getattr(default, name)}


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns a sentence that names the words most like a wrong one, or all where none is."""
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(words))}."


@lru_cache(maxsize=256)
def variable_shapes(model: nn.Module) -> Any:
    """Returns shapes and types of a model's variables; nothing is allocated, and equal blocks are traced once."""
    traced = shortened(model)
    size = getattr(model, "image_size", 64)
    images = jax.ShapeDtypeStruct((1, size, size, channels_of(model)), jnp.float32)
    shapes = jax.eval_shape(partial(traced.init, train=False), jax.random.key(0), images)
    shapes = {name: values for name, values in shapes.items() if name in ("params", "batch_stats")}
    if traced is not model:
        for values in shapes.values():
            for stage, blocks in enumerate(model.stage_sizes, 1):
                later = {f"block{i}": values[f"stage{stage}"]["block2"] for i in range(3, blocks + 1)}
                values[f"stage{stage}"] |= later
    return shapes


def shortened(model: nn.Module) -> nn.Module:
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


def feature_info(model: nn.Module) -> list[Feature]:
    """Describes the maps that `model.apply(..., endpoints=True)` returns beside the logits.

    Raises:
      InputError: the model has tokens and no maps, or is a module of your own without `endpoints`.

    Example:
      >>> rj.feature_info(rj.create_model("cifar_resnet20"))[-1]
      Feature(name='stage3', channels=64, stride=4)
    """
    if isinstance(model, ViT):
        raise InputError("a transformer has tokens of one width throughout, and no maps")
    check_endpoints(model)
    images = jax.ShapeDtypeStruct((1, 256, 256, channels_of(model)), jnp.float32)
    trace = partial(shortened(model).init_with_output, train=False, endpoints=True)
    outputs = jax.eval_shape(trace, jax.random.key(0), images)[0][1]
    stages = sorted(int(name[5:]) for name in outputs if re.fullmatch(r"stage\d+", name))
    names = [name for name in ("stem", *(f"stage{number}" for number in stages)) if name in outputs]
    return [Feature(name, outputs[name].shape[-1], 256 // outputs[name].shape[1]) for name in names]


def check_endpoints(model: nn.Module) -> None:
    """Raises InputError where a model has no `endpoints`, the outputs of its stages."""
    kind = type(model)
    if "endpoints" not in inspect.signature(kind.__call__).parameters:
        raise InputError(
            f"{kind.__qualname__} gives logits alone: let `__call__(images, train=False, endpoints=False)` return "
            "(logits, {'stem': map, 'stage1': map, ..., 'features': [batch, channel]}) with endpoints"
        )


def stride_of(model: nn.Module) -> int:
    """Returns how many times larger than its last map a model's image is; 1 for a module of a user's own."""
    if isinstance(model, ViT):
        return model.patch
    if isinstance(model, DenseNet):
        return 2 ** (len(model.stage_sizes) - 1) * (1 if model.stem == "3x3" else 4)
    if isinstance(model, GoogLeNet):
        return 4 if model.stem == "3x3" else 32
    if not isinstance(model, ResNet):
        return 1
    halvings = (model.stem != "3x3") + (model.stem_pool != "none") + len(model.stage_sizes) - 1
    return min(2**halvings, model.output_stride)


class Cost(NamedTuple):
    """Holds the number of trainable values of a model, and of multiply-adds for one image."""

    parameters: int
    macs: int


def cost(model: nn.Module, size: Size) -> Cost:
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
        elif isinstance(module, nn.Conv):
            each = out.size * math.prod(module.variables["params"]["kernel"].shape[:-1])
        elif isinstance(module, nn.Dense):
            each = out.size * args[0].shape[-1]
        elif isinstance(module, SelfAttention | SpatialAttention):
            places = math.prod(args[0].shape[1:-1])
            each = 2 * places**2 * out.shape[-1]
        elif isinstance(module, BatchNorm | GroupNorm | nn.BatchNorm | nn.GroupNorm):
            each = out.size * (2 if isinstance(module, BatchNorm | nn.BatchNorm) else 5)
        else:
            return out
        macs += each * repeats(module.path)
        return out

    with nn.intercept_methods(count):
        images = jax.ShapeDtypeStruct((1, *sides(size), channels_of(model)), jnp.float32)
        params = jax.eval_shape(partial(traced.init, train=False), jax.random.key(0), images)["params"]
    leaves = flatten_dict(params).items()
    return Cost(sum(math.prod(leaf.shape) * repeats(path) for path, leaf in leaves), macs)
