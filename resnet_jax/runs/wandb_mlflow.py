"""Hooks that write a run's numbers to Weights & Biases or to MLflow as well: `train(config, hooks=[WandbHook()])`."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from resnet_jax.config import InputError, to_dict
from resnet_jax.files import in_bucket, read_json, to_json, write_whole
from resnet_jax.output import say
from resnet_jax.typed import from_extra

WANDB_FILE, MLFLOW_FILE = "wandb.json", "mlflow.json"
"""Files in a run's folder that keep by which id a tracker knows the run, so that a resumed run goes on there."""

PARAMETERS_A_CALL = 100
"""Most parameters that MLflow takes at once."""


class WandbHook:
    """Writes the recipe, all metrics and the summary of a run to Weights & Biases.

    Metrics are drawn over `step`, the step of the run. A run that is resumed continues the run there; what it does
    again since its last checkpoint is equal and is there twice. Files of W&B lie in the run's folder, under `wandb`. A
    hook that could not begin writes nothing.

    Args:
      project: of W&B; None leaves it to W&B (`WANDB_PROJECT`).
      name: of the run; None takes the name of its folder.
      init: further arguments of `wandb.init`, such as `entity`, `tags`, `group`, `mode`; a `config` is added to the
        recipe.

    Raises:
      InputError: wandb is not installed.

    Example::

      rj.train(config, "runs/a", hooks=[rj.WandbHook(project="digits", tags=["first"])])
    """

    def __init__(self, project: str | None = None, name: str | None = None, **init: Any) -> None:
        with from_extra("wandb", "WandbHook"):
            from wandb import Run  # noqa: F401  a folder called wandb, which it leaves behind, can be imported too
        self._project, self._name, self._init = project, name, init
        self._run: Any = None

    def on_start(self, run: Any) -> None:
        """Begins the run, or continues it where its folder says that it was begun before.

        Raises:
          InputError: W&B does not take it, for example since nobody is logged in; or `wandb.json` is damaged.
        """
        import wandb

        self._run = None
        folder = Path(run.folder) if not in_bucket(run.folder) else None
        options: dict[str, Any] = {"dir": None if folder is None else str(folder.absolute()), "resume": "allow"}
        options |= {"id": _read_id(run.folder / WANDB_FILE), "reinit": "create_new"} | self._init
        options["config"] = to_dict(run.config) | (self._init.get("config") or {})
        try:
            self._run = wandb.init(project=self._project, name=self._name or run.folder.name, **options)
        except wandb.Error as error:
            raise InputError(
                f"Weights & Biases does not begin the run: {error}; WANDB_MODE=offline writes it on this machine alone"
            ) from error
        self._run.define_metric("*", step_metric="step")
        _write_id(run.folder / WANDB_FILE, self._run.id)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of training."""
        self._log(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of an evaluation."""
        self._log(step, metrics)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Writes the numbers of the summary, and ends the run."""
        if self._run is not None:
            self._run.summary.update(dict(_numbers(summary)))
            self._run.finish()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is not None:  # W&B drops a row whose step is below that of the row before
            self._run.log({"step": step} | metrics, step=max(step, self._run.step), commit=True)


class MlflowHook:
    """Writes the recipe, all metrics and the summary of a run to MLflow.

    A run that is resumed continues the run there; what it does again since its last checkpoint is equal and is there
    twice. Characters of a name that MLflow does not take become `_`. A hook that could not begin writes nothing.

    Args:
      experiment: its name, which is made if missing; None takes `MLFLOW_EXPERIMENT_NAME`, else `Default`.
      tracking_uri: such as `sqlite:///mlflow.db` or `http://HOST:5000`; None leaves it to MLflow
        (`MLFLOW_TRACKING_URI`).

    Raises:
      InputError: MLflow is not installed.

    Example::

      rj.train(config, "runs/a", hooks=[rj.MlflowHook(experiment="digits", tracking_uri="sqlite:///mlflow.db")])
    """

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None) -> None:
        with from_extra("mlflow", "MlflowHook"):
            from mlflow import MlflowClient  # noqa: F401
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        self._tracking_uri = tracking_uri
        self._client: Any = None
        self._run_id = ""

    def on_start(self, run: Any) -> None:
        """Begins the run, or continues it where its folder says that it was begun before.

        Raises:
          InputError: MLflow does not take it, for example since its store cannot be opened; or `mlflow.json` is
            damaged.
        """
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._run_id = ""
        kept = _read_id(run.folder / MLFLOW_FILE)
        try:
            self._client = MlflowClient(self._tracking_uri)
            there = self._open_run(kept) if kept else None
            if kept and there is None:
                say(f"WARNING: MLflow has no run {kept}, which {run.folder} names; a new one is begun", error=True)
            if there is None:
                experiment = self._client.get_experiment_by_name(self._experiment)
                number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
                there = self._client.create_run(number, run_name=run.folder.name, tags={"folder": str(run.folder)})
            run_id = there.info.run_id
            self._client.update_run(run_id, status="RUNNING")
            fields = _fields(to_dict(run.config))
            parameters = [Param(name, str(value)) for name, value in fields if name not in there.data.params]
            for first in range(0, len(parameters), PARAMETERS_A_CALL):
                self._client.log_batch(run_id, params=parameters[first : first + PARAMETERS_A_CALL])
        except MlflowException as error:
            raise InputError(f"MLflow does not begin the run in the experiment {self._experiment}: {error}") from error
        _write_id(run.folder / MLFLOW_FILE, run_id)
        self._run_id = run_id

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of training."""
        self._log(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of an evaluation."""
        self._log(step, metrics)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Writes the numbers of the summary, and ends the run."""
        self._log(int(summary.get("steps", 0)), dict(_numbers(summary)))
        if self._run_id:
            self._client.set_terminated(self._run_id, "FINISHED")

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in metrics.items()]
        if self._run_id:
            self._client.log_batch(self._run_id, metrics=rows)

    def _open_run(self, run_id: str) -> Any:
        """Returns the run of this id; None where there is none, or it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None


class Kept(TypedDict):
    """What a tracker's file in a run's folder holds."""

    id: str


def _read_id(path: Path) -> str | None:
    """Returns the id that a file keeps; None without such a file.

    Raises:
      InputError: it is damaged.
    """
    try:
        found: str = read_json(path, Kept)["id"]
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[\w-]{1,128}", found, flags=re.ASCII):
        raise InputError(f"{path}: {found[:200]!r} is not the id of a run; remove the file to begin a new one")
    return found


def _write_id(path: Path, run_id: str) -> None:
    write_whole(path, to_json({"id": run_id}) + "\n")


def _fields(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Returns `section.field` and value of everything in a recipe."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _numbers(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Returns all numbers of a summary, under names such as `test/accuracy`."""
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{below}", number) for below, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
