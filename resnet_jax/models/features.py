"""Backbones: the maps of some stages of a network, for detection, segmentation and the like."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from resnet_jax.config import InputError
from resnet_jax.models.registry import feature_info

Array = jax.Array


class Features(nn.Module):
    """Computes maps of a network: images [batch, height, width, channel] -> a tuple of [batch, h, w, channels[i]].

    Its variables are those of the network alone, under the same paths. It may be a part of another module.

    Attributes:
      model: the network, which has endpoints.
      names: of its endpoints, such as `stage2`.
      channels: of each map.
      strides: how many times larger than each map the image is.
    """

    model: nn.Module
    names: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def setup(self) -> None:
        nn.share_scope(self, self.model)

    def __call__(self, images: Array, train: bool = False) -> tuple[Array, ...]:
        """Computes the maps, with `train` as in `ResNet.__call__`."""
        outputs = self.model(images, train=train, endpoints=True)[1]
        return tuple(outputs[name] for name in self.names)


def features_of(model: nn.Module, stages: Sequence[int] | None = None, frozen: bool = False) -> Features:
    """Returns the maps of some stages of a model as a module.

    Args:
      model: a module of `create_model`, without a head, or a user's own with `endpoints`.
      stages: numbers of stages in the order of the result, 0 for the stem before its pool; None for all stages.
      frozen: normalise with the running statistics, also with `train=True`, and train nothing of the norms; without
        effect where there is no batch norm.

    Raises:
      InputError: the model has no such stages, no maps, or norms that cannot be frozen.
    """
    kind = type(model).__qualname__
    found = {0 if f.name == "stem" else int(f.name.removeprefix("stage")): f for f in feature_info(model)}
    stages = [number for number in found if number] if stages is None else stages
    if not stages or (unknown := [number for number in stages if number not in found]):
        asked = ", ".join(map(str, unknown)) if stages else "no stages"
        raise InputError(
            f"stages: {kind} cannot give {asked}; it has {', '.join(map(str, found))}, where 0 is the stem"
        )
    if frozen and not hasattr(model, "norm"):
        raise InputError(f"{kind} has no field norm that could be frozen_batch: call it with train=False instead")
    if frozen and model.norm == "batch":
        model = model.clone(norm="frozen_batch")
    names, channels, strides = zip(*(found[number] for number in stages), strict=True)
    return Features(model, names, channels, strides)
