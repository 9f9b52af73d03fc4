"""A watch over the loader: when nothing comes for too long, the run ends and the image is named."""

import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTE = struct.Struct("dq")
"""When the work on a place began, and the place; -1 where there is none under way."""


class Stalled(RuntimeError):
    """The loader gave nothing for `data.timeout` seconds, or one of its processes died."""


@dataclass(frozen=True)
class Noted:
    """Maps a place as `example` does, and notes in a file of its thread which place it is at."""

    example: Any
    notes: Path

    def __call__(self, place: int) -> Any:
        file = _own_file(self.notes)
        os.pwrite(file, NOTE.pack(time.time(), place), 0)
        result = self.example(place)
        os.pwrite(file, NOTE.pack(0.0, -1), 0)
        return result


_files = threading.local()


def _own_file(notes: Path) -> int:
    """This thread's open file in a folder of notes."""
    if getattr(_files, "notes", None) != (notes, os.getpid()):
        if getattr(_files, "file", None) is not None and _files.notes[1] == os.getpid():
            os.close(_files.file)
        name = notes / f"{os.getpid()}-{threading.get_ident()}"
        _files.file, _files.notes = os.open(name, os.O_CREAT | os.O_RDWR), (notes, os.getpid())
    return _files.file


def under_way(notes: Path, name: Callable[[int], str]) -> str:
    """What has been under way the longest, and for how long, by what the threads of all workers noted."""
    found = []
    for path in notes.iterdir():
        data = path.read_bytes()
        if len(data) == NOTE.size:
            began, place = NOTE.unpack(data)
            if place >= 0:
                found.append((began, place))
    if not found:
        return "no image is being read: a worker process may have died"
    began, place = min(found)
    return f"{name(place)} has been under way for {time.time() - began:.0f} seconds"


def awaited(source: Iterator[Any], timeout: float, explain: Callable[[], str]) -> Iterator[Any]:
    """The items of an iterator, which a thread of its own waits for.

    Raises:
      Stalled: nothing came for `timeout` seconds; `explain()` says more.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(1)
    ended = threading.Event()

    def put(kind: str, item: Any) -> bool:
        while not ended.is_set():
            try:
                ready.put((kind, item), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def fetch() -> None:
        try:
            for item in source:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, item = ready.get(timeout=timeout)
            except queue.Empty:
                raise Stalled(
                    f"the data gave nothing for data.timeout = {timeout:g} seconds: {explain()}. "
                    "Mend or remove it, or wait longer with --data.timeout"
                ) from None
            if kind == "item":
                yield item
            elif kind == "end":
                return
            elif isinstance(item, RuntimeError) and "terminated unexpectedly" in str(item):
                raise Stalled(
                    f"a process of the loader died ({str(item).splitlines()[0]}). Where it was killed for its memory, "
                    "lower --data.workers; the same command goes on from the last checkpoint"
                ) from item
            else:
                raise item
    finally:
        ended.set()
        thread.join(10.0)
