"""What a recipe leaves open, found where a run begins: fields that depend on the model, the weights or the data."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from resnet_jax.config import Config, InputError, Size, known, known_size, shown_size, sides, works_on_host
from resnet_jax.data.dataset import Dataset, Source, listed
from resnet_jax.data.decode import BadImage, decode
from resnet_jax.data.transforms import fit
from resnet_jax.data.watch import awaited
from resnet_jax.models.registry import check_name, create_model, variable_shapes
from resnet_jax.recipe_files import load_config
from resnet_jax.training.build import data_of
from resnet_jax.training.parts import NO_PARTS, Parts, named_after
from resnet_jax.weights.load import preprocessing_of
from resnet_jax.weights.sources import Weights, find_weights, known_of_weights

RESOLVED = (
    "model.name",
    "data.image_size",
    "data.mean",
    "data.std",
    "data.on_device",
    "augment.crop",
    "augment.pad",
    "augment.flip",
    "augment.eval_crop",
    "augment.interpolation",
)
"""Fields that are None in a recipe that does not give them, and never in one that a run works with."""
OF_MODEL = tuple(
    f"model.{name}"
    for name in (
        "shortcut",
        "norm",
        "act",
        "attention",
        "anti_alias",
        "drop_rate",
        "drop_path_rate",
        "output_stride",
        "global_pool",
    )
)
"""Fields that stay None where neither recipe nor weights change them: the model's own."""
OF_PREPROCESSING = {
    "image_size": "data.image_size",
    "eval_image_size": "data.eval_image_size",
    "eval_crop": "augment.eval_crop",
    "interpolation": "augment.interpolation",
    "mean": "data.mean",
    "std": "data.std",
}
"""Fields of `Preprocessing` -> those of a recipe."""
MEASURED = 1000
"""Training pictures, at most, of which mean and deviation are measured."""
ON_DEVICE_BYTES = 2**30
"""Below this the training images are kept on the device."""


@dataclass(frozen=True)
class Resolved:
    """A recipe in which every field that a run needs has a value.

    Attributes:
      config: the recipe.
      origins: `section.field` -> where its value came from, in a few words, of what was open.
      dataset: of `data_of`, where it had to be looked at; else None.
    """

    config: Config
    origins: dict[str, str]
    dataset: Dataset | None = None

    def line(self) -> str:
        """Returns a line with each value that was not given, and where it came from; empty where all were given."""
        groups: dict[str, list[str]] = {}
        for name, origin in self.origins.items():
            if name != "augment.pad" or self.config.augment.crop == "pad":
                groups.setdefault(origin, []).append(f"{name} {shown_value(value_of(self.config, name))}")
        taken = "; ".join(f"{', '.join(values)} ({origin})" for origin, values in groups.items())
        return taken and f"resolved: {taken}"


def resolve(
    config: Config, parts: Parts = NO_PARTS, before: Config | None = None, read: bool = True, fetch: bool = True
) -> Resolved:
    """Returns a recipe whose open fields, which are None, have values.

    A value comes from the first of these that has one: the recipe itself with its flags; the run in the folder; the
    pretrained weights; for the digits their recipe; what is usual for the model, and for images of the size; the data.

    Args:
      parts: the user's own, whose names the recipe then has.
      before: the recipe of the run that is resumed.
      read: look at the data where nothing else says mean, deviation and whether it fits the device; without it there
        are stand-ins, with which a step compiles to what it needs.
      fetch: have the weights of a tag or of the hub on this machine; without it only what is known of them is taken.

    Raises:
      InputError: the weights cannot be found, are those of another model than `model.name`, or say what is impossible;
        or no training picture can be decoded.
    """
    config, origins, dataset = named_after(config, parts), {}, None

    def take(values: Mapping[str, Any], origin: str) -> None:
        nonlocal config
        new = {name: value for name, value in values.items() if value is not None and value_of(config, name) is None}
        if "data.image_size" not in new:
            new.pop("data.eval_image_size", None)  # it is taken only with the image_size of the same source
        config = with_values(config, new)
        origins.update(dict.fromkeys(new, origin))

    if config.model.name is not None and parts.model is None:
        check_name(config.model.name)  # a name or a folder that is wrong is said before anything is fetched
    source = config.model.pretrained
    if read and source is not None and config.data.dataset.startswith("folder:"):
        dataset = data_of(config, parts)
    if before is not None:
        same = source is not None and before.model.pretrained == source
        names = (*RESOLVED, "data.eval_image_size", *(OF_MODEL if same else ()))
        take({name: value_of(before, name) for name in names}, "as the run in this folder began")
    if source is not None and (before is None or before.model.pretrained != source):
        take(values_of_weights(config, source, fetch), f"of {source}")
    if config.data.dataset == "digits":
        digits = load_config("digits_resnet20")
        host = works_on_host(config.augment)
        names = tuple(name for name in RESOLVED if not (host and name == "data.on_device"))
        take({name: value_of(digits, name) for name in names}, "recipe digits_resnet20")
    take({"model.name": "cifar_resnet20"}, "without weights and a name")

    if config.data.image_size is None:
        size, origin = usual_size(config, parts)
        if size is None:
            if read and config.data.dataset != "synthetic":
                dataset = dataset or data_of(config, parts)
            size, origin = size_of_pictures(dataset, config)
        take({"data.image_size": size}, origin)
    if parts.dataset is not None and read and None in (config.augment.crop, config.augment.flip):
        dataset = dataset or data_of(config, parts)
        if not dataset.class_names:
            still = "since the labels are no classes, and may say where something is"
            take({"augment.crop": "none", "augment.flip": "none"}, still)
    chosen = known_size(config.data.image_size)
    large, evaluated = max(sides(chosen)) > 64, min(sides(config.data.eval_image_size or chosen))
    crop = "random_resized" if large and not config.data.on_device else "pad"
    of_size = {"augment.crop": crop, "augment.pad": min(1024, min(sides(chosen)) // 8)}
    take(of_size | {"augment.eval_crop": 0.875 if evaluated >= 224 else 1.0}, f"usual for {shown_size(chosen)} pixels")
    take({"augment.flip": "random", "augment.interpolation": "bilinear"}, "usual")

    data = config.data
    if not read:
        take({"data.mean": (0.5,), "data.std": (0.25,)}, "a stand-in, since the data is not looked at")
        take({"data.on_device": not works_on_host(config.augment)}, "a stand-in, since the data is not looked at")
    elif data.mean is None or data.std is None or data.on_device is None:
        dataset = dataset or data_of(config, parts)
        if data.mean is None or data.std is None:
            mean, std, count = measured_by_first(*measure(dataset.train, config))
            what = f"measured on {count:,} of {len(dataset.train):,} training pictures"
            take({"data.mean": mean, "data.std": std}, what)
        fits, why = fits_device(config, len(dataset.train))
        take({"data.on_device": fits}, why)
    return Resolved(config, {name: origins[name] for name in sorted(origins, key=place_of)}, dataset)


def place_of(name: str) -> int:
    """Returns where a field stands among those that are resolved."""
    order = ("model.name", *OF_MODEL, "data.image_size", "data.eval_image_size", *RESOLVED[2:])
    return order.index(name)


def value_of(config: Config, name: str) -> Any:
    """Returns the value of `section.field`."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a recipe with other values of `section.field`, all checked together."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **new)


def filled(config: Config, other: Config) -> Config:
    """Returns a recipe whose open fields have the values of another one."""
    return with_values(config, {n: value_of(other, n) for n in RESOLVED if value_of(config, n) is None})


def values_of_weights(config: Config, source: str, fetch: bool = True) -> dict[str, Any]:
    """Returns what weights say of a recipe, by `section.field`; `fetch` is as for `resolve`.

    Raises:
      InputError: they cannot be found, nothing says their model, or they are of another one than the recipe names.
    """
    given = config.model.name
    try:
        weights = find_weights(source) if fetch else known_of_weights(source)
    except InputError as error:
        remedy = "--model.pretrained FILE takes weights on this disk, and --model.pretrained None starts without any"
        raise InputError(f"model.pretrained: {error}. {remedy}") from error
    name = given or weights.name
    if name is None:
        raise InputError(f"{source} does not say which model it belongs to: add --model.name, such as resnet50")
    if weights.name is not None and weights.name != name and not same_tensors(name, weights):
        raise InputError(
            f"model.pretrained {source} has weights of {weights.name}, and model.name is {name}: leave model.name out, "
            f"or give weights of {name}"
        )
    values = {f"model.{field}": value for field, value in weights.fields.items() if f"model.{field}" in OF_MODEL}
    values["model.name"] = name
    taken = {field: f"--{name}" for field, name in OF_PREPROCESSING.items() if value_of(config, name) is None}
    if "image_size" not in taken:
        taken.pop("eval_image_size", None)
    found = preprocessing_of(dataclasses.replace(weights, name=weights.name or name), source, taken)
    if found is not None:
        values |= {name: getattr(found, field) for field, name in OF_PREPROCESSING.items()}
    return values


def same_tensors(name: str, weights: Weights) -> bool:
    """Returns whether a model has parameters and statistics of the shapes that the model of some weights has, but for
    the head.
    """
    ours, theirs = (variable_shapes(create_model(n, num_classes=None)) for n in (name, known(weights.name, "name")))
    return ours == theirs


def usual_size(config: Config, parts: Parts) -> tuple[Size | None, str]:
    """Returns the usual size of a recipe's model and of which it is; None for a model of the user's own without one."""
    model = parts.model if parts.model is not None else create_model(known(config.model.name, "model.name"))
    own, name = getattr(model, "image_size", None), known(config.model.name, "model.name")
    origin = f"usual for {name}"
    if isinstance(own, int):
        return own, origin
    if parts.model is not None:
        return None, origin
    return (32 if name.startswith("cifar_") else 224), origin


def size_of_pictures(dataset: Dataset | None, config: Config) -> tuple[Size, str]:
    """Returns the size of the training pictures where some of them are all of one size that is usual, else 224."""
    if dataset is not None:
        found = {picture.shape[:2] for picture in sample(dataset.train, config, 20)}
        if len(found) == 1 and max(size := found.pop()) <= 512:
            return (size[0] if size[0] == size[1] else size), "the size of the training pictures"
    return 224, "usual, since the pictures are large or of several sizes"


def sample(
    source: Source, config: Config, most: int, size: Size | None = None, interpolation: str = "bilinear"
) -> Iterator[np.ndarray]:
    """Yields up to `most` pictures of a split, evenly over it, as arrays [height, width, channel]; those that cannot be
    decoded are left out.

    Args:
      size: that they are resized to; None leaves them as they are.

    Raises:
      Stalled: nothing came for `data.timeout` seconds; the message names the pictures under way.
    """
    channels, under_way = config.data.channels, set[int]()

    def read(index: int) -> np.ndarray | None:
        under_way.add(index)
        raw = source[index][0]
        try:
            if size is None:
                return np.asarray(decode(raw, channels))
            return np.asarray(fit(raw, size, interpolation=interpolation, channels=channels))
        except BadImage:
            return None
        finally:
            under_way.discard(index)

    def read_all() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(8) as threads:
            for first in range(0, len(places), 32):  # few at a time lie in memory
                yield from (picture for picture in threads.map(read, places[first : first + 32]) if picture is not None)

    def explain() -> str:
        names = listed([source.describe(index) for index in sorted(under_way)])
        return f"under way were {names}, to learn size, mean or deviation from"

    places = np.unique(np.linspace(0, len(source) - 1, min(len(source), most)).round().astype(int)).tolist()
    yield from awaited(read_all(), config.data.timeout, explain)


def measure(source: Source, config: Config) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Returns mean and deviation of the channels of some training pictures, in their size, and how many they were.

    They are the same in every process and at every start: the pictures stand evenly over the split, and the numbers
    have four digits. A channel that is the same everywhere has deviation 1.

    Raises:
      InputError: none of the pictures can be decoded.
    """
    channels, count, pixels = config.data.channels, 0, 0
    total, squares = np.zeros(channels), np.zeros(channels)
    how = known(config.augment.interpolation, "augment.interpolation")
    for picture in sample(source, config, MEASURED, config.data.image_size, how):
        values = picture.reshape(-1, channels).astype(np.float64) / (255.0 if picture.dtype == np.uint8 else 1.0)
        count, pixels = count + 1, pixels + len(values)
        total, squares = total + values.sum(0), squares + (values**2).sum(0)
    if not count:
        try:
            decode(source[0][0], channels)
            reason = "it can be now"
        except BadImage as error:
            reason = str(error)
        raise InputError(f"none of the training images can be decoded, such as {source.describe(0)} ({reason})")
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    std = np.where(std > 1e-6 * np.maximum(1.0, abs(mean)), std, 1.0)
    return tuple(float(f"{x:.4g}") for x in mean), tuple(float(f"{x:.4g}") for x in std), count


def measured_by_first(
    mean: tuple[float, ...], std: tuple[float, ...], count: int
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Returns what the first process has measured, in all of them: another one may have read a broken picture."""
    if jax.process_count() == 1:
        return mean, std, count
    from jax.experimental import multihost_utils

    found = multihost_utils.broadcast_one_to_all(np.asarray([count, *mean, *std], np.float32)).tolist()
    values, channels = [float(f"{x:.4g}") for x in found[1:]], len(mean)
    return tuple(values[:channels]), tuple(values[channels:]), round(found[0])


def fits_device(config: Config, count: int) -> tuple[bool, str]:
    """Returns whether the training images are kept on the device, and why, for a number of them."""
    if host := works_on_host(config.augment):
        return False, f"since augment.{next(iter(host))} works on the host"
    if config.data.workers:
        return False, "since data.workers work on the host"
    size, channels = sides(config.data.image_size), config.data.channels
    taken = count * math.prod(size) * channels * (1 if channels == 3 else 4)
    return taken < ON_DEVICE_BYTES, f"the training images take {taken / 2**20:,.1f} MiB"


def shown_value(value: object) -> str:
    """Returns a value as a line of a start shows it."""
    return " ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
