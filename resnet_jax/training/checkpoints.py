"""Checkpoints, as stock Orbax writes and opens them; this file alone knows Orbax.

`checkpoints/STEP/state` of a run's folder holds the tree `step`, `params`, `batch_stats`, `opt_state` and `ema`, and
`checkpoints/STEP/record`, in JSON, what else belongs to the run. Orbax's V1 interface is not used: it lies under
`experimental`, and its names still change from one version to the next.
"""

import contextlib
import difflib
import logging
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.config import InputError
from resnet_jax.files import finite, in_bucket, remove_tree
from resnet_jax.output import say
from resnet_jax.training.manifest import (
    MANIFEST,
    Damaged,
    checkpoints_of,
    damage,
    is_begun,
    newest_sound,
    read_chosen,
    steps_in,
    write_manifest,
)

Record: TypeAlias = dict[str, Any]
"""JSON that travels with a state: recipe, class names, best metric, unwritten sums, pending evaluation."""

Template: TypeAlias = Callable[[Record], Any]
"""Gives shapes, types and shardings of the state to read, from the record beside it."""

NONE, DAMAGED = -1, -2


class Checkpoints:
    """The checkpoints of a run's folder, to save into: the latest `keep` stay, and that of the step `best`.

    They are written in a thread beside the run. What a killed run had begun to write is removed. A save that fails is
    said and left out; the run goes on.

    Raises:
      InputError: the folder cannot be written, or is a link.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self.folder, self.keep = checkpoints_of(workdir), keep
        self.best: int | None = None
        self._begun: set[int] = set()  # steps whose save was begun
        self._writing: int | None = None
        for name in ("absl", "asyncio"):  # where a save fails, each of its parts would log a traceback
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.AsyncOptions(
            post_finalization_callback=self._complete,
            # Where a folder cannot be made, threads of Orbax would wait for it, and keep the process from ending.
            create_directories_asynchronously=False,
        )
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(async_options=options),
                state=ocp.PyTreeCheckpointHandler(use_compression=False),
                record=ocp.JsonCheckpointHandler(),
            ),
            async_options=options,
        )
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_begun("*")
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        with contextlib.suppress(OSError):  # the folder may be gone
            self._remove_old()
            self._writer.close()

    def latest(self) -> int | None:
        """Returns step of the newest checkpoint; waits for the one that is being written."""
        self.settle()
        sound = (step for step in steps_in(self.folder) if damage(self.folder / str(step), contents=False) is None)
        return next(sound, None)

    def save(self, step: int, state: Any, record: Record) -> None:
        """Starts to write a checkpoint and returns once the state has been copied."""
        self.settle()
        self._writing = step
        self._begun.add(step)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree_of(state)), record=ocp.args.JsonSave(finite(record)))
        try:
            self._writer.save(self.folder / str(step), items, force=True)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore have many kinds for a disk that takes no more
            self._failed(error)

    def settle(self) -> None:
        """Waits until what is being written is there, or says that it could not be written; removes older ones."""
        if self._writing is None:
            return
        try:
            self._writer.wait_until_finished()
            self._writing = None
            self._remove_old()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            self._failed(error)

    def abandon(self) -> None:
        """Removes what was being written when the run's folder was taken away, with the folders that this made anew."""
        self.settle()
        if jax.process_index() != 0 or (self.folder.parent / "config.json").exists():
            return
        for _ in range(10):  # a save that failed may still write for a moment, and make its folders again
            for step in self._begun:
                self._remove_begun(str(step))
                with contextlib.suppress(OSError):
                    remove_tree(self.folder / str(step))
            for folder in (self.folder, self.folder.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # where nothing else is in it
            if not self.folder.exists():
                return
            time.sleep(0.1)

    def has(self, step: int) -> bool:
        """Returns whether there is a checkpoint of a step; waits for the one that is being written."""
        self.settle()
        return (self.folder / str(step) / MANIFEST).exists()

    def read(self, step: int, template: Template) -> Any:
        """Reads the state of a step.

        Raises:
          InputError: the checkpoint is damaged.
        """
        self.settle()
        if problem := damage(self.folder / str(step)):
            raise InputError(f"the checkpoint of step {step} is damaged: {problem}")
        return _read(self.folder, template, step)[0]

    def restore(self, template: Template) -> tuple[Any, Record, int] | None:
        """Returns state, record and step of the newest sound checkpoint; damaged newer ones are moved aside.

        Returns:
          None where there are no checkpoints.

        Raises:
          InputError: there are some and none is sound; nothing is touched then.
        """
        step = self._newest()
        try:
            return None if step is None else _read(self.folder, template, step)
        except Damaged as error:
            raise InputError(
                f"process {jax.process_index()} cannot read the checkpoint of step {step} in {self.folder} ({error}), "
                "which process 0 finds sound: it must be one folder for all processes"
            ) from error

    def _newest(self) -> int | None:
        """Step of the newest checkpoint that is sound to process 0, which reads all of it and sets newer ones aside."""
        found, problem = NONE, None
        if jax.process_index() == 0:
            try:
                step, problems = newest_sound(self.folder, lambda step: step)
                self._set_aside(problems, step)
                found = NONE if step is None else step
            except InputError as error:
                found, problem = DAMAGED, error
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == DAMAGED:
            raise problem or InputError(f"no checkpoint in {self.folder} is sound; process 0 says more")
        return None if found == NONE else found

    def _set_aside(self, problems: dict[int, str], sound: int | None) -> None:
        if problems and sound is None:
            listed = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
            raise InputError(
                f"no checkpoint in {self.folder} is sound ({listed}). Nothing was changed. Put back a copy of one, or "
                "start anew in another --workdir"
            )
        for bad, problem in problems.items():
            aside = self.folder.with_name("damaged")
            try:
                if not in_bucket(aside) and aside.is_symlink():
                    raise OSError(f"{aside} is a link")
                aside.mkdir(exist_ok=True)
                place = next(path for i in count() if not (path := aside / f"{bad}-{i}").exists())
                (self.folder / str(bad)).rename(place)
            except OSError as error:
                raise InputError(
                    f"the checkpoint of step {bad} is damaged ({problem}) and cannot be moved to {aside}: {error}"
                ) from error
            say(
                f"WARNING: the checkpoint of step {bad} is damaged ({problem}) and was moved to {place}; "
                f"going on from that of step {sound}",
                error=True,
            )

    def _complete(self) -> None:
        """Runs in Orbax's thread when all is written, before the folder counts as a checkpoint for Orbax."""
        if jax.process_index() == 0:
            begun = [*self.folder.glob(f"{self._writing}{ocp.utils.TMP_DIR_SUFFIX}*"), self.folder / str(self._writing)]
            write_manifest(begun[0])

    def _remove_old(self) -> None:
        if jax.process_index() == 0:
            whole = [step for step in steps_in(self.folder) if (self.folder / str(step) / MANIFEST).exists()]
            for step in whole[self.keep :]:
                if step != self.best:
                    remove_tree(self.folder / str(step))

    def _remove_begun(self, step: int | str) -> None:
        begun = list(self.folder.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*"))
        begun += [path for path in self.folder.glob(str(step)) if path.name.isdigit() and is_begun(path)]
        for path in begun:
            with contextlib.suppress(OSError):
                remove_tree(path)

    def _failed(self, error: Exception) -> None:
        step, self._writing = self._writing, None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if jax.process_index() == 0:
            self._remove_begun(str(step))
        say(
            f"WARNING: the checkpoint of step {step} could not be written ({reason[0][:600]}). The run goes on and "
            f"tries again at the next interval; the last checkpoint is that of step {self.latest()}",
            error=True,
        )


def tree_of(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state as nested dicts by their addresses, such as `tree["opt_state"]["1"]["trace"]`."""
    return unflatten_dict({tuple(address.split("/")): leaf for address, leaf in leaves_of(state).items()})


def leaves_of(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their addresses, such as `params/stage1/block1/conv1/kernel`."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def read_checkpoint(workdir: Path, template: Template, checkpoint: str | None = "latest") -> tuple[Any, Record]:
    """Returns a checkpoint's state and record; arguments and errors as for `read_chosen`.

    Nothing is touched, so the run may be under way.
    """
    folder = checkpoints_of(workdir)
    return read_chosen(workdir, lambda step: _read(folder, template, step)[:2], checkpoint)


def read_variables(workdir: Path, checkpoint: str | None) -> tuple[int, Record, dict[str, Any]]:
    """Returns step and record of a checkpoint, and its `params` and `batch_stats`, those of the moving average where
    there is one; arguments and errors as for `read_chosen`.
    """
    folder = checkpoints_of(workdir)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> tuple[int, Record, dict[str, Any]]:
        with unreadable_is_damaged():
            there = shapes_in(folder / str(step))
            begin = "ema/" if any(address.startswith("ema/") for address in there) else ""
            kinds = (f"{begin}params/", f"{begin}batch_stats/")
            wanted = {
                address: jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=here)
                for address, kind in there.items()
                if address.startswith(kinds)
            }
            found = read_leaves(folder / str(step), wanted)
            variables = {tuple(address.removeprefix(begin).split("/")): leaf for address, leaf in found.items()}
            return step, read_record(folder / str(step)), unflatten_dict(variables)

    return read_chosen(workdir, read, checkpoint)


def write_tree(tree: Any, folder: Path) -> None:
    """Writes a tree of arrays as stock Orbax does, to be opened with `StandardCheckpointer().restore(folder)`.

    Raises:
      InputError: there is something in the folder, or it cannot be written.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder if in_bucket(folder) else folder.absolute(), tree)
    except Exception as error:  # Orbax and TensorStore have many kinds
        raise InputError(f"{folder} cannot be written: {str(error).strip().splitlines()[0][:300]}") from error


def _read(folder: Path, template: Template, step: int) -> tuple[Any, Record, int]:
    with unreadable_is_damaged():
        record, there = read_record(folder / str(step)), shapes_in(folder / str(step))
    shapes = template(record)
    wanted = leaves_of(shapes)
    if problems := differences(there, wanted):
        raise InputError(f"the checkpoint of step {step} in {folder} is of another model: {'; '.join(problems)}")
    with unreadable_is_damaged():
        found = read_leaves(folder / str(step), wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in wanted]), record, step


def differences(there: dict[str, Any], wanted: dict[str, Any], most: int = 8) -> list[str]:
    """Returns what a checkpoint lacks of what is asked for, or has in another shape, in words."""
    found = []
    for address, leaf in wanted.items():
        if address not in there:
            nearest = difflib.get_close_matches(address, there, 2, 0.5)
            found.append(f"it has no {address}" + (f" (but {' and '.join(nearest)})" if nearest else ""))
        elif tuple(there[address].shape) != leaf.shape:
            found.append(f"{address} is {tuple(there[address].shape)} there, and {leaf.shape} in the model")
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]


def shapes_in(folder: Path) -> dict[str, Any]:
    """Returns what Orbax knows of each array of a checkpoint (`shape`, `dtype`), by address."""
    return flatten_dict(ocp.PyTreeCheckpointer().metadata(folder / "state").item_metadata.tree, sep="/")


def read_leaves(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads arrays of a checkpoint, by address, onto the shardings that are given with their shapes."""
    tree = unflatten_dict(wanted, sep="/")
    args = ocp.args.PyTreeRestore(
        tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    return flatten_dict(ocp.PyTreeCheckpointer().restore(folder / "state", args), sep="/")


def read_record(folder: Path) -> Record:
    """Reads what a checkpoint holds beside the state."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "record")


@contextlib.contextmanager
def unreadable_is_damaged() -> Iterator[None]:
    """Turns whatever Orbax raises over files that it does not understand, which is of many kinds, into Damaged; what it
    warns of, such as that an item has no metadata of its own, is not shown.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (InputError, Damaged, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Damaged(f"it cannot be read ({type(error).__name__}: {reason[:300]})") from error
    finally:
        logger.setLevel(level)
