"""Validation selects, test is looked at once: on a folder, a table and a set of tensorflow-datasets."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, LogConfig, ModelConfig, ParallelConfig
from resnet_jax.data import transforms
from resnet_jax.data.fingerprint import Change, changes, count_trained_on, fingerprint
from resnet_jax.data.loader import BadImages
from resnet_jax.data.sources import load_dataset
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training import loop
from resnet_jax.training.evaluation import evaluate_run
from resnet_jax.training.run_progress import RunProgress
from resnet_jax.weights.load import load_pretrained

pytestmark = pytest.mark.xdist_group("selection")  # one process makes what they share

SHADES = {"dark": 40, "light": 210}


def picture(path, shade, seed):
    """Noise around a shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(-30, 30, (9, 9, 3)) + shade
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def make_splits(root, counts, swapped="validation"):
    """Dark and light pictures in split folders; in the split `swapped` every label is wrong."""
    seed = 0
    for split, count in counts.items():
        for name, shade in SHADES.items():
            shade = 250 - shade if split == swapped else shade
            for i in range(count):
                picture(root / split / name / f"{i}.png", shade, seed := seed + 1)
    return root


def recipe(dataset, **train):
    base = Config()
    return dataclasses.replace(
        base,
        model=ModelConfig("cifar_resnet8"),
        data=DataConfig(dataset=dataset, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3),
        augment=AugmentConfig(crop="none"),
        train=dataclasses.replace(
            base.train, **{"batch_size": 8, "steps": 30, "eval_every_epochs": 1.0, "ema_decay": None} | train
        ),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.0),
        parallel=ParallelConfig(devices=1),
        log=LogConfig(every_steps=10, tensorboard=False, report=False),
    )


def as_table(root):
    """The pictures of split folders as a table with a column for the split."""
    rows = [["path", "label", "split"]]
    rows += [[str(p.relative_to(root)), p.parts[-2], p.parts[-3]] for p in sorted(root.rglob("*.png"))]
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return f"csv:{root / 'table.csv'}"


def as_tfds(root, home):
    """The same pictures as a dataset of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    class Shades(tfds.core.GeneratorBasedBuilder):
        """Dark and light."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list(SHADES))}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {split.name: self._generate_examples(split) for split in sorted(root.iterdir()) if split.is_dir()}

        def _generate_examples(self, split):
            for path in sorted(split.rglob("*.png")):
                yield str(path.relative_to(split)), {"image": str(path), "label": path.parts[-2]}

    Shades(data_dir=str(home), file_format="array_record").download_and_prepare()
    return "tfds:shades"


@pytest.mark.parametrize("kind", ["folder", "csv", "tfds"])
def test_validation_selects_and_test_is_measured_once_at_the_end(kind, tmp_path):
    """In the validation split every label is wrong: the better the network the worse it looks there, so that the first
    evaluation is the best one. Selecting on the test split would choose a later step.
    """
    root = make_splits(tmp_path / "data", {"train": 20, "validation": 6, "test": 5})
    dataset = {"folder": lambda: f"folder:{root}", "csv": lambda: as_table(root)}
    dataset["tfds"] = lambda: as_tfds(root, tmp_path / "home")
    config = recipe(dataset[kind](), metric="loss")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(tmp_path / "home")))
    run = tmp_path / "run"
    summary = loop.train(config, run)
    lines = read_lines(run / "metrics.jsonl")
    losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert len(losses) == 6 and summary["selected"] == min(losses, key=losses.get) < 30
    assert summary["best"] == {"step": summary["selected"], "metric": "validation/loss", "value": min(losses.values())}
    assert summary["validation"]["count"] == 12 and summary["test"]["count"] == 10
    assert [line["step"] for line in lines if "test/loss" in line] == [summary["selected"]]
    assert summary["validation"]["loss"] == pytest.approx(min(losses.values()))
    again = evaluate_run(run)
    assert again["split"] == "test" and again["step"] == summary["selected"]
    assert again["test"]["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    latest = evaluate_run(run, "latest")
    assert latest["step"] == 30 and latest["test"]["loss"] != pytest.approx(summary["test"]["loss"], rel=1e-2)
    assert load_pretrained(str(run))[0].num_classes == 2


def test_where_nothing_is_selected_all_of_train_is_trained_on_and_the_last_step_counts(tmp_path, capsys):
    root = make_splits(tmp_path / "data", {"train": 20, "test": 5}, swapped=None)
    summary = loop.train(recipe(f"folder:{root}", metric="none"), tmp_path / "run")
    assert summary["best"] is None and summary["selected"] == summary["steps"] == 30
    assert "validation" not in summary and summary["test"]["count"] == 10
    assert "40 train, 10 test" in capsys.readouterr().out
    names = {name for line in read_lines(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert not any(name.startswith("validation/") for name in names) and "test/accuracy" in names
    assert evaluate_run(tmp_path / "run")["step"] == 30
    with pytest.raises(InputError, match="has no validation split, but train and test"):
        evaluate_run(tmp_path / "run", split="validation")
    with pytest.raises(InputError, match="has selected no best checkpoint"):
        evaluate_run(tmp_path / "run", "best")


def test_patience_without_a_validation_split_is_refused(tmp_path):
    root = make_splits(tmp_path / "data", {"train": 8, "test": 2})
    config = recipe(f"folder:{root}", patience=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.0))
    with pytest.raises(InputError, match=r"train.patience selects on a validation split, and there is none"):
        loop.train(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"train.patience needs a metric"):
        loop.train(recipe(f"folder:{root}", patience=2, metric="none"), tmp_path / "run")


def test_a_figure_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    """The first two evaluations give nan, as where running statistics overflow; patience does not count from them."""
    root = make_splits(tmp_path / "data", {"train": 16, "val": 4}, swapped=None)
    original, values = loop.make_evaluate, iter([math.nan, math.nan, 0.9, 0.8, math.nan, math.nan, math.nan])

    def evaluated(*args, **options):
        evaluate = original(*args, **options)

        def with_loss(state):
            result = evaluate(state)
            result["validation"]["loss"] = next(values)
            return result

        return with_loss

    monkeypatch.setattr(loop, "make_evaluate", evaluated)
    summary = loop.train(recipe(f"folder:{root}", metric="loss", patience=3, steps=60), tmp_path / "run")
    assert summary["best"]["value"] == 0.8 and summary["best"]["step"] == 16 and summary["steps"] == 28
    for name in ("summary.json", "metrics.jsonl", "best.json"):
        assert "NaN" not in (tmp_path / "run" / name).read_text(), name


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A finished run on a folder that holds its validation out."""
    work = tmp_path_factory.mktemp("grown")
    root = work / "data"
    for i in range(40):
        for name, shade in SHADES.items():
            picture(root / name / f"{i:02d}.png", shade, i)
    loop.train(recipe(f"folder:{root}", steps=20), work / "run")
    return work


def test_a_folder_that_grows_is_named_and_what_was_held_out_stays_so(grown, tmp_path, capsys):
    config, run = recipe(f"folder:{grown / 'data'}", steps=20), tmp_path / "run"
    shutil.copytree(grown / "run", run)
    before = evaluate_run(run)
    new = [grown / "data" / "dark" / name for name in ("00a.png", "zz.png", "later.png")]
    for i, path in enumerate(new):
        picture(path, 40, 100 + i)
    try:
        capsys.readouterr()
        after = evaluate_run(run)
        assert "is not as the run in" in capsys.readouterr().err
        added = after["validation"]["count"] - before["validation"]["count"]
        assert 0 <= added < 3  # those of the new ones that are held out; none of the old ones moved
        (run / "summary.json").unlink()
        with pytest.raises(InputError, match=rf"train: {3 - added} added.*--data.accept_changes"):
            loop.train(config, run)
        loop.train(dataclasses.replace(config, data=dataclasses.replace(config.data, accept_changes=True)), run)
        assert "WARNING" in capsys.readouterr().err
    finally:
        for path in new:
            path.unlink()


def test_what_is_reported_is_of_a_step_that_the_disk_took(tmp_path, monkeypatch):
    """The best of three evaluations is of a step whose checkpoint cannot be written."""
    kept = {1}
    checkpoints = SimpleNamespace(has=kept.__contains__, save=lambda *_: None, best=None)
    run = SimpleNamespace(metric="accuracy", config=Config(), checkpoints=checkpoints, folder=tmp_path)
    reporter = SimpleNamespace(evaluation=lambda *_: None)
    monkeypatch.setattr(loop, "unstack_blocks", lambda state: state)
    progress = RunProgress({}, ["a", "b"], False)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7)):
        found = {"validation": {"accuracy": accuracy}}
        loop.evaluate_step(run, None, step, progress, lambda _, found=found: found, reporter, BadImages("error"))
    best = progress.best
    assert (best["step"], best["value"]) == (1, 0.5) and progress.result == {"validation": {"accuracy": 0.5}}


def test_statistics_of_each_device_are_warned_of_where_the_devices_are_others(tmp_path, capsys):
    config = recipe(f"folder:{make_splits(tmp_path / 'data', {'train': 8, 'val': 3})}", steps=1)
    starts = [(2, "local", False), (4, "local", True), (4, "local", False), (2, "global", False), (4, "global", False)]
    for devices, scope, warned in starts:
        place = tmp_path / scope
        (place / "summary.json").unlink(missing_ok=True)
        loop.train(dataclasses.replace(config, parallel=ParallelConfig(devices, batch_norm=scope)), place)
        assert ("had 2 devices, and now has 4" in capsys.readouterr().err) == warned


def test_where_the_best_checkpoint_is_gone_both_splits_are_of_the_last_step(tmp_path, capsys):
    class Remove:
        def on_checkpoint(self, step, path):
            if step == 12:
                shutil.rmtree(path.with_name("3"))

    root = make_splits(tmp_path / "data", {"train": 12, "val": 4, "test": 4}, swapped="val")
    summary = loop.train(recipe(f"folder:{root}", steps=12, metric="loss"), tmp_path / "run", hooks=[Remove()])
    last = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in line][-1]
    assert (last["step"], summary["selected"], summary["best"]["step"]) == (12, 12, 3)
    assert "the last step counts in its place" in capsys.readouterr().err
    assert summary["validation"]["loss"] == pytest.approx(last["validation/loss"])


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_classes_that_changed_are_refused_also_where_changes_are_accepted(change, tmp_path):
    """The order of the names gives the classes their outputs: a renamed one would move the others to wrong outputs."""
    root = make_splits(tmp_path / "data", {"train": 6, "val": 3}, swapped=None)
    config = recipe(f"folder:{root}", steps=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=4))
    loop.train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for split in ("train", "val"):
        if change == "renamed":
            (root / split / "dark").rename(root / split / "murky")
        else:
            picture(root / split / "black" / "0.png", 40, 0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, accept_changes=True))
    before = (tmp_path / "run" / "pictures.npz").read_bytes()
    with pytest.raises(InputError, match=r"output 0 of the network stands for dark, and would now for (light|black)"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "pictures.npz").read_bytes() == before


@pytest.mark.parametrize("crop", ["random_resized", "none"])
def test_a_resume_with_another_library_that_resizes_is_warned(crop, tmp_path, capsys, monkeypatch):
    """Both ways, once each; not where no random part of a picture is resized: the rest is always Pillow's work."""
    pytest.importorskip("cykooz_resizer")
    root = make_splits(tmp_path / "data", {"train": 8, "val": 3})
    config = recipe(f"folder:{root}", steps=2)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, on_device=False), augment=AugmentConfig(crop=crop)
    )
    names = {transforms.fast: "cykooz.resizer", None: "Pillow"}
    before = None
    for now in (transforms.fast, None, None, transforms.fast):
        monkeypatch.setattr(transforms, "fast", now)
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
        loop.train(config, tmp_path / "run")
        err = capsys.readouterr().err
        if crop == "random_resized" and before not in (None, names[now]):
            assert f"resized by {before}, and now are by {names[now]}: pixels may differ by 1 of 255" in err
        else:
            assert "WARNING" not in err
        before = names[now]


def test_the_data_may_lie_elsewhere_changed_data_is_refused_and_other_data_said(grown, tmp_path, capsys):
    (grown / "data").rename(grown / "moved")
    try:
        with pytest.raises(InputError, match="there is no such folder"):
            evaluate_run(grown / "run")
        elsewhere = f"folder:{grown / 'moved'}"
        assert main(["evaluate", str(grown / "run"), "--data.dataset", elsewhere, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["split"] == "validation"
        assert main(["report", str(grown / "run"), "--data.dataset", elsewhere]) == 0
        added = grown / "moved" / "dark" / "new.png"
        picture(added, 40, 999)
        with pytest.raises(InputError, match=r"give the same data, or take this with --data.accept_changes"):
            evaluate_run(grown / "run", dataset=elsewhere)
        assert evaluate_run(grown / "run", dataset=elsewhere, accept_changes=True)["validation"]["count"] > 6
        added.unlink()
        summary = loop.train(recipe(elsewhere, steps=20), grown / "run")
        assert summary["steps"] == 20
    finally:
        (grown / "moved").rename(grown / "data")
    other = make_splits(tmp_path / "other", {"train": 8, "val": 3})
    capsys.readouterr()
    assert evaluate_run(grown / "run", dataset=f"folder:{other}")["validation"]["count"] == 6
    assert "is other data than that of the run" in capsys.readouterr().err


def test_a_split_that_was_trained_on_is_not_evaluated(tmp_path):
    """A training picture is moved into the test folder after the run."""
    root = make_splits(tmp_path / "data", {"train": 10, "test": 4}, swapped=None)
    table = as_table(root)
    loop.train(recipe(table, metric="none", steps=5), tmp_path / "run")
    text = (root / "table.csv").read_text()
    (root / "table.csv").write_text(text.replace("train/dark/3.png,dark,train", "train/dark/3.png,dark,test"))
    with pytest.raises(InputError, match=r"1 of the 9 test pictures of .* were trained on by this run"):
        evaluate_run(tmp_path / "run")


def test_every_kind_of_change_is_counted(tmp_path):
    root = make_splits(tmp_path / "data", {"train": 4, "val": 2, "test": 2})
    as_table(root)
    config = DataConfig(dataset=f"csv:{root / 'table.csv'}")
    before = fingerprint(load_dataset(config, 0))
    assert changes(before, before) == {}
    rows = (root / "table.csv").read_text().splitlines()
    rows.remove("train/dark/0.png,dark,train")
    rows[rows.index("train/dark/1.png,dark,train")] = "train/dark/1.png,light,train"
    rows[rows.index("val/dark/1.png,dark,val")] = "val/dark/1.png,dark,train"
    picture(root / "train/light/new.png", 200, 99)
    (root / "table.csv").write_text("\n".join([*rows, "train/light/new.png,light,train"]))
    Image.new("RGB", (80, 80)).save(Path(root / "train/light/2.png"), compress_level=0)
    after = fingerprint(load_dataset(config, 0))
    found = changes(before, after)
    assert found["train"] == Change(1, 1, 1, 0, 1, 1, 7) and found["validation"] == Change(0, 0, 0, 1, 0, 0, 3)
    assert set(found) == {"train", "validation"} and count_trained_on(before, after, "test") == 0
