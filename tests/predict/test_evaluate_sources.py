"""Evaluates runs, tags and files on data of whoever has it: classes by name, intervals, tables of predictions."""

import csv
import dataclasses
import json
import math
import re
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from scipy.stats import binomtest

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.data.dataset import ArraySource, Dataset
from resnet_jax.data.match_classes import match_classes, read_class_map, read_real_labels
from resnet_jax.predict import evaluate_sources
from resnet_jax.predict.write_predictions import RightInFolders
from resnet_jax.runs.folder import read_summary, served_line
from resnet_jax.training import loop
from resnet_jax.training.metrics import wilson
from resnet_jax.typed import InputError
from resnet_jax.weights import sources, tags
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import Weights, find_weights

from ..training.test_selection import make_splits, picture, recipe

pytestmark = pytest.mark.xdist_group("selection")


def run(arguments, capsys):
    """Exit status, standard output and standard error of a command line."""
    status = main([str(word) for word in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows_in(table):
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run whose first evaluation is the best, since every validation label is wrong, with its data and its end."""
    place = tmp_path_factory.mktemp("work")
    root = make_splits(place / "data", {"train": 12, "val": 4, "test": 4}, swapped="val")
    config = recipe(f"folder:{root}", steps=12, metric="loss")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=6, keep=9))
    loop.train(config, place / "run")
    return place


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Pictures of someone else: folders of classes alone."""
    root = tmp_path_factory.mktemp("theirs")
    for i in range(5):
        picture(root / "light" / f"{i}.png", 210, 900 + i)
        picture(root / "dark" / f"{i}.png", 40, 950 + i)
    return root


@pytest.mark.parametrize("command", ["evaluate", "report", "predict", "export"])
def test_each_command_takes_the_checkpoint_that_is_named(command, work, tmp_path, capsys):
    best = read_summary(work / "run")["selected"]
    after = {"predict": [work / "data" / "test" / "dark" / "0.png", "--format", "json"]}
    after["export"] = [tmp_path / "out.safetensors"]
    found = {}
    for which in (None, "best", "latest", "6", str(best)):
        flags = [] if which is None else ["--checkpoint", which]
        status, out, err = run([command, work / "run", *after.get(command, ()), *flags], capsys)
        assert status == 0, err
        if command == "export":
            tensors = find_weights(str(tmp_path / "out.safetensors")).tensors
            found[which] = b"".join(tensors[name].tobytes() for name in sorted(tensors))
        else:
            found[which] = (work / "run" / "measures.json").read_text() if command == "report" else out
            found[which] = re.sub(r"[\d.,]+ a second", "", found[which])
    assert found[None] == found["best"] == found[str(best)]
    assert len({found["best"], found["latest"], found["6"]}) == 3
    status, _, err = run([command, work / "run", *after.get(command, ()), "--checkpoint", "5"], capsys)
    assert status == 2 and "no checkpoint of step 5 is kept: give best, latest or one of" in err


@pytest.fixture(scope="module")
def exported(work):
    """The run as a file of weights, with a head that has a class more."""
    file = work / "out.safetensors"
    assert main(["export", str(work / "run"), str(file)]) == 0
    return file


def test_a_run_a_file_and_the_training_agree(work, exported, capsys):
    summary = read_summary(work / "run")
    status, out, _ = run(["evaluate", work / "run", "--json"], capsys)
    of_run = json.loads(out)
    assert status == 0 and of_run["step"] == summary["selected"]
    assert of_run["test"]["accuracy"] == summary["test"]["accuracy"]
    low, high = of_run["test"]["accuracy_interval"]
    assert of_run["test"]["accuracy_right"] == 8 and high == 1.0 and 0.6 < low < 0.7
    data = ["--data.dataset", f"folder:{work / 'data'}"]
    status, out, err = run(["evaluate", exported, *data, "--json"], capsys)
    of_file = json.loads(out)
    assert status == 0 and of_file["model"] == "cifar_resnet8" and of_file["parameters"] == of_run["parameters"]
    for name in ("loss", "accuracy", "count", "macro_f1"):
        assert of_file["test"][name] == pytest.approx(of_run["test"][name], rel=1e-5), name
    status, out, err = run(["evaluate", exported, *data, "--split", "validation"], capsys)
    assert status == 0 and "validation split, 8 images" in out and "top-1 0.00% [0.00, 32.44] (0 right)" in out
    status, _, err = run(["evaluate", exported], capsys)
    assert status == 2 and "holds no run" in err and "give --data.dataset" in err


def test_a_run_that_is_evaluated_mirrored_too_predicts_so_and_its_exports_do(tmp_path, capsys):
    root = make_splits(tmp_path / "data", {"train": 8, "val": 4}, swapped=None)
    config = recipe(f"folder:{root}", steps=2)
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, eval_flip=True))
    loop.train(config, tmp_path / "run")
    for name in ("net.safetensors", "net.stablehlo"):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / name)]) == 0
    wanted = evaluate_sources.Wanted(f"folder:{root}", "validation", keep=True)
    files = sorted((root / "val").rglob("*.png"))
    for source in ("run", "net.safetensors"):
        found = evaluate_sources.evaluate_source(str(tmp_path / source), wanted)
        expected = softmax(found.predictions.logits, axis=1)
        predictor = rj.Predictor.from_source(str(tmp_path / source))
        np.testing.assert_allclose(predictor(files), expected, atol=1e-5)
        plain = dataclasses.replace(predictor.preprocessing, eval_flip=False)
        assert np.abs(dataclasses.replace(predictor, preprocessing=plain)(files) - expected).max() > 1e-4
    with zipfile.ZipFile(tmp_path / "net.stablehlo") as archive:
        program = jax.export.deserialize(bytearray(archive.read("program")))
    pixels = np.stack([predictor.prepare(str(path)) for path in files])
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-5)


def test_the_interval_is_that_of_scipy():
    for right, count in ((0, 8), (8, 8), (351, 360), (1, 1), (1, 2)):
        theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert wilson(right / count, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_the_end_of_a_run_says_which_checkpoint_is_served_and_why():
    best = {"step": 16, "metric": "ema/validation/accuracy", "value": 0.9}
    summary = {"selected": 16, "best": best, "steps": 30, "ema/validation": {}}
    line = served_line(summary)
    assert line.startswith("served: the moving average of step 16, the best by ema/validation/accuracy (0.9000)")
    assert line.endswith("--checkpoint latest takes step 30")
    assert "the last one too" in served_line(summary | {"steps": 16})
    assert "since nothing was selected" in served_line({"selected": 30, "best": None, "steps": 30})


def test_the_recall_of_each_class_is_that_of_what_is_served():
    def means(right):
        classes = {"cat": {"recall": right / 4, "count": 4}, "dog": {"recall": None, "count": 0}}
        values = {"loss": 1.0, "accuracy": right / 4, "count": 4, "classes": classes}
        return values | {"accuracy_right": right, "accuracy_interval": [0.0, 1.0]}

    result = {"split": "test", "step": 2, "test": means(1), "ema/test": means(3), "skipped_images": []}
    lines = evaluate_sources.format_result(SimpleNamespace(result=result, images_per_second=8.0)).splitlines()
    assert lines[-3] == "test recall of each class, with the moving average, which is what is served:"
    assert [line.split() for line in lines[-2:]] == [["cat", "75.00%", "of", "4"], ["dog", "no", "images"]]
    del result["ema/test"]
    lines = evaluate_sources.format_result(SimpleNamespace(result=result, images_per_second=8.0)).splitlines()
    assert lines[-3:-1] == ["test recall of each class:", f"  {'cat':<24}  25.00% of 4"]


def test_data_of_someone_else_is_matched_by_name(work, theirs, tmp_path, capsys):
    """A map says how classes are called that have other names."""
    assert run(["report", work / "run"], capsys)[0] == 0
    table = tmp_path / "table.csv"
    data = ["--data.dataset", f"folder:{theirs}"]
    status, out, err = run(["evaluate", work / "run", *data, "--csv", table, "--per-class", "--batch", "4"], capsys)
    assert (
        status == 0
        and "a second" in out
        and f"every prediction: {table}" in out
        and "other data than that of the run" in err
        and "another order" not in err
    )
    assert "test split, 10 images" in out and "top-1 100.00%" in out
    rows = rows_in(table)
    assert list(rows[0]) == ["example", "label", "predicted", "probability", "right"] and len(rows) == 10
    for row in rows:
        assert row["label"] == row["predicted"] == row["example"].split("/")[-2] and row["right"] == "1"
        assert 0.5 < float(row["probability"]) <= 1
    before = (work / "run" / "calibration.json").read_text()
    assert run(["report", work / "run", *data], capsys)[0] == 0
    assert (work / "run" / "calibration.json").read_text() == before
    assert json.loads((work / "run" / "measures.json").read_text())["count"] == 10
    renamed = tmp_path / "renamed"
    for name, other in (("dark", "night"), ("light", "day")):
        for i in range(3):
            picture(renamed / other / f"x{i}.png", {"dark": 40, "light": 210}[name], i)
    command = ["evaluate", work / "run", "--data.dataset", f"folder:{renamed}"]
    status, _, err = run(command, capsys)
    assert status == 2 and err.count("day, night: no such class among the 2 of the run") == 1
    assert "--classes FILE" in err and "WARNING" not in err
    (tmp_path / "map.txt").write_text("night dark\nday\tlight\n")
    (tmp_path / "map.json").write_text('{"night": 0, "day": "light", "dusk": 1}')
    for name in ("map.txt", "map.json"):
        status, out, err = run([*command, "--classes", tmp_path / name], capsys)
        assert status == 0 and "top-1 100.00%" in out and "by the given map; the data has them in another order" in err


def test_the_run_s_own_data_that_changed_is_still_refused(work, tmp_path, capsys):
    moved = make_splits(tmp_path / "data", {"train": 12, "val": 4, "test": 4}, swapped="val")
    command = ["evaluate", work / "run", "--data.dataset", f"folder:{moved}"]
    status, _, err = run(command, capsys)
    assert status == 0 and "other data" not in err
    (moved / "test" / "dark" / "0.png").rename(moved / "test" / "dark" / "new.png")
    status, _, err = run(command, capsys)
    assert status == 2 and "take this with --data.accept_changes" in err
    assert run([*command, "--data.accept_changes"], capsys)[0] == 0


def test_other_pictures_under_the_same_names_were_not_trained_on(work, tmp_path, capsys):
    """A folder `test` of someone else's has the names of the run's training pictures; the same pictures are refused."""
    table = tmp_path / "table.csv"
    lines = ["path,label,split"]
    for split in ("train", "test"):
        for path in sorted((work / "data" / "train").rglob("*.png")):
            name = path.relative_to(work / "data")
            lines += [f"{name},{path.parent.name},{split}"] if (split == "test") == (path.stem in "0123") else []
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((30, 20)).save(tmp_path / name)
    table.write_text("\n".join(lines) + "\n")
    status, out, err = run(["evaluate", work / "run", "--data.dataset", f"csv:{table}"], capsys)
    assert status == 0 and "other data" in err and "test split, 8 images" in out
    (work / "data" / "table.csv").write_text(table.read_text())
    try:
        command = ["evaluate", work / "run", "--data.dataset", f"csv:{work / 'data' / 'table.csv'}"]
        status, _, err = run([*command, "--data.accept_changes"], capsys)
        assert status == 2 and "8 of the 8 test pictures" in err and "were trained on" in err
    finally:
        (work / "data" / "table.csv").unlink()


def source(labels):
    return ArraySource(np.zeros((len(labels), 2, 2, 3), np.uint8), np.asarray(labels, np.int32))


def labels_of(dataset):
    return [dataset.train[i][1] for i in range(len(dataset.train))]


def test_classes_are_matched():
    data = Dataset(source([0, 1, 1]), class_names=("cat", "dog"))
    found, line = match_classes(data, ("dog", "emu", "cat"), "X")
    assert labels_of(found) == [2, 0, 0] and found.class_names == ("dog", "emu", "cat")
    assert line == "classes: matched by name; the data has 2 of the 3 classes"
    assert match_classes(data, ("cat", "dog"), "X")[1] == ""
    assert "another order" in match_classes(data, ("dog", "cat"), "X")[1]
    found, line = match_classes(data, ("0", "1"), "X", named=False)
    assert labels_of(found) == [0, 1, 1] and line == "classes: X names none, so the data's 2 are taken in their order"
    v2 = Dataset(source([0, 1, 2]), class_names=("0", "10", "2"))  # folders sort as words
    assert labels_of(match_classes(v2, tuple(map(str, range(11))), "X", named=False)[0]) == [0, 10, 2]
    with pytest.raises(InputError, match=r"dog: no such class among the 2 of X .cat, dogs.; did you mean dogs"):
        match_classes(data, ("cat", "dogs"), "X")
    with pytest.raises(InputError, match="cat, dog: no such class"):
        match_classes(data, ("0", "1", "2"), "X", named=False)
    several = Dataset(source([[1, 0], [1, 1]]), class_names=("cat", "dog"), multilabel=True)
    found, _ = match_classes(several, ("dog", "emu", "cat"), "X", multilabel=True)
    assert labels_of(found) == [(0, 0, 1), (1, 0, 1)]
    assert labels_of(match_classes(data, ("dog", "cat"), "X", multilabel=True)[0]) == [(0, 1), (1, 0), (1, 0)]
    with pytest.raises(InputError, match="several labels an image, and X has one"):
        match_classes(several, ("cat", "dog"), "X")


def test_class_maps_are_read_in_their_forms(tmp_path):
    keras = '{"0": ["n01", "tench"], "1": ["n02", "goldfish"]}'
    forms = {"a.json": '["n01", "n02"]', "b.json": keras, "c.txt": "n01\nn02\n", "d.txt": "n01 0\nn02 1\n"}
    forms |= {"e.json": '{"n01": 0, "n02": 1}', "f.csv": "n01,0\nn02, 1\n"}
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert {key: int(k) for key, k in read_class_map(tmp_path / name).items()} == {"n01": 0, "n02": 1}, name
    data = Dataset(source([0, 1]), class_names=("n02", "n03"))
    for given, message in (
        ({"n02": 9, "n03": 0}, "n02 the number 9; the network has 0 to 1"),
        ({"n02": 0}, "lacks n03"),
    ):
        with pytest.raises(InputError, match=message):
            match_classes(data, ("a", "b"), "X", given=given)
    for name, text in {"g.txt": "a b c\n", "h.txt": "a\na\n", "i.txt": "", "j.json": "3", "k.json": "{"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="--classes"):
            read_class_map(tmp_path / name)
    with pytest.raises(InputError, match=r"--classes .*none cannot be read"):
        read_class_map(tmp_path / "none")
    (tmp_path / "real.json").write_text("[[1], [], [0, 1]]")
    assert read_real_labels(tmp_path / "real.json") == (frozenset({1}), frozenset(), frozenset({0, 1}))
    (tmp_path / "real.json").write_text('["a"]')
    with pytest.raises(InputError, match="--real"):
        read_real_labels(tmp_path / "real.json")


@pytest.fixture(scope="module")
def three(work, tmp_path_factory):
    """Weights that name no classes: a third output, always the greatest, beside the run's two."""
    weights = find_weights(str(work / "run"))
    head = {"fc.weight": np.pad(weights.tensors["fc.weight"], ((0, 1), (0, 0)))}
    head["fc.bias"] = np.append(weights.tensors["fc.bias"], np.float32(1e6))
    file = tmp_path_factory.mktemp("three") / "three.safetensors"
    changed = dataclasses.replace(
        weights, tensors=dict(weights.tensors) | head, fields=weights.fields | {"num_classes": 3}, class_names=None
    )
    save_tensors(file, changed, "safetensors")
    return file


def test_valid_labels_and_real_labels(three, tmp_path, capsys):
    """With all outputs the third one wins; among the data's it does not. The real labels: file names in order are
    d0, d1, l0, l1, all predicted 2, or with valid labels 0, 0, 1, 1.
    """
    for name, shade in (("dark", 40), ("light", 210)):
        for i in range(2):
            picture(tmp_path / "data" / name / f"{name[0]}{i}.png", shade, i)
    (tmp_path / "map.json").write_text('["dark", "light"]')
    (tmp_path / "real.json").write_text("[[0, 2], [2], [], [1]]")
    command = ["evaluate", three, "--data.dataset", f"folder:{tmp_path / 'data'}", "--classes", tmp_path / "map.json"]
    command += ["--real", tmp_path / "real.json", "--json"]
    status, out, err = run(command, capsys)
    found = json.loads(out)["test"]
    assert status == 0 and "the data has 2 of the 3 classes" in err
    assert found["accuracy"] == 0 and (found["real_accuracy_right"], found["real_count"]) == (2, 3)
    status, out, _ = run([*command, "--valid_labels"], capsys)
    found = json.loads(out)["test"]
    assert status == 0 and found["accuracy"] == 1 and (found["real_accuracy_right"], found["real_count"]) == (2, 3)
    assert found["real_accuracy_interval"] == list(wilson(2 / 3, 3)) and found["loss"] < math.log(2)
    status, out, _ = run([*command[:-1], "--valid_labels", "--per-class"], capsys)
    assert "ReaL 66.67%" in out and "of 3" in out
    (tmp_path / "real.json").write_text("[[0]]")
    status, _, err = run(command, capsys)
    assert status == 2 and "--real has labels for 1 images, and the split has 4" in err
    status, _, err = run([*command[:4]], capsys)
    assert status == 2 and "dark, light: no such class among the 3 of" in err


def test_several_labels_an_image(work, exported, theirs, tmp_path, capsys):
    """Outputs that say dark for dark pictures and never light; one picture has both labels, one none."""
    weights = find_weights(str(work / "run"))
    bias = weights.tensors["fc.bias"] - np.asarray([0, 1e3], np.float32)
    changed = dataclasses.replace(weights, tensors=dict(weights.tensors) | {"fc.bias": bias}, multilabel=True)
    save_tensors(tmp_path / "many.safetensors", changed, "safetensors")
    labels = ["dark", "light;dark", "", "dark"]
    lines = ["path,label", *(f"{theirs}/dark/{i}.png,{label}" for i, label in enumerate(labels))]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    command = ["evaluate", tmp_path / "many.safetensors", "--data.dataset", f"csv:{tmp_path / 'data.csv'}"]
    status, out, err = run([*command, "--csv", tmp_path / "out.csv"], capsys)
    assert status == 0 and "mean average precision" in out and "all labels right 50.00%" in out
    assert "threshold of each class: one half" in out
    rows = rows_in(tmp_path / "out.csv")
    assert [row["label"] for row in rows] == ["dark", "dark;light", "", "dark"]
    assert [(row["predicted"], row["right"]) for row in rows] == [("dark", x) for x in ("1", "0", "0", "1")]
    strict = dataclasses.replace(changed, calibration=tags.Calibration(1.0, (1.0, 1.0)))  # nothing reaches it
    save_tensors(tmp_path / "many.safetensors", strict, "safetensors")
    status, out, _ = run([*command, "--csv", tmp_path / "out.csv", "--per-class"], capsys)
    assert "all labels right 25.00%" in out and "with the thresholds of the run's report, by which 1 of 4" in out
    assert (
        "with one half in its place: all labels right 50.00%, macro recall 50.00%" in out
        and "macro recall 0.00%" in out
    )
    assert "  dark " in out and "0.00% of 3, threshold 1.0000" in out
    found = json.loads(run([*command, "--per-class", "--json"], capsys)[1])
    assert found["thresholds"] == {"dark": 1.0, "light": 1.0} and found["test"]["accuracy_right"] == 1
    assert found["test"]["at_one_half"]["accuracy"] == 0.5
    assert found["test"]["classes"]["dark"] == {"recall": 0.0, "count": 3}
    assert [row["right"] for row in rows_in(tmp_path / "out.csv")] == list("0010")
    status, _, err = run([*command, "--valid_labels"], capsys)
    assert status == 2 and "--valid_labels chooses one class an image" in err
    status, _, err = run(["evaluate", work / "out.safetensors", *command[2:]], capsys)
    assert status == 2 and "several labels an image" in err


def test_a_pattern_makes_a_table_that_is_gone_on_with(three, exported, theirs, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(exported.read_bytes())
    (tmp_path / "b.safetensors").write_text("damaged")
    (tmp_path / "c.safetensors").write_bytes(three.read_bytes())
    table = tmp_path / "results.csv"
    command = ["evaluate", tmp_path / "*.safetensors", "--data.dataset", f"folder:{theirs}", "--csv", table]
    status, out, _ = run(command, capsys)
    assert status == 1
    rows = {row["name"][-13:-12]: row for row in rows_in(table)}
    assert list(rows) == ["a", "b", "c"]
    assert float(rows["a"]["top1"]) == 1 and rows["a"]["count"] == "10" and rows["a"]["image_size"] == "8"
    assert float(rows["a"]["low"]) < float(rows["a"]["high"]) == 1 and float(rows["a"]["images_per_second"]) > 0
    assert int(rows["a"]["parameters"]) > 70_000 and rows["a"]["error"] == ""
    assert "not a whole safetensors file" in rows["b"]["error"] and "no such class" in rows["c"]["error"]
    assert "top-1 100.00% [72.25, 100.00]" in out and "not evaluated: " in out
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace(",10,", ",77,")  # what is there is not evaluated again
    table.write_text("\n".join(lines) + "\n")
    (tmp_path / "b.safetensors").write_bytes(exported.read_bytes())
    (tmp_path / "c.safetensors").unlink()
    status, out, _ = run([*command, "--json"], capsys)
    again = json.loads(out)
    assert status == 0 and [int(row["count"]) for row in again] == [77, 10]
    assert len(rows_in(table)) == 3
    sources_now = ["evaluate", tmp_path / "a.safetensors*", *command[2:]]
    (tmp_path / "a.safetensors").write_bytes(three.read_bytes())  # other weights under the same name
    status, out, _ = run(sources_now, capsys)
    assert status == 1 and "no such class" in out
    (tmp_path / "a.safetensors").write_bytes(exported.read_bytes())
    (tmp_path / "map.json").write_text('{"dark": "light", "light": "dark"}')
    status, out, _ = run([*sources_now, "--classes", tmp_path / "map.json"], capsys)
    assert status == 0 and "top-1   0.00%" in out  # other options, other row
    status, out, _ = run(sources_now, capsys)
    assert status == 0 and "top-1 100.00%" in out and len(rows_in(table)) == 4
    status, _, err = run(command[:-2], capsys)
    assert status == 2 and "--csv results.csv" in err
    status, _, err = run([*command[:-1], tmp_path / "none" / "x.csv"], capsys)
    assert status == 2 and "is no folder that can be written" in err
    status, _, err = run(["evaluate", "zzz*", *command[2:]], capsys)
    assert status == 2 and "no run, file of weights or tag matches 'zzz*'" in err
    table.write_text("a,b\n")
    status, _, err = run(command, capsys)
    assert status == 2 and "has the columns a, b" in err


def test_a_pattern_of_runs_takes_their_own_data(work, exported, tmp_path, capsys):
    status, _, err = run(["evaluate", work / "r*n", "--csv", tmp_path / "out.csv"], capsys)
    (row,) = rows_in(tmp_path / "out.csv")
    assert status == 0 and (row["dataset"], row["top1"], row["count"]) == ("", "1.0", "8")
    status, _, err = run(["evaluate", work / "[ro]*", "--csv", tmp_path / "out.csv"], capsys)
    assert status == 2 and "say what to evaluate on" in err


def test_predict_says_the_accuracy_on_folders_of_classes(work, theirs, capsys):
    status, out, err = run(["predict", work / "run", theirs], capsys)
    assert status == 0 and "accuracy 100.00% [72.25, 100.00] on 10 pictures in folders of classes" in out
    status, out, err = run(["predict", work / "run", theirs / "dark", "--format", "json"], capsys)
    assert len(out.splitlines()) == 5 and "on 5 pictures in folders of classes" in err
    status, out, err = run(["predict", work / "run", theirs / "dark" / "0.png"], capsys)
    assert status == 0 and "accuracy" not in out + err


def test_predict_says_no_accuracy_of_a_network_with_one_output(theirs):
    """Its only class would be right in each of its own pictures, and those of the other class are in no such folder."""
    predictor = SimpleNamespace(multilabel=False, class_names=("light",))
    counted = RightInFolders(predictor, str(theirs), [str(theirs)])
    for path in sorted(theirs.rglob("*.png")):
        counted.add(path, np.asarray([0.01]))
    assert counted.line() == ""


def test_predict_counts_no_picture_that_was_trained_on(work, theirs, tmp_path, capsys):
    status, out, _ = run(["predict", work / "run", work / "data"], capsys)
    assert status == 0 and "on 16 pictures in folders of classes" in out
    assert "24 more are not counted: by their names, the run was trained on them" in out
    assert "8 of those counted are the run's validation pictures" in out
    status, out, _ = run(["predict", work / "run", work / "data" / "train"], capsys)
    assert status == 0 and "no accuracy: the run was trained on all 24 pictures" in out and "accuracy 1" not in out
    (tmp_path / "train" / "light").mkdir(parents=True)
    for i in range(5):  # other pictures under the names of the run's
        Image.new("RGB", (40, 40), (210 + i,) * 3).save(tmp_path / "train" / "light" / f"{i}.png")
    status, out, _ = run(["predict", work / "run", tmp_path], capsys)
    assert status == 0 and "on 5 pictures" in out and "trained on" not in out
    run(["export", work / "run", tmp_path / "out.safetensors"], capsys)
    status, out, _ = run(["predict", tmp_path / "out.safetensors", theirs], capsys)
    assert status == 0 and "on 10 pictures" in out and "is not known here" in out


def test_tags_that_match_are_evaluated_and_one_that_cannot_be_fetched_is_a_row(theirs, tmp_path, capsys, monkeypatch):
    """The only tag that is there predicts class 7 of 1,000 always; a map says that the dark pictures are that."""
    model = rj.create_model("test_resnet", num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    tensors = rj.to_torch(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    tensors["fc.bias"] = np.eye(1000, dtype=np.float32)[7]
    file = tmp_path / "model.safetensors"
    save_tensors(file, Weights(tensors), "safetensors")

    def download(repository, name):
        if repository != "timm/test_resnet.r160_in1k":
            raise InputError(f"{repository} is not there")
        return file

    monkeypatch.setattr(sources, "_download", download)
    two = {name: tags.all_tags()[name] for name in ("test_resnet.r160_in1k", "resnet18.tv_in1k")}
    monkeypatch.setattr(evaluate_sources, "all_tags", lambda: two)
    (tmp_path / "map.txt").write_text("dark 7\nlight 8\n")
    data = ["--data.dataset", f"folder:{theirs}", "--classes", tmp_path / "map.txt"]
    status, out, _ = run(["evaluate", "*resnet*", *data, "--csv", tmp_path / "out.csv"], capsys)
    rows = {row["name"]: row for row in rows_in(tmp_path / "out.csv")}
    assert status == 1 and set(rows) == set(two)
    good = rows["test_resnet.r160_in1k"]
    assert float(good["top1"]) == 0.5 and (good["count"], good["image_size"]) == ("10", "160")
    assert float(good["top5"]) == 0.5 and rows["resnet18.tv_in1k"]["error"] == "timm/resnet18.tv_in1k is not there"
    status, out, err = run(["evaluate", "test_resnet.r160_in1k", *data], capsys)
    assert status == 0 and out.startswith("test_resnet, test split, 10 images") and "2 of the 1,000 classes" in err
    status, _, err = run(["evaluate", "test_resnet.r160_in1"], capsys)
    assert status == 2 and "test_resnet.r160_in1k" in err
