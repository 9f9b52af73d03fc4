"""Measures a backbone without training it: nearest neighbours among its features (Wu et al. 2018, arXiv:1805.01978)."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax.typing import VariableDict

from resnet_jax.config import AugmentConfig, Config, InputError, TrainConfig
from resnet_jax.data.dataset import Source, default_split
from resnet_jax.data.loader import BadImages, eval_batches
from resnet_jax.data.on_device import normalize
from resnet_jax.data.sources import load_dataset
from resnet_jax.files import path_of
from resnet_jax.models.registry import channels_of, check_endpoints, create_model, dtype_of
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.training.evaluation import mesh_for
from resnet_jax.training.sharding import compiler_options, replicated, sharded_over
from resnet_jax.typed import from_extra
from resnet_jax.weights.load import fit_weights, model_of, preprocessing_of
from resnet_jax.weights.sources import find_weights
from resnet_jax.weights.tags import Preprocessing


def knn(
    source: str,
    dataset: str | None = None,
    k: int = 20,
    split: str | None = None,
    *,
    name: str | None = None,
    checkpoint: str | None = None,
    batch_size: int = 64,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Classifies a split by its nearest training images, with scikit-learn's `KNeighborsClassifier`.

    Near are images whose features, pooled and before the head, have a small cosine distance; each of the k nearest
    votes for its class with one over its distance. Images are prepared as for the evaluation of the network.

    Args:
      source: of the network, as for `load_pretrained`.
      dataset: as `data.dataset` of a recipe; None takes that of the run.
      k: neighbours that vote.
      split: `validation` or `test`; None takes test where the data has it.
      name, checkpoint: as for `find_weights`.
      batch_size: images that go through the network at once.
      data_dir: as in a recipe.

    Returns:
      `accuracy`, `correct`, `count`, `split`, `k`, `train_count`, `channels` (of the features) and `skipped_images`.

    Raises:
      InputError: the source or the data cannot be read, scikit-learn is missing, images have several labels, or there
        are fewer than k training images.
    """
    with from_extra("report", "knn"):
        from sklearn.neighbors import KNeighborsClassifier
    weights = find_weights(source, name, checkpoint)
    model_name, fields = model_of(weights, source)
    model: Any = create_model(model_name, **fields)
    check_endpoints(model)
    look = preprocessing_of(weights, source)
    if look is None:
        raise InputError(f"{source} does not say how pictures are prepared; take the run, or what it exports")
    config = recipe_for(source, dataset, data_dir, look, channels_of(model), batch_size)
    data = load_dataset(config.data, config.train.seed, hold_out=split == "validation")
    if data.multilabel:
        raise InputError(f"{config.data.dataset}: images have several labels, and nearest neighbours give one")
    split = split or default_split(data)
    tested = data.split(split)
    if k > len(data.train):
        raise InputError(f"--k {k}: there are {len(data.train)} training images; take as many neighbours or fewer")
    bad = BadImages("skip", channels=config.data.channels)
    mesh = mesh_for(batch_size)
    variables = jax.device_put(fit_weights(model, weights.tensors, source), replicated(mesh))

    def pooled(variables: VariableDict, images: jax.Array) -> jax.Array:
        pixels = normalize(images, look.mean, look.std, dtype_of(model))
        return model.apply(variables, pixels, train=False, endpoints=True)[1]["features"]

    program = jax.jit(sharded_over(mesh)(pooled), compiler_options=compiler_options())

    def read(part: Source) -> tuple[np.ndarray, np.ndarray]:
        """Returns features, float32 [n, channels], and labels of the images that can be decoded."""
        features, labels = [], []
        for batch in eval_batches(part, config, mesh, bad, classes=data.label_classes()):
            here = np.asarray(batch["mask"])
            features.append(np.asarray(program(variables, batch["image"]), np.float32)[here])
            labels.append(np.asarray(batch["label"])[here])
        found = np.concatenate(features)
        if not np.isfinite(found).all():
            raise InputError(f"{source} gives features that are not finite: the weights are damaged")
        return found, np.concatenate(labels)

    (known, known_labels), (new, new_labels) = read(data.train), read(tested)
    if len(known) < k or not len(new):
        raise InputError(f"{len(bad.names)} images cannot be decoded, such as {min(bad.names)}: too few are left")
    classifier = KNeighborsClassifier(k, weights="distance", metric="cosine").fit(known, known_labels)
    correct, count = int((classifier.predict(new) == new_labels).sum()), len(new)
    return {
        "accuracy": correct / count,
        "correct": correct,
        "count": count,
        "split": split,
        "k": k,
        "train_count": len(known),
        "channels": known.shape[1],
        "skipped_images": sorted(bad.names),
    }


def recipe_for(
    source: str, dataset: str | None, data_dir: str | None, look: Preprocessing, channels: int, batch_size: int
) -> Config:
    """Returns a recipe that reads data for a network; of a run it is the run's data, held out by the run's seed.

    Raises:
      InputError: nobody names a dataset.
    """
    path = path_of(source, "SOURCE")
    run = recorded_recipe(path) if (path / "checkpoints").is_dir() else None
    base = run or Config()
    if run is None and dataset is None:
        raise InputError(f"{source} is no run, which would name its data: give --data.dataset, such as folder:PATH")
    data = replace(
        base.data,
        dataset=dataset or base.data.dataset,
        data_dir=data_dir or base.data.data_dir,
        image_size=look.eval_image_size,
        eval_image_size=None,
        channels=channels,
        mean=look.mean,
        std=look.std,
    )
    interpolation: Any = look.interpolation
    augment = AugmentConfig(crop="none", eval_crop=look.eval_crop, interpolation=interpolation)
    return Config(data=data, augment=augment, train=TrainConfig(batch_size=batch_size, seed=base.train.seed))
