"""The `resnet-jax` command: the process, and how what goes wrong becomes words and a status. See `commands.py`."""

import atexit
import gc
import io
import logging
import os
import select
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resnet_jax import __version__
from resnet_jax.files import bucket_problem
from resnet_jax.output import fail, first_line
from resnet_jax.typed import InputError, from_extra

LARGE_PAGES = "RESNET_JAX_LARGE_PAGES"
"""Environment variable: 0 leaves memory to the system."""
MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
"""glibc's settings in our processes: large pages of memory, and the main thread keeps what it frees."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs `main` as the console script, in a process that has large pages of memory, and keeps them.

    glibc reads `MEMORY` only when a process starts, so the process replaces itself once, unless the environment sets
    `GLIBC_TUNABLES` or `RESNET_JAX_LARGE_PAGES=0`. What it brings a training step on two cores is in the rows `system's
    memory` of `benchmarks/results/train_step-cpu2-*.json`. Garbage is looked for less often than Python's default,
    because what imports and traces make lives on.
    """
    for number in (0, 1, 2):  # a file opened later would get a closed one's number, and its prints
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    wanted = "GLIBC_TUNABLES" not in os.environ and os.environ.get(LARGE_PAGES) != "0"
    if sys.platform == "linux" and wanted:
        os.environ["GLIBC_TUNABLES"] = MEMORY
        os.execv(sys.executable, sys.orig_argv)
    gc.set_threshold(50_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names that are not UTF-8 come out as the bytes that they are
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    status = main(arguments)
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except (OSError, ValueError):  # it takes nothing, and Python would end with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0, 1 (the run ended before its end, such as by diverging), 2
    (wrong input), 3 (the disk did not take the end of a run), 130 (Ctrl-C).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if any("\0" in word for word in arguments):
        return fail("a word of the command line holds a NUL character")
    if arguments[0] == "--version":
        print(f"resnet-jax {__version__}")
        return 0
    try:
        with from_extra("train", "resnet-jax"):
            from resnet_jax.commands import COMMANDS, call
    except InputError as error:
        return fail(str(error))
    if arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        return fail(f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    settle_matplotlib()
    try:
        with log_as_warnings():
            status = call(arguments)
        sys.stdout.flush()
        return status
    except InputError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted; resnet-jax train --workdir FOLDER goes on from the last checkpoint", status=130)
    except BrokenPipeError:
        if not reader_is_gone():
            raise  # another pipe is broken
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else about_bucket(error, arguments))
    except MemoryError as error:
        return fail(f"{NO_MEMORY} ({first_line(error)})", status=1)
    except (RuntimeError, AssertionError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return fail(f"{NO_MEMORY} ({first_line(error)})", status=1)
        if problem := no_device():
            return fail(problem)
        raise
    except Exception as error:
        if type(error).__module__.startswith(("gcsfs.", "google.auth.")):  # such as HttpError, where there is no right
            return fail(about_bucket(error, arguments))
        raise


@contextmanager
def log_as_warnings() -> Iterator[None]:
    """Prints what the package logs as `WARNING: ...`, once, whatever handlers other libraries have added."""
    logger, handler = logging.getLogger("resnet_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def about_bucket(error: Exception, arguments: Sequence[str]) -> str:
    """Returns what an error says; where it may be that of a bucket that the command line names, what to check of it."""
    of_system = getattr(error, "errno", None) is not None and not type(error).__module__.startswith("aiohttp.")
    words = " ".join(arguments)
    if of_system or "gs:/" not in words or "bucket gs:" in str(error):
        return str(error)
    return bucket_problem(words, error)


def reader_is_gone() -> bool:
    """Returns whether standard output is a pipe whose reader has seen enough, such as `head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


NO_MEMORY = (
    "out of memory: take a smaller --train.batch_size, --train.accumulate_steps 2 or more, --model.remat block, "
    "smaller images, or --data.no_on_device; to predict, a smaller --batch"
)


def settle_matplotlib() -> None:
    """Gives matplotlib a temporary folder where there is no home to write: it cannot be imported without one."""
    if "MPLCONFIGDIR" in os.environ or "XDG_CONFIG_HOME" in os.environ:
        return
    try:
        found = os.access(Path.home(), os.W_OK)
    except RuntimeError:
        found = False
    if not found:
        os.environ["MPLCONFIGDIR"] = folder = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def no_device() -> str | None:
    """Returns what is wrong where JAX finds no device to compute on; None where it does."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, without words, where JAX has no plugin for a GPU
        reason = (
            first_line(error).partition(" (set JAX_PLATFORMS=")[0] if str(error) else "no plugin for it is installed"
        )
        wanted = os.environ.get("JAX_PLATFORMS")
        where = f"JAX_PLATFORMS={wanted}: JAX finds no such device" if wanted else "JAX finds no device"
        return f"{where} here ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU"
    return None


if __name__ == "__main__":
    run()
