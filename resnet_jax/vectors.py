"""Packed states on disk, with Orbax: each vector is a file of its bytes."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax.packing import PAGE, Index, new, type_of, unpack, vectors_of


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
                _write(_place(info), value.view(np.uint8).data)

        if jax.process_index():
            return []
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="vectors")]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[np.ndarray]:
        """Reads several vectors at a time."""
        read = asyncio.get_running_loop().run_in_executor
        with ThreadPoolExecutor(4) as pool:
            return await asyncio.gather(*(read(pool, _read, _place(info), _vector(info)) for info in infos))


def _place(info: Any) -> Path:
    return Path(info.parent_dir) / info.name


def _vector(info: Any) -> str:
    return info.name.split(".")[-1]


def _write(path: Path, data: memoryview) -> None:
    """Whole pages go to the disk directly where it can be: a copy in the system's memory would cost the step time."""
    done, whole = 0, len(data) // PAGE * PAGE
    path.touch()
    with suppress(AttributeError, OSError):  # there is no such way here, or what is wrong shows below once more
        straight = os.open(path, os.O_WRONLY | os.O_DIRECT)
        with open(straight, "wb", buffering=0) as file:
            while done < whole:
                done += file.write(data[done:whole])
    with path.open("r+b") as file:
        file.truncate(done)
        file.seek(done)
        file.write(data[done:])
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, vector: str) -> np.ndarray:
    size = path.stat().st_size
    found = new(size // type_of(vector).itemsize, vector)
    with path.open("rb") as file:
        if file.readinto(found.view(np.uint8).data) != size:
            raise OSError(f"{path} became shorter while it was read")
    return found


def name_of(vector: str) -> str:
    """The file of a vector in a checkpoint's folder."""
    return f"state/whole.{vector}"


def handlers() -> dict[str, Any]:
    """Orbax's handlers of the two items of a checkpoint, the packed state and the record."""
    ways = (np.ndarray, Vectors()), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    registry = ocp.type_handlers.create_type_handler_registry(*ways)
    compress = False  # it costs the step beside it time, and gains a tenth of the size
    state = ocp.PyTreeCheckpointHandler(use_compression=compress, type_handler_registry=registry)
    return {"state": state, "record": ocp.JsonCheckpointHandler()}


def items(packed: dict[str, dict[str, Any]], index: Index, record: dict[str, Any]) -> ocp.args.Composite:
    """What to save: a packed state, and a record beside it."""
    said = {"record": record, "index": index}
    return ocp.args.Composite(state=ocp.args.PyTreeSave(packed), record=ocp.args.JsonSave(said))


def read_record(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], Index]:
    """The record of a checkpoint, and what lies where in its vectors."""
    said = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
    return said["record"], said["index"]


def read_state(manager: ocp.CheckpointManager, step: int, index: Index, spread: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's arrays by address: those of the vectors on the host, the others like those of `spread`."""
    packed = {"spread": spread, "whole": vectors_of(index)}
    state = ocp.args.PyTreeRestore(packed, restore_args=ocp.checkpoint_utils.construct_restore_args(packed))
    return unpack(manager.restore(step, args=ocp.args.Composite(state=state)).state, index)
