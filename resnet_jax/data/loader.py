"""Makes batches of a dataset: examples in their order, augmented by threads or worker processes of grain, as arrays on
the mesh.
"""

import gc
import os
import pickle
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.config import AugmentConfig, Config, InputError, Size, known, known_size, sides
from resnet_jax.data.dataset import Dataset, Source, labels_of
from resnet_jax.data.decode import BadImage, decode
from resnet_jax.data.order import balanced_table, example_index, is_mirrored
from resnet_jax.data.own_data import slow_example
from resnet_jax.data.transforms import augment, fit
from resnet_jax.data.watch import Stalled, awaited, check_guard, end_with_parent, name_what_hangs
from resnet_jax.output import say
from resnet_jax.training.sharding import shard_batch
from resnet_jax.typed import from_extra

SHOWN = 3
"""Images that cannot be decoded and are named on standard error."""
FEW = 1000
"""Images up to which an evaluation is read by threads: worker processes would take seconds to start, each time."""

Batch = dict[str, np.ndarray]


@dataclass
class BadImages:
    """The images that could not be decoded.

    Attributes:
      policy: `error` ends the run at the first one, `skip` goes on.
      names: what they are called.
      channels: of the recipe, by which they are decoded.
    """

    policy: str
    names: set[str] = field(default_factory=set)
    channels: int = 3

    def note(self, source: Source, indices: np.ndarray) -> None:
        """Adds the names of a batch's bad examples.

        Args:
          source: of the examples.
          indices: int [batch], the index in `source` of a bad example, -1 for a good one.

        Raises:
          InputError: there is a bad one and the policy is `error`.
        """
        for index in indices[indices >= 0].tolist():
            if self.policy == "error":
                raise InputError(
                    f"{source.describe(index)} cannot be decoded ({self._reason(source, index)}); mend it, or go on "
                    "without such images with --data.on_bad_image skip; to go on after it was removed, give "
                    "--data.accept_changes"
                )
            name = source.describe(index)
            if name not in self.names and len(self.names) < SHOWN:
                more = "; of further ones summary.json has the names" if len(self.names) == SHOWN - 1 else ""
                say(
                    f"WARNING: {name} cannot be decoded ({self._reason(source, index)}) and is left out{more}",
                    error=True,
                )
            self.names.add(name)

    def _reason(self, source: Source, index: int) -> str:
        try:
            decode(source[index][0], self.channels)
        except BadImage as error:
            return str(error)
        return "it can be now"


@dataclass(frozen=True)
class TrainExample:
    """Maps the number of an example on this host, counted from the run's beginning, to the augmented example.

    Host `rank` takes the examples [rank * share, (rank + 1) * share) of every batch, so that batches are the same for
    any number of hosts.

    Attributes:
      source: of raw examples.
      recipe: of the augmentation.
      image_size: of the result.
      seed: of order and augmentation.
      share: examples of a batch that this host makes.
      rank, hosts: number of this host, and how many there are.
      channels: of the images.
      table: as `balanced_table` returns it; None takes the examples of `source`.
      classes: labels are checked as in `checked_label`.
    """

    source: Source
    recipe: AugmentConfig
    image_size: Size
    seed: int
    share: int
    rank: int = 0
    hosts: int = 1
    channels: int = 3
    table: np.ndarray | None = None
    classes: int | None = None

    def __call__(self, place: int) -> dict[str, Any]:
        first, mirrored, position = self._example(place)
        size = len(self.source)
        for tries in range(size):
            index = (first + tries) % size
            raw, label = self.source[index]
            rng = np.random.default_rng([self.seed, position])
            try:
                image = augment(raw, rng, self.image_size, self.recipe, mirrored, self.channels)
            except BadImage:
                continue
            checked = checked_label(label, self.classes, self.source, index)
            return {"image": image, "label": checked, "bad": np.int64(first if tries else -1)}
        raise InputError("none of the training images can be decoded")

    def name(self, place: int) -> str:
        """Returns what to call the example in a message."""
        return self.source.describe(self._example(place)[0])

    def _example(self, place: int) -> tuple[int, bool, int]:
        """Returns the index of an example, whether alternating flips mirror it, and its position in the whole run."""
        step, offset = divmod(place, self.share)
        start = (step * self.hosts + self.rank) * self.share
        size = len(self.source if self.table is None else self.table)
        indices, mirrored = _order_of_batch(start, self.share, size, self.seed, self.recipe.repeats)
        index = int(indices[offset])
        return index if self.table is None else int(self.table[index]), bool(mirrored[offset]), start + offset


@lru_cache(maxsize=64)
def _order_of_batch(start: int, count: int, size: int, seed: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `example_index` and `is_mirrored` of `count` positions from `start`, which cost little more than one."""
    positions = np.arange(start, start + count, dtype=np.uint32) // np.uint32(repeats)
    indices = example_index(positions, size, seed)
    return indices, is_mirrored(positions, indices, size, seed)


def eval_crop_and_interpolation(recipe: AugmentConfig) -> tuple[float, str]:
    """Returns crop and interpolation of images that are evaluated, as `fit` takes them."""
    return known(recipe.eval_crop, "augment.eval_crop"), known(recipe.interpolation, "augment.interpolation")


@dataclass(frozen=True)
class EvalExample:
    """Maps the number of an example on this host to an example of a split; attributes are as in `TrainExample`.

    `mask` is False where the split has no more examples, or the image cannot be decoded; the image is then zero.
    """

    source: Source
    image_size: Size
    recipe: AugmentConfig
    share: int
    rank: int = 0
    hosts: int = 1
    channels: int = 3
    classes: int | None = None

    def __call__(self, place: int) -> dict[str, Any]:
        index, here = self._example(place)
        raw, label = self.source[index]
        found = {
            "label": checked_label(label, self.classes, self.source, index),
            "mask": np.False_,
            "bad": np.int64(-1),
        }
        blank = np.zeros((*sides(self.image_size), self.channels), np.uint8 if self.channels == 3 else np.float32)
        if not here:
            return found | {"image": blank}
        try:
            image = fit(raw, self.image_size, *eval_crop_and_interpolation(self.recipe), self.channels)
        except BadImage:
            return found | {"image": blank, "bad": np.int64(index)}
        return found | {"image": image, "mask": np.True_}

    def name(self, place: int) -> str:
        """Returns what to call the example in a message."""
        return self.source.describe(self._example(place)[0])

    def _example(self, place: int) -> tuple[int, bool]:
        """Returns the index of an example and True; past the last example of the split 0 and False."""
        step, offset = divmod(place, self.share)
        index = (step * self.hosts + self.rank) * self.share + offset
        return (index, True) if index < len(self.source) else (0, False)


def checked_label(label: Any, classes: int | None, source: Source, index: int) -> Any:
    """Returns a label as int32: the number of a class, or [classes] with 0 or 1 for each class.

    Args:
      label: as the source holds it.
      classes: how many there are; None checks nothing, and then a label may be any array, or a dict of arrays, whose
        floating-point numbers become float32.
      source, index: of the example, for the message.

    Raises:
      InputError: the label is none of these classes.
    """
    if isinstance(label, dict):
        return {name: checked_label(value, None, source, index) for name, value in label.items()}
    found = np.asarray(label)
    if found.dtype.kind not in "iubf":
        raise InputError(f"{source.describe(index)} has the label {label!r}, expected numbers or a dict of numbers")
    if classes is not None:
        least, most = (0, classes - 1) if found.ndim == 0 else (0, 1)
        whole = found.dtype.kind in "iub" and found.shape in ((), (classes,))
        if not (whole and (found >= least).all() and (found <= most).all()):
            expected = f"a number from 0 to {most}" if found.ndim == 0 else f"{classes} numbers that are 0 or 1"
            raise InputError(
                f"{source.describe(index)} has the label {label}, expected {expected}: correct it, or leave it out"
            )
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int32)


def _batches(
    example: Any,
    start: int,
    stop: int,
    share: int,
    workers: int,
    timeout: float,
    source: Source,
    bad: BadImages,
    mesh: Mesh,
) -> Generator[dict[str, Any], None, None]:
    """Yields the batches `start` to `stop - 1` on the mesh, made by threads, or by worker processes.

    Raises:
      InputError: an image cannot be decoded and the policy of `bad` is `error`, or the dataset cannot be pickled for
        worker processes.
      Stalled: nothing came for `timeout` seconds, or a worker process died.
    """
    with from_extra("train", "the loader"):
        import grain
        from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain 0.2.18 reads a flag when it starts workers
    rows = grain.MapDataset.range(start * share, stop * share).map(example).batch(share)
    threads = 1 if workers else min(os.cpu_count() or 1, 16)
    ds = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))  # whole batches
    if workers:
        ds = ds.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), end_with_parent
        )
    iterator, stalled, given = iter(ds), False, start

    def explain() -> str:
        seconds = min(timeout, 30.0)
        return slow_example(seconds / 2) or name_what_hangs(example, range(given * share, (given + 1) * share), seconds)

    try:
        for batch in awaited(iterator, timeout, explain):
            given += 1
            if workers:  # JAX, or the traceback of an error, would keep shared memory to the very end of the process
                batch = jax.tree.map(np.array, batch)
            bad.note(source, batch.pop("bad"))
            yield shard_batch(batch, mesh)
    except Stalled:
        stalled = True
        raise
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        if not workers or "pickle" not in str(error):
            raise
        raise InputError(
            f"data.workers {workers}: a worker process is given a copy of the dataset, and this one cannot be copied "
            f"({str(error).splitlines()[0]}): leave what holds a lock or an open file out by its __getstate__, or set "
            "data.workers 0"
        ) from error
    finally:
        if not stalled:  # what hangs could not be closed
            iterator.close()
            if workers:
                del iterator, ds, rows
                gc.collect()  # the arrays that are still on their way hang in reference cycles of grain


def sampling_table(dataset: Dataset, sampling: str) -> np.ndarray | None:
    """Returns `balanced_table` of the training split for `balanced`; None for `natural`, which needs no table.

    Raises:
      InputError: images have several labels, or a class has no image.
    """
    if sampling == "natural":
        return None
    if dataset.multilabel:
        raise InputError("data.sampling balanced needs one label an image; weigh classes with train.class_weights")
    labels = labels_of(dataset.train)
    if missing := sorted(set(range(len(dataset.class_names))) - set(labels.tolist())):
        raise InputError(f"data.sampling balanced: {dataset.class_names[missing[0]]} has no training image")
    return balanced_table(labels)


def train_batches(
    source: Source,
    config: Config,
    mesh: Mesh,
    bad: BadImages,
    steps: range,
    rank: int = 0,
    hosts: int = 1,
    table: np.ndarray | None = None,
    classes: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Yields the batches of `steps` as arrays on the mesh.

    Args:
      source: the training split.
      config: the recipe.
      mesh: of the devices.
      bad: takes the names of images that cannot be decoded.
      steps: of the run.
      rank, hosts: number of this host, and how many there are.
      table: of `sampling_table`.
      classes: how many there are; None does not check labels.

    Yields:
      `image`, uint8 [batch, height, width, 3], or float32 for another number of channels; `label`, int32 [batch], or
      [batch, classes] where images have several labels.

    Raises:
      InputError: an image cannot be decoded and `data.on_bad_image` is error, a label is none of `classes`, or worker
        processes cannot be started from this program.
      Stalled: nothing came for `data.timeout` seconds, or a worker process died.
    """
    check_guard(config.data.workers)
    share, data = config.train.batch_size // hosts, config.data
    place = (config.train.seed, share, rank, hosts, data.channels, table, classes)
    size = known_size(data.image_size)
    example = TrainExample(source, config.augment, size, *place)
    return _batches(example, steps.start, steps.stop, share, data.workers, data.timeout, source, bad, mesh)


def eval_batches(
    source: Source,
    config: Config,
    mesh: Mesh,
    bad: BadImages,
    rank: int = 0,
    hosts: int = 1,
    classes: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Yields every example of a split exactly once; arguments and errors are as in `train_batches`.

    Up to `FEW` images on a host are read by threads of this process, whatever `data.workers` says.

    Yields:
      `image` and `label` as in `train_batches`, and `mask`, bool [batch]: the last batch is filled up with examples
      whose `mask` is False, and so it is where an image cannot be decoded.
    """
    check_guard(config.data.workers)
    share, data = config.train.batch_size // hosts, config.data
    size = data.eval_image_size or known_size(data.image_size)
    example = EvalExample(source, size, config.augment, share, rank, hosts, data.channels, classes)
    count = -(-len(source) // (share * hosts))
    workers = data.workers if len(source) > FEW * hosts else 0
    return _batches(example, 0, count, share, workers, data.timeout, source, bad, mesh)


def check_readable(source: Source, channels: int, name: str) -> None:
    """Checks that a split has an image that can be decoded; it tries them in a random order until one can.

    Args:
      source: the split.
      channels: of the recipe.
      name: of the split, for the message.

    Raises:
      InputError: none of them can be decoded.
    """
    for index in example_index(np.arange(len(source)), len(source), 0).tolist():
        try:
            decode(source[index][0], channels)
            return
        except BadImage as error:
            reason = error
    first = ", ".join(source.describe(index) for index in range(min(3, len(source))))
    raise InputError(f"none of the {len(source)} {name} images can be decoded, such as {first} ({reason})")


def whole_split(
    source: Source, config: Config, bad: BadImages, table: np.ndarray | None = None, classes: int | None = None
) -> Batch:
    """Reads all images of a split into memory, resized, as `draw_batch` takes them.

    Args:
      source, config, bad, table, classes: as in `train_batches`.

    Returns:
      `image` [size, height, width, channel] and `label` int32 [size], or [size, classes], of what could be decoded;
      `table` where one is given.

    Raises:
      InputError: an image cannot be decoded and the policy is error, none can, or a label is none of `classes`.
    """
    data, how = config.data, known(config.augment.interpolation, "augment.interpolation")
    size = known_size(data.image_size)
    images, labels, kept = [], [], []
    for index in range(len(source)):
        try:
            raw, label = source[index]
            images.append(fit(raw, size, 1.0, how, data.channels))
            labels.append(checked_label(label, classes, source, index))
            kept.append(index)
        except BadImage:
            bad.note(source, np.asarray([index]))
    if not images:
        raise InputError("none of the training images can be decoded")
    split = {"image": np.stack(images), "label": jax.tree.map(lambda *rows: np.stack(rows), *labels)}
    return split if table is None else split | {"table": renumbered(table, kept, len(source))}


def renumbered(table: np.ndarray, kept: Any, size: int) -> np.ndarray:
    """Returns a table for the images that could be decoded: entries of the others are left out.

    Args:
      table: int [n], indices of a split.
      kept: indices of the images that are left, in order.
      size: of the whole split.
    """
    place = np.full(size, -1, np.int32)
    place[kept] = np.arange(len(kept))
    return place[table][place[table] >= 0]
