"""Watches over the loader: where nothing comes for too long, the run ends and the image is named."""

import ast
import contextlib
import errno
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from resnet_jax.config import InputError

SHARED_MEMORY = "/dev/shm"
GUARD = 'if __name__ == "__main__":'


class Stalled(RuntimeError):
    """The loader gave nothing for `data.timeout` seconds, or one of its processes died."""


def check_guard(workers: int) -> None:
    """Checks that worker processes can be started: each of them imports the program's script once more.

    Raises:
      InputError: the script does its work, or would do it, when a worker imports it: it never reads `__name__`.
    """
    main, imported = sys.modules["__main__"], sys.modules.get("__mp_main__")
    script, names = getattr(main, "__file__", None), {"__name__"}
    if script is not None and multiprocessing.parent_process() is None:
        with contextlib.suppress(OSError, ValueError, SyntaxError):  # it is not Python, or has been removed
            names = {node.id for node in ast.walk(ast.parse(Path(script).read_bytes())) if isinstance(node, ast.Name)}
    if workers and ("__name__" not in names or imported not in (None, main)):
        raise InputError(
            f"data.workers is {workers}, and each worker process imports {script or 'the script'} again, which does "
            f"all of its work once more: put the work under `{GUARD}`, or set data.workers to 0"
        )


def keep_tracker(workers: int) -> None:
    """Starts Python's own process that looks after shared memory, deaf to the signals that a scheduler or a terminal
    sends to all processes of a run: if it dies, whoever next uses shared memory gets a BrokenPipeError.
    """
    if workers:
        deaf_to = (signal.SIGUSR1, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
        try:
            resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf_to)


def end_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process as soon as the process that started it ends, even if that is killed, and not before:
    signals that a scheduler or a terminal sends to all processes of a run are for that one, which saves.
    """
    for number in (signal.SIGUSR1, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def name_what_hangs(example: Any, places: Sequence[int], seconds: float) -> str:
    """Finds which of some examples hangs: they are made once more, in a thread that is waited for.

    Args:
      example: maps a place to an example; its method `name` says what to call it.
      places: of the examples.
      seconds: how long to wait at most.

    Returns:
      The end of a sentence that names the image, or says that all can be read now.
    """
    at = [(places[0], time.monotonic())]

    def read() -> None:
        for place in places:
            at.append((place, time.monotonic()))
            with contextlib.suppress(Exception):
                example(place)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return "all images of the batch can be read now; its disk was slow, or a worker process hangs"
    place, began = at[-1]
    return f"{example.name(place)} has been under way for {time.monotonic() - began:.0f} seconds, when read once more"


def why_it_died(error: BaseException) -> str:
    """Explains an error by which grain says that a worker process died, with the remedy; "" for any other error."""
    full = (
        f"{SHARED_MEMORY} is full: lower --data.workers or the batch size, or make it larger (docker run --shm-size=8g)"
    )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the loader could not store a batch for its worker processes ({error}). Where {full}"
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if found is None:
        return ""
    died = f"a process of the loader died with exit code {found[1]}"
    if int(found[1]) == -signal.SIGBUS:
        return f"{died}, since shared memory in {full}"
    if int(found[1]) == -signal.SIGKILL:
        return f"{died}. Where it was killed for its memory, lower --data.workers"
    if int(found[1]) > 0:
        return f"{died}; its own error is above. A script of yours needs its work under `{GUARD}`"
    return died


def awaited(source: Iterator[Any], timeout: float, explain: Callable[[], str]) -> Iterator[Any]:
    """Yields the items of an iterator, which runs in a thread of its own.

    Args:
      source: the iterator; its errors are raised here.
      timeout: in seconds.
      explain: returns what is known of the reason where nothing came.

    Raises:
      Stalled: nothing came for `timeout` seconds, or a worker process died.
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
            elif why := why_it_died(item):
                raise Stalled(f"{why}; the same command goes on from the last checkpoint") from item
            else:
                raise item
    finally:
        ended.set()
        thread.join(10.0)
