"""Reads datasets of Hugging Face (`datasets`): a name on the Hub, a folder on the disk, Parquet files."""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config import DataConfig, InputError
from resnet_jax.data.dataset import Dataset, listed, row_of, split_of
from resnet_jax.files import local_path
from resnet_jax.typed import from_extra

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}")
"""NAME, OWNER/NAME or OWNER/NAME/CONFIGURATION."""

LABELS = re.compile(r"u?int\d+|bool|(large_)?string|string_view")
"""Types of columns whose distinct values can be classes."""

BYTES = frozenset({"binary", "large_binary", "binary_view"})
"""Types of columns that can hold encoded images."""


@dataclass(frozen=True)
class HuggingFaceSource:
    """A split of a dataset of Hugging Face, images still encoded.

    Attributes:
      rows: a `datasets.Dataset` with the column `image` alone: bytes, or a dictionary with `bytes` and perhaps `path`.
      labels: int32 [size].
      name: what `data.dataset` says, without a split.
      places: (split of the dataset, first, after the last) of each run of rows, in their order.
      files: path below the folder for each row whose image is a file of its own; else empty.
    """

    rows: Any
    labels: np.ndarray
    name: str
    places: tuple[tuple[str, int, int], ...]
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[bytes | str, int]:
        found, label = self.rows[int(index)]["image"], int(self.labels[index])
        if isinstance(found, dict):
            found = found.get("path") if found["bytes"] is None else found["bytes"]
        return b"" if found is None else found, label

    def describe(self, index: int) -> str:
        return f"{self.name}: {self.key(index)}"

    def key(self, index: int) -> str:
        if self.files:
            return self.files[index]
        split, row = row_of(self.places, index)
        return f"row {row} of {split}"


def hugging_face_dataset(spec: str, config: DataConfig, prepare: bool) -> Dataset:
    """Loads `hf:NAME_OR_PATH[:SPLIT]` or `parquet:PATH`.

    The name is `OWNER/NAME` on the Hub, or `OWNER/NAME/CONFIGURATION`; a folder goes before a name. Validation and test
    are the splits of these names, where they have labels. Of Parquet files, those with the name of a split as a word of
    their path belong to it, the others to the training split. `datasets` copies what it reads into Arrow files, once.

    Classes are those of a `ClassLabel`; of another column its distinct values in the training split, sorted.

    Args:
      spec: as above.
      config: the part `data` of a recipe.
      prepare: what lies on the Hub may be downloaded.

    Raises:
      InputError: `datasets` is not installed; there is no such dataset, or it cannot be read; the column of the images
        or of the labels cannot be found, or is none; or an example of the training split has no label.
    """
    with from_extra("hf", f"data.dataset {spec}"):
        from datasets import Image, ReadInstruction

    kind, _, rest = spec.partition(":")
    given, _, wanted = rest.partition(":")
    if kind == "parquet" or local_path(rest, "data.dataset").exists():
        given, wanted = rest, ""
    name = f"{kind}:{given}"
    builder, root = _prepared(kind, given, name, config.data_dir, prepare)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}
    known = {split_of(split): split for split in reversed(sizes)}
    wanted = wanted or known.get("train", "")
    if not wanted:
        raise InputError(f"{name} has no training split, but {listed([*sizes])}: give hf:{given}:SPLIT")
    try:
        parts = ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{name} has no split {wanted!r}; there are {', '.join(sizes)}, and parts of them such as "
            f"{next(iter(sizes))}[:90%]"
        ) from error
    places = {"train": tuple((part.splitname, part.from_, part.to) for part in parts)}
    for split in ("validation", "test"):
        if split in known and known[split] not in {part.splitname for part in parts}:
            places[split] = ((known[split], 0, sizes[known[split]]),)

    tables = {split: builder.as_dataset(split=own[0][0]) for split, own in places.items() if split != "train"}
    tables["train"] = builder.as_dataset(split=wanted)
    features = tables["train"].features
    image = _column("image", features, config.image_column, name)
    label = _column("label", features, config.label_column, name)
    notes = [f"{name}: images are the column {image}, labels the column {label}"]
    values = {split: _values(table, label) for split, table in tables.items()}
    for split in ("validation", "test"):
        if split in values and set(values[split]) <= {None, -1}:
            notes.append(f"left out: the split {known[split]} of {name}, which has no labels")
            del values[split]
    for split, labels in values.items():
        if None in labels:
            where, row = row_of(places[split], labels.index(None))
            raise InputError(f"{name}: row {row} of {where} has no label in the column {label}: give it one")
    classes = tuple(getattr(features[label], "names", None) or ())
    if not classes:
        whole = [builder.as_dataset(split=split) for split in {part.splitname for part in parts}]
        found = [value for table in whole for value in _values(table, label) if value is not None]
        classes = _distinct(found, label, label in ("label", config.label_column), name)
        number = {value: i for i, value in enumerate(classes)}
        for split, labels in values.items():
            if unknown := sorted(set(labels) - set(number)):
                raise InputError(
                    f"{name}: its {split} split has classes that train lacks: {listed([*map(str, unknown)])}"
                )
            values[split] = [number[value] for value in labels]

    def source(split: str) -> HuggingFaceSource | None:
        if split not in values:
            return None
        rows = tables[split].select_columns([image])
        rows = rows if image == "image" else rows.rename_column(image, "image")
        if isinstance(rows.features["image"], Image):
            rows = rows.cast_column("image", Image(decode=False))
        labels = np.asarray(values[split], np.int32)
        return HuggingFaceSource(rows, labels, name, places[split], _files_below(rows, root))

    train = source("train")
    assert train is not None
    return Dataset(train, source("validation"), source("test"), tuple(map(str, classes)), False, tuple(notes))


def _prepared(kind: str, given: str, name: str, home: str | None, prepare: bool) -> tuple[Any, Path | None]:
    """Returns a builder whose rows lie on the disk, and the folder where the data is one.

    Raises:
      InputError: there is no such dataset, or it cannot be read.
    """
    from datasets import DownloadMode, load_dataset_builder

    path, root = local_path(given, "data.dataset"), None
    options: dict[str, Any] = {}
    if kind == "parquet":
        source, options = "parquet", {"data_files": _parquet_files(path, name)}
    elif path.is_dir():
        root = path.absolute()
        source = str(root)
    elif path.exists() or not HUB_NAME.fullmatch(given):
        raise InputError(
            f"{name}: give a folder, or OWNER/NAME on the Hub of Hugging Face; Parquet files as parquet:PATH"
        )
    else:
        owner, _, rest = given.partition("/")
        source, _, own = rest.partition("/")
        source, options = f"{owner}/{source}".rstrip("/"), {"name": own or None}
    local = kind == "parquet" or root is not None
    try:
        builder = load_dataset_builder(source, cache_dir=home, **options)
        if not (prepare or local) and not os.path.isdir(builder.cache_dir):
            raise InputError(f"{name} is not downloaded: training does that; --data.dataset names it elsewhere")
        builder.download_and_prepare(download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS)
    except InputError:
        raise
    except ConnectionError as error:
        raise InputError(
            f"{name}: there is no folder {given} here, and the Hub of Hugging Face cannot be reached ({error}); give a "
            "folder, or go online"
        ) from error
    except Exception as error:  # datasets, pyarrow and huggingface_hub raise many kinds
        reason = " ".join(str(error.__cause__ or error).partition("Example of usage")[0].split())[:500]
        where = "" if local else f" (there is no folder {given} here, so it is one on the Hub)"
        several = "; name one as hf:OWNER/NAME/CONFIGURATION" if not local and "onfig" in reason else ""
        raise InputError(f"{name} cannot be read{where}: {type(error).__name__}: {reason}{several}") from error
    return builder, root


def _parquet_files(path: Path, name: str) -> dict[str, list[str]]:
    """Returns Parquet files by split: of a file, a folder or a pattern."""
    if path.is_dir():
        hidden = re.compile(r"(.*/)?\.")
        found = [file for file in path.rglob("*.parquet") if not hidden.match(file.relative_to(path).as_posix())]
    else:
        found = [path] if path.is_file() else [Path(file) for file in glob.glob(str(path), recursive=True)]
    files = sorted(file.absolute() for file in found if file.is_file())
    if not files:
        raise InputError(f"{name}: there is no such Parquet file; give a file, a folder of *.parquet, or a pattern")
    above = path.absolute() if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z]+", str(file.relative_to(above).with_suffix(""))) if len(files) > 1 else ()
        split = next(filter(None, map(split_of, words)), "train")
        splits.setdefault(split, []).append(glob.escape(str(file)))
    if "train" not in splits:
        raise InputError(f"{name}: its files are named as {' and '.join(splits)}, and none is left to train on")
    return splits


def _column(what: str, features: Any, given: str | None, name: str) -> str:
    """Returns the column of the images or of the labels: the one that is named, else the only one of a fitting type.

    Among several, the one that is called so goes before one that is declared so (`Image`, `ClassLabel`).

    Raises:
      InputError: there is none, or several; the message lists them.
    """
    declared = [key for key, feature in features.items() if type(feature).__name__ == DECLARED[what]]
    fitting = [key for key, feature in features.items() if key in declared or _fits(what, feature)]
    shown = ", ".join(f"{key} ({_type(feature)})" for key, feature in features.items())
    expected = {"image": "images or their bytes", "label": "whole numbers, texts or a ClassLabel"}[what]
    flag = f"--data.{what}_column"
    if given is not None:
        if given not in features:
            raise InputError(f"{name} has no column {given!r} ({flag}); its columns are {shown}")
        if given not in fitting:
            raise InputError(
                f"{name}: the column {given} ({flag}) is {_type(features[given])}, expected {expected}; its columns "
                f"are {shown}"
            )
        return given
    for names in ([key for key in fitting if key == what], declared, fitting):
        if len(names) == 1:
            return names[0]
    if not fitting:
        raise InputError(f"{name} has no column of {what}s, which are {expected}; its columns are {shown}")
    raise InputError(f"{name} has several columns that may be the {what}s, {', '.join(fitting)}: name one with {flag}")


DECLARED = {"image": "Image", "label": "ClassLabel"}
"""Types by which a dataset of Hugging Face says what a column is."""


def _fits(what: str, feature: Any) -> bool:
    """Returns whether a column can hold encoded images, or one label a row."""
    if what == "image":
        feature = feature.get("bytes") if isinstance(feature, dict) else feature
        return getattr(feature, "dtype", None) in BYTES
    return LABELS.fullmatch(str(getattr(feature, "dtype", ""))) is not None and type(feature).__name__ == "Value"


def _type(feature: Any) -> str:
    """Returns the name of a column's type for messages, such as `int64`, `ClassLabel`, `List(Value('int64'))`."""
    if isinstance(feature, dict):
        return f"struct of {', '.join(feature)}"
    kind = type(feature).__name__
    return str(feature.dtype if kind == "Value" else feature if kind not in DECLARED.values() else kind)


def _values(table: Any, column: str) -> list[Any]:
    """Returns all values of a column; None where there is none."""
    values: list[Any] = table.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    return values


def _distinct(values: Iterable[Any], column: str, named: bool, name: str) -> tuple[Any, ...]:
    """Returns the distinct values of a column of labels, sorted.

    Raises:
      InputError: there are fewer than two, a negative number, or, in a column that nobody named, one for each row.
    """
    values = list(values)
    classes = tuple(sorted(set(values)))
    if len(classes) < 2:
        raise InputError(f"{name}: its column {column} has {len(classes)} class; it takes two or more")
    if isinstance(classes[0], int) and classes[0] < 0:
        raise InputError(f"{name}: its column {column} has the label {classes[0]}; classes are numbered from 0")
    if len(classes) == len(values) and not named:
        raise InputError(
            f"{name}: each row has a value of its own in the column {column}, the only one that may be the labels; if "
            f"these are classes, say so with --data.label_column {column}"
        )
    return classes


def _files_below(rows: Any, root: Path | None) -> tuple[str, ...]:
    """Returns paths below a folder, where all images are files in it; else none. No image is read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    images = rows.with_format("arrow")[:].column(0)
    if root is None or not pa.types.is_struct(images.type) or images.type.get_field_index("path") < 0:
        return ()
    if pc.struct_field(images, "bytes").null_count < len(images):
        return ()
    above = os.path.join(root, "")
    paths = pc.struct_field(images, "path").to_pylist()
    if not all(path and path.startswith(above) for path in paths):
        return ()
    return tuple(path.removeprefix(above).replace(os.sep, "/") for path in paths)
