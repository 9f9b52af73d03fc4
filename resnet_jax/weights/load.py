"""`load_pretrained`: a model and its variables from a source of weights."""

import logging
from typing import Any

import flax.linen as nn

from resnet_jax.config import InputError
from resnet_jax.models.registry import create_model
from resnet_jax.weights.convert import Tensors, adapt_stem, fresh_head, from_torch, head_key, modern_name, stem_channels
from resnet_jax.weights.sources import Weights, find_weights

logger = logging.getLogger("resnet_jax")


def load_pretrained(
    source: str, name: str | None = None, num_classes: int | None = None, in_channels: int = 3, **overrides: Any
) -> tuple[nn.Module, Any]:
    """A model with pretrained weights.

    Args:
      source: a tag (`resnet50.tv2_in1k`; `resnet50` alone takes its default), which is fetched from the Hugging Face
        hub and cached; `hf-hub:OWNER/NAME`; a `.safetensors`, `.pth` or `.pt` file; a folder with weights and
        `config.json`; the folder of a run.
      name: of the model; needed where the source is a file that does not say.
      num_classes: None keeps the weights' head, another number makes the head anew, 0 leaves it out.
      in_channels: of the images; the first convolution is adapted as `adapt_stem` says.
      **overrides: fields of the module, as for `create_model`.

    Returns:
      The module, and `{"params", "batch_stats"}` in float32.

    Raises:
      InputError: the source cannot be found or read, or its tensors are not those of the model.
    """
    weights = find_weights(source)
    name, fields = model_of(weights, source, name)
    fields |= {"in_channels": in_channels} | overrides
    if num_classes is not None:
        fields["num_classes"] = num_classes or None
    model = create_model(name, **fields)
    return model, fit_weights(model, weights.tensors, source)


def model_of(weights: Weights, source: str, name: str | None) -> tuple[str, dict[str, Any]]:
    """Name and fields of the model that weights belong to, with as many classes as they have.

    Raises:
      InputError: neither the weights nor `name` say which model it is.
    """
    name = name or weights.name
    if name is None:
        raise InputError(f"{source} does not say which model it belongs to: give its name, such as resnet50")
    classes = classes_of(create_model(name), weights.tensors)
    return name, weights.fields | {"num_classes": classes or None}


def classes_of(model: nn.Module, tensors: Tensors) -> int:
    """Number of classes in a state dict; 0 where it has no head."""
    name = f"{head_key(model)}.bias"
    bias = next((key for key in tensors if modern_name(model, key) == name), None)
    return 0 if bias is None else tensors[bias].shape[0]


def fit_weights(model: Any, tensors: Tensors, source: str, head: Any = None) -> Any:
    """The variables of a model from tensors; stem and head are fitted to it, and the log says so.

    Args:
      source: for the log.
      head: `{"kernel", "bias"}` for the case that the tensors' own does not fit; None draws one.

    Raises:
      InputError: as `from_torch`.
    """
    tensors = adapt_stem(model, tensors)
    found = stem_channels(model, tensors)
    if found is not None and found != model.in_channels:
        raise InputError(
            f"{source} takes images of {found} channels, the model {model.in_channels}: only weights for RGB can be "
            f"fitted to others. Give {found} channels (in_channels, or data.channels of a recipe)"
        )
    classes = classes_of(model, tensors)
    if not model.num_classes or classes == model.num_classes:
        return from_torch(model, tensors)
    logger.warning("%s has %d classes, the model %d: its head is made anew", source, classes, model.num_classes)
    return from_torch(model, tensors, head or fresh_head(model))
