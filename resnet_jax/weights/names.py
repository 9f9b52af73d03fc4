"""Names our parameters as state dicts of torchvision and timm do."""

import re
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.registry import variable_shapes
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stacking import block_by_block
from resnet_jax.models.vit import ViT

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Entry(NamedTuple):
    """One of our arrays and its tensor.

    Attributes:
      path: from the collection down: `("params", "stage1", "block1", "conv1", "kernel")`.
      shape: of our array.
      key: the tensor's name in a state dict.
      tensor_shape: of the tensor.
      same_axes: its axes stand in the same order; those of kernels are transposed.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    key: str
    tensor_shape: tuple[int, ...]
    same_axes: bool = False


SAME_AXES = ("class_token", "position", "relative_rows", "relative_columns")
"""Arrays whose axes stand in the same order on both sides."""


@lru_cache(maxsize=16)
def entries(model: nn.Module) -> tuple[Entry, ...]:
    """Lists the arrays of a model's variables with the tensors of a state dict, except `num_batches_tracked`."""
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(block_by_block(model))):
        path = tuple(key.key for key in keys)
        module = "/".join(path[1:-1])
        pointwise = "attention/fc" in module or (module == "head" and getattr(model, "preact", False))
        key, same_axes = torch_key(model, module, path[-1]), path[-1] in SAME_AXES
        if not is_ours(model):
            pointwise, same_axes = False, path[-1] != "kernel"
        shape = leaf.shape if same_axes else torch_shape(leaf.shape, pointwise and path[-1] == "kernel")
        found.append(Entry(path, leaf.shape, key, shape, same_axes))
    counts = Counter(entry.key for entry in found)
    return tuple(e if counts[e.key] == 1 else e._replace(key=".".join(e.path)) for e in found)


def is_ours(model: nn.Module) -> bool:
    """Returns whether a model is of this package, so that PyTorch has names for it, and no module of a user's own."""
    return isinstance(model, ResNet | DenseNet | GoogLeNet | ViT)


def has_one_head(model: nn.Module) -> bool:
    """Returns whether a model's classifier is one dense layer called `head`, which can be made anew."""
    leaves = {entry.path[2:] for entry in entries(model) if entry.path[:2] == ("params", "head")}
    return is_ours(model) or leaves == {("kernel",), ("bias",)}


def torch_key(model: nn.Module, module: str, leaf: str) -> str:
    """Returns PyTorch's name of an array of a module of ours; for a user's own module its path, with dots."""
    if not is_ours(model):
        return ".".join(filter(None, (module.replace("/", "."), LEAVES.get(leaf, leaf))))
    if not module:
        return {"class_token": "class_token", "position": "encoder.pos_embedding"}[leaf]
    name = torch_module(model, module)
    return f"{name}{'_' if name.endswith('in_proj') else '.'}{LEAVES.get(leaf, leaf)}"


def torch_shape(shape: tuple[int, ...], pointwise: bool) -> tuple[int, ...]:
    """Returns the shape of the tensor for an array: outputs first.

    Args:
      shape: of the array.
      pointwise: it is the kernel of a dense layer that PyTorch has as a 1x1 convolution.
    """
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] + ((1, 1) if pointwise else ())


def torch_module(model: nn.Module, module: str) -> str:
    """Returns PyTorch's name of a module of ours: `stage1/block2/norm1` -> `layer1.1.bn1`."""
    if not is_ours(model):
        return module.replace("/", ".")
    rules = _rules(model)
    for pattern, name in rules:
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(name) if isinstance(name, str) else name(*match.groups())
    raise KeyError(f"{module} has no name in PyTorch")  # a gap in the rules below


def _rules(model: nn.Module) -> list[tuple[str, Any]]:
    if isinstance(model, GoogLeNet):
        return GOOGLENET
    if isinstance(model, DenseNet):
        return DENSENET
    if isinstance(model, ViT):
        return VIT
    if model.preact:
        return PREACTIVATED
    behind_pool = 1 if model.shortcut == "D" else 0
    behind_blur = 1 if model.anti_alias == "none" else 2
    return [
        *RESIDUAL,
        (r"stem_pool/norm", f"maxpool.{behind_blur}"),
        (r"stage(\d)/block(\d+)/shortcut/conv", lambda s, b: f"layer{s}.{int(b) - 1}.downsample.{behind_pool}"),
        (r"stage(\d)/block(\d+)/shortcut/norm", lambda s, b: f"layer{s}.{int(b) - 1}.downsample.{behind_pool + 1}"),
    ]


def _kind(word: str) -> str:
    return "bn" if word == "norm" else word


RESIDUAL: list[tuple[str, Any]] = [
    (r"stem/conv", "conv1"),
    (r"stem/norm3?", "bn1"),
    (r"stem/(conv|norm)(\d)", lambda kind, i: f"conv1.{3 * int(i) - (3 if kind == 'conv' else 2)}"),
    (r"stem_pool/conv", "maxpool.0"),
    (r"stage(\d)/block(\d+)/(conv|norm)(\d)", lambda s, b, kind, i: f"layer{s}.{int(b) - 1}.{_kind(kind)}{i}"),
    (r"stage(\d)/block(\d+)/attention/(\w+)", lambda s, b, name: f"layer{s}.{int(b) - 1}.se.{name}"),
    (r"stage(\d)/block(\d+)/conv2/qkv", lambda s, b: f"layer{s}.{int(b) - 1}.conv2.qkv"),
    (r"head", "fc"),
]
"""ResNet, ResNeXt, SENet, ... (torchvision and timm), and ours for CIFAR."""

PREACTIVATED: list[tuple[str, Any]] = [
    (r"stem/(\w+)", r"stem.\1"),
    (r"stage(\d)/block(\d+)/shortcut/conv", lambda s, b: f"stages.{int(s) - 1}.blocks.{int(b) - 1}.downsample.conv"),
    (r"stage(\d)/block(\d+)/attention/(\w+)", lambda s, b, n: f"stages.{int(s) - 1}.blocks.{int(b) - 1}.se.{n}"),
    (r"stage(\d)/block(\d+)/(\w+)", lambda s, b, name: f"stages.{int(s) - 1}.blocks.{int(b) - 1}.{name}"),
    (r"norm", "norm"),
    (r"head", "head.fc"),
]
"""ResNetV2 and Big Transfer (timm)."""

DENSENET: list[tuple[str, Any]] = [
    (r"stem/(conv|norm)", r"features.\g<1>0"),
    (r"stem/(conv|norm)(\d)", lambda kind, i: f"features.{kind}{int(i) - 1}"),
    (r"stage(\d)/block(\d+)/(\w+)", r"features.denseblock\1.denselayer\2.\3"),
    (r"transition(\d)/(\w+)", r"features.transition\1.\2"),
    (r"norm", "features.norm5"),
    (r"head", "classifier"),
]
"""DenseNet (torchvision and timm)."""

GOOGLENET: list[tuple[str, Any]] = [
    (r"stem1/(conv|norm)1", lambda kind: f"conv1.{_kind(kind)}"),
    (r"stem2/(conv|norm)(\d)", lambda kind, i: f"conv{int(i) + 1}.{_kind(kind)}"),
    (
        r"stage(\d)/block(\d)/branch1/(conv|norm)1",
        lambda s, b, kind: f"inception{int(s) + 2}{' abcde'[int(b)]}.branch1.{_kind(kind)}",
    ),
    (
        r"stage(\d)/block(\d)/branch([23])/(conv|norm)(\d)",
        lambda s, b, k, kind, i: f"inception{int(s) + 2}{' abcde'[int(b)]}.branch{k}.{int(i) - 1}.{_kind(kind)}",
    ),
    (
        r"stage(\d)/block(\d)/branch4/(conv|norm)1",
        lambda s, b, kind: f"inception{int(s) + 2}{' abcde'[int(b)]}.branch4.1.{_kind(kind)}",
    ),
    (r"auxiliary(\d)/conv/(conv|norm)1", lambda i, kind: f"aux{i}.conv.{_kind(kind)}"),
    (r"auxiliary(\d)/(fc\d)", r"aux\1.\2"),
    (r"head", "fc"),
]
"""GoogLeNet (torchvision)."""

LAYER = "encoder.layers.encoder_layer_"
VIT: list[tuple[str, Any]] = [
    (r"stem/conv", "conv_proj"),
    (r"stage1/block(\d+)/norm(\d)", lambda b, i: f"{LAYER}{int(b) - 1}.ln_{i}"),
    (r"stage1/block(\d+)/attention/qkv", lambda b: f"{LAYER}{int(b) - 1}.self_attention.in_proj"),
    (r"stage1/block(\d+)/attention/out", lambda b: f"{LAYER}{int(b) - 1}.self_attention.out_proj"),
    (r"stage1/block(\d+)/mlp(\d)", lambda b, i: f"{LAYER}{int(b) - 1}.mlp.{3 * (int(i) - 1)}"),
    (r"norm", "encoder.ln"),
    (r"head", "heads.head"),
]
"""Vision transformer (torchvision)."""
