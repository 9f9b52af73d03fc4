"""Checkpoints with Orbax: asynchronous, the latest and the best are kept."""

import logging
from pathlib import Path
from typing import Any, TypeAlias

import orbax.checkpoint as ocp

from resnet_jax.config import InputError

Manager: TypeAlias = ocp.CheckpointManager
Record: TypeAlias = dict[str, Any]
"""JSON that travels with a state: recipe, class names, preprocessing, best metric, unwritten training sums."""


def open_checkpoints(workdir: Path, keep: int) -> Manager:
    """The checkpoints of a run's folder, to save into: the latest `keep` and the one with the greatest `metric` stay.

    What a killed run had begun to write is removed.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
        preservation_policy=latest_and_best(keep),
        best_fn=metric_of,
        cleanup_tmp_directories=True,
    )
    return Manager((workdir / "checkpoints").resolve(), options=options)


def metric_of(metrics: Any) -> float:
    """What checkpoints are ranked by. Orbax writes and reads metrics only where it is given such a function."""
    return metrics["metric"]


def latest_and_best(keep: int) -> Any:
    """Orbax's policy that keeps the latest `keep` checkpoints and the one with the greatest `metric`."""
    managers = ocp.checkpoint_managers
    best = managers.BestN(get_metric_fn=metric_of, n=1, keep_checkpoints_without_metrics=False)
    return managers.AnyPreservationPolicy([managers.LatestN(keep), best])


def read_checkpoints(workdir: Path) -> Manager:
    """The checkpoints of a run's folder, to read only: nothing is touched, so the run may be under way.

    Raises:
      InputError: there are none.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = (workdir / "checkpoints").resolve()
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no checkpoint; the run ended before its first one")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, best_fn=metric_of)
    return Manager(folder, options=options)


def save(manager: Manager, step: int, state: Any, record: Record, metric: float | None) -> None:
    """Starts to write a checkpoint and returns once the state has been copied from the device.

    Args:
      metric: what the best checkpoint is chosen by; None where this step was not evaluated.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    manager.save(step, args=items, metrics=None if metric is None else {"metric": metric}, force=True)


def restore(manager: Manager, template: Any, step: int | None = None) -> tuple[Any, Record]:
    """A state like `template` (shapes, types and shardings) and its record; the latest one if `step` is None.

    Raises:
      InputError: there is no checkpoint.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        raise InputError(f"{manager.directory} holds no checkpoint; the run ended before its first one")
    items = ocp.args.Composite(state=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore())
    restored = manager.restore(step, args=items)
    return restored.state, restored.record


def best_step(manager: Manager) -> int | None:
    """Step of the checkpoint with the greatest metric, the later one of equals; None if none was evaluated."""
    ranked = [
        (metric_of(metrics), step) for step in manager.all_steps() if (metrics := manager.metrics(step)) is not None
    ]
    return max(ranked)[1] if ranked else None
