"""A linear probe on features that are computed once, where nothing about the images is random."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.config import AugmentConfig, Config, known
from resnet_jax.data.dataset import Source
from resnet_jax.data.loader import BadImages, Batch, eval_batches, renumbered
from resnet_jax.data.on_device import normalize
from resnet_jax.models.head import Classifier
from resnet_jax.models.registry import OURS
from resnet_jax.training.sharding import compiler_options, replicated, sharded_over

Features = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Variables, and a batch with `image` -> the batch with `feature` in its place, float32 [batch, channel]."""

STILL = AugmentConfig(crop="none", flip="none", eval_crop=1.0)


def computes_features_once(config: Config) -> bool:
    """Returns whether the recipe trains the head alone on images that are always the same."""
    same = ("area", "pad", "eval_crop", "eval_flip", "interpolation", "repeats")  # these do not differ between steps
    augment = dataclasses.replace(STILL, **{name: getattr(config.augment, name) for name in same})
    alone = config.finetune.mode == "linear_probe" and not config.optimizer.rate_rules and config.model.name in OURS
    return alone and config.augment == augment and not config.augment.eval_flip and not config.model.drop_path_rate


def head_of(model: Any) -> nn.Module:
    """Returns the model's head as a module of its own, for the parameters of the whole model."""
    return Classifier(model.num_classes, model.drop_rate)


def make_features(config: Config, model: Any, mesh: Mesh) -> Features:
    """Returns the frozen part of a model as a function of its variables and of batches that lie on a mesh."""
    body = model.clone(num_classes=None)
    mean, std = known(config.data.mean, "data.mean"), known(config.data.std, "data.std")

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        pixels = normalize(images, mean, std, model.dtype)
        return body.apply(variables, pixels, train=False)

    program = jax.jit(sharded_over(mesh)(forward), compiler_options=compiler_options())

    def features(variables: Any, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: values for name, values in batch.items() if name != "image"}
        return rest | {"feature": program(variables, batch["image"])}

    return features


def whole_features(
    source: Source,
    config: Config,
    mesh: Mesh,
    bad: BadImages,
    features: Callable[[dict[str, Any]], dict[str, Any]],
    table: np.ndarray | None,
) -> Batch:
    """Returns all examples of a split as `draw_batch` takes them: `feature` float32, `label` int32, and perhaps
    `table`.

    Args:
      features: those of `make_features` for certain variables.
      table: of `sampling_table`.
    """
    data = dataclasses.replace(config.data, eval_image_size=None)
    still = dataclasses.replace(
        config, data=data, augment=dataclasses.replace(STILL, interpolation=config.augment.interpolation)
    )
    gather = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))

    def parts() -> Iterator[Batch]:
        for batch in eval_batches(source, still, mesh, bad, jax.process_index(), jax.process_count()):
            yield jax.device_get(gather(features(batch)))

    rows = list(parts())
    whole = {name: np.concatenate([row[name] for row in rows]) for name in ("feature", "label", "mask")}
    kept = np.flatnonzero(whole["mask"])
    split = {name: whole[name][kept] for name in ("feature", "label")}
    return split if table is None else split | {"table": renumbered(table, kept, len(source))}
