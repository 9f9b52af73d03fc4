"""Checkpoints, as stock Orbax writes and opens them; this file alone knows Orbax.

`checkpoints/STEP/state` holds the tree `step`, `params`, `batch_stats`, `opt_state` and `ema`, and
`checkpoints/STEP/record`, in JSON, what else belongs to the run. Orbax's V1 interface is not used: it lies under
`experimental`, and its names still change. Its CheckpointManager opens what is written here, and is not used to write
it: after a save that failed it never deletes what that one was to replace.
"""

import contextlib
import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.config import InputError
from resnet_jax.files import finite, in_bucket, remove_tree
from resnet_jax.output import first_line, say
from resnet_jax.training.manifest import (
    MANIFEST,
    Damaged,
    checkpoints_of,
    is_begun,
    newest_sound,
    read_chosen,
    steps_in,
    write_manifest,
)
from resnet_jax.training.sharding import broadcast_from_first

Record: TypeAlias = dict[str, Any]
"""JSON that travels with a state: recipe, class names, best metric, unwritten sums, pending evaluation."""

Template: TypeAlias = Callable[[Record], Any]
"""Gives shapes, types and shardings of the state to read, from the record beside it."""


class Checkpoints:
    """Saves into a run's folder, in a thread beside the run: the latest `keep` stay, and that of the step `best`.

    What a killed run had begun to write is removed. A save that fails is said and left out; the run goes on.

    Raises:
      InputError: the folder of checkpoints is a link.
      OSError: it cannot be made.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self.folder, self.keep = checkpoints_of(workdir), keep
        self.best: int | None = None
        self._last, self._writing = -1, False  # the step whose save was begun last, and whether it is under way
        for name in ("absl", "asyncio"):  # where a save fails, each of its parts would log a traceback
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.AsyncOptions(
            post_finalization_callback=self._complete,
            # Where a folder cannot be made, threads of Orbax would wait for it, and keep the process from ending.
            create_directories_asynchronously=False,
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            state=ocp.PyTreeCheckpointHandler(use_compression=False),
            record=ocp.JsonCheckpointHandler(),
        )
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        remove(self._begun("*"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        self._remove_old()
        with contextlib.suppress(OSError):  # the folder may be gone
            self._writer.close()

    def save(self, step: int, state: Any, record: Record) -> None:
        """Starts to write a checkpoint and returns once the state has been copied."""
        # The first evaluation would import it beside the thread that writes, and while grain 0.2.18 is imported every
        # thread is given lazy modules (`etils.epy.lazy_imports`), with which Orbax fails.
        import grain  # noqa: F401

        self.settle()
        self._last, self._writing = step, True
        tree = ocp.args.PyTreeSave(unflatten_dict(leaves_of(state), sep="/"))
        with self._failure_is_said():
            items = ocp.args.Composite(state=tree, record=ocp.args.JsonSave(finite(record)))
            self._writer.save(self.folder / str(step), items, force=True)

    def settle(self) -> None:
        """Waits until what is being written is there, or says that it could not be written; removes older ones."""
        if self._writing:
            with self._failure_is_said():
                self._writer.wait_until_finished()
                self._writing = False
                self._remove_old()

    def has(self, step: int) -> bool:
        """Returns whether there is a checkpoint of a step; waits for the one that is being written."""
        self.settle()
        return (self.folder / str(step) / MANIFEST).exists()

    def latest(self) -> int | None:
        """Returns step of the newest checkpoint; waits for the one that is being written."""
        self.settle()
        return next(iter(steps_in(self.folder)), None)

    def restore(self, template: Template) -> tuple[Any, Record, int] | None:
        """Returns state, record and step of the newest sound checkpoint; damaged newer ones are moved to `damaged/`.

        Process 0 reads all of it and decides for all. None where there are no checkpoints.

        Raises:
          InputError: there are some and none is sound; nothing is touched then.
        """
        step = None
        if jax.process_index() == 0:
            step, problems = newest_sound(self.folder, lambda step: step)
            if step is None and problems:
                listed = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
                raise InputError(
                    f"no checkpoint in {self.folder} is sound ({listed}). Nothing was changed. Put back a copy of one, "
                    "or start anew in another --workdir"
                )
            for bad, problem in problems.items():
                self._set_aside(bad, f"the checkpoint of step {bad} is damaged ({problem})")
        step = broadcast_from_first(-1 if step is None else step)
        return None if step < 0 else _read(self.folder, template, step)

    def abandon(self) -> None:
        """Removes what was being written when the run's folder was taken away, with the folders that this made anew."""
        self.settle()
        if (self.folder.parent / "config.json").exists():
            return
        for _ in range(10):  # a save that failed may still write for a moment, and make its folders again
            remove([*self._begun(self._last), self.folder / str(self._last)])
            for folder in (self.folder, self.folder.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # where nothing else is in it
            if not self.folder.exists():
                return
            time.sleep(0.1)

    def _set_aside(self, step: int, what: str) -> None:
        aside = self.folder.with_name("damaged")
        try:
            if not in_bucket(aside) and aside.is_symlink():
                raise OSError(f"{aside} is a link")
            aside.mkdir(exist_ok=True)
            place = next(path for i in count() if not (path := aside / f"{step}-{i}").exists())
            (self.folder / str(step)).rename(place)
        except OSError as error:
            raise InputError(f"{what} and cannot be moved to {aside}: {error}") from error
        say(f"WARNING: {what} and was moved to {place}; the run goes on from the newest sound one", error=True)

    def _complete(self) -> None:
        """Runs in Orbax's thread when all is written, before the folder counts as a checkpoint for Orbax."""
        if jax.process_index() == 0:
            write_manifest([*self._begun(self._last), self.folder / str(self._last)][0])

    def _begun(self, step: int | str) -> list[Path]:
        """Returns the folders of a step, or of all (`*`), that are not whole."""
        begun = [path for path in self.folder.glob(str(step)) if path.name.isdigit() and is_begun(path)]
        return [*self.folder.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*"), *begun]

    def _remove_old(self) -> None:
        whole = [step for step in steps_in(self.folder) if (self.folder / str(step) / MANIFEST).exists()]
        remove(self.folder / str(step) for step in whole[self.keep :] if step != self.best)

    @contextlib.contextmanager
    def _failure_is_said(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore have many kinds for a disk that takes no more
            self._writing = False
            remove(self._begun("*"))  # with what an earlier one still wrote after it had failed
            say(
                f"WARNING: the checkpoint of step {self._last} could not be written ({first_line(error, 600)}). The "
                "run goes on and tries again at the next interval; the last checkpoint is that of step "
                f"{self.latest()}",
                error=True,
            )


def remove(folders: Iterable[Path]) -> None:
    """Removes folders, in the first process alone; what cannot be removed stays."""
    for folder in folders if jax.process_index() == 0 else ():
        with contextlib.suppress(OSError):
            remove_tree(folder)


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


def read_record(workdir: Path, step: int) -> Record:
    """Returns what the checkpoint of a step holds beside the state.

    Raises:
      Damaged: it cannot be read.
    """
    return _describe(checkpoints_of(workdir) / str(step))[0]


def read_variables(workdir: Path, checkpoint: str | None) -> tuple[int, Record, dict[str, Any]]:
    """Returns step and record of a checkpoint, and its `params` and `batch_stats`, those of the moving average where
    there is one; arguments and errors as for `read_chosen`.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> tuple[int, Record, dict[str, Any]]:
        folder = checkpoints_of(workdir) / str(step)
        record, there = _describe(folder)
        begin = "ema/" if any(address.startswith("ema/") for address in there) else ""
        wanted = {
            address: jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=here)
            for address, kind in there.items()
            if address.startswith((f"{begin}params/", f"{begin}batch_stats/"))
        }
        found = {address.removeprefix(begin): leaf for address, leaf in _read_leaves(folder, wanted).items()}
        return step, record, unflatten_dict(found, sep="/")

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
        raise InputError(f"{folder} cannot be written: {first_line(error)}") from error


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


def _read(folder: Path, template: Template, step: int) -> tuple[Any, Record, int]:
    record, there = _describe(folder / str(step))
    shapes = template(record)
    wanted = leaves_of(shapes)
    if problems := differences(there, wanted):
        rest = {address: leaf for address, leaf in wanted.items() if not address.startswith("opt_state/")}
        what = "model" if differences(there, rest) else "optimizer"
        raise InputError(f"the checkpoint of step {step} in {folder} is of another {what}: {'; '.join(problems)}")
    found = _read_leaves(folder / str(step), wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in wanted]), record, step


def _describe(folder: Path) -> tuple[Record, dict[str, Any]]:
    """Returns what a checkpoint holds beside the state, and `shape` and `dtype` of the state's arrays by address."""
    with unreadable_is_damaged(folder):
        record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "record")
        tree = ocp.PyTreeCheckpointer().metadata(folder / "state").item_metadata.tree
        return record, flatten_dict(tree, sep="/")


def _read_leaves(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns arrays of a checkpoint, by address, on the shardings that are given with their shapes."""
    tree = unflatten_dict(wanted, sep="/")
    with unreadable_is_damaged(folder):
        onto = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=onto, partial_restore=True)
        return flatten_dict(ocp.PyTreeCheckpointer().restore(folder / "state", args), sep="/")


@contextlib.contextmanager
def unreadable_is_damaged(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax raises over a folder's files, which is of many kinds, into Damaged; its warnings, such as
    that an item has no metadata of its own, are not shown.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        raise Damaged(f"{folder} cannot be read ({type(error).__name__}: {first_line(error)})") from error
    finally:
        logger.setLevel(level)
