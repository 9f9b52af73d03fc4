"""Packed states on disk, with Orbax: each vector is a file of its bytes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax.config import InputError
from resnet_jax.integrity import VECTORS, Damaged, read_sound, sums_in
from resnet_jax.packing import Index, type_of, unpack
from resnet_jax.pages import read_pages, write_pages

Arrays: TypeAlias = dict[str, Any]


class Vectors(ocp.type_handlers.TypeHandler):
    """Orbax's way with vectors on the host. Its own, with TensorStore, takes a step beside it more of the processor."""

    def typestr(self) -> str:
        """What Orbax calls arrays on the host."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[ocp.metadata.ArrayMetadata]:
        """Sizes and types."""
        found = []
        for info in infos:
            dtype = type_of(_vector(info))
            size = _place(info).stat().st_size // dtype.itemsize
            found.append(ocp.metadata.ArrayMetadata(info.name, info.parent_dir, (size,), None, dtype))
        return found

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Has process 0 write the vectors, in a thread; until that is done they must not change."""

        async def write() -> None:
            for value, info in zip(values, infos, strict=True):
                write_pages(_place(info), value.view(np.uint8).data)

        if jax.process_index():
            return []
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="vectors")]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[np.ndarray]:
        """The vectors; `read_state` is a quicker way."""
        return [read_pages(_place(info)).view(type_of(_vector(info))) for info in infos]


def _place(info: Any) -> Path:
    return Path(info.parent_dir) / info.name


def _vector(info: Any) -> str:
    return info.name.split(".")[-1]


def name_of(vector: str) -> str:
    """The file of a vector in a checkpoint's folder."""
    return VECTORS + vector


def handlers() -> dict[str, Any]:
    """Orbax's handlers of the two items of a checkpoint, packed state and record."""
    ways = (np.ndarray, Vectors()), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    registry = ocp.type_handlers.create_type_handler_registry(*ways)
    compress = False  # it costs the step beside it time, and gains a tenth of the size
    state = ocp.PyTreeCheckpointHandler(use_compression=compress, type_handler_registry=registry)
    return {"state": state, "record": ocp.JsonCheckpointHandler()}


def items(packed: dict[str, dict[str, Any]], index: Index, record: dict[str, Any]) -> ocp.args.Composite:
    """What to save: a packed state, and a record beside it."""
    said = {"record": record, "index": index}
    return ocp.args.Composite(state=ocp.args.PyTreeSave(packed), record=ocp.args.JsonSave(said))


@contextmanager
def reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of a folder of checkpoints, to read alone.

    Raises:
      Damaged: what is done with it fails, as where a run deletes a checkpoint meanwhile.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, lightweight_initialize=True)
    with unreadable_is_damaged(), ocp.CheckpointManager(folder, options=options, item_handlers=handlers()) as manager:
        yield manager


@contextmanager
def unreadable_is_damaged() -> Iterator[None]:
    """Turns whatever Orbax raises over files that it does not understand, which is of many kinds, into Damaged."""
    try:
        yield
    except (InputError, Damaged, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Damaged(f"it cannot be read ({type(error).__name__}: {reason[:300]})") from error


def read_record(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], Index]:
    """The record of a checkpoint, and what lies where in its vectors."""
    said = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
    return said["record"], said["index"]


def read_state(
    manager: ocp.CheckpointManager, step: int, index: Index, spread: dict[str, Any], place: Callable[[Arrays], Arrays]
) -> Arrays:
    """A checkpoint's arrays by address: those of the vectors as they were placed, the others like those of `spread`.

    Args:
      place: puts the arrays of a vector where they belong, while others are being read.

    Raises:
      Damaged: a vector is not what was saved.
    """
    folder = Path(manager.directory) / str(step)
    sums, found = sums_in(folder), Arrays()
    with ThreadPoolExecutor(4) as pool:
        names = {name_of(vector): vector for vector in index}
        reading = {pool.submit(read_sound, folder, name, sums[name][1]): names[name] for name in names}
        for done in as_completed(reading):
            vector = reading[done]
            found |= place(unpack(done.result().view(type_of(vector)), index[vector]))
    if spread:
        wanted = {"spread": spread}
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        state = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
        found |= manager.restore(step, args=ocp.args.Composite(state=state)).state["spread"]
    return found
