"""Parts of the user's own: model, data, loss, optimizer, metrics and hooks in our loop."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import resnet_jax as rj
from resnet_jax import recipe_files
from resnet_jax.cli import main
from resnet_jax.recipe_files import load_recipe
from resnet_jax.runs.folder import finish
from resnet_jax.runs.hooks import Hook
from resnet_jax.runs.signals import Stopped
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training.evaluation import evaluate_run
from resnet_jax.training.parts import check_parts, make_parts, names_and_hashes
from resnet_jax.training.run_progress import RunProgress


def recipe(steps=6, **train):
    """A short run without a report."""
    config = rj.Config()
    data, augment = (
        {"image_size": 8, "mean": (0.305,) * 3, "std": (0.376,) * 3},
        {"crop": "pad", "pad": 1, "flip": "none"},
    )
    train = {"steps": steps, "batch_size": 16, "ema_decay": None, "eval_every_epochs": 1.0} | train
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        augment=dataclasses.replace(config.augment, **augment),
        train=dataclasses.replace(config.train, **train),
        schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
        log=dataclasses.replace(config.log, every_steps=2, tensorboard=False, report=False),
    )


class Net(nn.Module):
    """Batch statistics, dropout, and a collection of its own, which counts calls in training."""

    outputs: int = 3

    @nn.compact
    def __call__(self, images, train):
        calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            calls.value = calls.value + 1
        x = nn.Conv(8, (3, 3), strides=2)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        return nn.Dense(self.outputs)(nn.Dropout(0.1, deterministic=not train)(x))


LABELS = np.arange(80) % 3
IMAGES = (np.random.default_rng(0).integers(0, 100, (80, 8, 8, 3)) + LABELS[:, None, None, None] * 70).astype(np.uint8)
SPLITS = {"train": slice(0, 48), "validation": slice(48, 64), "test": slice(64, 80)}
DATA = rj.Dataset(**{name: (IMAGES[part], LABELS[part]) for name, part in SPLITS.items()})


def likelihood(logits, batch):
    return jax.nn.softmax(logits)[jnp.arange(len(logits)), batch["label"]]


def squared_error(outputs, batch):
    return jnp.square(outputs - batch["label"]).sum(-1)


class Watch:
    """Notes what a run tells, and ends it at a step."""

    def __init__(self, end=None):
        self.end, self.told = end, []

    def on_start(self, run):
        self.told.append(("start", run.step, run.total_steps, run.folder.name))

    def on_metrics(self, step, metrics):
        self.told.append(("metrics", step, sorted(metrics)))

    def on_evaluation(self, step, metrics):
        self.told.append(("evaluation", step, sorted(metrics)))
        return step == self.end

    def on_checkpoint(self, step, path):
        self.told.append(("checkpoint", step, path.name))
        raise KeyError("no place")

    def on_end(self, summary):
        self.told.append(("end", summary["steps"]))


def test_parts_of_ones_own_train_stop_by_a_hook_and_resume_bit_by_bit(tmp_path, capsys):
    parts = {"model": Net(), "dataset": DATA, "metrics": {"likelihood": likelihood}, "loss": None}
    parts["optimizer"] = lambda schedule: optax.adam(schedule)
    config = recipe(metric="likelihood", metric_goal="max")
    whole = rj.train(config, tmp_path / "whole", **parts)
    assert whole["best"]["metric"] == "validation/likelihood"
    assert 0 < whole["test"]["likelihood"] < 1

    watch = Watch(end=3)
    stopped = rj.train(config, tmp_path / "run", hooks=[watch], **parts)
    assert stopped["steps"] == 3
    assert stopped["hook_errors"] == 1
    assert "a hook asked for it: the run ends at step 3 of 6" in capsys.readouterr().out
    assert watch.told[0] == ("start", 0, 6, "run")
    assert watch.told[-1] == ("end", 3)
    assert ("checkpoint", 3, "3") in watch.told
    lines = [names for kind, *_, names in watch.told if kind == "evaluation"]
    assert "validation/likelihood" in lines[0]
    assert all(name.startswith("validation/") for names in lines[:-1] for name in names)
    assert all(name.startswith("test/") for name in lines[-1])
    *before, (_, last, _) = (told for told in watch.told if told[0] == "evaluation")
    assert last == stopped["selected"] and before[-1][1] == 3
    assert "train/likelihood" in next(names for kind, *_, names in watch.told if kind == "metrics")

    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed
    rj.train(config, tmp_path / "run", **parts)
    states = [rj.restore(tmp_path / name, model=Net(), optimizer=parts["optimizer"])[0] for name in ("whole", "run")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].collections["counts"]["calls"] == 6
    logged = [read_lines(tmp_path / name / "metrics.jsonl")[-1]["test/likelihood"] for name in ("whole", "run")]
    assert logged[0] == logged[1] == whole["test"]["likelihood"]

    del parts["optimizer"]  # whose state is needed to train alone
    result = evaluate_run(tmp_path / "whole", parts=make_parts(parts))
    assert result["test"]["likelihood"] == whole["test"]["likelihood"]
    rj.Predictor.from_run(tmp_path / "whole", model=Net())
    with pytest.raises(rj.InputError, match=r"parts of its user's own: optimizer"):
        rj.restore(tmp_path / "whole", model=Net())
    with pytest.raises(rj.InputError, match="is of another optimizer: it has no opt_state"):
        rj.restore(tmp_path / "whole", model=Net(), optimizer=optax.sgd(0.1, momentum=0.9))


def test_other_parts_than_those_of_the_run_are_refused_unless_told(tmp_path):
    config = recipe(2)
    rj.train(config, tmp_path / "run", model=Net(), dataset=DATA)
    with pytest.raises(rj.InputError, match=r"parts of its user's own: model \(.*Net\), dataset .* --config FILE"):
        rj.train(config, tmp_path / "run")
    with pytest.raises(rj.InputError, match=r"the source of model .*--train.accept_parts"):
        rj.train(config, tmp_path / "run", model=Net(outputs=4), dataset=DATA)
    with pytest.raises(rj.InputError, match=r"loss \(.*squared_error\), which was the recipe's"):
        rj.train(config, tmp_path / "run", model=Net(), dataset=DATA, loss=squared_error)
    with pytest.raises(rj.InputError, match=r"started with other parts: loss \(.*squared_error\), which was the rec"):
        check_parts(tmp_path / "of the recipe alone", make_parts({"loss": squared_error}))
    accepting = dataclasses.replace(config, train=dataclasses.replace(config.train, accept_parts=True))
    rj.train(accepting, tmp_path / "run", model=Net(), dataset=DATA, loss=squared_error)
    with pytest.raises(rj.InputError, match=r"parts of its user's own: model .* resnet_jax.restore\(.*\.variables"):
        rj.load_pretrained(str(tmp_path / "run"))
    predictor = rj.Predictor.from_run(tmp_path / "run", model=Net())
    np.testing.assert_allclose(predictor([IMAGES[0], IMAGES[1]]).sum(1), 1.0, rtol=1e-6)


def test_numbers_and_several_heads_train_with_a_loss_of_ones_own(tmp_path, capsys):
    """Labels are a dict of a point and a class; nothing needs names of classes."""

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            x = nn.relu(nn.Dense(16)(images.reshape(len(images), -1)))
            return {"point": nn.Dense(2)(x), "kind": nn.Dense(3)(x)}

    def loss(outputs, batch):
        distance = jnp.square(outputs["point"] - batch["label"]["point"]).sum(-1)
        kinds = optax.softmax_cross_entropy_with_integer_labels(outputs["kind"], batch["label"]["kind"])
        return distance + kinds

    def distance(outputs, batch):
        return jnp.abs(outputs["point"] - batch["label"]["point"]).sum(-1)

    points = np.random.default_rng(1).normal(size=(80, 2))
    examples = [
        {"image": Image.fromarray(IMAGES[i]), "label": {"point": points[i], "kind": LABELS[i]}} for i in range(80)
    ]
    data = rj.Dataset(**{name: examples[part] for name, part in SPLITS.items()})
    config = recipe(metric="distance", metric_goal="min")
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, report=True))
    summary = rj.train(config, tmp_path / "run", model=Heads(), dataset=data, loss=loss, metrics={"distance": distance})
    assert sorted(summary["test"]) == ["count", "distance", "loss"]
    assert summary["best"]["metric"] == "validation/distance"
    assert "accuracy" not in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The labels are no classes" in page
    assert "distance" in page
    assert "Confusion" not in page

    state, _ = rj.restore(tmp_path / "run", step=summary["selected"], model=Heads())
    normalized = (IMAGES[64:] / 255 - 0.305) / 0.376
    outputs = Heads().apply(state.variables, normalized.astype(np.float32), train=False)
    expected = np.abs(outputs["point"] - points[64:]).sum(-1).mean()
    assert summary["test"]["distance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("strategy", ["jit", "shard_map", "pmap"])
def test_metrics_of_ones_own_are_exact_over_eight_devices(strategy, tmp_path):
    """13 examples do not divide over 8 devices; each counts once."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(3)(images.mean((1, 2)))

    data = dataclasses.replace(DATA, test=(IMAGES[64:77], LABELS[64:77]))
    config, found = recipe(3), {}
    for devices in (1, 8):
        parallel = dataclasses.replace(config.parallel, devices=devices, strategy=strategy)
        run = dataclasses.replace(config, parallel=parallel)
        parts = {"model": Plain(), "dataset": data, "metrics": {"likelihood": likelihood}}
        found[devices] = rj.train(run, tmp_path / str(devices), **parts)
    assert found[8]["test"]["count"] == 13
    assert found[8]["test"]["likelihood"] == pytest.approx(found[1]["test"]["likelihood"], rel=1e-5)
    one, eight = (read_lines(tmp_path / str(n) / "metrics.jsonl")[0]["train/likelihood"] for n in (1, 8))
    assert eight == pytest.approx(one, rel=1e-5)


def test_a_module_of_nnx_trains_through_the_bridge(tmp_path):
    class NnxNet(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, images, train):
            x = nnx.relu(self.norm(self.conv(images), use_running_average=not train)).mean((1, 2))
            return self.head(self.drop(x, deterministic=not train))

    model = nnx.bridge.to_linen(NnxNet)
    rj.train(recipe(30), tmp_path / "run", model=model, dataset=DATA)
    losses = [line["train/loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    state, _ = rj.restore(tmp_path / "run", model=model)
    assert set(state.batch_stats) == {"norm"}


RECIPE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import resnet_jax as rj


class Own(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(3)(images.mean((1, 2)))


def dataset():
    labels = np.arange(80) % 3
    images = np.random.default_rng(0).integers(0, 100, (80, 8, 8, 3)) + labels[:, None, None, None] * 70
    images = images.astype(np.uint8)
    return rj.Dataset((images[:48], labels[:48]), (images[48:64], labels[48:64]), (images[64:], labels[64:]))


model = Own()
metrics = {"margin": lambda logits, batch: logits.max(-1) - logits.min(-1)}
config = rj.Config()
config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, steps=4, batch_size=16),
    schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
    log=dataclasses.replace(config.log, tensorboard=False),
)
"""


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A recipe file with parts of its own, and the run that the command made of it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(RECIPE)
    with redirect_stdout(io.StringIO()) as out:
        assert main(["train", "--config", str(folder / "mine.py"), "--workdir", str(folder / "run")]) == 0
    (folder / "out.txt").write_text(out.getvalue())
    Image.fromarray(IMAGES[0]).save(folder / "a.png")
    return folder


def test_what_to_type_next_names_the_recipe_file_or_what_it_must_define(own_run, tmp_path, capsys, monkeypatch):
    command = f"  resnet-jax evaluate {own_run / 'run'} --config {own_run / 'mine.py'} --per-class"
    assert command in (own_run / "out.txt").read_text().splitlines()
    monkeypatch.setattr(recipe_files, "EXECUTED_RECIPES", {})
    shutil.copy(own_run / "run/parts.json", tmp_path)
    finish(tmp_path, RunProgress({}, [], False, step=4, selected=4), {}, "cpu")
    *_, command, note = capsys.readouterr().out.splitlines()
    assert command == f"  resnet-jax evaluate {tmp_path} --config FILE"
    assert note == "FILE is a recipe file that defines config and the run's model, dataset, metrics"
    assert f"; the same command with --workdir {tmp_path} goes on" in str(Stopped(tmp_path, 4, 15, True))


def test_a_run_notes_the_parts_of_a_recipe_file(own_run):
    noted = json.loads((own_run / "run" / "parts.json").read_text())
    assert noted["model"]["name"] == "Own"
    assert set(noted) == {"model", "dataset", "metrics.margin"}
    assert json.loads((own_run / "run" / "config.json").read_text())["model"]["name"] == "Own"
    page = (own_run / "run" / "report.html").read_text()
    assert "model (Own), dataset (dataset), metrics.margin (&lt;lambda&gt;)" in page


@pytest.mark.parametrize(
    "command",
    [
        "evaluate RUN",
        "evaluate RUN --checkpoint latest --csv out.csv",
        "report RUN",
        "predict RUN a.png",
        "export RUN out.stablehlo",
        "export RUN tree --format orbax",
        "plan",
        "show-batch out.png",
        "train --workdir RUN",
    ],
)
def test_every_command_takes_the_parts_of_a_recipe_file(command, own_run, monkeypatch, capsys):
    monkeypatch.chdir(own_run)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # which plan sets
        monkeypatch.setenv(name, os.environ[name])
    words = command.replace("RUN", "run").split()
    assert main([*words, "--config", "mine.py"]) == 0
    out = capsys.readouterr().out
    if words[0] == "evaluate":
        assert "margin" in out
    if words[0] not in ("plan", "show-batch"):
        assert main(words) == 2
        assert "--config FILE" in capsys.readouterr().err


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images.mean((1, 2)))


class Noise(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        if train:
            images += jax.random.normal(self.make_rng("noise"), images.shape)
        return nn.Dense(3)(images.mean((1, 2)))


class OnlyPredicts(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        if train:
            raise ValueError("not yet")
        return nn.Dense(3)(images.mean((1, 2)))


class Maps(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(3)(images)


class Pairs(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(3)(images.mean((1, 2))), images


class Endless:
    def __getitem__(self, index):
        return {"image": IMAGES[0], "label": 0}


class Mistyped(Hook):
    def on_evaluate(self, step, metrics):
        return True


BAD = {
    "no_train": ({"model": NoTrain()}, "NoTrain does not take `train`"),
    "a_class": ({"model": Net}, "model is the class Net: expected an instance"),
    "noise": ({"model": Noise()}, r"Noise draws random numbers from a stream .*make_rng\('dropout'\)"),
    "in_training": ({"model": OnlyPredicts()}, r"OnlyPredicts cannot be called .*train=True: ValueError: not yet"),
    "maps": ({"model": Maps()}, r"Maps gives an array \[2, 8, 8, 3\].*expected logits \[2, 3\]"),
    "pairs": ({"model": Pairs()}, "Pairs gives a value of type tuple"),
    "few_outputs": ({"model": Net(2)}, "Net gives 2 logits, and the data has 3 classes"),
    "no_length": ({"dataset": rj.Dataset(Endless())}, "dataset.train is of type Endless and has no length"),
    "columns": ({"dataset": rj.Dataset([{"img": 0, "label": 1}])}, "'img', 'label': expected \"image\" and \"label\""),
    "labels": (
        {"dataset": rj.Dataset((IMAGES, LABELS / 2))},
        "labels of the data are no classes.*give one of your own",
    ),
    "counts": ({"dataset": rj.Dataset((IMAGES, LABELS[1:]))}, "80 images and 79 labels"),
    "scalar": (
        {"loss": lambda logits, batch: logits.mean()},
        r"loss gave float32 \[\]; expected.*16.*leave out the mean",
    ),
    "metric": ({"metrics": {"a": lambda logits, batch: logits}}, r"metrics\['a'\] gave float32 \[16, 3\]"),
    "taken": ({"metrics": {"accuracy": likelihood}}, "accuracy is a name of ours"),
    "optimizer": ({"optimizer": 0.1}, "optimizer is a value of type float: expected an optax transformation"),
    "maker": ({"optimizer": lambda schedule: 3}, "a function that returns a value of type int"),
    "hooks": ({"hooks": Watch()}, "hooks is a value of type .*Watch: expected a list"),
    "hook_class": ({"hooks": [Watch]}, r"hooks\[0\] is the class Watch: expected an object, such as Watch\(\)"),
    "mistyped_hook": ({"hooks": [Mistyped()]}, "Mistyped, has no method that is called: .*; it has on_evaluate"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_part_that_is_not_as_expected_is_named(case, tmp_path):
    given, message = BAD[case]
    with pytest.raises(rj.InputError, match=message):
        rj.train(recipe(2), tmp_path / "run", **{"model": Net(), "dataset": DATA} | given)


@pytest.mark.parametrize("fields", [{"mixup": 0.5}, {"cutmix": 1.0}, {"label_smoothing": 0.1}])
def test_a_loss_of_ones_own_reads_the_targets_that_the_recipe_changes(fields, tmp_path):
    smoothing = fields.pop("label_smoothing", 0.0)
    config = recipe(2, label_smoothing=smoothing)
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, **fields))

    def of_labels(logits, batch):
        return -jnp.log(likelihood(logits, batch))

    def of_targets(logits, batch):
        return optax.softmax_cross_entropy(logits, batch["target"])

    message = r"(mixup|cutmix|smoothing) changes batch\['target'\] \[batch, 3\], which your loss does not read"
    with pytest.raises(rj.InputError, match=message):
        rj.train(config, tmp_path / "a", model=Net(), dataset=DATA, loss=of_labels)
    assert not (tmp_path / "a").exists()
    found = rj.train(config, tmp_path / "b", model=Net(), dataset=DATA, loss=of_targets)
    assert np.isfinite(found["test"]["loss"])


@pytest.mark.parametrize("name", ["num_classes", "compute_dtype"])
def test_what_a_recipe_cannot_change_in_ones_own_model_is_refused(name, tmp_path):
    config = rj.Config(model=rj.config.ModelConfig(**{name: {"num_classes": 7, "compute_dtype": "bfloat16"}[name]}))
    with pytest.raises(rj.InputError, match=f"model.{name} has no effect on a model of your own"):
        rj.train(config, tmp_path, model=Net(), dataset=DATA)


def test_a_metric_of_ones_own_needs_a_goal(tmp_path):
    with pytest.raises(rj.InputError, match=r"--train.metric_goal max or min"):
        rj.train(recipe(2, metric="a"), tmp_path, model=Net(), dataset=DATA, metrics={"a": likelihood})


def test_a_metric_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(rj.InputError, match=r"train.metric recall is none of auto, none, loss, accuracy, macro_recall"):
        rj.train(recipe(2, metric="recall"), tmp_path, model=Net(), dataset=DATA)


def test_a_recipe_that_cannot_be_run_twice_is_run_once(tmp_path, capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ[name])
    (tmp_path / "loud.py").write_text(
        textwrap.dedent("""
        import resnet_jax as rj
        print("once")
        config = rj.Config()
    """)
    )
    assert main(["plan", "--config", str(tmp_path / "loud.py")]) == 0
    assert capsys.readouterr().out.count("once") == 1


def test_a_part_is_known_again_by_source_and_fields():
    class Wide(nn.Module):
        act: object
        width: int = 8

    def known(**parts):
        return names_and_hashes(make_parts(parts))

    first = known(model=Wide(lambda x: x), optimizer=optax.adam(1e-3), dataset=DATA)
    assert first == known(model=Wide(lambda x: x), optimizer=optax.adam(1e-2), dataset=rj.Dataset((IMAGES, LABELS)))
    assert first["model"] != known(model=Wide(nn.relu, 9))["model"]
    assert first["dataset"]["name"] == "a pair of arrays"
    assert known(model=rj.create_model("resnet18")) != known(model=rj.create_model("resnet18", act="silu"))


SCRIPT = """
import sys
from pathlib import Path

import flax.linen as nn

import resnet_jax as rj
from resnet_jax.training.parts import make_parts, record_parts


class Net(nn.Module):
    block: type = nn.Dense
    grows = True

    @nn.compact
    def __call__(self, images, train):
        return self.block(3)(images.mean((1, 2)))


class Mine(nn.Dense):
    pass


def margin(logits, batch):
    return logits.max(-1)


model, metrics, config = Net(Mine), {"margin": margin}, rj.Config()
if __name__ == "__main__":
    record_parts(Path(sys.argv[1]), make_parts(globals()))
"""


def test_parts_of_a_script_are_known_again_in_a_recipe_file_and_other_ones_are_not(tmp_path):
    (tmp_path / "net.py").write_text(SCRIPT)
    ended = subprocess.run([sys.executable, tmp_path / "net.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr

    def differences(text):
        (tmp_path / "recipe.py").write_text(text)
        return check_parts(tmp_path, make_parts(load_recipe(tmp_path / "recipe.py")), accept=True)

    assert differences(SCRIPT) == []
    assert differences("from net import config, metrics, model") == []
    for old, new in (("grows = True", "grows = False"), ("Net(Mine)", "Net()"), ("images.mean", "images.sum")):
        (found,) = differences(SCRIPT.replace(old, new))
        assert "the source of model (Net)" in found
    (found,) = differences(SCRIPT.replace("Net", "Other"))
    assert "model (Net, now Other)" in found
    (found,) = differences(SCRIPT.replace("logits.max(-1)", "logits.min(-1)"))
    assert "the source of metrics.margin (margin)" in found
