"""From sources to batches: order, transforms and workers on grain, then arrays on the mesh."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from resnet_jax.config import AugmentConfig, Config, InputError
from resnet_jax.data.order import alternately, example_index
from resnet_jax.data.sources import Source
from resnet_jax.data.transforms import BadImage, augment, decode, fit
from resnet_jax.data.watch import Noted, Stalled, awaited, under_way
from resnet_jax.sharding import put_batch

Batch = dict[str, np.ndarray]


@dataclass
class BadImages:
    """What could not be decoded, by name; `policy` error ends the run at the first one, skip goes on."""

    policy: str
    names: set[str] = field(default_factory=set)

    def note(self, source: Source, indices: np.ndarray) -> None:
        """Takes indices of a batch's bad examples, -1 for a good one.

        Raises:
          InputError: the policy is error and there is a bad one.
        """
        for index in indices[indices >= 0].tolist():
            if self.policy == "error":
                raise InputError(
                    f"{source.describe(index)} cannot be decoded ({_reason(source, index)}); "
                    "mend or remove it, or go on without such images with --data.on_bad_image skip"
                )
            self.names.add(source.describe(index))


def _reason(source: Source, index: int) -> str:
    try:
        decode(source[index][0])
    except BadImage as error:
        return str(error)
    return "it can be now"


@dataclass(frozen=True)
class TrainExample:
    """Maps a place in this host's row of examples to the example, augmented.

    Host `rank` takes the places [rank * share, (rank + 1) * share) of every batch, so that the batches are the same
    for any number of hosts.
    """

    source: Source
    recipe: AugmentConfig
    image_size: int
    seed: int
    share: int
    rank: int = 0
    hosts: int = 1

    def __call__(self, place: int) -> dict[str, Any]:
        step, offset = divmod(place, self.share)
        start, size = (step * self.hosts + self.rank) * self.share, len(self.source)
        indices, turns = _drawn(start, self.share, size, self.seed)
        position, first, turn = start + offset, int(indices[offset]), bool(turns[offset])
        for tries in range(size):
            raw, label = self.source[(first + tries) % size]
            rng = np.random.default_rng([self.seed, position])
            try:
                image = augment(raw, rng, self.image_size, self.recipe, turn)
            except BadImage:
                continue
            return {"image": image, "label": np.int32(label), "bad": np.int64(first if tries else -1)}
        raise InputError("none of the training images can be decoded")

    def name(self, place: int) -> str:
        """What to call the example at a place."""
        step, offset = divmod(place, self.share)
        start = (step * self.hosts + self.rank) * self.share
        return self.source.describe(int(_drawn(start, self.share, len(self.source), self.seed)[0][offset]))


@lru_cache(maxsize=64)
def _drawn(start: int, count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and turns of so many positions, since they cost little more together than one alone."""
    positions = np.arange(start, start + count, dtype=np.uint32)
    indices = example_index(positions, size, seed)
    return indices, alternately(positions, indices, size, seed)


@dataclass(frozen=True)
class EvalExample:
    """Maps a place in this host's row to a test example, `mask` False where there is none or it is bad."""

    source: Source
    image_size: int
    recipe: AugmentConfig
    share: int
    rank: int = 0
    hosts: int = 1

    def __call__(self, place: int) -> dict[str, Any]:
        step, offset = divmod(place, self.share)
        index = (step * self.hosts + self.rank) * self.share + offset
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        if index >= len(self.source):
            return {"image": blank, "label": np.int32(0), "mask": np.False_, "bad": np.int64(-1)}
        raw, label = self.source[index]
        try:
            image = fit(raw, self.image_size, self.recipe.eval_crop, self.recipe.interpolation)
        except BadImage:
            return {"image": blank, "label": np.int32(label), "mask": np.False_, "bad": np.int64(index)}
        return {"image": image, "label": np.int32(label), "mask": np.True_, "bad": np.int64(-1)}

    def name(self, place: int) -> str:
        """What to call the example at a place."""
        step, offset = divmod(place, self.share)
        return self.source.describe((step * self.hosts + self.rank) * self.share + offset)


def _batches(example: Any, start: int, stop: int, share: int, workers: int, timeout: float = 600.0) -> Iterator[Batch]:
    """Batches `start`..`stop` of this host's row, made by threads, or by worker processes."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain 0.2.18 reads a flag when it starts workers
    notes = Path(tempfile.mkdtemp(prefix="resnet_jax-"))
    rows = grain.MapDataset.range(start * share, stop * share).map(Noted(example, notes)).batch(share)
    threads = 1 if workers else min(os.cpu_count() or 1, 16)
    ds = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))  # whole batches
    if workers:
        ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    iterator, stalled = iter(ds), False
    try:
        yield from awaited(iterator, timeout, lambda: under_way(notes, example.name))
    except Stalled:
        stalled = True
        raise
    finally:
        if not stalled:  # what hangs could not be closed
            iterator.close()
            del iterator, ds, rows
            gc.collect()  # grain's workers leave shared memory in reference cycles
        shutil.rmtree(notes, ignore_errors=True)


def train_batches(
    source: Source, config: Config, mesh: Mesh, bad: BadImages, steps: range, rank: int = 0, hosts: int = 1
) -> Iterator[dict[str, Any]]:
    """The batches of `steps` as arrays on the mesh: `image` uint8 [batch, height, width, 3], `label` int32 [batch].

    Raises:
      InputError: an image cannot be decoded and `data.on_bad_image` is error.
    """
    share = config.train.batch_size // hosts
    example = TrainExample(source, config.augment, config.data.image_size, config.train.seed, share, rank, hosts)
    for batch in _batches(example, steps.start, steps.stop, share, config.data.workers, config.data.timeout):
        bad.note(source, batch.pop("bad"))
        yield put_batch(batch, mesh)


def eval_batches(
    source: Source, config: Config, mesh: Mesh, bad: BadImages, rank: int = 0, hosts: int = 1
) -> Iterator[dict[str, Any]]:
    """Every test example exactly once; the last batch is filled up with examples whose `mask` is False."""
    share = config.train.batch_size // hosts
    size = config.data.eval_image_size or config.data.image_size
    example = EvalExample(source, size, config.augment, share, rank, hosts)
    count = -(-len(source) // (share * hosts))
    for batch in _batches(example, 0, count, share, config.data.workers, config.data.timeout):
        bad.note(source, batch.pop("bad"))
        yield put_batch(batch, mesh)


def whole_split(source: Source, image_size: int, bad: BadImages, interpolation: str = "bilinear") -> Batch:
    """All examples of a split in memory, resized: `image` uint8 [size, image_size, image_size, 3], `label` [size].

    Raises:
      InputError: an image cannot be decoded and the policy is error, or none can.
    """
    images, labels = [], []
    for index in range(len(source)):
        raw, label = source[index]
        try:
            images.append(fit(raw, image_size, interpolation=interpolation))
            labels.append(label)
        except BadImage:
            bad.note(source, np.asarray([index]))
    if not images:
        raise InputError("none of the training images can be decoded")
    return {"image": np.stack(images), "label": np.asarray(labels, np.int32)}
