"""Loads datasets: the digits, folders, tables, tensorflow-datasets, Hugging Face, and synthetic data."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config import DataConfig, InputError, Size, known_size, sides
from resnet_jax.data.dataset import (
    SPLIT_NAMES,
    ArraySource,
    Dataset,
    known_labels,
    labels_of,
    row_of,
    with_validation,
)
from resnet_jax.data.folders import folder_dataset, table_dataset
from resnet_jax.data.hugging_face import hugging_face_dataset
from resnet_jax.files import path_of
from resnet_jax.typed import from_extra

CHECKED_LABELS = 1000
"""How many labels of a split that lies on the disk are looked at before the first step; the loader checks the rest."""


def load_dataset(config: DataConfig, seed: int, hold_out: bool = True, prepare: bool = True) -> Dataset:
    """Loads the dataset that `data.dataset` names, in three splits.

    Where the data has no validation split, the share `data.validation_fraction` of the training split is held out for
    it: always where there is no test split either, else only with `hold_out`. Whether an example is held out depends on
    its own key and on `seed`, not on which other examples there are.

    Args:
      config: the part `data` of a recipe.
      seed: of what is held out, and of synthetic data.
      hold_out: something is selected on the validation split.
      prepare: tensorflow-datasets and Hugging Face may download and prepare the data.

    Raises:
      InputError: the kind is unknown, the data is not as its kind needs it, or a label is not that of a class.
    """
    kind, _, rest = config.dataset.partition(":")
    if config.dataset == "digits":
        found = _digits()
    elif config.dataset == "synthetic":
        found = _synthetic(config, seed)
    elif kind == "folder" and rest:
        found = folder_dataset(path_of(rest, "data.dataset"))
    elif kind == "csv" and rest:
        found = table_dataset(path_of(rest, "data.dataset"))
    elif kind == "tfds" and rest:
        found = _tfds(rest, config, prepare)
    elif kind in ("hf", "parquet") and rest:
        found = hugging_face_dataset(config.dataset, config, prepare)
    else:
        raise InputError(
            f"data.dataset {config.dataset!r} is unknown; "
            "give digits, folder:PATH, csv:FILE, tfds:NAME[:SPLIT], hf:NAME_OR_PATH[:SPLIT], parquet:PATH or synthetic"
        )
    return in_three_splits(found, config, seed, hold_out)


def in_three_splits(found: Dataset, config: DataConfig, seed: int, hold_out: bool = True) -> Dataset:
    """Returns a dataset with what is held out for validation, checked, and with a note on what it holds; arguments and
    errors: `load_dataset`.
    """
    held_out = found.validation is None and config.validation_fraction > 0 and (hold_out or found.test is None)
    _check_labels(found)
    if held_out:
        found = with_validation(found, config.validation_fraction, seed)
    counts = ", ".join(f"{len(source):,} {name}" for name, source in found.splits().items())
    how = f" (about {config.validation_fraction:.0%} held out of train, by name)" if held_out else ""
    classes = f"{len(found.class_names)} classes" if found.class_names else "no classes"
    note = f"data: {config.dataset}: {classes}; {counts}{how}"
    return dataclasses.replace(found, notes=(note, *found.notes))


def _check_labels(dataset: Dataset) -> None:
    """Raises InputError where a label is not that of a class; of data on the disk some are looked at."""
    classes = len(dataset.class_names)
    for name, source in dataset.splits().items():
        if not len(source):
            raise InputError(f"the {name} split has no examples")
        if dataset.multilabel or not classes:
            continue
        labels, places = known_labels(source), np.arange(len(source))
        if labels is None:
            places = _spread(len(source), CHECKED_LABELS)
            labels = np.asarray([source[int(i)][1] for i in places])
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
            place = int(places[wrong[0]])
            raise InputError(
                f"{source.describe(place)} ({name}) has the label {labels[wrong[0]]}, and there are {classes} "
                f"classes: labels go from 0 to {classes - 1}"
            )


def _spread(size: int, most: int) -> np.ndarray:
    """Returns at most `most` places, evenly over a split of `size`, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))


def _digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels: scikit-learn's `load_digits`, split by its
    `train_test_split(test_size=0.2, random_state=0, stratify=target)`, in a file here since its import takes seconds.

    They are optdigits of the UCI repository (Alpaydin and Kaynak 1998, doi 10.24432/C50P49, CC BY 4.0).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as digits:

        def split(name: str) -> ArraySource:
            images = np.round(digits[f"{name}_images"] * (255 / 16)).astype(np.uint8)
            labels = digits[f"{name}_labels"].astype(np.int32)
            return ArraySource(np.repeat(images[..., None], 3, axis=-1), labels, f"the digits ({name})")

        return Dataset(split("train"), None, split("test"), tuple(str(i) for i in range(10)))


def _synthetic(config: DataConfig, seed: int) -> Dataset:
    """Returns random pixels and labels; the validation split is a tenth of the size."""
    rng = np.random.default_rng(seed)

    def split(name: str, size: int, image: Size) -> ArraySource:
        images = rng.integers(0, 256, (size, *sides(image), config.channels), dtype=np.uint8)
        labels = rng.integers(0, config.synthetic_classes, size, dtype=np.int32)
        return ArraySource(images, labels, f"the synthetic data ({name})")

    side = known_size(config.image_size)
    train = split("train", config.synthetic_size, side)
    size = max(1, config.synthetic_size // 10)
    validation = split("validation", size, config.eval_image_size or side)
    return Dataset(train, validation, None, tuple(f"class{i}" for i in range(config.synthetic_classes)))


@dataclass(frozen=True)
class TfdsSource:
    """A split of tensorflow-datasets, images still encoded.

    Attributes:
      name: of the dataset with its version.
      places: (split of the builder, first, after the last) of each run of examples, in their order.
    """

    split: Sequence[dict[str, Any]]
    name: str
    places: tuple[tuple[str, int, int], ...]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        example = self.split[index]
        return example["image"], int(example["label"])

    def describe(self, index: int) -> str:
        return f"example {self.key(index)}"

    def key(self, index: int) -> str:
        split, row = row_of(self.places, index)
        return f"{row} of tfds:{self.name}:{split}"


def _tfds(spec: str, config: DataConfig, prepare: bool) -> Dataset:
    """Returns the dataset of `NAME` or `NAME:SPLIT`; validation and test are the splits of these names, where they have
    labels.
    """
    with from_extra("tfds", f"data.dataset tfds:{spec}"):
        import tensorflow_datasets as tfds

    match = re.fullmatch(r"([^:]+(?::\d[\d.]*)?)(?::(.+))?", spec)
    if match is None:
        raise InputError(f"data.dataset tfds:{spec} is not of the form tfds:NAME or tfds:NAME:SPLIT")
    name = match.group(1)
    try:
        builder = tfds.builder(name, data_dir=config.data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, RuntimeError) as error:
        raise InputError(f"tensorflow-datasets has no dataset {name!r}: {str(error).splitlines()[0]}") from error
    features = builder.info.features
    if not {"image", "label"} <= set(features or {}):
        raise InputError(f"tfds:{name} has no image and label, but {', '.join(features or ())}")
    if prepare:
        builder.download_and_prepare()
    elif not builder.is_prepared():
        raise InputError(
            f"tfds:{name} is not prepared in {builder.data_dir}: training prepares it, and --data.dataset names it "
            "elsewhere"
        )
    there = [split for split, info in builder.info.splits.items() if info.num_examples]
    known = {kind: next((s for own in names for s in there if s == own), None) for kind, names in SPLIT_NAMES.items()}
    wanted = match.group(2) or known["train"]
    if wanted is None:
        raise InputError(f"tfds:{name} has no training split, but {', '.join(there)}: give tfds:{name}:SPLIT")
    version = f"{builder.info.name}/{builder.info.version}"

    def source(split: str) -> TfdsSource:
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
            data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, KeyError, AssertionError) as error:
            raise InputError(
                f"tfds:{name} has no split {split!r}; there are {', '.join(there)}, and parts of them such as "
                f"{there[0]}[:90%]"
            ) from error
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        places = tuple((p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts)
        return TfdsSource(data, version, places)

    train, notes, others = source(wanted), [], {}
    for kind in ("validation", "test"):
        split = known[kind]
        if split is None or split in {place[0] for place in train.places}:
            continue
        others[kind] = source(split)
        labels = [others[kind][int(i)][1] for i in _spread(len(others[kind]), 64)]
        if all(label == -1 for label in labels):
            notes.append(f"left out: the split {split} of tfds:{name}, which has no labels")
            del others[kind]
    names = getattr(features["label"], "names", None)
    if names is None:
        if features["label"].shape != () or not np.issubdtype(features["label"].np_dtype, np.integer):
            raise InputError(f"tfds:{name}: its labels are {features['label']!r}, not the number of a class")
        names = [str(i) for i in range(1 + max(int(labels_of(s).max()) for s in (train, *others.values())))]
    return Dataset(train, others.get("validation"), others.get("test"), tuple(names), False, tuple(notes))
