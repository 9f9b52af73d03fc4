"""Puts a dataset on trial: twins across splits, doubtful labels, pictures unlike all others, classes that are two.

Labels are judged by a probe on features, cross-validated by folds. The features are those of a network, or of one layer
of patches that needs no training and no labels (Coates, Lee and Ng 2011).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, DataConfig, InputError
from resnet_jax.data.dataset import Part, Source
from resnet_jax.data.decode import BadImage, decode
from resnet_jax.data.fingerprint import count_trained_on, fingerprint, load_fingerprint
from resnet_jax.data.inspect import (
    DoubtfulLabels,
    Pair,
    confident_learning,
    far_out,
    groups_of,
    near_pairs,
    two_in_one,
    unit_rows,
    unlike_others,
)
from resnet_jax.data.loader import BadImages, checked_label, eval_batches
from resnet_jax.data.on_device import normalize
from resnet_jax.data.show import as_shown
from resnet_jax.data.sources import load_dataset
from resnet_jax.files import path_of
from resnet_jax.models.registry import channels_of, check_endpoints, create_model, dtype_of
from resnet_jax.predict.knn import recipe_for
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.training.evaluation import mesh_for
from resnet_jax.training.metrics import fit_calibration, probabilities
from resnet_jax.training.sharding import compiler_options, replicated, sharded_over
from resnet_jax.weights.load import fit_weights, model_of, preprocessing_of
from resnet_jax.weights.sources import find_weights

SIDE = 32
"""Pixels of a side at which pictures are compared, and at most for the layer of patches."""
KERNELS, SAMPLED, THRESHOLD = 800, 50_000, 0.25
"""Patches that are kernels; those that the whitening is estimated from; what a response must exceed to count."""
DIMENSIONS = 128
"""Principal components of the features, in which distances are taken."""
RIDGE, MOST_BY_KERNEL = 0.3, 12_000
"""Of the probe: what is added to the diagonal; up to how many pictures it has a kernel."""
BATCH = 100
"""Pictures that go through the layer of patches at once."""
SPLIT_SHARE, LEAST_HALF, LEAST_PICTURES = 0.8, 0.1, 40
"""A class is taken for two where its halves hold at least SPLIT_SHARE of the variance between them, the smaller half at
least LEAST_HALF of the pictures, and the class at least LEAST_PICTURES."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of all splits in one row.

    Attributes:
      pixels: uint8 [n, side, side, 3], the whole pictures, squeezed to a square.
      splits: the names of the splits, in their order.
      split: int [n], which of them a picture is of.
      index: int [n], its index there.
      labels: int [n], or [n, classes] for multilabel data; zeros where labels are no classes.
      sources: split -> source.
      undecodable: what the pictures are called that cannot be decoded, and are not among these.
    """

    pixels: np.ndarray
    splits: tuple[str, ...]
    split: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    sources: Mapping[str, Source]
    undecodable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        """Returns what to call a picture: of a file its path."""
        return self.sources[self.splits[self.split[i]]].describe(int(self.index[i]))

    def shown(self, i: int, channels: int = 3) -> np.ndarray:
        """Returns a picture in its own size, uint8 [height, width, 3]."""
        raw = self.sources[self.splits[self.split[i]]][int(self.index[i])][0]
        return as_shown(np.asarray(decode(raw, channels)))


@dataclass(frozen=True)
class TwoInOne:
    """A class and how far its pictures fall into two; see `two_in_one`.

    Attributes:
      label: the class.
      share: of the variance, between the halves.
      smaller: share of the pictures in the smaller half.
      members: int [n], the pictures, first those of the larger half.
      sizes: of the larger and of the smaller half.
      found: whether the class is taken for two.
    """

    label: int
    share: float
    smaller: float
    members: np.ndarray
    sizes: tuple[int, int]
    found: bool


@dataclass(frozen=True)
class Inspection:
    """What `inspect_data` found.

    Attributes:
      dataset: as `data.dataset` of a recipe.
      class_names: in the order of the labels.
      pictures: all that were looked at.
      pairs: those that are nearly the same, the most alike first.
      likely: float [n, classes], probabilities by a probe that did not see the picture; None where none was fitted.
      agreement: share of the labels that are the likeliest class by this probe; None without one.
      doubtful: by confident learning; None without a probe.
      unlike: int [m], pictures that are unlike all others, the most unlike first.
      distance: float [n], to the nearest others, over the median.
      two: the classes, those that fall into two most clearly first.
      features: what features they are.
      channels: of the pictures.
      notes: what a reader has to know beside.
    """

    dataset: str
    class_names: tuple[str, ...]
    pictures: Pictures
    pairs: tuple[Pair, ...]
    likely: np.ndarray | None
    agreement: float | None
    doubtful: DoubtfulLabels | None
    unlike: np.ndarray
    distance: np.ndarray
    two: tuple[TwoInOne, ...]
    features: str
    channels: int = 3
    notes: tuple[str, ...] = ()

    def across(self) -> list[Pair]:
        """Returns the pairs whose pictures are of different splits."""
        return [pair for pair in self.pairs if self.pictures.split[pair.first] != self.pictures.split[pair.second]]

    def inside(self) -> list[Pair]:
        """Returns the pairs whose pictures are of the same split."""
        return [pair for pair in self.pairs if self.pictures.split[pair.first] == self.pictures.split[pair.second]]


def inspect_data(
    dataset: str | None = None,
    source: str | None = None,
    *,
    name: str | None = None,
    checkpoint: str | None = None,
    data_dir: str | None = None,
    folds: int = 5,
    most: int = 60_000,
    seed: int = 0,
    batch_size: int = 64,
    kernels: int = KERNELS,
) -> Inspection:
    """Looks for what is wrong with a dataset.

    Args:
      dataset: as `data.dataset` of a recipe; None takes that of the run.
      source: of a network that gives the features, as for `load_pretrained`; None takes a layer of patches. Where the
        network was trained on these pictures, labels are judged with the patches all the same.
      name, checkpoint: as for `find_weights`.
      data_dir: as in a recipe.
      folds: of the cross-validation.
      most: pictures that are examined at most, drawn at random from more.
      seed: of folds, patches and that draw.
      batch_size: images that go through the network at once.
      kernels: of the layer of patches.

    Raises:
      InputError: the source or the data cannot be read, or there are too few pictures.
    """
    if folds < 2:
        raise InputError(f"folds {folds}: labels are judged by what was fitted without them; give 2 or more")
    if source is None and dataset is None:
        raise InputError("give the data, such as --data.dataset folder:PATH, or a run, which names its own")
    network = None if source is None else Network(source, name, checkpoint, dataset, data_dir, batch_size)
    config = network.config if network else Config(data=DataConfig(dataset=str(dataset), data_dir=data_dir))
    if network is None or network.run is None:  # the splits are those of the data, nothing is held out
        config = replace(config, data=replace(config.data, validation_fraction=0.0))
    data = load_dataset(config.data, config.train.seed, hold_out=network is not None and network.selects)
    channels = config.data.channels
    pictures = read_pictures(
        data.splits(), None if not data.class_names else data.label_classes(), channels, most, seed
    )
    notes = list(data.notes[1:])
    if (total := sum(map(len, data.splits().values()))) > most:
        notes.append(f"{most:,} of {total:,} pictures were drawn at random and looked at")
    judged = bool(data.class_names) and not data.multilabel
    if not judged:
        notes.append("labels are not judged: there is not one class for each picture")
    seen = network.has_seen(data) if network else False
    patches = patch_features(pictures.pixels, kernels, seed) if network is None or (seen and judged) else None
    if network is None:
        assert patches is not None
        features, what = patches, f"one layer of {kernels} whitened patches, not trained"
    else:
        features = network.features(pictures)
        what = f"{source}, before its head"
    if seen and judged:
        notes.append(
            "the network was trained on these pictures and their labels, so that it cannot judge them: labels are "
            "judged by a layer of patches that has seen none"
        )
    space = unit_rows(principal(features, DIMENSIONS, seed))
    pairs = near_pairs(pictures.pixels, space)
    distance = unlike_others(space)
    likely = agreement = doubtful = None
    if judged:
        groups = groups_of(len(pictures), pairs)
        basis = features if patches is None else patches
        likely = out_of_fold(basis, pictures.labels, len(data.class_names), folds, groups, seed)
        agreement = float((likely.argmax(1) == pictures.labels).mean())
        doubtful = confident_learning(likely, pictures.labels)
    two = classes_of_two(space, pictures.labels, len(data.class_names), seed) if judged else ()
    return Inspection(
        config.data.dataset,
        tuple(data.class_names),
        pictures,
        tuple(pairs),
        likely,
        agreement,
        doubtful,
        far_out(distance),
        distance,
        two,
        what,
        channels,
        tuple(notes),
    )


def read_pictures(
    splits: Mapping[str, Source], classes: int | None, channels: int, most: int, seed: int = 0
) -> Pictures:
    """Decodes the pictures of all splits, squeezed to squares of `SIDE` pixels, or of their own size if that is less.

    Args:
      splits: name -> source.
      classes: as for `checked_label`; None where labels are no classes.
      channels: of the pictures.
      most: pictures at most, drawn at random by `seed` from more.

    Raises:
      InputError: fewer than two pictures can be decoded, or a label is none of the classes.
    """
    from PIL import Image

    places = [(k, i) for k, source in enumerate(splits.values()) for i in range(len(source))]
    if len(places) > most:
        drawn = np.random.default_rng(seed).choice(len(places), most, replace=False)
        places = [places[i] for i in np.sort(drawn)]
    sources, small, kept, labels, bad, side = list(splits.values()), [], [], [], [], 0
    for k, i in places:
        raw, label = sources[k][i]
        try:
            pixels = as_shown(np.asarray(decode(raw, channels)))
        except BadImage:
            bad.append(sources[k].describe(i))
            continue
        side = max(side, min(SIDE, *pixels.shape[:2]))
        fitting = pixels.shape[:2] == (SIDE, SIDE)
        picture = Image.fromarray(pixels)
        small.append(pixels if fitting else np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        labels.append(0 if classes is None else checked_label(label, classes, sources[k], i))
        kept.append((k, i))
    if len(kept) < 2:
        raise InputError(f"{len(kept)} of {len(places)} pictures can be decoded: there is nothing to compare")
    if side < SIDE:
        small = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BOX)) for p in small]
    split, index = np.asarray(kept).T
    return Pictures(np.stack(small), tuple(splits), split, index, np.asarray(labels), dict(splits), tuple(bad))


class Network:
    """A network whose pooled features are taken, and the recipe that reads data for it.

    Attributes:
      source: as for `load_pretrained`.
      config: reads the data as the network takes it.
      run: the recipe of the run that the source is; None where it is none.
    """

    def __init__(
        self,
        source: str,
        name: str | None,
        checkpoint: str | None,
        dataset: str | None,
        data_dir: str | None,
        batch_size: int,
    ) -> None:
        """Finds the weights; errors as for `knn`."""
        weights = find_weights(source, name, checkpoint)
        model_name, fields = model_of(weights, source)
        self.source, self.model = source, create_model(model_name, **fields)
        check_endpoints(self.model)
        self.look: Any = preprocessing_of(weights, source)
        if self.look is None:
            raise InputError(f"{source} does not say how pictures are prepared; take the run, or what it exports")
        self.config = recipe_for(source, dataset, data_dir, self.look, channels_of(self.model), batch_size)
        path = path_of(source, "SOURCE")
        self.run = recorded_recipe(path) if (path / "checkpoints").is_dir() else None
        self.tensors = weights.tensors

    @property
    def selects(self) -> bool:
        """Returns whether it is a run that held pictures out for its selection."""
        return self.run is not None and self.run.train.metric != "none"

    def has_seen(self, data: Any) -> bool:
        """Returns whether it was trained on pictures of the data, by what the run has noted of its own."""
        seen = load_fingerprint(path_of(self.source, "SOURCE")) if self.run else None
        return seen is not None and any(count_trained_on(seen, fingerprint(data), split) for split in data.splits())

    def features(self, pictures: Pictures) -> np.ndarray:
        """Returns the pooled features of the pictures, float32 [n, channels].

        Raises:
          InputError: they are not finite.
        """
        bad = BadImages("error", channels=self.config.data.channels)
        mesh = mesh_for(self.config.train.batch_size)
        variables = jax.device_put(fit_weights(self.model, self.tensors, self.source), replicated(mesh))

        def pooled(variables: Any, images: jax.Array) -> jax.Array:
            pixels = normalize(images, self.look.mean, self.look.std, dtype_of(self.model))
            return self.model.apply(variables, pixels, train=False, endpoints=True)[1]["features"]

        program = jax.jit(sharded_over(mesh)(pooled), compiler_options=compiler_options())
        found = []
        for k, split in enumerate(pictures.splits):
            part = Part(pictures.sources[split], pictures.index[pictures.split == k])
            for batch in eval_batches(part, self.config, mesh, bad):
                found.append(np.asarray(program(variables, batch["image"]), np.float32)[np.asarray(batch["mask"])])
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            raise InputError(f"{self.source} gives features that are not finite: the weights are damaged")
        return features


def patch_features(pixels: np.ndarray, kernels: int = KERNELS, seed: int = 0) -> np.ndarray:
    """Returns features of pictures by one layer whose kernels are patches of them, float32 [n, 8 * kernels].

    Patches are freed of brightness and contrast and whitened; what exceeds a threshold in either direction is averaged
    over the four quarters of the picture (Coates, Lee and Ng 2011; the encoding of Coates and Ng 2011). Nothing is
    trained, and no label is seen.

    Args:
      pixels: uint8 [n, side, side, 3].
      kernels: number of patches.
      seed: of their choice.
    """
    rng = np.random.default_rng(seed)
    side = pixels.shape[1]
    size = min(side, max(3, round(side * 6 / 32)))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(1, 2))

    def drawn(count: int) -> np.ndarray:
        place = rng.integers(0, side - size + 1, (2, count))
        patches = windows[rng.integers(0, len(pixels), count), place[0], place[1]]
        flat = patches.transpose(0, 2, 3, 1).reshape(count, -1).astype(np.float64)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.sqrt(flat.var(1, keepdims=True) + 10.0)

    sample = drawn(SAMPLED)
    centre = sample.mean(0)
    values, vectors = np.linalg.eigh(np.cov(sample.T))
    whitening = (vectors / np.sqrt(values.clip(0) + 0.1)) @ vectors.T
    chosen = (drawn(kernels) - centre) @ whitening
    chosen /= np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
    weights = whitening @ chosen.T
    bias = jnp.asarray(-centre @ weights, jnp.float32)
    weights = weights - weights.mean(0)  # so that each patch loses its mean
    kernel = jnp.asarray(weights.reshape(size, size, 3, kernels), jnp.float32)
    even = jnp.full((size, size, 3, 1), 1 / kernel[..., 0].size, jnp.float32)

    def convolved(images: jax.Array, by: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(images, by, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def pooled(maps: jax.Array) -> jax.Array:
        half = (maps.shape[1] + 1) // 2
        parts = [
            maps[:, y, x].mean((1, 2))
            for y in (slice(half), slice(-half, None))
            for x in (slice(half), slice(-half, None))
        ]
        return jnp.concatenate(parts, -1)

    @jax.jit
    def layer(images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32)
        variance = convolved(images**2, even) - convolved(images, even) ** 2
        response = convolved(images - 128.0, kernel) / jnp.sqrt(jnp.maximum(variance, 0) + 10.0) + bias
        both = [pooled(jax.nn.relu(sign * response - THRESHOLD)) for sign in (1, -1)]
        return jnp.concatenate(both, -1)

    found = np.empty((len(pixels), 8 * kernels), np.float32)
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH]
        filled = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), np.uint8)])
        found[start : start + BATCH] = np.asarray(layer(filled))[: len(part)]
    return found


def principal(features: np.ndarray, dimensions: int, seed: int = 0) -> np.ndarray:
    """Returns the features' first principal components, float32 [n, at most `dimensions`], by a randomised range finder
    (Halko et al. 2011) where there are more features than that.
    """
    centred = standardized(features)
    if min(centred.shape) <= dimensions:
        return centred
    rng = np.random.default_rng(seed)
    guess = centred @ rng.standard_normal((centred.shape[1], dimensions + 16)).astype(np.float32)
    for _ in range(2):
        guess = centred @ (centred.T @ np.linalg.qr(guess)[0])
    basis = np.linalg.qr(guess)[0]
    left, values, _ = np.linalg.svd(basis.T @ centred, full_matrices=False)
    return ((basis @ left) * values)[:, :dimensions]


def standardized(features: np.ndarray) -> np.ndarray:
    """Returns features [n, channels] less their mean and over their deviation; constant ones become zero."""
    centred = features - features.mean(0)
    centred /= np.sqrt(np.square(centred).mean(0) + 1e-8)
    return centred


def folds_of(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Returns which fold each picture is in, int [n]: those of a group in the same, classes spread evenly."""
    first = np.unique(groups, return_index=True)[1]
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % folds
    return fold[np.unique(groups, return_inverse=True)[1]]


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, classes: int, folds: int, groups: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Returns probabilities of classes, float [n, classes], each by a probe that was fitted without the fold that the
    picture is in: ridge regression on the labels, and one temperature for all.

    Rows of features have length 1. Up to `MOST_BY_KERNEL` pictures the regression is on a Gaussian kernel as wide as
    the median distance; for more, whose kernel would not fit into memory, it is linear.

    Args:
      features: float32 [n, channels].
      labels: int [n].
      classes: how many there are.
      folds: how many; less where there are fewer groups.
      groups: int [n], of twins, which stay together.
      seed: of the folds.
    """
    from scipy.linalg import solve

    fold = folds_of(labels, groups, min(folds, len(np.unique(groups))), seed)
    known = standardized(features)
    known /= np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-12)
    targets = np.eye(classes, dtype=np.float32)[labels]
    targets -= targets.mean(0)
    scores = np.zeros((len(labels), classes), np.float32)
    by_kernel = len(known) <= MOST_BY_KERNEL
    gram = gaussian_kernel(known) if by_kernel else known.T @ known
    for k in range(fold.max() + 1):
        there, here = fold != k, fold == k
        inner = gram[np.ix_(there, there)] if by_kernel else gram - known[here].T @ known[here]
        inner[np.diag_indices(len(inner))] += RIDGE
        wanted = targets[there] if by_kernel else known[there].T @ targets[there]
        weights = solve(inner, wanted, assume_a="pos", overwrite_a=True)
        scores[here] = (gram[np.ix_(here, there)] if by_kernel else known[here]) @ weights
    return probabilities(scores, False, fit_calibration(scores, labels).temperature)


def gaussian_kernel(unit: np.ndarray) -> np.ndarray:
    """Returns exp(-d / median d), float32 [n, n], of the squared distances d between rows of length 1."""
    distance = unit @ unit.T
    distance *= -2
    distance += 2
    distance /= -max(float(np.median(distance[:: -(-len(unit) // 1000)])), 1e-12)
    return np.exp(distance, out=distance)


def classes_of_two(space: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0) -> tuple[TwoInOne, ...]:
    """Returns how far each class of enough pictures falls into two, those that do most first."""
    rows = []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < LEAST_PICTURES:
            continue
        share, smaller, side = two_in_one(space[members], seed)
        found = share >= SPLIT_SHARE and smaller >= LEAST_HALF
        ordered = np.concatenate([members[~side], members[side]])
        rows.append(TwoInOne(label, share, smaller, ordered, (int((~side).sum()), int(side.sum())), found))
    return tuple(sorted(rows, key=lambda row: -row.share))
