"""Checkpoints with Orbax: written beside the run, sealed, the latest and the best are kept, damage is found."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax.config import InputError
from resnet_jax.files import finite
from resnet_jax.integrity import Damaged, checkpoints_of, damage, newest_sound, none, read_chosen, seal, steps_in
from resnet_jax.output import say
from resnet_jax.packing import addresses, pack
from resnet_jax.sharding import put
from resnet_jax.vectors import handlers, items, name_of, read_record, read_state, reader, unreadable_is_damaged

Record: TypeAlias = dict[str, Any]
"""JSON that travels with a state: recipe, class names, best metric, unwritten training sums, what is still owed."""

NONE, DAMAGED = -1, -2


class Checkpoints:
    """The checkpoints of a run's folder, to save into: the latest `keep` stay, and that of the step `best`.

    What a killed run had begun to write is removed. A save that fails is said and left out; the run goes on.

    Raises:
      InputError: the folder cannot be written, or is a link.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self.folder = checkpoints_of(workdir)
        self.best: int | None = None
        self._writing: int | None = None
        self._vectors: dict[str, np.ndarray] = {}
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
            preservation_policy=LatestAndBest(keep, self),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # it would end at the damaged metadata of any checkpoint
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal,
                create_directories_asynchronously=False,  # where they cannot be made, Orbax would wait for them
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers())
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        with contextlib.suppress(OSError):  # the folder may be gone
            self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint; waits for the one that is being written."""
        self.settle()
        return next((step for step in steps_in(self.folder) if damage(self.folder / str(step), none) is None), None)

    def save(self, step: int, state: Any, record: Record) -> None:
        """Starts to write a checkpoint and returns once the state has been copied, to memory that the next one uses."""
        self.settle()
        packed, index = pack(state, self._vectors)
        self._vectors = packed["whole"]
        self._writing = step
        try:
            self._manager.save(step, args=items(packed, index, finite(record)), force=True)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore have many kinds for a disk that takes no more
            self._failed(error)

    def settle(self) -> None:
        """Waits until what is being written is there, or says that it could not be written."""
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
            self._writing = None
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            self._failed(error)

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of a step; waits for the one that is being written."""
        self.settle()
        return step in steps_in(self.folder)

    def read(self, step: int, template: Any) -> Any:
        """Reads the state of a step, like `template`.

        Raises:
          InputError: the checkpoint is damaged.
        """
        self.settle()
        if problem := damage(self.folder / str(step)):
            raise InputError(f"the checkpoint of step {step} is damaged: {problem}")
        return _read(self._manager, template, step)[0]

    def restore(self, template: Callable[[], Any]) -> tuple[Any, Record, int] | None:
        """State, record and step of the newest sound checkpoint; damaged newer ones are moved aside.

        Args:
          template: gives shapes, types and shardings of the state; is called where there is one.

        Returns:
          None where there are no checkpoints.

        Raises:
          InputError: there are some and none is sound; nothing is touched then.
        """
        if jax.process_count() == 1:
            found, problems = newest_sound(self.folder, lambda step: _read(self._manager, template(), step))
            if problems := problems | self._damaged_below(found and found[2]):
                self._set_aside(problems, found and found[2])
                self._manager.reload()
            return found
        step = self._agreed_step()
        try:
            return None if step is None else _read(self._manager, template(), step)
        except Damaged as error:
            raise InputError(
                f"process {jax.process_index()} does not find what process 0 finds in {self.folder} ({error}): it must "
                "be one folder for all of them"
            ) from error

    def _agreed_step(self) -> int | None:
        """Step of the newest checkpoint that is sound to process 0, which reads all of it."""
        from jax.experimental import multihost_utils

        def whole(step: int) -> int:
            if problem := damage(self.folder / str(step)):
                raise Damaged(problem)
            return step

        told, problem = NONE, None
        if jax.process_index() == 0:
            try:
                found, problems = newest_sound(self.folder, whole)
                if problems := problems | self._damaged_below(found):
                    self._set_aside(problems, found)
                told = NONE if found is None else found
            except InputError as error:
                told, problem = DAMAGED, error
        step = int(multihost_utils.broadcast_one_to_all(np.int32(told)))
        if step == DAMAGED:
            raise problem or InputError(f"no checkpoint in {self.folder} is sound; process 0 says more")
        self._manager.reload()
        return None if step == NONE else step

    def _damaged_below(self, sound: int | None) -> dict[int, str]:
        """What can be seen of damage in checkpoints older than a sound one: Orbax would end at some of it."""
        older = [step for step in steps_in(self.folder) if sound is not None and step < sound]
        problems = {step: damage(self.folder / str(step), none) for step in older}
        return {step: problem for step, problem in problems.items() if problem}

    def _set_aside(self, problems: dict[int, str], sound: int | None) -> None:
        if sound is None:
            listed = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
            raise InputError(
                f"no checkpoint in {self.folder} is sound ({listed}). Nothing was changed. Put back a copy of one, or "
                "start anew in another --workdir"
            )
        for bad, problem in problems.items():
            aside = self.folder.with_name("damaged")
            try:
                if aside.is_symlink():
                    raise OSError(f"{aside} is a link")
                aside.mkdir(exist_ok=True)
                place = aside / f"{bad}-{len(list(aside.iterdir()))}"
                os.replace(self.folder / str(bad), place)
            except OSError as error:
                raise InputError(
                    f"the checkpoint of step {bad} is damaged ({problem}) and cannot be moved to {aside}: {error}"
                ) from error
            say(
                f"WARNING: the checkpoint of step {bad} is damaged ({problem}) and was moved to {place}; "
                f"going on from that of step {sound}",
                error=True,
            )

    def _seal(self) -> None:
        """Runs in Orbax's thread when all is written, before the folder gets its final name."""
        if jax.process_index() == 0:
            known = {name_of(vector): values.view(np.uint8).data for vector, values in self._vectors.items()}
            for folder in self.folder.glob(f"{self._writing}.orbax-checkpoint-tmp*"):
                seal(folder, known)

    def _failed(self, error: Exception) -> None:
        step, self._writing = self._writing, None
        self._vectors = {}  # another of them may still be on its way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if jax.process_index() == 0:
            for left in (self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError):  # the folder may be gone, or an older checkpoint damaged
            self._manager.reload()
        say(
            f"WARNING: the checkpoint of step {step} could not be written ({reason[0][:600]}). The run goes on and "
            f"tries again at the next interval; the last checkpoint is that of step {self.latest()}",
            error=True,
        )


class LatestAndBest:
    """Orbax's policy of what is kept."""

    def __init__(self, keep: int, checkpoints: Checkpoints) -> None:
        self.keep, self.checkpoints = keep, checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each checkpoint, the oldest first."""
        newest = [info.step for info in checkpoints][-self.keep :]
        return [info.step in newest or info.step == self.checkpoints.best for info in checkpoints]


def read_checkpoint(workdir: Path, template: Any, checkpoint: str | None = "latest") -> tuple[Any, Record]:
    """A checkpoint's state like `template` and its record; arguments and errors as for `read_chosen`.

    Nothing is touched, so the run may be under way.
    """
    folder = checkpoints_of(workdir)
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    def read(step: int) -> tuple[Any, Record]:
        with reader(folder) as manager:
            return _read(manager, template, step)[:2]

    return read_chosen(workdir, read, checkpoint)


def _read(manager: ocp.CheckpointManager, template: Any, step: int) -> tuple[Any, Record, int]:
    with unreadable_is_damaged():
        record, index = read_record(manager, step)
        whole = {name: tuple(shape) for rows in index.values() for name, shape in rows}
    wanted = dict(zip(addresses(template), jax.tree.leaves(template), strict=True))
    for name, array in wanted.items():
        if whole.get(name, array.shape) != array.shape:
            raise InputError(f"{name} is {whole[name]} in the checkpoint of step {step}, not {array.shape}")

    def place(arrays: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in arrays if name in wanted]
        return put({name: arrays[name] for name in names}, {name: wanted[name].sharding for name in names})

    spread = {name: array for name, array in wanted.items() if name not in whole}
    with unreadable_is_damaged():
        found = read_state(manager, step, index, spread, place)
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"the checkpoint of step {step} has no {', '.join(missing[:3])}")
    return jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in wanted]), record, step
