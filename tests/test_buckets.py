"""Runs in a bucket: an emulator of Google's over loopback, which tests start themselves."""

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import chex
import gcsfs
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.config import InputError
from resnet_jax.files import path_of
from resnet_jax.runs.folder import runs_under
from resnet_jax.runs.lock import hold
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training.build import restore
from resnet_jax.training.manifest import damage, steps_in

from .runs.test_folder import events_in

FLAGS = [
    "--model.name", "cifar_resnet8", "--train.steps", "40", "--train.batch_size", "32", "--train.ema_decay", "0.9",
    "--parallel.devices", "1", "--schedule.warmup_epochs", "0", "--train.eval_every_epochs", "0.5",
    "--checkpoint.every_steps", "10", "--log.every_steps", "2", "--log.no_report",
]  # fmt: skip


class Emulator:
    """Google's storage in a process of its own, which may go away for a while."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.start()

    def start(self):
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("emulator.py"))]
        self.process = subprocess.Popen([*command, str(self.port), str(self.folder)], stderr=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.1)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """An emulator with a bucket, at which this process and those that it starts find `gs://bucket1`."""
    found = Emulator(tmp_path_factory.mktemp("storage"))
    url = f"http://127.0.0.1:{found.port}"
    names = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield found
    found.kill()


@pytest.fixture
def bucket(emulator):
    return "gs://bucket1"


def train(workdir, *flags):
    command = [sys.executable, "-W", "ignore", "-m", "resnet_jax.cli", "train", "--workdir", workdir, *FLAGS, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"GLIBC_TUNABLES": ""}, **pipes)


def test_a_run_in_a_bucket_is_killed_goes_on_and_is_the_same_as_on_a_disk(bucket, tmp_path, capsys):
    folder = path_of(f"{bucket}/runs/a", "the run")
    process = train(str(folder))
    while not steps_in(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    with pytest.raises(InputError, match=f"in use by process {process.pid} on"), hold(folder / "lock"):
        pass
    process.kill()
    process.communicate()
    for workdir in (str(folder), str(tmp_path / "run")):
        process = train(workdir)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, out + err
        assert ("resuming at step" in out) == workdir.startswith("gs://")
    (ours, step), (theirs, _) = restore(str(folder)), restore(tmp_path / "run")
    assert step == 40
    chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(theirs))
    lines = [[{k: v for k, v in line.items() if "/loss" in k} for line in read_lines(place / "metrics.jsonl")]
             for place in (folder, tmp_path / "run")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) >= 20
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "curves.png", "best.json", "checkpoints"}
    assert "lock" not in names
    events = [event for name in names if name.startswith("events.out") for event in events_in(folder / name)]
    found = {(event.step, value.tag) for event in events for value in event.summary.value}
    assert found >= {(38, "train/loss"), (40, "train/loss"), (40, "validation/loss"), (40, "test/loss")}
    assert [run["state"] for run in runs_under(folder.parent)] == ["finished"]
    Image.new("L", (8, 8), 99).save(tmp_path / "picture.png")
    for command in (["evaluate", "{}", "--json"], ["predict", "{}", str(tmp_path / "picture.png"), "--format", "json"]):
        shown = []
        for place in (folder, tmp_path / "run"):
            capsys.readouterr()
            assert main([word.format(place) for word in command]) == 0
            out = capsys.readouterr().out
            shown.append(json.loads(out[out.index("{") :]))
        assert shown[0] == shown[1]
    assert main(["export", str(folder), f"{bucket}/weights", "--format", "orbax"]) == 0
    weights = ocp.StandardCheckpointer().restore(path_of(f"{bucket}/weights", "the weights"))
    jax.tree.map(np.testing.assert_array_equal, weights, dict(theirs.ema))
    flags = ["--train.steps", "50"]  # of another recipe
    assert main(["train", "--workdir", str(folder), *FLAGS, *flags]) == 2
    (newest, *_) = steps_in(folder / "checkpoints")
    assert damage(folder / "checkpoints" / str(newest)) is None
    file = folder / "checkpoints" / str(newest) / "record" / "metadata"
    file.write_bytes(file.read_bytes().replace(b"cifar", b"CIFAR"))
    assert damage(folder / "checkpoints" / str(newest)) == "record/metadata has other contents"


def test_of_two_starts_at_once_one_trains_and_its_run_is_reported(bucket, capsys):
    folder = path_of(f"{bucket}/runs/c", "the run")
    both = [train(str(folder), "--train.steps", "20", "--train.eval_every_epochs", "9") for _ in range(2)]
    told = [process.communicate(timeout=900) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], told
    first, second = codes.index(0), codes.index(2)
    assert f"error: {folder} is in use by process {both[first].pid} on " in told[second][1]
    assert "give another --workdir" in told[second][1] and "Traceback" not in told[second][1]
    assert steps_in(folder / "checkpoints")[0] == 20
    assert [x["step"] for x in read_lines(folder / "metrics.jsonl") if "train/loss" in x] == [*range(2, 21, 2)]
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert f"{folder}/report.html" in capsys.readouterr().out
    measured, summary = (json.loads((folder / name).read_text()) for name in ("measures.json", "summary.json"))
    assert measured["accuracy"] == pytest.approx(summary["ema/test"]["accuracy"])
    assert f"{100 * measured['accuracy']:.1f}\N{NO-BREAK SPACE}%" in (folder / "report.html").read_text()
    assert (folder / "calibration.json").exists()


def test_a_bucket_that_does_not_answer_for_a_while_costs_no_step(emulator, bucket):
    folder = path_of(f"{bucket}/runs/b", "the run")
    process = train(str(folder))
    while not steps_in(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    emulator.kill()
    time.sleep(4)
    emulator.start()
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    (newest, *_) = steps_in(folder / "checkpoints")
    assert newest == 40 and damage(folder / "checkpoints" / "40") is None
    assert [x["step"] for x in read_lines(folder / "metrics.jsonl") if "train/loss" in x] == [*range(2, 41, 2)]


def test_pictures_tables_and_weights_lie_in_a_bucket(bucket, tmp_path, capsys):
    data, rows = path_of(f"{bucket}/data", "the data"), ["path,label"]
    for name, grey in (("dark", 40), ("light", 200)):
        for i in range(12):
            file = io.BytesIO()
            Image.new("L", (8, 8), grey + i).save(file, "PNG")
            (data / "train" / name / f"{i}.png").write_bytes(file.getvalue())
            rows.append(f"train/{name}/{i}.png,{name}")
    (data / "train" / ".DS_Store").write_bytes(b"x")
    (data / "table.csv").write_text("\n".join(rows))
    flags = ["--model.name", "cifar_resnet8", "--train.steps", "4", "--train.batch_size", "8", "--data.image_size", "8"]
    flags += ["--schedule.warmup_epochs", "0", "--log.no_report", "--log.no_tensorboard", "--data.workers", "0"]
    for kind, place in (("folder", "data"), ("csv", "data/table.csv")):
        run = str(tmp_path / kind)
        assert main(["train", "--workdir", run, "--data.dataset", f"{kind}:{bucket}/{place}", *flags]) == 0
        assert "2 classes" in capsys.readouterr().out
    assert main(["export", run, f"{bucket}/net.safetensors"]) == 0
    capsys.readouterr()
    shown = []
    for source in (run, f"{bucket}/net.safetensors"):
        assert main(["predict", source, f"{data}/train/light", "--format", "csv"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and f"{bucket}/data/train/light/3.png" in shown[0]
    assert main(["train", "--workdir", run, "--data.dataset", f"folder:{bucket}/nothing", *flags]) == 2
    assert "there is no such folder" in capsys.readouterr().err


COMMANDS = ["train --workdir {}/run", "plan --workdir {}/run", "evaluate {}/run", "report {}/run", "runs {}"]
COMMANDS += ["predict {}/run {}/picture.png", "export {}/run out.pth", "train --data.dataset folder:{}/data"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bucket_that_is_not_there_is_named(bucket, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.format("gs://nosuch", "gs://nosuch").split()) == 2
    err = capsys.readouterr().err
    assert "the bucket gs://nosuch cannot be used (it does not exist): check its name" in err and "recipe" not in err


@pytest.mark.parametrize("command", ["train --workdir {}/run", "evaluate {}/run", "runs {}"])
def test_a_bucket_that_cannot_be_reached_is_named_with_what_to_check(bucket, command, capsys, monkeypatch):
    async def at_once(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    assert main(command.format("gs://bucket9").split()) == 2
    err = capsys.readouterr().err
    assert "the bucket gs://bucket9 cannot be used (Cannot connect to host 127.0.0.1:1" in err and "recipe" not in err
    assert "check its name, your right to it (gcloud auth application-default login) and the network" in err


@pytest.mark.parametrize(
    ("path", "words"),
    [("gs://", "give the bucket's name"), ("s3://bucket1/run", "only gs://BUCKET/PATH is supported")],
)
def test_a_path_in_no_bucket_is_refused(path, words, capsys):
    assert main(["train", "--workdir", path, *FLAGS]) == 2
    assert words in capsys.readouterr().err


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gcs"):
        path_of("gs://bucket1/run", "--workdir")


@pytest.mark.parametrize(
    "error", [gcsfs.retry.HttpError({"code": 403, "message": "no right"}), OSError("Forbidden: x")]
)
@pytest.mark.parametrize("command", ["runs gs://bucket1/runs", "evaluate gs://bucket1/run"])
def test_a_bucket_without_a_right_to_it_is_a_sentence(bucket, error, command, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.is_dir", refuse)
    monkeypatch.setattr("etils.epath.gpath.PosixGPath.read_bytes", refuse)
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert (
        "error: the bucket gs://bucket1 cannot be used (" in err and str(error)[:6] in err and "your right to it" in err
    )
