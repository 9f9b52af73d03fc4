"""Where images come from: digits, folders, tables, tensorflow-datasets. Random access to raw examples."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from resnet_jax.config import DataConfig, InputError, Size, sides

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy"}
TEST_FOLDERS = ("test", "val", "validation")


Label: TypeAlias = int | tuple[int, ...]
"""Number of the class, or with several labels an image a 0 or 1 for each class."""


class Source(Protocol):
    """Raw examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        """(path, bytes or array of an image; its label)."""

    def describe(self, index: int) -> str:
        """What to call the example in a message."""


@dataclass(frozen=True)
class ArraySource:
    """Images in memory, uint8 [size, height, width, channel]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Label]:
        label = self.labels[index]
        return self.images[index], int(label) if label.ndim == 0 else tuple(label.tolist())

    def describe(self, index: int) -> str:
        return f"example {index}"


@dataclass(frozen=True)
class FileSource:
    """Image files."""

    paths: tuple[str, ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Label]:
        return self.paths[index], self.labels[index]

    def describe(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class TfdsSource:
    """A split of tensorflow-datasets, images still encoded."""

    split: Sequence[dict[str, Any]]
    name: str

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        example = self.split[index]
        return example["image"], int(example["label"])

    def describe(self, index: int) -> str:
        return f"example {index} of tfds:{self.name}"


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the names of the classes that their labels count.

    Attributes:
      several: an image may have several labels, or none.
    """

    train: Source
    test: Source
    class_names: tuple[str, ...]
    several: bool = False


def labels_of(source: Source) -> np.ndarray:
    """All labels of a split, int32 [size], or [size, classes] where there are several; no image is decoded."""
    known = getattr(source, "labels", None)
    return np.asarray([source[i][1] for i in range(len(source))] if known is None else known, np.int32)


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """The dataset that `data.dataset` names; `seed` decides the split where the data has none.

    Raises:
      InputError: the kind is unknown, or the data is not as its kind needs it.
    """
    kind, _, rest = config.dataset.partition(":")
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "synthetic":
        return _synthetic(config, seed)
    if kind == "folder" and rest:
        return _folder(Path(rest).expanduser(), config.validation_fraction, seed)
    if kind == "csv" and rest:
        return _csv(Path(rest).expanduser(), config.validation_fraction, seed)
    if kind == "tfds" and rest:
        return _tfds(rest, config)
    raise InputError(
        f"data.dataset {config.dataset!r} is unknown; "
        "give digits, folder:PATH, csv:FILE, tfds:NAME[:SPLIT] or synthetic"
    )


def _digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels: scikit-learn's `load_digits`, split by its
    `train_test_split(test_size=0.2, random_state=0, stratify=target)`, in a file here since its import takes seconds.

    They are optdigits of the UCI repository (Alpaydin and Kaynak 1998, doi 10.24432/C50P49, CC BY 4.0).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as digits:

        def split(name: str) -> ArraySource:
            images = np.round(digits[f"{name}_images"] * (255 / 16)).astype(np.uint8)
            return ArraySource(np.repeat(images[..., None], 3, axis=-1), digits[f"{name}_labels"].astype(np.int32))

        return Dataset(split("train"), split("test"), tuple(str(i) for i in range(10)))


def _synthetic(config: DataConfig, seed: int) -> Dataset:
    """Random pixels and labels; the test split is a tenth of the size."""
    rng = np.random.default_rng(seed)

    def split(size: int, image: Size) -> ArraySource:
        images = rng.integers(0, 256, (size, *sides(image), config.channels), dtype=np.uint8)
        return ArraySource(images, rng.integers(0, config.synthetic_classes, size, dtype=np.int32))

    train = split(config.synthetic_size, config.image_size)
    test = split(max(1, config.synthetic_size // 10), config.eval_image_size or config.image_size)
    return Dataset(train, test, tuple(f"class{i}" for i in range(config.synthetic_classes)))


def _folder(root: Path, fraction: float, seed: int) -> Dataset:
    if not root.is_dir():
        raise InputError(f"data.dataset folder:{root}: there is no such folder")
    if not (root / "train").is_dir():
        files = _class_files(root)
        return _split(root, files, fraction, seed)
    train = _class_files(root / "train")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test_root is None:
        return _split(root, train, fraction, seed)
    test = _class_files(test_root)
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise InputError(f"{test_root} has classes that {root / 'train'} lacks: {', '.join(unknown)}")
    names = tuple(train)
    _check_classes(root, names)
    return Dataset(_file_source(train, names), _file_source(test, names), names)


def _check_classes(where: Path, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError(f"{where} has {'no class' if not names else f'one class, {names[0]}'}; it takes two or more")


def _csv(file: Path, fraction: float, seed: int) -> Dataset:
    """Columns `path` (relative to the file's folder), `label`, and perhaps `split` (train, or one of TEST_FOLDERS).

    Where a label holds a semicolon, every image has a set of labels, and an empty label is none.
    """
    rows = _table(file)
    several = any(";" in row["label"] for row in rows)
    for number, row in enumerate(rows, start=2):
        if not several and not _labels(row["label"]):
            raise InputError(f"{file}, line {number}: {row['path']} has no label; every picture needs one")
    splits = [[row for row in rows if (row["split"] == "train") == first] for first in (True, False)]
    train, test = ([(row["path"], _labels(row["label"])) for row in split] for split in splits)
    if not test and several:
        train, test = _held_out(train, fraction, np.random.default_rng(seed))
    names = tuple(sorted({label for _, labels in train for label in labels}))
    _check_classes(file, names)
    if unknown := sorted({label for _, labels in test for label in labels} - set(names)):
        raise InputError(f"{file} tests classes that are not in its training split: {', '.join(unknown)}")
    if several:
        return Dataset(_set_source(train, names), _set_source(test, names), names, several=True)
    by_class = [
        {name: [path for path, (label,) in split if label == name] for name in names} for split in (train, test)
    ]
    if not test:
        return _split(file, by_class[0], fraction, seed)
    return Dataset(_file_source(by_class[0], names), _file_source(by_class[1], names), names)


def _table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with whole paths, all of them checked."""
    if not file.is_file():
        raise InputError(f"data.dataset csv:{file}: there is no such file")
    with file.open(newline="") as opened:
        table = csv.DictReader(opened)
        missing = {"path", "label"} - set(table.fieldnames or ())
        if missing:
            raise InputError(
                f"{file} has no column {', '.join(sorted(missing))}: its first line must name path and label"
            )
        rows = [{name: row.get(name) or "" for name in ("path", "label", "split")} for row in table]
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        row["path"], row["split"] = str(file.parent / row["path"]), row["split"] or "train"
        if row["path"] in seen:
            raise InputError(f"{file}, line {number}: {row['path']} is there twice; leave one of the lines out")
        if row["split"] != "train" and row["split"] not in TEST_FOLDERS:
            raise InputError(
                f"{file}, line {number}: split {row['split']!r} is unknown; give train or {' or '.join(TEST_FOLDERS)}"
            )
        if not Path(row["path"]).is_file():
            raise InputError(f"{file}, line {number}: there is no file {row['path']}")
        seen.add(row["path"])
    return rows


def _labels(text: str) -> tuple[str, ...]:
    return tuple(sorted({label.strip() for label in text.split(";")} - {""}))


def _held_out(rows: list[Any], fraction: float, rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Most of the rows, and a random share of them, in their old order."""
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    out = set(rng.permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in out], [row for i, row in enumerate(rows) if i in out]


def _set_source(rows: list[tuple[str, tuple[str, ...]]], names: tuple[str, ...]) -> FileSource:
    labels = tuple(tuple(int(name in labels) for name in names) for _, labels in rows)
    return FileSource(tuple(path for path, _ in rows), labels)


def _class_files(root: Path) -> dict[str, list[str]]:
    """Image files of each class folder, both sorted by name."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise InputError(f"{root} has no classes: put the images of each class into a folder of the class's name")
    files = {}
    for folder in folders:
        found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"{folder}: the class has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); remove it")
        files[folder.name] = found
    return files


def _file_source(files: dict[str, list[str]], names: tuple[str, ...]) -> FileSource:
    pairs = [(path, names.index(name)) for name, paths in files.items() for path in paths]
    return FileSource(tuple(path for path, _ in pairs), tuple(label for _, label in pairs))


def _split(where: Path, files: dict[str, list[str]], fraction: float, seed: int) -> Dataset:
    """Holds out a share of each class, at least one image and never all."""
    _check_classes(where, tuple(files))
    rng = np.random.default_rng(seed)
    train, test = {}, {}
    for name, paths in files.items():
        if len(paths) < 2:
            raise InputError(f"class {name!r} has a single image ({paths[0]}): a split needs two; add one or remove it")
        held_out = min(max(1, round(fraction * len(paths))), len(paths) - 1)
        shuffled = [paths[i] for i in rng.permutation(len(paths))]
        test[name], train[name] = sorted(shuffled[:held_out]), sorted(shuffled[held_out:])
    names = tuple(files)
    return Dataset(_file_source(train, names), _file_source(test, names), names)


def _tfds(spec: str, config: DataConfig) -> Dataset:
    """`NAME` or `NAME:SPLIT`; the test split is `test`, else `validation`, else a share of the training split."""
    import tensorflow_datasets as tfds

    match = re.fullmatch(r"([^:]+(?::\d[\d.]*)?)(?::(.+))?", spec)
    if match is None:
        raise InputError(f"data.dataset tfds:{spec} is not of the form tfds:NAME or tfds:NAME:SPLIT")
    name, train_split = match.group(1), match.group(2) or "train"
    try:
        builder = tfds.builder(name, data_dir=config.data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"tensorflow-datasets has no dataset {name!r}: {str(error).splitlines()[0]}") from error
    if not {"image", "label"} <= set(builder.info.features):
        raise InputError(f"tfds:{name} has no image and label, but {', '.join(builder.info.features)}")
    builder.download_and_prepare()
    splits = set(builder.info.splits)
    test_split = next((s for s in ("test", "validation") if s in splits), None)
    if test_split is None:
        percent = 100 - round(100 * config.validation_fraction)
        train_split, test_split = f"{train_split}[:{percent}%]", f"{train_split}[{percent}%:]"
    decoders = {"image": tfds.decode.SkipDecoding()}
    train, test = builder.as_data_source(split=[train_split, test_split], decoders=decoders)
    return Dataset(TfdsSource(train, name), TfdsSource(test, name), tuple(builder.info.features["label"].names))
