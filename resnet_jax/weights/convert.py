"""Converts PyTorch's state dicts to variables of our models and back, exactly: axes are transposed, values stay."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import VariableDict

from resnet_jax.config import InputError
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.registry import channels_of, nearest
from resnet_jax.models.stacking import stack_blocks, unstack_blocks
from resnet_jax.weights.names import Entry, entries, has_one_head, is_ours, torch_module

Tensors = Mapping[str, Any]

OUTPUTS = 16
"""Outputs of a convolution that are transposed at once."""

LISTED = 50
"""How many names of each kind an error lists before it counts the rest."""


def to_torch(model: nn.Module, variables: VariableDict) -> dict[str, np.ndarray]:
    """Converts variables to a state dict that timm's, or torchvision's, model of the same name loads strictly.

    Args:
      model: a module of `create_model`.
      variables: its `{"params", "batch_stats"}`.

    Returns:
      Name -> NumPy array, with the type of the variable; kernels are [out, in, height, width], or [out, in].

    Raises:
      InputError: a variable is of another shape than the model's.

    Example:
      >>> model = rj.create_model("cifar_resnet8", stage_sizes=(1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> tensors = rj.to_torch(model, variables)
      >>> tensors["conv1.weight"].shape
      (16, 3, 3, 3)
    """
    flat = flatten_dict(unstack_blocks(variables))
    tensors = {}
    for entry in entries(model):
        value = np.asarray(flat[entry.path])
        if value.shape != entry.shape:
            raise InputError(
                f"{'/'.join(entry.path)} is {list(value.shape)}, and {type(model).__name__} has {list(entry.shape)}: "
                "give the fields with which it was made; a module of your own whose shapes depend on the size of the "
                "images needs a field image_size, which is set to it"
            )
        if not entry.same_axes:
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[entry.key] = np.ascontiguousarray(value).reshape(entry.tensor_shape)
        if entry.key.endswith("running_var"):
            tensors[entry.key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def from_torch(model: nn.Module, tensors: Tensors, head: Any = None) -> Any:
    """Converts a PyTorch state dict to variables of a model.

    Args:
      model: a module of `create_model`; where it has no head, the head of the tensors is left out.
      tensors: name -> NumPy array or tensor, with names that `state_dict_names` understands.
      head: `{"kernel", "bias"}` to take in place of the tensors' own.

    Returns:
      `{"params", "batch_stats"}` in float32; no `batch_stats` for a model that has none.

    Raises:
      InputError: tensors are missing, left over, of another shape, not floating-point or not finite; all of them are
        listed. Or the head is not one linear layer.

    Example:
      >>> model = rj.create_model("cifar_resnet8", stage_sizes=(1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> again = rj.from_torch(model, rj.to_torch(model, variables))
      >>> jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), dict(variables), again))
      True
    """
    tensors, wanted = state_dict_names(model, tensors), entries(model)
    classes = getattr(model, "num_classes", None)
    if has_one_head(model) and (head is not None or not classes):
        tensors = {name: tensor for name, tensor in tensors.items() if not in_head(model, name)}
        wanted = tuple(entry for entry in wanted if entry.path[1] != "head")
    elif others := [name for name in tensors if in_head(model, name) and name.rpartition(".")[0] != head_key(model)]:
        raise InputError(
            f"the head is not one linear layer: {', '.join(others)}. Ask for another number of classes, which "
            "gets a new head, or for num_classes=0, which has none; or leave these tensors out of the file"
        )
    found, other = [], []
    for entry in wanted:
        if entry.key in tensors:
            tensor = as_array(entry.key, tensors[entry.key])
            if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
                other.append(f"type: {entry.key} is {tensor.dtype}, which is no floating-point type of 16 bits or more")
            elif _fits(tensor.shape, entry):
                found.append((entry, tensor))
            else:
                shapes = f"{list(tensor.shape)}, the model has {list(entry.tensor_shape)}"
                other.append(f"shape: {entry.key} is {shapes}")
    check_tensors({entry.key for entry in wanted}, set(tensors), other)
    arrays = [_converted(entry, tensor) for entry, tensor in found]
    check_values(zip([entry.key for entry, _ in found], arrays, strict=True))
    paths = [entry.path for entry, _ in found]
    variables = unflatten_dict(dict(zip(paths, jax.device_put(arrays), strict=True)))
    if head is not None and classes:
        variables["params"]["head"] = head
    return stack_blocks(variables) if getattr(model, "scan", False) else variables


def as_array(name: str, tensor: Any) -> np.ndarray:
    """Returns a NumPy array as it is, and a tensor of PyTorch as an array; its floating-point types become float32.

    Raises:
      InputError: the tensor cannot be an array: it is quantised, sparse, nested, complex or on the meta device.
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    kinds = {
        "quantised": tensor.is_quantized,
        "nested": tensor.is_nested,
        "on the meta device, without values": tensor.is_meta,
        "complex": tensor.is_complex(),
        f"not dense ({tensor.layout})": not tensor.is_nested and str(tensor.layout) != "torch.strided",
        f"{tensor.dtype}": tensor.is_floating_point() and tensor.element_size() < 2,
    }
    for kind, found in kinds.items():
        if found:
            raise InputError(f"the tensor {name} is {kind}: save it as a dense floating-point tensor")
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def check_values(arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises InputError where named arrays hold nan or infinity."""
    wrong = []
    for name, values in arrays:
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            wrong.append(f"{name}: {bad} of {values.size} values are nan or infinite in float32")
    if wrong:
        count = [f"... {len(wrong)} in all"] if len(wrong) > LISTED else []
        raise InputError("the weights are damaged:\n  " + "\n  ".join(wrong[:LISTED] + count))


def _converted(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    """Returns a copy of a tensor as float32 with the axes of our array: those of a kernel have the outputs last."""
    array = np.empty(entry.shape, np.float32)
    with np.errstate(over="ignore"):
        if entry.same_axes:
            array[...] = tensor
        elif array.ndim == 4:
            for i in range(0, len(tensor), OUTPUTS):  # a few at a time stay in the processor's cache
                array[..., i : i + OUTPUTS] = tensor[i : i + OUTPUTS].transpose(2, 3, 1, 0)
        else:
            array[...] = tensor.reshape(entry.shape[::-1]).T
    return array


def state_dict_names(model: nn.Module, tensors: Tensors) -> dict[str, Any]:
    """Renames tensors to the names that today's state dicts of torchvision and timm have for this model.

    - A prefix that all tensors of the network carry is removed: DDP, torch.compile, Lightning, averages and modules
      around the network leave `module.`, `_orig_mod.`, `model.`, ... in any order. Other tensors keep their names.
    - A head of one linear layer gets the model's name for it, whatever it is called (`HEADS`), also in a Sequential
      (`fc.1.weight`); without a bias it gets one of zeros. Other heads keep their names.
    - DenseNet's published files say `norm.1` for `norm1`.
    - Counters (`num_batches_tracked`, `n_averaged`) and auxiliary heads that the model does not have are left out.

    Raises:
      InputError: there are several networks, under different prefixes.
    """
    modern = {key: _modern(key) for key in tensors}
    backbone = {entry.key for entry in entries(model) if entry.path[1] != "head"}
    found = Counter(key[:i] for key in modern.values() for i in _starts(key) if key[i:] in backbone)
    networks = sorted(prefix for prefix, count in found.items() if count > len(backbone) / 2)
    if len(networks) > 1:
        raise InputError(
            f"there are several networks, under {', '.join(map(repr, networks))}: save a file with the tensors of one"
        )
    prefix = max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")
    outer = [prefix[:i] for i in _starts(prefix)[::-1]]
    named, head = {}, {}
    for key, name in modern.items():
        counter = key.rpartition(".")[2] in ("num_batches_tracked", "n_averaged")
        inner = name.removeprefix(prefix)
        if counter or (isinstance(model, GoogLeNet) and not model.auxiliary and inner.startswith("aux")):
            continue
        within = next((name[len(start) :] for start in outer if name.startswith(start)), name)
        if in_head(model, within):
            head[within] = tensors[key]
        else:
            named[inner if name.startswith(prefix) else key] = tensors[key]
    return named | _linear(head, head_key(model))


HEADS = ("fc", "classifier", "head", "heads", "last_linear", "linear", "logits", "output")
"""First words of the names that heads have in PyTorch."""


def in_head(model: nn.Module, name: str) -> bool:
    """Tells whether a tensor of that name, without prefixes, belongs to a head: in a user's own module, to `head`."""
    first = name.partition(".")[0]
    return first in HEADS if is_ours(model) else first == "head" and has_one_head(model)


def _modern(key: str) -> str:
    if "denselayer" in key:
        return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    return key


def _starts(key: str) -> list[int]:
    """Returns where the parts of a dotted name begin, and its end if it ends with a dot."""
    return [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]


def _linear(head: dict[str, Any], name: str) -> dict[str, Any]:
    """Renames a head that is one linear layer, and gives it a bias; other heads stay as they are."""
    weights = [key for key in head if key.endswith(".weight")]
    module = weights[0].removesuffix(".weight") if weights else ""
    if not weights or not set(head) <= {f"{module}.weight", f"{module}.bias"}:
        return head
    weight = head[f"{module}.weight"]
    shape = tuple(weight.shape)
    if len(shape) != 2 and shape[2:] != (1, 1):
        return head
    bias = head[f"{module}.bias"] if f"{module}.bias" in head else np.zeros(shape[0], np.float32)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


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
    """Tells whether a tensor has an entry's shape; a dense layer may be a 1x1 convolution."""
    if len(entry.shape) == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    target = entry.tensor_shape[:2] if len(entry.shape) == 2 else entry.tensor_shape
    return shape == target


def head_key(model: nn.Module) -> str:
    """Returns the name of the classifier in a state dict, without `.weight` and `.bias`."""
    return torch_module(model, "head")


def classes_of(model: nn.Module, tensors: Tensors) -> int:
    """Counts the outputs of the head in a state dict; 0 where it has no head."""
    head = [tensor for name, tensor in state_dict_names(model, tensors).items() if in_head(model, name)]
    return next((tensor.shape[0] for tensor in reversed(head) if len(tensor.shape)), 0)


def adapt_stem(model: nn.Module, tensors: Tensors) -> Tensors:
    """Fits the first convolution, made for RGB, to the model's `in_channels`; names are as in `state_dict_names`.

    For one channel the kernels of red, green and blue are added, so that the logits of a grey image are those of its
    RGB; for n channels they are repeated (red, green, blue, red, ...), times 3 / n. Tensors that fit are left alone.
    """
    tensors, key, n = state_dict_names(model, tensors), _stem_key(model), channels_of(model)
    if n == 3 or stem_channels(model, tensors) != 3:
        return tensors
    rgb = as_array(key, tensors[key]).astype(np.float32)
    adapted = rgb.sum(1, keepdims=True) if n == 1 else rgb[:, np.arange(n) % 3] * np.float32(3 / n)
    return tensors | {key: adapted}


def stem_channels(model: nn.Module, tensors: Tensors) -> int | None:
    """Returns the number of channels of the images that tensors were made for; None without a first convolution."""
    kernel = state_dict_names(model, tensors).get(_stem_key(model))
    return None if kernel is None or len(kernel.shape) != 4 else kernel.shape[1]


def _stem_key(model: nn.Module) -> str:
    found = (e.key for e in entries(model) if e.path[1].startswith("stem") and e.path[-1] == "kernel")
    return next(found, "")  # of a user's own module, which may have no part of this name


def fresh_head(model: nn.Module) -> Any:
    """Draws a new classifier, `{"kernel", "bias"}` in float32, as the model's own would be."""
    shape = next(entry.shape for entry in entries(model) if entry.path[1:] == ("head", "kernel"))
    kernel = nn.initializers.lecun_normal()(jax.random.key(0), shape, jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(shape[1])}
