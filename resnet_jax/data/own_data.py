"""Data of the user's own: splits that are arrays, lists, or anything with a length and examples by index."""

import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_jax.config import InputError
from resnet_jax.data.dataset import Dataset, listed


@dataclass(frozen=True)
class Examples:
    """A split whose `examples[i]` is `{"image", "label"}` or a pair of these.

    Where they are no arrays or lists, the threads of a process read them one at a time: a `__getitem__` of the user's
    own may move the position of an open file.

    Attributes:
      name: of the split.
      labels: int [size], where the labels are classes and are known without reading examples.
    """

    examples: Any
    name: str
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.read(index)
        return image, int(self.labels[index]) if self.labels is not None else label

    def read(self, index: int) -> tuple[Any, Any]:
        """Returns image and label of an example as they were given.

        Raises:
          InputError: it cannot be read, or is neither a dict with both nor a pair.
        """
        if in_memory(self.examples):
            return self._read(index)
        with READ_LOCK:
            READS_UNDER_WAY.append((self.describe(index), time.monotonic()))
            try:
                return self._read(index)
            finally:
                READS_UNDER_WAY.pop()

    def _read(self, index: int) -> tuple[Any, Any]:
        try:
            example = self.examples[index]
        except Exception as error:  # of the user's own code
            raise InputError(f"{self.describe(index)} cannot be read: {type(error).__name__}: {error}") from error
        image, label = pair_of(example, self.describe(index))
        return as_picture(image), label

    def describe(self, index: int) -> str:
        return f"example {index} of dataset.{self.name}"

    key = describe


READ_LOCK = threading.RLock()
"""Is held while an example of the user's own is read, of any split: two of them may share one open file."""
READS_UNDER_WAY: list[tuple[str, float]] = []
"""What is being read now, and since when, in seconds of `time.monotonic`."""


def slow_example(seconds: float) -> str:
    """Returns the end of a sentence that names an example of the user's own that has been read for longer than this;
    "" where none has.
    """
    for what, began in READS_UNDER_WAY[:1]:
        if (passed := time.monotonic() - began) > seconds:
            return f"{what} has been under way for {passed:.0f} seconds"
    return ""


@dataclass(frozen=True)
class Pair:
    """Images and labels, each by index, as a list of examples."""

    images: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def own_dataset(dataset: Dataset) -> Dataset:
    """Returns a dataset of the user's own with its splits as sources, and the names of its classes.

    Labels are classes where they are integers, or where `class_names` are given; `class_names=()` says that they are
    none. Other labels (floating-point numbers, arrays, dicts of arrays) are for a loss of the user's own, and leave
    `class_names` empty.

    Raises:
      InputError: a split has no length, its examples are not as expected, or it numbers the classes in another way than
        the training split.
    """
    check_same_numbers(dataset)
    splits = {name: source_of(split, name) for name, split in dataset.splits().items()}
    if not len(splits["train"]):
        raise InputError("the train split has no examples")
    first = splits["train"][0][1]
    names = None if dataset.class_names is None else tuple(map(str, dataset.class_names))
    if names == () or (names is None and not is_integer(first)):
        return dataclasses.replace(dataset, **splits, class_names=())
    if names is not None and not is_integer(first):
        label = np.asarray(first)
        if label.dtype.kind not in "iub" or label.shape != (len(names),):
            raise InputError(
                f"{splits['train'].describe(0)} has the label {label.tolist()!r}; with {len(names)} class_names "
                f"expected the number of a class, or {len(names)} numbers that are 0 or 1"
            )
        whole = {name: dataclasses.replace(split, labels=None) for name, split in splits.items()}
        return dataclasses.replace(dataset, **whole, class_names=names, multilabel=True)
    splits = {name: with_labels(split) for name, split in splits.items()}
    if names is None:
        known = names_in(dataset.train)
        most = max(int(split.labels.max()) for split in splits.values())
        names = tuple(known) if known else tuple(str(i) for i in range(1 + most))
    return dataclasses.replace(dataset, **splits, class_names=names)


def source_of(split: Any, name: str) -> Any:
    """Returns a split as a source.

    Raises:
      InputError: it has no length or no examples by index, or images and labels are not equally many.
    """
    if all(hasattr(split, word) for word in ("describe", "key", "__len__")):
        return split
    if isinstance(split, tuple) and len(split) == 2 and all(hasattr(part, "__len__") for part in split):
        images, labels = split
        if len(images) != len(labels):
            raise InputError(f"dataset.{name} has {len(images)} images and {len(labels)} labels: give as many of both")
        return Examples(Pair(images, labels), name)
    if not (hasattr(split, "__len__") and hasattr(split, "__getitem__")):
        lacks = "length" if not hasattr(split, "__len__") else "examples by index (__getitem__)"
        raise InputError(
            f"dataset.{name} is of type {type(split).__qualname__} and has no {lacks}: expected a pair of arrays "
            '(images, labels), or anything with len() whose examples by index are {"image", "label"}; random access '
            "is what resumes exactly"
        )
    return Examples(split, name)


def in_memory(examples: Any) -> bool:
    """Returns whether examples are arrays of NumPy or plain lists, which any number of threads may read at once."""
    if isinstance(examples, Pair):
        return in_memory(examples.images) and in_memory(examples.labels)
    return isinstance(examples, np.ndarray) or type(examples) in (list, tuple)


def pair_of(example: Any, what: str) -> tuple[Any, Any]:
    """Returns image and label of an example.

    Raises:
      InputError: it is neither a dict with both nor a pair.
    """
    if isinstance(example, dict):
        if "image" in example and "label" in example:
            return example["image"], example["label"]
        raise InputError(f'{what} has {", ".join(map(repr, example))}: expected "image" and "label"')
    if isinstance(example, tuple | list) and len(example) == 2:
        return example[0], example[1]
    raise InputError(f'{what} is of type {type(example).__qualname__}: expected {{"image": ..., "label": ...}}')


def as_picture(image: Any) -> Any:
    """Returns an image as `decode` takes it: arrays of other libraries become NumPy's."""
    if isinstance(image, np.ndarray) or not hasattr(image, "__array__"):
        return image
    return np.asarray(image)


def is_grey(image: Any) -> bool:
    """Returns whether an image is an array of one channel, [height, width] or [height, width, 1]."""
    return isinstance(image, np.ndarray) and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 1))


def is_integer(label: Any) -> bool:
    """Returns whether a label is a whole number; True and False are none."""
    array = None if isinstance(label, dict | str | bytes) else np.asarray(label)
    return array is not None and array.ndim == 0 and array.dtype.kind in "iu"


def is_table(split: Any) -> bool:
    """Returns whether a split gives columns by name, as those of Hugging Face datasets do."""
    return hasattr(split, "column_names") and hasattr(split, "features")


def names_in(split: Any) -> tuple[str, ...]:
    """Returns the names of the classes that a table of Hugging Face has in the order of its labels; () for others."""
    label = split.features.get("label") if is_table(split) and split.features else None
    return tuple(getattr(label, "names", None) or ())


def check_same_numbers(dataset: Dataset) -> None:
    """Raises InputError where two splits number their classes in different ways, as tables of Hugging Face and
    torchvision's folders do that were made of one folder each; what says nothing of its classes is let through.
    """

    def order_of(split: Any) -> tuple[str, ...]:
        classes = getattr(split, "classes", ())
        return names_in(split) or (tuple(map(str, classes)) if isinstance(classes, list | tuple) else ())

    numbers = order_of(dataset.train)
    for name, split in dataset.splits().items():
        if numbers and (own := order_of(split)) and own != numbers:
            table = "of a table with align_labels_with_mapping({name: number of train, ...}, 'label')"
            raise InputError(
                f"dataset.{name} has the classes {listed(own)} in this order, and dataset.train {listed(numbers)}: the "
                f"same number would mean different classes. Give it the numbers of train, {table}"
            )


def with_labels(split: Any) -> Any:
    """Returns a split of the user's own whose labels are known: from its column, or by reading every example."""
    if not isinstance(split, Examples):
        return split
    if isinstance(split.examples, Pair):
        labels = split.examples.labels
    elif is_table(split.examples):
        labels = split.examples["label"]
    else:
        labels = [split.read(i)[1] for i in range(len(split))]
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        wrong = next((i for i in range(len(split)) if not is_integer(labels[i])), 0)
        raise InputError(
            f"{split.describe(wrong)} has the label {labels[wrong]!r}, and others are numbers of classes: give each "
            "example the number of its class"
        )
    return dataclasses.replace(split, labels=found.astype(np.int32))
