"""Real processes that train together over the loopback, and how they end when one of them cannot go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax import Config, InputError, load_pretrained
from resnet_jax.config import ParallelConfig
from resnet_jax.runs.folder import locked
from resnet_jax.runs.processes import identity, split_address
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training.manifest import steps_in
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("processes")  # one process makes what they share

FLAGS = [
    "--model.name", "cifar_resnet8", "--train.steps", "24",
    "--train.batch_size", "32", "--augment.flip", "random", "--augment.mixup", "0.2",
    "--schedule.warmup_epochs", "0", "--checkpoint.every_steps", "3", "--log.every_steps", "3", "--log.no_tensorboard",
    "--log.no_report",
    "--train.eval_every_epochs", "0.2",
]  # fmt: skip


def start(workdir, processes, devices=1, more=lambda i: [], told="flags", only=None, folder=lambda i: ROOT, port=None):
    """So many processes with so many virtual devices each, told who they are by flags or by the environment.

    Args:
      more: flags of process i.
      only: the processes that are started, all by default.
      folder: where process i runs.
    """
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        "GLIBC_TUNABLES": "",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", str(workdir), *FLAGS]
    together = ["--parallel.distributed", "auto"] if processes > 1 else []
    names = ["--parallel.coordinator", "--parallel.processes", "--parallel.process_id"]
    variables = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]

    def who(i, words):
        values = [f"localhost:{port}", str(processes), str(i)]
        return zip(words, values, strict=True) if processes > 1 else []

    return [
        subprocess.Popen(
            [*command, *together, *chain(*(who(i, names) if told == "flags" else [])), *more(i)],
            env=environment | dict(who(i, variables) if told == "environment" else []),
            cwd=folder(i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (range(processes) if only is None else only)
    ]


def ends(process, status, *words):
    """Checks that a process ends within a minute, with this status and these words and nothing raw."""
    began = time.monotonic()
    out, err = process.communicate(timeout=240)
    assert process.returncode == status and time.monotonic() - began < 60, (process.returncode, out + err)
    assert all(word in err for word in words), err
    assert "Traceback" not in err and "stack trace" not in err, err


def finish(running):
    for process in running:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err


def kill_after(sign, running, workdir, victim, also=None):
    """Kills one process, perhaps after telling another to stop, once a path in the run's folder is there."""
    while not any(workdir.glob(sign)):
        assert running[victim].poll() is None, running[victim].communicate()
        time.sleep(0.02)
    if also is not None:
        running[also].send_signal(signal.SIGTERM)
    running[victim].send_signal(signal.SIGKILL)
    running[victim].communicate()
    assert not (workdir / "summary.json").exists()


CHECKPOINT = "checkpoints/[0-9]*[0-9]"


def same_as(workdir, expected):
    ours, theirs = (load_pretrained(str(folder))[1] for folder in (workdir, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)
    lines, others = (list(read_lines(f / "metrics.jsonl")) for f in (workdir, expected))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    losses = [[line["train/loss"] for line in run if "train/loss" in line] for run in (lines, others)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    counts = {json.loads((f / "summary.json").read_text())["test"]["count"] for f in (workdir, expected)}
    assert counts == {360}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, and a copy of its folder as it was at its first checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    running = start(folder / "run", 1, 1)
    while not any((folder / "run").glob(CHECKPOINT)):
        assert running[0].poll() is None, running[0].communicate()
        time.sleep(0.02)
    running[0].send_signal(signal.SIGSTOP)
    shutil.copytree(folder / "run", folder / "part", ignore=shutil.ignore_patterns("lock*"))
    running[0].send_signal(signal.SIGCONT)
    finish(running)
    return folder / "run", folder / "part"


def test_two_processes_go_on_with_the_run_of_one_and_train_what_one_trains(tmp_path, alone):
    """From its sound checkpoint, though a newer one is damaged, which process 0 finds and sets aside."""
    whole, part = alone
    shutil.copytree(part, tmp_path / "run")
    sound = max(steps_in(part / "checkpoints"))
    assert sound < 24 and not (part / "summary.json").exists()
    newer = tmp_path / "run" / "checkpoints" / str(sound + 1)
    shutil.copytree(newer.with_name(str(sound)), newer)
    largest = max((path for path in newer.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"?" + largest.read_bytes()[1:])
    finish(start(tmp_path / "run", 2, 2, lambda i: ["--parallel.strategy", "pmap", "--log.report"], "environment"))
    kept = json.loads((tmp_path / "run" / "measures.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert kept["count"] == 360  # both have evaluated for the page, which the first has written
    assert kept["accuracy"] == pytest.approx(summary["ema/test"]["accuracy"], abs=1e-6)
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "damaged" / f"{sound + 1}-0").is_dir()
    same_as(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("sign", "victim", "also"),
    [("config.json", 0, None), ("checkpoints", 1, None), (CHECKPOINT, 1, 0)],
    ids=["starting", "compiling", "while the other one is told to stop"],
)
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(sign, victim, also, tmp_path):
    running = start(tmp_path / "run", 2, 2)
    kill_after(sign, running, tmp_path / "run", victim, also)
    ends(running[1 - victim], 1, f"error: process {victim} was lost")


def test_when_the_first_dies_the_other_ends_two_go_on_and_stop_together_and_one_alone_goes_on(tmp_path, alone):
    """Told while they compile: it takes a second until all know, as long as these steps do."""
    running = start(tmp_path / "run", 2, 2)
    kill_after(CHECKPOINT, running, tmp_path / "run", victim=0)
    ends(running[1], 1, "error: process 0 was lost", "start the same command again in all processes")
    first = max(steps_in(tmp_path / "run" / "checkpoints"))
    running = start(tmp_path / "run", 2, 2, lambda i: ["--parallel.strategy", "shard_map"])
    while "resuming at step" not in (line := running[0].stdout.readline()):
        assert line, running[0].communicate()
    running[1].send_signal(signal.SIGTERM)
    (out, err), _ = [process.communicate(timeout=240) for process in running]
    assert running[0].returncode == running[1].returncode == 0, err
    step = max(steps_in(tmp_path / "run" / "checkpoints"))
    assert f"stopped by SIGTERM after step {step}, which is saved" in out and first < step < 24
    finish(start(tmp_path / "run", 1))
    same_as(tmp_path / "run", alone[0])


def test_fields_that_differ_are_named_before_the_first_step(tmp_path):
    fields = {
        "optimizer.learning_rate": ("0.1", "0.2"),
        "checkpoint.every_steps": ("3", "4"),
        "parallel.fsdp": ("1", "2"),
    }
    running = start(tmp_path / "run", 2, more=lambda i: chain(*((f"--{name}", of[i]) for name, of in fields.items())))
    for process in running:
        ends(process, 2, *(f"{name} is {a} on process 0, {b} on process 1" for name, (a, b) in fields.items()))
    assert not (tmp_path / "run").exists()


def test_another_folder_on_one_is_named(tmp_path):
    for process in start(tmp_path, 2, more=lambda i: ["--workdir", str(tmp_path / f"run{i}")]):
        ends(process, 2, "--workdir must be the same folder for all processes", "run0, process 1 has", "run1")


def write_pictures(root, classes, count):
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 12), (i, 99, 0)).save(root / label / f"{i}.png")


OWN = ["--data.dataset", "folder:pictures", "--data.image_size", "8", "--train.batch_size", "8"]


def test_other_pictures_and_classes_on_one_are_named_before_the_first_step(tmp_path):
    write_pictures(tmp_path / "0" / "pictures", ["cat", "dog"], 10)
    write_pictures(tmp_path / "1" / "pictures", ["cat", "cow"], 20)
    for process in start(tmp_path / "run", 2, more=lambda i: OWN, folder=lambda i: tmp_path / str(i)):
        ends(
            process,
            2,
            "train pictures is",
            "validation pictures is",
            'class names is ["cat", "dog"] on process 0, ["cat", "cow"]',
        )


def test_a_bad_picture_on_one_ends_both_with_its_name(tmp_path):
    for i in range(2):
        write_pictures(tmp_path / str(i) / "pictures", ["cat", "dog"], 10)
    for path in (tmp_path / "1" / "pictures" / "cat").iterdir():
        path.write_bytes(b"no picture")
    running = start(tmp_path / "run", 2, more=lambda i: OWN, folder=lambda i: tmp_path / str(i))
    ends(running[0], 2, "error: process 1 failed: ", "cat")
    ends(running[1], 2, "error: ", "cat")


def test_a_lock_that_another_run_holds_ends_both(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", Config()):
        (tmp_path / "run" / "config.json").unlink()
        running = start(tmp_path / "run", 2)
        ends(running[0], 2, "is in use by process")
        ends(running[1], 2, "error: process 0 failed: ", "is in use by process")


def test_processes_that_never_join_and_a_port_in_use_are_named(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        waiting = [
            *start(tmp_path / "a", 3, more=lambda i: ["--parallel.join_within", "3"], only=[0]),
            *start(tmp_path / "b", 3, more=lambda i: ["--parallel.join_within", "3"], only=[1]),
            *start(tmp_path / "c", 2, only=[0], port=port),
        ]
        ends(waiting[0], 2, "process 1, 2 of 3 did not join within 3 seconds")
        ends(waiting[1], 2, "process 0 did not answer at parallel.coordinator localhost:")
        ends(waiting[2], 2, f"process 0 cannot listen at port {port}", "another port")


def test_processes_that_were_given_other_numbers_end(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [*start(tmp_path, 2, only=[0], port=port), *start(tmp_path, 3, only=[1], port=port)]:
        ends(process, 2, "process 1 cannot join: it was given 3 processes, process 0 was given 2")


def test_an_identity_that_makes_no_sense_is_named(monkeypatch):
    with pytest.raises(InputError, match="a host and a port"):
        split_address("localhost")
    with pytest.raises(InputError, match=r"parallel.process_id 2: of 2 processes the first is 0"):
        ParallelConfig(distributed="auto", coordinator="localhost:1", processes=2, process_id=2)
    for name, value in (("COORDINATOR_ADDRESS", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "2")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(InputError, match=r"parallel.process_id 2: with 2 processes it is from 0 to 1"):
        identity(ParallelConfig(distributed="auto"))
