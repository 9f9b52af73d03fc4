"""Variables of our models to PyTorch's tensors and back, exactly: values are moved, never computed."""

import math
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.config import InputError
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.registry import nearest
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.weights.names import Entry, entries, torch_module

Tensors = Mapping[str, Any]

LISTED = 50
"""Names of each kind that an error lists before it counts the rest."""

LARGE, TILE = 2**14, 2**16
"""Numbers in a tensor that is worth a thread, and in a part of it that a processor's cache holds."""


def to_torch(model: Any, variables: Any) -> dict[str, np.ndarray]:
    """A PyTorch state dict as NumPy arrays: what timm's, or torchvision's, model of the same name loads strictly.

    Args:
      model: a module of `create_model`.
      variables: its `{"params", "batch_stats"}`.
    """
    flat = flatten_dict(unstack_blocks(variables))
    tensors = {}
    for entry in entries(model):
        value = np.asarray(flat[entry.path])
        turned = value if entry.kept else value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[entry.key] = np.ascontiguousarray(turned).reshape(entry.tensor_shape)
        if entry.path[-1] == "var":
            tensors[entry.key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def from_torch(model: Any, tensors: Tensors, head: Any = None) -> Any:
    """Variables of a model from a PyTorch state dict with torchvision's or timm's names.

    Args:
      model: a module of `create_model`; where it has no head, that of the tensors is left out.
      tensors: name -> NumPy array or CPU tensor; floating-point types other than float32 are converted.
      head: `{"kernel", "bias"}` to take in place of the tensors' own.

    Returns:
      `{"params", "batch_stats"}` in float32; no `batch_stats` for a model that has none.

    Raises:
      InputError: tensors are missing, left over or of another shape; all of them are listed.
    """
    names = {name: key for key in tensors if (name := modern_name(model, key))}
    wanted = entries(model)
    if head is not None or not model.num_classes:
        its = head_key(model) + "."
        names = {name: key for name, key in names.items() if not name.startswith(its)}
        wanted = tuple(entry for entry in wanted if entry.path[1] != "head")
    found, other = [], []
    for entry in wanted:
        if entry.key in names:
            tensor = np.asarray(tensors[names[entry.key]])
            if _fits(tensor.shape, entry):
                found.append((entry, tensor))
            else:
                shapes = f"{list(tensor.shape)}, the model has {list(entry.tensor_shape)}"
                other.append(f"shape: {entry.key} is {shapes}")
    check_tensors({entry.key for entry in wanted}, set(names), other)
    variables = unflatten_dict(_turned(found))
    if head is not None and model.num_classes:
        variables["params"]["head"] = head
    return stack_blocks(variables) if getattr(model, "scan", False) else variables


def _turned(found: list[tuple[Entry, np.ndarray]]) -> dict[tuple[str, ...], jax.Array]:
    """Copies of tensors as our arrays, by their paths, in float32; threads turn the large ones."""
    large = [pair for pair in found if pair[1].size >= LARGE]
    small = [pair for pair in found if pair[1].size < LARGE]
    arrays = [_aligned(entry.shape) for entry, _ in large]
    parts = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(parts) as threads:
        list(threads.map(_turn, [arrays[i::parts] for i in range(parts)], [large[i::parts] for i in range(parts)]))
    taken = jax.device_put(arrays + [_view(*pair).copy() for pair in small])
    return dict(zip([entry.path for entry, _ in large + small], taken, strict=True))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for an array, on a border of 64 bytes, so that JAX takes it on a CPU without another copy."""
    size = math.prod(shape)
    memory = np.empty(size + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + size].reshape(shape)


def _view(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    """A tensor as float32, its axes in our order."""
    tensor = tensor.astype(np.float32, copy=False)
    if entry.kept:
        return tensor
    return tensor.transpose(2, 3, 1, 0) if len(entry.shape) == 4 else tensor.reshape(entry.shape[::-1]).T


def _turn(arrays: list[np.ndarray], pairs: list[tuple[Entry, np.ndarray]]) -> None:
    """Fills arrays with what `_view` shows; kernels go by parts that a processor's cache holds.

    NumPy has no way for that, and JAX's own takes more than twice as long.
    """
    import cv2

    for array, (entry, tensor) in zip(arrays, pairs, strict=True):
        if entry.kept or array.ndim == 1:
            array[...] = tensor
            continue
        inputs, outputs = array.shape[-2:]
        rows, turned = np.ascontiguousarray(tensor, np.float32).reshape(outputs, -1), array.reshape(-1, inputs, outputs)
        places = len(turned)
        if places == 1:
            cv2.transpose(rows, turned[0])
            continue
        step = max(1, TILE // (outputs * places))
        for first in range(0, inputs, step):
            part = cv2.transpose(rows[:, first * places : (first + step) * places])
            turned[:, first : first + step] = part.reshape(-1, places, outputs).transpose(1, 0, 2)


def modern_name(model: Any, key: str) -> str:
    """A tensor's name as today's state dicts have it; empty for what we have no use for.

    DenseNet's published files say `norm.1` for `norm1`; wrappers put `module.` or `model.` in front.
    """
    key = key.removeprefix("module.").removeprefix("model.")
    if "denselayer" in key:
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    spare = isinstance(model, GoogLeNet) and not model.auxiliary and key.startswith("aux")
    if key.endswith("num_batches_tracked") or spare:
        return ""
    return key


def check_tensors(wanted: set[str], present: set[str], other: list[str]) -> None:
    """Raises InputError with all that is missing or left over and the sentences of `other`, with the nearest names."""
    left = sorted(present - wanted)
    missing = []
    for i, key in enumerate(sorted(wanted - present)):
        hint = f" ({nearest(key, left)})" if i < 10 and 0 < len(left) < 100 else ""
        missing.append(f"missing: {key}{hint}")
    lines = []
    for kind in (missing, [f"left over: {key}" for key in left], other):
        lines += kind[:LISTED] + ([f"... {len(kind)} in all"] if len(kind) > LISTED else [])
    if lines:
        raise InputError("the tensors are not those of this model:\n  " + "\n  ".join(lines))


def _fits(shape: tuple[int, ...], entry: Entry) -> bool:
    """Whether a tensor has an entry's shape, apart from the two 1s that a dense layer has as a 1x1 convolution."""
    if len(entry.shape) == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    target = entry.tensor_shape[:2] if len(entry.shape) == 2 else entry.tensor_shape
    return shape == target


def head_key(model: Any) -> str:
    """Name of the classifier in a state dict, without `.weight` and `.bias`."""
    return torch_module(model, "head")


def adapt_stem(model: Any, tensors: Tensors) -> Tensors:
    """Fits the first convolution, made for RGB, to the model's `in_channels`.

    One channel sees the sum over red, green and blue, so that a grey image gives what it gave as RGB; n channels take
    the three in turn, scaled by 3 / n. Tensors that fit are left alone.
    """
    key, n = _stem_key(model, tensors), model.in_channels
    if key is None or n == 3 or tensors[key].shape[1] != 3:
        return tensors
    rgb = np.asarray(tensors[key]).astype(np.float32)
    adapted = rgb.sum(1, keepdims=True) if n == 1 else rgb[:, np.arange(n) % 3] * np.float32(3 / n)
    return ChainMap({key: adapted}, tensors)  # type: ignore[arg-type]  # it only reads


def stem_channels(model: Any, tensors: Tensors) -> int | None:
    """Channels of the images that tensors were made for; None where they lack the first convolution."""
    key = _stem_key(model, tensors)
    return None if key is None else tensors[key].shape[1]


def _stem_key(model: Any, tensors: Tensors) -> str | None:
    first = next(entry for entry in entries(model) if entry.path[1].startswith("stem") and entry.path[-1] == "kernel")
    return next((key for key in tensors if modern_name(model, key) == first.key), None)


def fresh_head(model: Any) -> Any:
    """A new classifier, `{"kernel", "bias"}`, drawn as the model's own would be."""
    shape = next(entry.shape for entry in entries(model) if entry.path[1:] == ("head", "kernel"))
    kernel = nn.initializers.lecun_normal()(jax.random.key(0), shape, jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(shape[1])}
