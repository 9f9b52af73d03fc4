"""Packed states on disk, with Orbax: each vector is a file of its bytes."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax.packing import Index, type_of, unpack, vectors_of

ALIGNED = 64
"""Bytes at whose multiples an array has to begin for JAX to take it over on a CPU as it lies."""


class Vectors(ocp.type_handlers.TypeHandler):
    """Orbax's way with vectors on the host; TensorStore's, in its place, copies them once more when it reads."""

    def typestr(self) -> str:
        """What Orbax calls arrays on the host."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[ocp.metadata.ArrayMetadata]:
        """Sizes and types."""
        found = []
        for info in infos:
            place, dtype = _place(info)
            size = place.stat().st_size // dtype.itemsize
            found.append(ocp.metadata.ArrayMetadata(info.name, info.parent_dir, (size,), None, dtype))
        return found

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Has process 0 write the vectors, in a thread; until that is done they must not change."""

        async def write() -> None:
            for value, info in zip(values, infos, strict=True):
                with _place(info)[0].open("wb") as file:
                    file.write(value.view(np.uint8).data)
                    file.flush()
                    os.fsync(file.fileno())

        if jax.process_index():
            return []
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="vectors")]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[np.ndarray]:
        """Reads several vectors at a time."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(4) as pool:
            return await asyncio.gather(*(loop.run_in_executor(pool, _read, *_place(info)) for info in infos))


def _place(info: Any) -> tuple[Path, np.dtype]:
    return Path(info.parent_dir) / info.name, type_of(info.name.split(".")[-1])


def _read(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    room = np.empty(size + ALIGNED, np.uint8)
    room = room[-room.ctypes.data % ALIGNED :][:size]
    with path.open("rb") as file:
        if file.readinto(room.data) != size:
            raise OSError(f"{path} became shorter while it was read")
    return room.view(dtype)


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
