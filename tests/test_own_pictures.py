"""From a folder or a table of pictures to a report and a program for colleagues, from the shell."""

import csv
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.models.resnet import ResNet
from resnet_jax.runs.trackers import read_lines
from tests.browser import needs_chromium, screenshot, tags
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("own_pictures")  # one process makes what they share

RNG = np.random.default_rng(0)
SHORT = [
    "--model.name", "cifar_resnet8", "--parallel.devices", "1", "--train.batch_size", "8", "--augment.crop", "none",
    "--augment.flip", "none",
    "--schedule.warmup_epochs", "0", "--log.no_tensorboard", "--data.image_size", "12",
    "--train.eval_every_epochs", "2", "--train.ema_decay", "None",
]  # fmt: skip


def texture(kind):
    """A noisy picture of uneven size with stripes across, along, or none."""
    height, width = RNG.integers(14, 24, 2)
    rows, columns = np.mgrid[:height, :width]
    stripes = {"across": rows // 2 % 2, "along": columns // 2 % 2, "plain": 0 * rows}[kind] * 120
    return (stripes[..., None] + RNG.integers(0, 100, (height, width, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of textures, one of them rare."""
    root = tmp_path_factory.mktemp("textures")
    for kind, count in (("across", 24), ("along", 24), ("plain", 6)):
        (root / kind).mkdir()
        for i in range(count):
            Image.fromarray(texture(kind)).save(root / kind / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, folder):
    """What a first run on the folder exported."""
    root = tmp_path_factory.mktemp("weights")
    flags = ["--data.dataset", f"folder:{folder}", "--train.steps", "40", "--log.no_report"]
    assert main(["train", "--workdir", str(root / "run"), *SHORT, *flags]) == 0
    assert main(["export", str(root / "run"), str(root / "net.safetensors")]) == 0
    return root / "net.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder, weights):
    """A linear probe on those weights, with all that serves a few unbalanced pictures."""
    work = tmp_path_factory.mktemp("run") / "probe"
    flags = ["--data.dataset", f"folder:{folder}", "--model.pretrained", str(weights), "--finetune", "linear_probe"]
    flags += ["--train.loss", "focal", "--train.class_weights", "effective_number", "--data.sampling", "balanced"]
    flags += ["--train.metric", "macro_f1", "--train.patience", "2", "--train.epochs", "12"]
    assert main(["train", "--workdir", str(work), *SHORT, *flags]) == 0
    return work


def test_a_probe_keeps_the_network_and_reports_on_its_best_checkpoint(run, weights):
    _, before = rj.load_pretrained(str(weights))
    _, after = rj.load_pretrained(str(run))
    head = [values["params"].pop("head")["kernel"] for values in (before, after)]
    assert not np.array_equal(*head)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    measures = json.loads((run / "measures.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]
    assert measures["step"] == summary["selected"] == best["step"] and best["value"] > 0.7
    assert best["metric"] == "validation/macro_f1" and measures["split"] == measures["calibrated_on"] == "validation"
    assert measures["macro_f1"] == pytest.approx(best["value"], abs=1e-6)
    assert measures["accuracy"] == pytest.approx(summary["validation"]["accuracy"], abs=1e-6)
    assert "test" not in summary and "so the figures of that split are optimistic" in (run / "report.html").read_text()
    assert sum(row["support"] for row in measures["classes"]) == summary["validation"]["count"]


def test_a_run_without_progress_ends_and_stays_ended(tmp_path, folder, capsys):
    flags = ["--data.dataset", f"folder:{folder}", "--finetune", "linear_probe", "--train.patience", "2"]
    flags += ["--optimizer.learning_rate", "0.0"]
    command = ["train", "--workdir", str(tmp_path / "run"), *SHORT, *flags, "--train.epochs", "40", "--log.no_report"]
    assert main(command) == 0
    evaluations = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in line]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(evaluations) == 3 and summary["steps"] == evaluations[-1] and summary["best"]["step"] == evaluations[0]
    assert "no better for 2 evaluations" in capsys.readouterr().out
    assert main(command) == 0
    assert "the run is finished" in capsys.readouterr().out


@needs_chromium
def test_a_browser_shows_the_report_without_an_error(run, tmp_path):
    page = tags(run / "report.html", tmp_path)
    assert page.rows["classes"] == 4 and page.rows["confusion"] == 4 and page.rows["run"] > 5
    assert page.count["svg"] == 4 and "http" not in (run / "report.html").read_text().replace("http-equiv", "")
    wrong = np.asarray(json.loads((run / "measures.json").read_text())["confusion"])
    assert page.count.get("img", 0) == 2 * min(12, wrong.sum() - np.trace(wrong))
    pixels = screenshot(run / "report.html", tmp_path, 390, 1200)
    assert pixels.shape[:2] == (1200, 390) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30


WITHOUT_US = """
import json, sys, zipfile
import jax, numpy as np
archive = zipfile.ZipFile(sys.argv[1])
program = jax.export.deserialize(bytearray(archive.read("program")))
pixels = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(pixels))
assert not any(name.startswith(("resnet_jax", "flax")) for name in sys.modules)
assert "flatbuffers" in sys.modules
print(json.loads(archive.read("metadata.json"))["class_names"])
"""


def test_a_program_serves_without_this_package(run, folder, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "net.stablehlo")]) == 0
    printed = capsys.readouterr()
    assert "takes uint8 pixels ['batch', 12, 12, 3], gives 3 probabilities" in printed.out
    assert "100 generated pictures" in printed.out and "may take a minute" in printed.out
    assert "`pip install jax flatbuffers pillow`" in (ROOT / "docs" / "serving.md").read_text()
    predictor = rj.Predictor.from_run(run)
    files = sorted(folder.rglob("*.png"))[:7]
    np.save(tmp_path / "in.npy", np.stack([predictor.prepare(str(path)) for path in files]))
    places = [str(tmp_path / name) for name in ("net.stablehlo", "in.npy", "out.npy")]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *places], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['across', 'along', 'plain']", done.stderr
    np.testing.assert_allclose(np.load(places[2]), predictor(files), atol=1e-5)


def test_onnx_runtime_computes_the_same(run, folder, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs jax2onnx and onnxruntime")
    assert main(["export", str(run), str(tmp_path / "net.onnx")]) == 0
    predictor = rj.Predictor.from_run(run)
    files = sorted(folder.rglob("*.png"))[:5]
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    pixels = np.stack([predictor.prepare(str(path)) for path in files])
    found = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    np.testing.assert_allclose(found, predictor(files), atol=1e-5)
    predicted = session.get_modelmeta().custom_metadata_map
    assert json.loads(predicted["class_names"]) == ["across", "along", "plain"]


NETWORKS = {
    "bottlenecks behind a pool": {"block": "bottleneck", "stem": "7x7", "stem_pool": "max", "shortcut": "D"},
    "activation first": {"preact": True, "stem": "7x7", "stem_pool": "max_zero", "attention": "se"},
    "norms over groups": {"norm": "group", "stem": "3x3"},
}


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_operations_of_the_family_are_translated(fields, tmp_path):
    """With values that tell: a pool without its border, say, would pass with a network that starts as zero."""
    pytest.importorskip("onnxruntime", reason="needs jax2onnx and onnxruntime")
    from resnet_jax.predict.export_program import write_onnx

    model = ResNet(stage_sizes=(1, 1), widths=(32, 64), num_classes=5, **fields)
    images = jax.random.normal(jax.random.key(0), (3, 33, 33, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.3 * jnp.abs(jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys, strict=True)]
    variables = jax.tree.unflatten(tree, moved)
    call = write_onnx(partial(model.apply, variables), (33, 33, 3), np.float32, {}, tmp_path / "net.onnx")
    wanted = np.asarray(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(call(np.asarray(images)), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_program_that_differs_is_not_written(run, tmp_path, monkeypatch, capsys):
    from resnet_jax.predict import export_program

    monkeypatch.setattr(
        export_program, "pixels_to_probabilities", lambda predictor: lambda pixels: pixels[:, 0, 0] / 255.0
    )
    assert main(["export", str(run), str(tmp_path / "net.stablehlo")]) == 2
    assert "differs from the network" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_several_labels_from_a_table(tmp_path, capsys):
    """Stripes across, along, both or none; the best checkpoint is that of the best mean average precision."""
    rows, rng = [["path", "label"]], np.random.default_rng(0)
    for i in range(48):
        across, along = i % 2, i // 2 % 2
        y, x = np.mgrid[:12, :12]
        pixels = 100 * across * (y // 2 % 2) + 100 * along * (x // 2 % 2) + rng.integers(0, 50, (12, 12))
        Image.fromarray(np.repeat(pixels[..., None], 3, -1).astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", ";".join(["across"] * across + ["along"] * along)])
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    flags = ["--data.dataset", f"csv:{tmp_path / 'table.csv'}", "--train.epochs", "25"]
    assert main(["train", "--workdir", str(tmp_path / "run"), *SHORT, *flags]) == 2
    assert "add --train.loss binary" in capsys.readouterr().err
    flags += ["--train.loss", "binary"]
    assert main(["train", "--workdir", str(tmp_path / "run"), *SHORT, *flags, "--train.eval_every_epochs", "5"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["metric"] == "validation/map" and summary["validation"]["map"] > 0.9
    calibration = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert len(calibration["thresholds"]) == 2
    shown = json.loads((tmp_path / "run" / "measures.json").read_text())["calibrated"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"threshold {100 * each:.1f}\N{NO-BREAK SPACE}%" in page for each in calibration["thresholds"])
    how = "(all labels right, threshold one half)"
    assert f"accuracy {how}" in " ".join(capsys.readouterr().out.split()) and f"Accuracy {how}" in page
    assert main(["evaluate", str(tmp_path / "run"), "--per-class", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["thresholds"].values()) == calibration["thresholds"]
    figures = {name: found["validation"][name] for name in ("accuracy", "macro_recall", "macro_f1")}
    assert figures == pytest.approx({name: shown[name] for name in figures})
    recalls = {row["name"]: row["recall"] for row in shown["classes"]}
    assert {name: row["recall"] for name, row in found["validation"]["classes"].items()} == pytest.approx(recalls)
    assert found["validation"]["at_one_half"]["macro_f1"] == pytest.approx(summary["validation"]["macro_f1"])
    assert (
        main(["predict", str(tmp_path / "run"), *(str(tmp_path / f"{i}.png") for i in range(40)), "--format", "json"])
        == 0
    )
    predicted = [{row["name"] for row in json.loads(line)["classes"]} for line in capsys.readouterr().out.splitlines()]
    truth = [set(row[1].split(";")) - {""} for row in rows[1:41]]
    assert np.mean([a == b for a, b in zip(predicted, truth, strict=True)]) > 0.85


@pytest.mark.parametrize("kind", ["16-bit grey", "5 channels"])
def test_pictures_that_are_not_rgb(tmp_path, kind, capsys):
    """What tells the classes apart lies in the low bits, or in the last channel, and would be lost in 8 bits of RGB."""
    for name, level in (("low", 0), ("high", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(16):
            if kind == "16-bit grey":
                pixels = (1000 + 120 * level + RNG.integers(0, 60, (12, 14))).astype(np.uint16)
                Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
            else:
                pixels = RNG.random((12, 12, 5)).astype(np.float32)
                pixels[..., 4] = 0.3 * pixels[..., 4] + 0.5 * level
                np.save(tmp_path / "data" / name / f"{i}.npy", pixels)
    channels, mean, std = ("1", "0.0165", "0.001") if kind == "16-bit grey" else ("5", "0.5", "0.3")
    flags = ["--data.dataset", f"folder:{tmp_path / 'data'}", "--data.channels", channels, "--train.steps", "40"]
    flags += ["--data.mean", mean, "--data.std", std]
    assert main(["train", "--workdir", str(tmp_path / "run"), *SHORT, *flags]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["accuracy"] == 1.0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "data" / "high")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and all("high" in line.split("   ")[1] for line in lines[:16])
    assert lines[16].startswith("accuracy 100.00%"), lines[16]


def test_a_batch_is_shown_as_the_network_sees_it(folder, tmp_path):
    flags = ["--data.dataset", f"folder:{folder}", *SHORT, "--augment.mixup", "1.0", "--data.image_size", "12", "20"]
    assert main(["show-batch", str(tmp_path / "batch.png"), *flags]) == 0
    sheet = Image.open(tmp_path / "batch.png")
    assert sheet.size == (8 * (20 * 11 + 8), 12 * 11 + 8 + 2 * 14)  # two classes an image, each in a line
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.name", "resnet18"], "below the stride of resnet18, which shrinks images by 32"),
        (["--data.channels", "5"], "5"),
        (["--train.metric", "map"], "needs images with several labels"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, flags, says, capsys):
    command = ["train", "--workdir", str(tmp_path / "run"), *SHORT, "--data.dataset", f"folder:{folder}", *flags]
    assert main([*command, "--train.steps", "2"]) == 2
    assert says in capsys.readouterr().err
    assert flags[0] == "--data.channels" or not (tmp_path / "run" / "config.json").exists()  # before anything is read


def test_weights_of_other_channels_are_named(tmp_path, weights, capsys):
    model, variables = rj.load_pretrained(str(weights), in_channels=5)
    from safetensors.numpy import save_file

    save_file(rj.to_torch(model, variables), tmp_path / "five.safetensors")
    with pytest.raises(rj.InputError, match="takes images of 5 channels, the model 3"):
        rj.load_pretrained(str(tmp_path / "five.safetensors"), "cifar_resnet8")
