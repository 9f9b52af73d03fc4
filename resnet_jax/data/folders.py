"""Finds images on the disk, in folders of classes or by a table, and names the files that are left out."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.config import InputError
from resnet_jax.data.dataset import SPLIT_NAMES, Dataset, FileSource, listed, split_of
from resnet_jax.files import bucket_errors, in_bucket

LITTER = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin"})
"""Names, in lower case, of files that operating systems leave among images; names that begin with a dot are others."""

NO_PICTURES = frozenset({"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"})
"""Formats that Pillow knows by name but does not decode by itself."""


class Picture(NamedTuple):
    """An image file: its path, its path below the root of the data, and its labels."""

    path: str
    key: str
    labels: tuple[str, ...]


@cache
def picture_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, of the files that the installed Pillow decodes, and `.npy`."""
    from PIL import Image

    formats = Image.registered_extensions()
    return frozenset({s for s, form in formats.items() if form in Image.OPEN and form not in NO_PICTURES} | {".npy"})


@dataclass
class LeftOut:
    """Files and folders that are not taken for images: path -> reason, in the order in which they were found."""

    found: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, reason: str) -> None:
        """Adds a file or folder."""
        self.found[path] = reason

    def notes(self, root: Path) -> tuple[str, ...]:
        """Returns a line that counts them and names the first few; no line where nothing was left out."""
        if not self.found:
            return ()
        shown = [f"{os.path.relpath(path, root)} ({reason})" for path, reason in self.found.items()]
        return (f"left out: {len(shown):,} files or folders: {printable(listed(shown))}",)


def printable(text: str) -> str:
    """Returns a text in which bytes of file names that are not UTF-8 are replacement characters."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


class Entry(NamedTuple):
    """An entry of a folder; its kind is `folder`, `file`, `gone` (a link whose target does not exist) or `other`."""

    name: str
    path: str
    kind: str


def entries_of(folder: Path) -> list[Entry]:
    """Returns the entries of a folder, sorted by name; the kind of a link is that of its target.

    Raises:
      InputError: it cannot be read.
    """
    found = []
    try:
        if in_bucket(folder):
            import fsspec

            with bucket_errors(folder):
                for info in fsspec.filesystem("gs").ls(os.fspath(folder), detail=True):
                    path, kind = f"gs://{info['name'].rstrip('/')}", info["type"]
                    if path != os.fspath(folder):  # an object that stands for the folder itself
                        found.append(Entry(path.rpartition("/")[2], path, "folder" if kind == "directory" else kind))
        else:
            for entry in os.scandir(folder):
                gone = entry.is_symlink() and not os.path.exists(entry.path)
                kind = "gone" if gone else "folder" if os.path.isdir(entry.path) else "file"
                found.append(Entry(entry.name, entry.path, kind if kind != "file" or entry.is_file() else "other"))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    return sorted(found)


def is_litter(name: str) -> bool:
    """Tells whether a file or folder of this name is one that systems and editors leave among images."""
    return name.startswith(".") or name.lower() in LITTER


def pictures_under(folder: Path, left: LeftOut) -> Iterator[str]:
    """Yields the paths of the images under a folder, at any depth, sorted by name; links to folders are followed, but
    not to a folder above them.

    Args:
      folder: where to look.
      left: takes the files that are left out, and why.

    Raises:
      InputError: a folder cannot be read.
    """

    def walk(path: Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        entries, here = entries_of(path), above
        if not in_bucket(path):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                left.add(str(path), "a link that leads back to a folder above it")
                return
            here = above | {(status.st_dev, status.st_ino)}
        for entry in entries:
            if is_litter(entry.name):
                left.add(entry.path, "hidden" if entry.name.startswith(".") else "left by a system")
            elif entry.kind == "folder":
                yield from walk(path / entry.name, here)
            elif entry.kind == "gone":
                left.add(entry.path, "a link whose target is gone")
            elif (suffix := os.path.splitext(entry.name)[1].lower()) not in picture_suffixes():
                left.add(entry.path, f"not a picture's suffix: {suffix or 'none'}")
            elif entry.kind == "other":
                left.add(entry.path, "not a file")
            else:
                yield entry.path

    above = [] if in_bucket(folder) else [os.stat(parent) for parent in folder.absolute().parents]
    return walk(folder, frozenset((status.st_dev, status.st_ino) for status in above))


def _folders(root: Path, left: LeftOut) -> dict[str, Path]:
    """Returns the folders in a folder by name, without litter."""
    found = {}
    for entry in entries_of(root):
        if is_litter(entry.name):
            left.add(entry.path, "hidden" if entry.name.startswith(".") else "left by a system")
        elif entry.kind == "folder":
            found[entry.name] = root / entry.name
        else:
            left.add(entry.path, "a link whose target is gone" if entry.kind == "gone" else "beside the folders")
    return found


def folder_dataset(root: Path) -> Dataset:
    """Finds the images of a folder that holds `train`, and perhaps `validation` and `test`, by any of `SPLIT_NAMES`,
    with a folder for each class; or folders of classes alone.

    Raises:
      InputError: the folder cannot be read, or does not have this form.
    """
    if not root.is_dir():
        raise InputError(f"data.dataset folder:{root}: there is no such folder")
    left = LeftOut()
    folders = _folders(root, left)
    splits: dict[str, list[str]] = {split: [] for split in SPLIT_NAMES}
    for name in folders:
        if (split := split_of(name)) and (split != "train" or _has_folders(folders[name])):
            splits[split].append(name)
    if doubled := [names for names in splits.values() if len(names) > 1 and splits["train"]]:
        raise InputError(f"{root}: {' and '.join(doubled[0])} are the same split: leave one of them, or join them")
    if not splits["train"]:
        if folders and all(map(split_of, folders)):
            raise InputError(
                f"{root}: the folders {', '.join(folders)} are named as splits, and none is a training split with a "
                "folder for each class: give train/CLASS/*, or call the classes otherwise"
            )
        ambiguous = [name for name in folders if split_of(name)]
        notes = (f"WARNING: {listed(ambiguous)} is taken for a class, not for a split",) if ambiguous else ()
        return _dataset(root, {"train": _class_files(root, root, left)}, left, notes=notes)
    rest = [name for name in folders if name not in {names[0] for names in splits.values() if names}]
    for name in rest:
        left.add(str(folders[name]), "beside the splits")
    found = {}
    for split, names in splits.items():
        if not names:
            continue
        place = folders[names[0]]
        if split == "test" and not _has_folders(place):
            left.add(str(place), "test pictures without classes")
        elif not _has_folders(place):
            raise InputError(f"{place} has no classes: put the images of each class into a folder of the class's name")
        else:
            found[split] = _class_files(place, root, left)
    return _dataset(root, found, left)


def classes_in(root: Path) -> tuple[str, ...]:
    """Returns the classes of a folder as `folder_dataset` takes them, by the names of their folders alone, whose
    pictures are not looked for.

    Raises:
      InputError: the folder cannot be read.
    """
    folders = _folders(root, LeftOut())
    train = [folder for name, folder in folders.items() if split_of(name) == "train" and _has_folders(folder)]
    return tuple(_folders(train[0], LeftOut()) if train else folders)


def _has_folders(folder: Path) -> bool:
    """Returns whether there are folders in a folder, litter left aside."""
    return bool(_folders(folder, LeftOut()))


def _class_files(place: Path, root: Path, left: LeftOut) -> list[Picture]:
    """Returns the pictures of each class folder in a place, both sorted by name; keys are paths below the root."""
    folders = _folders(place, left)
    if not folders:
        raise InputError(f"{place} has no classes: put the images of each class into a folder of the class's name")
    found, start = [], len(os.path.join(root, ""))
    for name, folder in folders.items():
        before = len(left.found)
        own = [Picture(path, path[start:].replace(os.sep, "/"), (name,)) for path in pictures_under(folder, left)]
        if not own:
            why = [f"{os.path.relpath(path, place)} ({reason})" for path, reason in [*left.found.items()][before:]]
            raise InputError(
                f"{folder}: the class has no images; remove the folder, or give it some"
                + (f"; left out: {listed(why)}" if why else "")
            )
        found += own
    return found


def _dataset(
    where: Path,
    pictures: dict[str, list[Picture]],
    left: LeftOut,
    multilabel: bool = False,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Returns a dataset of pictures by split; classes are those of the training split.

    Raises:
      InputError: there are fewer than two classes, or another split has one that is not trained on.
    """
    names = tuple(sorted({label for picture in pictures["train"] for label in picture.labels}))
    if len(names) < 2:
        raise InputError(f"{where} has {'no class' if not names else f'one class, {names[0]}'}; it takes two or more")
    number = {name: i for i, name in enumerate(names)}

    def source(split: str) -> FileSource | None:
        rows = pictures.get(split)
        if not rows:
            return None
        if unknown := sorted({label for row in rows for label in row.labels} - set(number)):
            raise InputError(f"{where}: its {split} split has classes that train lacks: {listed(unknown)}")
        labels: Any = (number[row.labels[0]] for row in rows)
        if multilabel:
            labels = (tuple(int(name in row.labels) for name in names) for row in rows)
        return FileSource(tuple(row.path for row in rows), tuple(labels), tuple(row.key for row in rows))

    train = source("train")
    assert train is not None
    root = where if where.is_dir() else where.parent
    return Dataset(train, source("validation"), source("test"), names, multilabel, (*notes, *left.notes(root)))


def table_dataset(file: Path) -> Dataset:
    """Reads a CSV file with the columns `path` (relative to its folder), `label`, and perhaps `split` (`SPLIT_NAMES`).

    Where any label holds a semicolon, the data is multilabel: each label is a list, and an empty one has no class.

    Raises:
      InputError: the table cannot be read, or a line is wrong; the message says which.
    """
    (rows, notes), there = _table(file), None
    if in_bucket(file):
        import fsspec

        there = {f"gs://{path}" for path in fsspec.filesystem("gs").find(os.fspath(file.parent))}
    multilabel = any(";" in row["label"] for row in rows)
    pictures: dict[str, list[Picture]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        where = f"{file}, line {number}"
        path, labels = os.path.normpath(os.path.join(file.parent, row["path"])), _labels(row["label"])
        path = path if there is None else path.replace("gs:/", "gs://", 1)  # normpath has made one slash of two
        split = split_of(row["split"] or "train")
        if split is None:
            known = ", ".join(names[0] for names in SPLIT_NAMES.values())
            raise InputError(f"{where}: split {row['split']!r} is unknown; give {known}")
        if path in seen:
            raise InputError(f"{where}: {path} is there twice; leave one of the lines out")
        if "\0" in path or not (os.path.isfile(path) if there is None else path in there):
            raise InputError(f"{where}: there is no file {path}")
        if not labels and not multilabel:
            raise InputError(f"{where}: {path} has no label; every picture needs one")
        seen.add(path)
        pictures[split].append(Picture(path, os.path.normpath(row["path"]), labels))
    if rows and not pictures["train"]:
        raise InputError(f"{file}: no line belongs to the training split; give some the split train")
    if not multilabel:
        for own in pictures.values():
            own.sort(key=lambda picture: picture.labels)
    return _dataset(file, pictures, LeftOut(), multilabel, notes)


def _table(file: Path) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Returns the rows of a CSV file: `path`, `label` and `split`, in any case, each "" where it is absent; and a note
    on other columns.

    UTF-8 with or without a byte order mark, and UTF-16 with one, are read.
    """
    if not file.is_file():
        raise InputError(f"data.dataset csv:{file}: there is no such file")
    try:
        data = file.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        table = csv.DictReader(text.splitlines(keepends=True))
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
        missing = {"path", "label"} - set(table.fieldnames)
        if missing:
            raise InputError(
                f"{file} has no column {', '.join(sorted(missing))}: its first line must name path and label"
            )
        rows = list(table)
        if long := [number for number, row in enumerate(rows, start=2) if None in row]:
            raise InputError(
                f"{file}, line {long[0]}: it has more values than the first line has columns; several labels are "
                "joined by semicolons, and a value that holds a comma stands in quotes"
            )
        unread = [name for name in table.fieldnames if name not in ("path", "label", "split")]
        notes = (f"columns of {file} that are not read: {listed(unread)}",) if unread else ()
        return [{name: row.get(name) or "" for name in ("path", "label", "split")} for row in rows], notes
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{file}, line {line}: the byte {data[error.start]:#x} is not {error.encoding.upper()}; save the table as "
            "UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    except csv.Error as error:
        raise InputError(f"{file} is no table of comma-separated values ({error})") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _labels(text: str) -> tuple[str, ...]:
    return tuple(sorted({label.strip() for label in text.split(";")} - {""}))
