"""The hooks are called as the training loop does, and what they wrote is read by wandb and MLflow themselves."""

import json
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

import resnet_jax as rj
from resnet_jax.config import Config, InputError, ModelConfig, to_dict

NOLOAD = "ignore:The ``noload`` loader strategy is deprecated"  # of SQLAlchemy 2.1, which MLflow 3.17 calls so
SUMMARY = {"test": {"accuracy": 0.75, "count": 12}, "ema/test": {"accuracy": 0.8}, "best": None, "steps": 4}


def run_of(folder, step=0, name="cifar_resnet8"):
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(folder=folder, config=Config(model=ModelConfig(name)), total_steps=4, step=step)


def first_half(hook, run):
    """A run that ends without a word after its second step."""
    hook.on_start(run)
    hook.on_metrics(1, {"train/loss": 2.5, "train/accuracy": 0.25})
    hook.on_metrics(2, {"train/loss": 2.0, "train/accuracy": 0.5})
    hook.on_evaluation(2, {"validation/accuracy": 0.5, "ema/validation/accuracy": 0.25})


def second_half(hook, run):
    hook.on_start(run)
    hook.on_metrics(3, {"train/loss": 1.5, "train/accuracy": 0.5})
    hook.on_metrics(4, {"train/loss": float("nan"), "train/accuracy": 0.75})
    hook.on_evaluation(4, {"validation/accuracy": 0.75})
    hook.on_end(SUMMARY)


@pytest.fixture
def offline(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def records(folder):
    """What `wandb leet inspect` reads in the files of a run, one after the other."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found.append([json.loads(line) for line in lines])
    return found


def items(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


def test_wandb_reads_what_the_hook_wrote_and_a_resumed_run_is_the_same_one(offline, tmp_path):
    hook = rj.WandbHook("digits", tags=["small"], config={"note": "x"})
    first_half(hook, run_of(tmp_path / "run"))
    hook._run.finish(exit_code=1)  # as W&B does when the process ends
    kept = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    second_half(rj.WandbHook("digits"), run_of(tmp_path / "run", step=2))
    before, after = records(tmp_path / "run")
    for found in (before, after):
        begun = items(found, "run")[0]
        assert begun["run_id"] == kept and begun["project"] == "digits" and begun["display_name"] == "run"
        config = begun["config"]["update"]
        assert config["model"]["name"] == "cifar_resnet8" and config["train"]["batch_size"] == 96
        assert items(found, "metric")[0]["step_metric"] == "step"
    assert items(before, "run")[0]["tags"] == ["small"]
    assert items(before, "run")[0]["config"]["update"]["note"] == "x"
    first, second = ([row["item"] for row in items(found, "history")] for found in (before, after))
    assert [{name: value for name, value in row.items() if name[0] != "_"} for row in first] == [
        {"step": 1, "train/loss": 2.5, "train/accuracy": 0.25},
        {"step": 2, "train/loss": 2, "train/accuracy": 0.5},
        {"step": 2, "validation/accuracy": 0.5, "ema/validation/accuracy": 0.25},
    ]
    assert [{name: value for name, value in row.items() if name[0] != "_"} for row in second] == [
        {"step": 3, "train/loss": 1.5, "train/accuracy": 0.5},
        {"step": 4, "train/loss": "NaN", "train/accuracy": 0.75},
        {"step": 4, "validation/accuracy": 0.75},
    ]
    assert [row["_step"] for row in first + second] == [1, 2, 3, 3, 4, 5]
    assert {"test/accuracy": 0.75, "test/count": 12, "ema/test/accuracy": 0.8, "steps": 4} in [
        found["update"] for found in items(after, "summary")
    ]
    assert [items(found, "exit")[0]["exit_code"] for found in (before, after)] == [1, 0]


def test_wandb_keeps_steps_that_are_done_again(offline, tmp_path):
    """As after a rollback, in the same process."""
    hook = rj.WandbHook()
    hook.on_start(run_of(tmp_path / "run"))
    for step, loss in ((1, 3.0), (2, float("inf")), (2, 2.5), (3, 2.0)):
        hook.on_metrics(step, {"train/loss": loss})
    hook.on_end({})
    rows = [row["item"] for row in items(records(tmp_path / "run")[0], "history")]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 3), (2, "Infinity"), (2, 2.5), (3, 2)]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty store of MLflow, which takes seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOLOAD.removeprefix("ignore:"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # where MLflow would put artifacts
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.mark.filterwarnings(NOLOAD)
def test_mlflow_reads_what_the_hook_wrote_and_a_resumed_run_is_the_same_one(store, tmp_path, capsys):
    from mlflow import MlflowClient

    first_half(rj.MlflowHook("digits", store), run_of(tmp_path / "run"))
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("digits").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "RUNNING" and run.info.run_name == "run"
    assert run.data.params["model.name"] == "cifar_resnet8" and run.data.params["train.steps"] == "None"
    recipe = to_dict(Config())
    assert set(run.data.params) == {f"{section}.{name}" for section, fields in recipe.items() for name in fields}
    second_half(rj.MlflowHook("digits", store), run_of(tmp_path / "run", step=2))
    (again,) = client.search_runs([experiment])
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.5), (4, 0.75)]
    history = client.get_metric_history(run.info.run_id, "ema/validation/accuracy")
    assert [(point.step, point.value) for point in history] == [(2, 0.25)]
    assert again.data.metrics["test/accuracy"] == 0.75 and again.data.metrics["ema/test/accuracy"] == 0.8
    client.delete_run(run.info.run_id)
    rj.MlflowHook("digits", store).on_start(run_of(tmp_path / "run", step=4))
    assert f"WARNING: MLflow has no run {run.info.run_id}" in capsys.readouterr().err
    (other,) = client.search_runs([experiment])
    assert other.info.run_id == json.loads((tmp_path / "run" / "mlflow.json").read_text())["id"] != run.info.run_id
    rj.MlflowHook("digits", store).on_start(run_of(tmp_path / "run", 4, "cifar_resnet14"))  # a parameter stays
    assert client.get_run(other.info.run_id).data.params["model.name"] == "cifar_resnet8"


@pytest.mark.filterwarnings(NOLOAD)
def test_a_name_that_mlflow_does_not_take_is_changed(store, tmp_path):
    from mlflow import MlflowClient

    hook = rj.MlflowHook(tracking_uri=store)
    hook.on_start(run_of(tmp_path / "run"))
    hook.on_metrics(1, {"top@5": 0.5})
    (run,) = MlflowClient(store).search_runs(["0"])
    assert run.data.metrics == {"top_5": 0.5}


def test_what_cannot_begin_says_so(offline, store, tmp_path, monkeypatch):
    run = run_of(tmp_path / "run")
    unable = rj.MlflowHook(tracking_uri="nosuch://there")
    with pytest.raises(InputError, match=r"MLflow does not begin the run in the experiment Default: .*nosuch"):
        unable.on_start(run)
    unable.on_metrics(1, {"train/loss": 1.0})
    unable.on_end(SUMMARY)
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match=r"Weights & Biases does not begin the run: .*; WANDB_MODE=offline"):
        rj.WandbHook().on_start(run)
    for name, hook in (("wandb.json", rj.WandbHook()), ("mlflow.json", rj.MlflowHook(tracking_uri=store))):
        (tmp_path / "run" / name).write_text('{"id": "../../x"}')
        with pytest.raises(InputError, match=rf"{name}: '../../x' is not the id of a run; remove the file"):
            hook.on_start(run)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=rf'pip install "residual-jax\[{name}\]"'):
            getattr(rj, f"{name.capitalize()}Hook")()
