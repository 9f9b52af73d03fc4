"""Notes which images a run was given, by split, and which library resized them; a later start says what changed."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_jax.config import InputError
from resnet_jax.data.dataset import ArraySource, Dataset, FileSource, Part, Source, known_labels
from resnet_jax.data.hugging_face import HuggingFaceSource
from resnet_jax.data.own_data import Examples, in_memory
from resnet_jax.data.transforms import resizer
from resnet_jax.files import parse_path, read_file, size_of, write_whole

FILE = "pictures.npz"
"""Name of the file in a run's folder."""

RESIZER, DEVICES = "resizer", "devices"
"""Name of the library that resizes, and number of devices, beside the splits."""

SIZED = 64
"""Of how many pictures of a split size or hash are noted, by which other ones under the same names are found."""

Fingerprint = dict[str, np.ndarray]
"""Split -> int64 [examples, 3], ordered by key: hash of the key, of its classes' names, bytes of the file or -1; of a
picture in a table or an array, which is no file, the last is a hash of it."""


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Computes the fingerprint of a dataset; it does not depend on where the data lies, and opens no picture."""
    names = np.asarray([_hash(name) for name in dataset.class_names], np.int64)
    return {split: _rows(source, names) for split, source in dataset.splits().items()}


def _rows(source: Source, names: np.ndarray) -> np.ndarray:
    keys = np.asarray([_hash(source.key(i)) for i in range(len(source))], np.int64)
    rows = np.stack([keys, np.zeros_like(keys), np.full_like(keys, -1)], 1)
    labels = known_labels(source)
    if labels is not None:
        rows[:, 1] = names[labels] if labels.ndim == 1 else labels[:, : len(names)] @ names
    order = np.argsort(keys, kind="stable")
    for i in order[:SIZED].tolist():
        rows[i, 2] = _size_or_hash(source, i)
    return rows[order]


def _size_or_hash(source: Source, index: int) -> int:
    """Returns the size of a picture's file, the hash of one that lies in a table or in an array, or -1 where a source
    does not say: what a user's own code gives may be another picture each time.
    """
    if isinstance(source, Part):
        return _size_or_hash(source.source, int(source.indices[index]))
    if isinstance(source, FileSource):
        return size_of(parse_path(source.paths[index], "a picture"))
    if isinstance(source, HuggingFaceSource):
        raw = source[index][0]
        return size_of(Path(raw)) if isinstance(raw, str) else abs(_hash(raw))
    if isinstance(source, ArraySource) or (isinstance(source, Examples) and in_memory(source.examples)):
        picture = source[index][0]
        return abs(_hash(picture.tobytes())) if isinstance(picture, np.ndarray) else -1
    return -1


def _hash(text: str | bytes) -> int:
    data = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def digest(found: Fingerprint) -> str:
    """Computes a hash of a whole fingerprint, hexadecimal."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(found):
        whole.update(name.encode() + np.ascontiguousarray(found[name]).tobytes())
    return whole.hexdigest()


def save_fingerprint(found: Fingerprint, folder: Path, devices: int) -> None:
    """Writes a fingerprint, the name of the library that resizes and the number of devices into a run's folder, at once
    or not at all.
    """
    content = io.BytesIO()
    np.savez(content, **found, **{RESIZER: np.asarray(resizer()), DEVICES: np.asarray(devices)})  # type: ignore[arg-type]
    write_whole(folder / FILE, content.getvalue())


def load_fingerprint(folder: Path) -> Fingerprint | None:
    """Reads the fingerprint of a run; None where its folder has none.

    Raises:
      InputError: the file is damaged.
    """
    found = _arrays(folder)
    if found is None:
        return None
    for name in (RESIZER, DEVICES):
        found.pop(name, None)
    if not all(rows.ndim == 2 and rows.shape[1] == 3 and rows.dtype == np.int64 for rows in found.values()):
        raise InputError(f"{folder / FILE} is damaged; remove it to go on without what it says")
    return found


def other_resizer(folder: Path) -> str | None:
    """Returns the name of the library that resized the pictures of a run, where it is another one than now; else None.

    Raises:
      InputError: the file is damaged.
    """
    before = (_arrays(folder) or {}).get(RESIZER)
    return None if before is None or str(before) == resizer() else str(before)


def devices_of(folder: Path) -> int | None:
    """Returns the number of devices that a run had last; None where its folder does not say.

    Raises:
      InputError: the file is damaged.
    """
    before = (_arrays(folder) or {}).get(DEVICES)
    return None if before is None else int(before)


def _arrays(folder: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(io.BytesIO(read_file(folder / FILE)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file
        raise InputError(f"{folder / FILE} is damaged ({error}); remove it to go on without what it says") from error


@dataclass(frozen=True)
class Change:
    """How many examples of a split changed.

    Attributes:
      added, lost: were in no split before, or are in none now.
      moved_in, moved_out: came from another split, or went to one.
      relabelled: have another label.
      resized: have another size in bytes, or another hash, among those for which it was noted.
      kept: were in this split before and still are.
    """

    added: int
    lost: int
    moved_in: int
    moved_out: int
    relabelled: int
    resized: int
    kept: int

    def __bool__(self) -> bool:
        return any((self.added, self.lost, self.moved_in, self.moved_out, self.relabelled, self.resized))

    def __str__(self) -> str:
        named = {
            "added": self.added,
            "lost": self.lost,
            "moved in from another split": self.moved_in,
            "moved to another split": self.moved_out,
            "relabelled": self.relabelled,
            "of those looked at have another size or content": self.resized,
        }
        return ", ".join(f"{count:,} {what}" for what, count in named.items() if count)


def changes(old: Fingerprint, new: Fingerprint) -> dict[str, Change]:
    """Compares two fingerprints and returns the changes by split; splits without a change are left out."""
    found = {}
    for name in sorted(set(old) | set(new)):
        before, now = old.get(name, _NONE), new.get(name, _NONE)
        elsewhere_before = _keys(rows for other, rows in old.items() if other != name)
        elsewhere_now = _keys(rows for other, rows in new.items() if other != name)
        came, went = np.setdiff1d(now[:, 0], before[:, 0]), np.setdiff1d(before[:, 0], now[:, 0])
        moved_in, moved_out = np.isin(came, elsewhere_before).sum(), np.isin(went, elsewhere_now).sum()
        _, a, b = np.intersect1d(before[:, 0], now[:, 0], return_indices=True)
        sized = (before[a, 2] >= 0) & (now[b, 2] >= 0)
        change = Change(
            added=int(len(came) - moved_in),
            lost=int(len(went) - moved_out),
            moved_in=int(moved_in),
            moved_out=int(moved_out),
            relabelled=int((before[a, 1] != now[b, 1]).sum()),
            resized=int((before[a, 2] != now[b, 2])[sized].sum()),
            kept=len(a),
        )
        if change:
            found[name] = change
    return found


def shares_of(old: Fingerprint, new: Fingerprint) -> tuple[float, float | None]:
    """Returns which share of the examples has names that were there before, in any split; and, of those whose size or
    hash was noted before and now, which share has the same, None where there are none: by the second other pictures
    under the same names are found.
    """
    before, now = (np.concatenate([_NONE, *found.values()]) for found in (old, new))
    noted, seen = before[before[:, 2] >= 0], now[now[:, 2] >= 0]
    _, a, b = np.intersect1d(noted[:, 0], seen[:, 0], return_indices=True)
    same = float((noted[a, 2] == seen[b, 2]).mean()) if len(a) else None
    return float(np.isin(now[:, 0], before[:, 0]).mean()), same


def count_trained_on(old: Fingerprint, new: Fingerprint, split: str) -> int:
    """Counts the examples of a split, as it is now, that were in the training split of a run."""
    return int(np.isin(new[split][:, 0], old.get("train", _NONE)[:, 0]).sum())


def find_file(found: Fingerprint, path: Path) -> tuple[str, bool | None]:
    """Returns the split of a run that held a picture, told by the end of its path from its folder's name on, and
    whether it has the size in bytes that was noted, None where none was; ("", None) where no split held it.
    """
    parts = os.path.abspath(path).split(os.sep)
    keys = [_hash("/".join(parts[i:])) for i in range(len(parts) - 1)]
    for split in sorted(found, key=lambda name: name != "train"):
        rows = found[split]
        for key in keys:
            at = int(np.searchsorted(rows[:, 0], key))
            if at < len(rows) and rows[at, 0] == key:
                return split, None if rows[at, 2] < 0 else bool(rows[at, 2] == size_of(path))
    return "", None


def described(found: dict[str, Change]) -> str:
    """Describes all changes in one line."""
    return "; ".join(f"{name}: {change}" for name, change in found.items())


_NONE = np.zeros((0, 3), np.int64)


def _keys(parts: object) -> np.ndarray:
    return np.concatenate([_NONE[:, 0], *(rows[:, 0] for rows in parts)])  # type: ignore[attr-defined]
