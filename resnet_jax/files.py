"""Paths that users give, files that nobody ever sees half of, and JSON that holds what it must."""

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_jax.typed import DISTRIBUTION, InputError, typed

REMOTE = re.compile(r"([A-Za-z][\w+.-]+):/")
"""How a path that is not on this machine begins; a Path has made one slash of two."""

BUCKET = re.compile("gs://?([^/ ]+)")
"""Where a path, or a command line, names a bucket."""


def path_of(given: str | Path, what: str) -> Path:
    """Returns a path that the user gave, on this machine (`local_path`) or in a bucket (`gs://bucket/run`).

    What is in a bucket is an `etils.epath.Path`, which has pathlib's methods but no links, locks or appending.

    Raises:
      InputError: as `parse_path`; or the bucket does not exist, or does not answer.
    """
    path = parse_path(given, what)
    if in_bucket(path):
        check_bucket(BUCKET.match(str(path))[1])  # type: ignore[index]
    return path


def parse_path(given: str | Path, what: str) -> Path:
    """Returns what `path_of` does, without a look whether the bucket is there.

    Raises:
      InputError: as `local_path`; or another scheme than gs, a bucket without a name, or `gcsfs` is not installed.
    """
    scheme = REMOTE.match(str(given))
    if not scheme:
        return local_path(given, what)
    if scheme[1] != "gs":
        raise InputError(f"{what} {given}: of remote paths only gs://BUCKET/PATH is supported; or name a local path")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f'{what} {given}: buckets need gcsfs: pip install "{DISTRIBUTION}[gcs]"')
    if not BUCKET.match(str(given)):
        raise InputError(f"{what} {given}: give the bucket's name, as in gs://BUCKET/PATH")
    import fsspec
    from etils import epath

    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # others write, too
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    found: Path = epath.Path(re.sub("^gs:/+", "gs://", str(given)))
    return found


@functools.cache
def check_bucket(name: str) -> None:
    """Asks a bucket once whether it is there. One that may not be listed passes: its files may be readable.

    Raises:
      InputError: it does not exist, or does not answer, which is tried for up to a minute.
    """
    import fsspec

    try:
        fsspec.filesystem("gs").call("GET", "b/{}/o", name, maxResults=1)
    except FileNotFoundError as error:
        raise InputError(bucket_problem(f"gs://{name}", "it does not exist")) from error
    except Exception as error:  # of gcsfs, aiohttp, requests or google.auth
        if getattr(error, "code", None) != 401 and not str(error).startswith("Forbidden"):
            raise InputError(bucket_problem(f"gs://{name}", error)) from error


def bucket_problem(place: object, reason: object) -> str:
    """Returns a sentence on a bucket that cannot be used, and what to check.

    Args:
      place: a path in the bucket, or whatever text names it.
      reason: an error, or what is wrong in words.
    """
    bucket = BUCKET.search(str(place))
    why = " ".join(str(reason).split())[:300] or type(reason).__name__
    return (
        f"the bucket{f' gs://{bucket[1]}' if bucket else ''} cannot be used ({why}): check its name, your right to it "
        "(gcloud auth application-default login) and the network"
    )


def local_path(given: str | Path, what: str) -> Path:
    """Returns a path that the user gave, with `~` expanded; nothing needs to be there.

    Args:
      what: the name of the flag or field, for messages.

    Raises:
      InputError: it is empty, remote (`gs://bucket/run`), in the home of an unknown user, or no name for a file.
    """
    text = str(given)
    if not text.strip():
        raise InputError(f"{what} is empty: name a file or folder")
    if REMOTE.match(text):
        raise InputError(f"{what} {text}: this has to be on this machine; name a local folder or file, or a mount")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{what} {text}: there is no such home ({error}); write the path out") from error
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {text[:200]!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def in_bucket(path: Path) -> bool:
    """Returns whether a path leads into a bucket, which has no links, no folders without files, and no appending."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def bucket_errors(path: Path) -> Iterator[None]:
    """Turns whatever a bucket raises over a path, but that it is not there, into an OSError that says what to check."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        raise OSError(bucket_problem(path, error)) from error


def size_of(path: Path) -> int:
    """Returns the size of a file in bytes."""
    found: Any = path.stat()
    return int(found.length if in_bucket(path) else found.st_size)


def modified(path: Path) -> float:
    """Returns when a file was written, in seconds since 1970 by the clock of its disk or bucket."""
    found: Any = path.stat()
    return float(found.mtime if in_bucket(path) else found.st_mtime_ns / 1e9)


def remove_tree(folder: Path) -> None:
    """Removes a folder and what is in it."""
    if not in_bucket(folder):
        shutil.rmtree(folder)
        return
    with bucket_errors(folder):
        folder.rmtree()  # type: ignore[attr-defined]


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file such that nobody ever sees half of it, and nothing outside of its folder is touched: a link in its
    place is replaced, not followed. Characters that UTF-8 cannot hold are written as escapes.

    Raises:
      OSError: the disk takes no more, the folder is gone, or a bucket does not answer.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    if in_bucket(path):
        with bucket_errors(path):
            path.write_bytes(data)
        return
    new = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(data)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON as every reader takes it: numbers that are infinite or not a number are null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Returns dicts, lists and tuples with None in place of each float that is infinite or not a number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(data: bytes, kind: Any, what: str) -> Any:
    """Returns JSON as a type, as `typed` does; NaN and Infinity, which older versions wrote, are null.

    Args:
      what: the value is called in messages.

    Raises:
      InputError: it is no JSON, or not of this type.
    """
    try:
        value = json.loads(data.decode(), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{what} is no JSON: {reason}") from error
    return typed(value, kind, what)


def read_json(path: Path, kind: Any, what: str = "its content") -> Any:
    """Returns what a JSON file holds as a type, as `typed` does.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such file.
      InputError: it cannot be read, or it holds something else; the message names the file.
      OSError: its bucket does not answer, or refuses.
    """
    try:
        return parse_json(read_file(path), kind, what)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if in_bucket(path):
            raise
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def read_file(path: Path) -> bytes:
    """Returns the bytes of an ordinary file; a pipe or a device, which may never end, is an OSError."""
    if in_bucket(path):
        with bucket_errors(path):
            return path.read_bytes()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no ordinary file")
        return file.read()
