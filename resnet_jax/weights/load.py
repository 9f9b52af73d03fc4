"""Loads a model with pretrained weights."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import InputError, shown_size
from resnet_jax.models.features import Features, features_of
from resnet_jax.models.registry import OURS, channels_of, create_model, default_classes, list_models
from resnet_jax.weights.convert import Tensors, adapt_stem, as_array, classes_of, fresh_head, from_torch, stem_channels
from resnet_jax.weights.names import has_one_head, is_ours
from resnet_jax.weights.sources import Weights, find_weights
from resnet_jax.weights.tags import Preprocessing, tags_of

logger = logging.getLogger("resnet_jax")


def load_pretrained(
    source: str, name: str | None = None, num_classes: int | None = None, in_channels: int = 3, **overrides: Any
) -> tuple[nn.Module, Any]:
    """Loads a model with pretrained weights.

    Args:
      source: a tag (`resnet50.tv2_in1k`; `resnet50` alone takes its default), which is fetched from the Hugging Face
        hub and cached; `hf-hub:OWNER/NAME`; a `.safetensors`, `.pth`, `.pt`, `.ckpt` or `.bin` file; a folder with
        weights and `config.json`; the folder of a run.
      name: of the model; needed where the source is a file that does not say.
      num_classes: None keeps the weights' head, another number makes the head anew, 0 leaves it out. A head without a
        bias gets one of zeros.
      in_channels: of the images; the first convolution is adapted as `adapt_stem` says.
      **overrides: fields of the module, as for `create_model`.

    Returns:
      The module, and `{"params", "batch_stats"}` in float32.

    Raises:
      InputError: the source cannot be found or read, or its tensors are not those of the model.

    Example:
      A tag of timm's, with a new head for five classes, and a file with torchvision's names::

        model, variables = rj.load_pretrained("resnet50.tv2_in1k", num_classes=5)
        model, variables = rj.load_pretrained("weights.pth", "resnet50")
        logits = model.apply(variables, images, train=False)
    """
    weights = find_weights(source, name)
    name, fields = model_of(weights, source)
    fields |= {"in_channels": in_channels} | overrides
    if num_classes is not None:
        fields["num_classes"] = num_classes or None
    model = create_model(name, **fields)
    return model, fit_weights(model, weights.tensors, source)


def features(
    source: str,
    stages: Sequence[int] | None = None,
    *,
    key: jax.Array | None = None,
    frozen: bool = False,
    name: str | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> tuple[Features, Any]:
    """Makes a backbone: the maps of some stages of a network, for detection, segmentation and the like.

    Args:
      source: of pretrained weights, as for `load_pretrained`; with `key` the name of a model.
      stages: their numbers, in the order of the maps, such as (2, 3, 4); 0 is the stem, None all stages.
      key: draws random parameters in place of pretrained ones.
      frozen: batch norms use their running statistics, also with `train=True`, and nothing of them trains.
      name, in_channels: as for `load_pretrained`.
      **overrides: fields of the module, as for `create_model`.

    Returns:
      A module, with `names`, `channels` and `strides` of the maps, and its variables `{"params", "batch_stats"}` in
      float32, which are those of the network without its head. `module.apply(variables, images, train=...)` returns a
      tuple of maps [batch, height / stride, width / stride, channel].

    Raises:
      InputError: as `load_pretrained`, or the model has no such stages, or tokens and no maps.

    Example:
      >>> shape = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem_width": 8}
      >>> backbone, variables = rj.features("resnet18", stages=(2, 3), key=jax.random.key(0), **shape)
      >>> backbone.channels, backbone.strides
      ((8, 16), (8, 16))
      >>> maps = backbone.apply(variables, jnp.zeros((1, 64, 64, 3)), train=False)
      >>> [m.shape for m in maps]
      [(1, 8, 8, 8), (1, 4, 4, 16)]
    """
    if key is None:
        try:
            weights = find_weights(source, name)
        except InputError as error:
            random = "; key=jax.random.key(0) draws random parameters" if source in list_models() else ""
            raise InputError(f"{error}{random}") from error
        name, fields = model_of(weights, source)
    else:
        name, fields = source, {}
    fields |= {"in_channels": in_channels} | overrides | ({"num_classes": None} if name in OURS else {})
    model = create_model(name, **fields)
    module = features_of(model, stages, frozen)
    if key is None:
        return module, fit_weights(model, weights.tensors, source)
    images = jax.ShapeDtypeStruct((1, 64, 64, in_channels), jnp.float32)
    return module, jax.jit(module.lazy_init)(key, images)


def model_of(weights: Weights, source: str) -> tuple[str, dict[str, Any]]:
    """Returns name and fields of the model that weights belong to, with as many classes as they have.

    Raises:
      InputError: neither the source nor the caller names the model.
    """
    if weights.name is None:
        raise InputError(f"{source} does not say which model it belongs to: give its name, such as resnet50")
    given = weights.fields.get("num_classes")
    try:
        model = create_model(weights.name, num_classes=given or default_classes(weights.name))
        classes = classes_of(model, weights.tensors)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    if not classes and not is_ours(model):
        classes = given or default_classes(weights.name)
    return weights.name, weights.fields | {"num_classes": classes or None}


def preprocessing_of(weights: Weights, source: str, flags: Mapping[str, str] | None = None) -> Preprocessing | None:
    """Returns how images are prepared for weights, as their source says.

    Where it does not say, it is as for the default tag of their model, which the log notes; None where there is no tag.

    Args:
      flags: field of `Preprocessing` -> the flag that gives another value, of the fields that are taken from here; None
        where there are no such flags.
    """
    if weights.preprocessing is not None or not weights.name:
        return weights.preprocessing
    tags = tags_of(weights.name)
    if not tags:
        return None
    found = tags[0].preprocessing
    words = {
        "image_size": f"{shown_size(found.image_size)} pixels in training",
        "eval_image_size": f"{shown_size(found.eval_image_size)} in evaluation",
        "eval_crop": f"crop {found.eval_crop}",
        "interpolation": found.interpolation,
        "mean": f"mean {' '.join(map(str, found.mean))}",
        "std": f"deviation {' '.join(map(str, found.std))}",
    }
    if flags is None:
        taken, remedy = ", ".join(words.values()), "a folder that holds it and timm's config.json says otherwise"
    else:
        taken = ", ".join(f"{words[field]} ({flag})" for field, flag in flags.items())
        remedy = "the flags in brackets change it"
    if taken:
        message = "%s does not say how images are prepared: taken as for %s, %s; %s"
        logger.warning(message, source, tags[0].tag, taken, remedy)
    return found


def names_of_outputs(outputs: int | None, given: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """Returns a name for each output of a network.

    Without given names outputs are called by their numbers; outputs beyond the given names are called `class 10`, ... A
    single output is the probability of the label 1: it is called `1`, or takes the second of two names.

    Raises:
      InputError: there are more names than outputs.
    """
    outputs, given = outputs or 0, tuple(given or ())
    if outputs == 1 and len(given) in (0, 2):
        return given[1:] or ("1",)
    if len(given) > outputs:
        raise InputError(f"{source} names {len(given)} classes, and its head has {outputs} outputs: leave names out")
    first = given or tuple(map(str, range(outputs)))
    return (*first, *(f"class {i}" for i in range(len(first), outputs)))


def fit_weights(model: nn.Module, tensors: Tensors, source: str, head: Any = None) -> Any:
    """Converts tensors to variables of a model, with stem and head fitted to it; the log notes a new head.

    Args:
      model: a module of `create_model`.
      tensors: as for `from_torch`.
      source: for messages.
      head: `{"kernel", "bias"}` to take where the tensors' head has another number of classes; None draws one.

    Returns:
      `{"params", "batch_stats"}` in float32.

    Raises:
      InputError: as `from_torch`.
    """
    try:
        tensors = adapt_stem(model, tensors)
        found = stem_channels(model, tensors)
        if found is not None and found != channels_of(model):
            raise InputError(
                f"takes images of {found} channels, the model {channels_of(model)}: only weights for RGB can be fitted "
                f"to others. Give {found} channels (in_channels, or data.channels of a recipe)"
            )
        for name, tensor in tensors.items():
            if name.endswith("running_var") and np.any(as_array(name, tensor) < 0):
                raise InputError(f"{name} holds negative variances: the weights are damaged")
        classes, wanted = classes_of(model, tensors), getattr(model, "num_classes", None)
        if not wanted or classes == wanted or not has_one_head(model):
            return from_torch(model, tensors)
        variables = from_torch(model, tensors, head or fresh_head(model))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    logger.warning("%s has %d classes, the model %d: its head is made anew", source, classes, wanted)
    return variables
