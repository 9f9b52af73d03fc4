"""Real processes that train together over the loopback, and what happens when one of them is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import jax
import numpy as np
import pytest

from resnet_jax import InputError, load_pretrained
from resnet_jax.integrity import steps_in
from resnet_jax.sharding import await_coordinator
from resnet_jax.training.trackers import read_lines

FLAGS = [
    "--model.name", "cifar_resnet8", "--train.steps", "24",
    "--train.batch_size", "32", "--augment.flip", "random", "--augment.mixup", "0.2",
    "--schedule.warmup_epochs", "0", "--checkpoint.every_steps", "3", "--log.every_steps", "3", "--log.no_tensorboard",
    "--log.no_report",
    "--train.eval_every_epochs", "0.2",
]  # fmt: skip


IMPATIENT = """
import sys
from resnet_jax import cli, sharding
sharding.LOST_AFTER = 10
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command, but that a process counts as lost after 10 seconds, not 30."""


def start(
    workdir, processes, devices, strategy="jit", more=lambda i: [], told="flags", program=("-m", "resnet_jax.cli")
):
    """So many processes with so many virtual devices each, told who they are by flags or by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        "GLIBC_TUNABLES": "",
    }
    command = [sys.executable, *program, "train", "--workdir", str(workdir), *FLAGS]
    command += ["--parallel.strategy", strategy]
    together = ["--parallel.distributed", "auto"] if processes > 1 else []
    names = ["--parallel.coordinator", "--parallel.processes", "--parallel.process_id"]
    variables = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]

    def identity(i, words):
        values = [f"localhost:{port}", str(processes), str(i)]
        return zip(words, values, strict=True) if processes > 1 else []

    return [
        subprocess.Popen(
            [*command, *together, *chain(*(identity(i, names) if told == "flags" else [])), *more(i)],
            env=environment | dict(identity(i, variables) if told == "environment" else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running):
    for process in running:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err


def kill_after_a_checkpoint(running, workdir, victim):
    """Kills one process once a checkpoint is there; returns when it is dead."""
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert running[victim].poll() is None, running[victim].communicate()
        time.sleep(0.05)
    running[victim].send_signal(signal.SIGKILL)
    running[victim].communicate()
    assert not (workdir / "summary.json").exists()


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
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(folder, 1, 1))
    return folder


@pytest.mark.parametrize(("strategy", "told"), [("shard_map", "flags"), ("pmap", "environment")])
def test_two_processes_train_what_one_trains(strategy, told, tmp_path, alone):
    finish(start(tmp_path / "run", 2, 2, strategy, told=told))
    same_as(tmp_path / "run", alone)


def test_when_one_process_dies_the_other_ends_and_one_alone_goes_on(tmp_path, alone):
    running = start(tmp_path / "run", 2, 2, program=("-c", IMPATIENT))
    kill_after_a_checkpoint(running, tmp_path / "run", victim=1)
    began = time.monotonic()
    _, err = running[0].communicate(timeout=60)
    assert running[0].returncode not in (0, None) and time.monotonic() - began < 60
    assert "lost touch with another process" in err or "another task died" in err, err  # ours, or that of JAX
    finish(start(tmp_path / "run", 1, 4))
    same_as(tmp_path / "run", alone)


def test_two_go_on_where_one_was_killed_and_stop_together_when_one_is_told(tmp_path, alone):
    """Told while they compile: it takes a second until all know, as long as these steps do."""
    running = start(tmp_path / "run", 1, 1)
    kill_after_a_checkpoint(running, tmp_path / "run", victim=0)
    first = max(steps_in(tmp_path / "run" / "checkpoints"))
    running = start(tmp_path / "run", 2, 2)
    while "resuming at step" not in (line := running[0].stdout.readline()):
        assert line, running[0].communicate()
    running[1].send_signal(signal.SIGTERM)
    (out, err), _ = [process.communicate(timeout=60) for process in running]
    assert running[0].returncode == running[1].returncode == 0, err
    step = max(steps_in(tmp_path / "run" / "checkpoints"))
    assert f"stopped by SIGTERM after step {step}, which is saved" in out and first < step < 24
    finish(start(tmp_path / "run", 1, 4))
    same_as(tmp_path / "run", alone)


def test_processes_with_different_recipes_end_before_the_first_step(tmp_path):
    running = start(tmp_path / "run", 2, 1, more=lambda i: ["--optimizer.learning_rate", f"0.{i + 1}"])
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "processes 1 were given another recipe than process 0" in err, err


def test_a_coordinator_that_does_not_answer_is_named():
    with pytest.raises(InputError, match=r"coordinator localhost:1 did not answer for 1 seconds"):
        await_coordinator("localhost:1", 1)
    with pytest.raises(InputError, match="a host and a port"):
        await_coordinator("localhost", 1)
