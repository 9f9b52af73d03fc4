"""Datasets: three splits of raw examples by index, and the part of training that is held out for validation."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from resnet_jax.config import InputError

SPLIT_NAMES = {
    "train": ("train", "training", "training_set", "train_set", "trainset"),
    "validation": ("validation", "val", "valid", "dev", "validation_set", "val_set", "valid_set", "dev_set"),
    "test": ("test", "testing", "test_set", "testset", "eval", "evaluation"),
}
"""What folders and tables call the three splits, in any case."""

Label: TypeAlias = int | tuple[int, ...]
"""Number of the class; for multilabel data a 0 or 1 for each class."""


class Source(Protocol):
    """Raw examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        """Returns the path, the bytes or the array of an image, and its label."""

    def describe(self, index: int) -> str:
        """Returns what to call the example in a message."""

    def key(self, index: int) -> str:
        """Returns a name that does not depend on where the data lies: for files the path below the root."""


@dataclass(frozen=True)
class ArraySource:
    """Images in memory, uint8 [size, height, width, channel]; `name` is that of the data and its split."""

    images: np.ndarray
    labels: np.ndarray
    name: str = "the arrays"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Label]:
        label = self.labels[index]
        return self.images[index], int(label) if label.ndim == 0 else tuple(label.tolist())

    def describe(self, index: int) -> str:
        return f"example {index} of {self.name}"

    key = describe


@dataclass(frozen=True)
class FileSource:
    """Image files: whole paths, labels, and paths below the root."""

    paths: tuple[str, ...]
    labels: tuple[Label, ...]
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Label]:
        return self.paths[index], self.labels[index]

    def describe(self, index: int) -> str:
        return self.paths[index]

    def key(self, index: int) -> str:
        return self.keys[index] if self.keys else self.paths[index]

    def take(self, indices: np.ndarray) -> "FileSource":
        """Returns the source of some of the files, by their indices, int [n]."""
        parts = (self.paths, self.labels, self.keys)
        return FileSource(*(tuple(values[i] for i in indices.tolist()) if values else () for values in parts))


@dataclass(frozen=True)
class Part:
    """Some examples of a source, by their indices there, int [size]."""

    source: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))


@dataclass(frozen=True)
class Dataset:
    """Three splits, and the names of the classes.

    A split of your own is a pair of arrays (images, labels), or anything with a length whose examples by index are
    `{"image", "label"}`: a list, a grain `MapDataset`, a Hugging Face dataset. Images are paths, bytes of a file,
    arrays [height, width, channel] (uint8, or floating-point numbers in [0, 1]), or Pillow's. Threads read what is no
    array or list one example at a time; processes (`data.workers`) read pickled copies.

    Attributes:
      train: the examples to train on.
      validation: the examples that select (the best checkpoint, the last step, the calibration); None where there are
        none.
      test: the examples that are measured once, at the end of a run; None where there are none.
      class_names: in the order of the labels; None takes those of the data, or numbers, where labels are integers; ()
        where labels are no classes, but numbers or arrays for a loss of your own.
      multilabel: an image may have several labels, or none.
      notes: lines that say what was found, held out and left out.

    Example:
      >>> images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1, 0, 1])
      >>> data = rj.Dataset(train=(images[:4], labels[:4]), test=(images[4:], labels[4:]), class_names=("cat", "dog"))
    """

    train: Any
    validation: Any = None
    test: Any = None
    class_names: Any = None
    multilabel: bool = False
    notes: tuple[str, ...] = ()

    def splits(self) -> dict[str, Source]:
        """Returns the splits that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: source for name, source in named.items() if source is not None}

    def label_classes(self) -> int | None:
        """Returns how many classes a label counts, or how many 0 and 1 it holds; None where labels are no classes."""
        if not self.class_names:
            return None
        if not self.multilabel:
            return len(self.class_names)
        label: Any = next(iter(self.splits().values()))[0][1]
        return len(label)

    def split(self, name: str) -> Source:
        """Returns a split by its name.

        Raises:
          InputError: the data has none of this name.
        """
        found = self.splits()
        if name not in found:
            raise InputError(f"the data has no {name} split, but {' and '.join(found)}")
        return found[name]


def default_split(dataset: Dataset) -> str:
    """Returns `test` where the data has it, else `validation`.

    Raises:
      InputError: it has neither.
    """
    name = next((name for name in ("test", "validation") if name in dataset.splits()), None)
    if name is None:
        raise InputError("the data has neither a test nor a validation split: there is nothing to evaluate on")
    return name


def known_labels(source: Source) -> np.ndarray | None:
    """Returns all labels of a split as `labels_of` does; None where they would have to be read from the disk."""
    if isinstance(source, Part):
        known = known_labels(source.source)
        return None if known is None else known[source.indices]
    labels = getattr(source, "labels", None)
    return None if labels is None else np.asarray(labels, np.int32)


def labels_of(source: Source) -> np.ndarray:
    """Returns all labels of a split, int32 [size], or [size, classes] for multilabel data; no image is decoded."""
    known = known_labels(source)
    return np.asarray([source[i][1] for i in range(len(source))], np.int32) if known is None else known


def row_of(places: Sequence[tuple[str, int, int]], index: int) -> tuple[str, int]:
    """Returns the split and the row in it of an example of a source that joins rows of several splits.

    Args:
      places: (split, first row, one past the last row) of each joined part.
      index: of the example, counted over all parts.

    Raises:
      IndexError: there are fewer rows.
    """
    for split, first, end in places:
        if index < end - first:
            return split, first + index
        index -= end - first
    raise IndexError(index)


def split_of(name: str) -> str | None:
    """Returns which of the three splits a folder or a word of a table names, in any case; None for another name."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    return next((split for split, names in SPLIT_NAMES.items() if plain in names), None)


def is_held_out(key: str, fraction: float, seed: int) -> bool:
    """Tells whether an example belongs to the share that is held out; that depends on its key and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def with_validation(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Holds a share of the training split out as validation.

    Args:
      dataset: without a validation split.
      fraction: the share, between 0 and 1.
      seed: of the choice.

    Raises:
      InputError: nothing is held out, or a class has nothing left to train on.
    """
    source, names = dataset.train, dataset.class_names
    mask = np.asarray([is_held_out(source.key(i), fraction, seed) for i in range(len(source))], bool)
    other = f"another --train.seed or --data.validation_fraction than {fraction:g}, or a validation folder of your own"
    if not mask.any():
        raise InputError(
            f"none of the {len(mask)} training pictures is held out for validation, which goes by their names: give "
            f"more pictures, {other}; --train.metric none --data.validation_fraction 0 trains without one"
        )
    train, validation = (
        source.take(indices) if isinstance(source, FileSource) else Part(source, indices)
        for indices in (np.flatnonzero(~mask), np.flatnonzero(mask))
    )
    notes, labels = dataset.notes, known_labels(source)
    if labels is not None:
        here, there = (
            part.any(0) if dataset.multilabel else np.bincount(part, minlength=len(names))
            for part in (labels[~mask], labels[mask])
        )
        if absent := [name for name, n in zip(names, here + there, strict=True) if not n]:
            raise InputError(
                f"no training picture has the label {listed(absent)}: classes are numbered from 0, and each needs some"
            )
        if lost := [name for name, n in zip(names, here, strict=True) if not n]:
            raise InputError(
                f"all pictures of the class {listed(lost)} are held out for validation, which goes by their names: "
                f"give more pictures, {other}"
            )
        if unseen := [name for name, n in zip(names, there, strict=True) if not n]:
            notes = (*notes, f"no validation picture of {listed(unseen)}: too few pictures to hold one out")
    return dataclasses.replace(dataset, train=train, validation=validation, notes=notes)


def with_outputs(dataset: Dataset, outputs: int) -> Dataset:
    """Fills multilabel labels up with zeros where a model has more outputs than the data has classes.

    Raises:
      InputError: the model has fewer outputs than the data has classes; or it has more, and the labels are no table's.
    """
    more = outputs - len(dataset.class_names)
    if more < 0:
        raise InputError(
            f"model.num_classes {outputs} is below the {len(dataset.class_names)} classes of the data: give as many or "
            "more, or leave it out"
        )
    if not dataset.multilabel or not more:
        return dataset

    def widened(source: Source) -> Source:
        if not isinstance(source, FileSource):
            raise InputError(
                f"model.num_classes {outputs} is above the {len(dataset.class_names)} classes of the data, whose "
                "labels have a number for each class: give them as many as the model has outputs, or leave it out"
            )
        labels: Any = tuple((*label, *(0,) * more) for label in source.labels)  # type: ignore[misc]
        return dataclasses.replace(source, labels=labels)

    splits = {name: widened(source) for name, source in dataset.splits().items()}
    return dataclasses.replace(dataset, **splits)  # type: ignore[arg-type]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Joins the first few names, and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
