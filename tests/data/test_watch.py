import errno
import subprocess
import sys
import threading

import pytest

from resnet_jax.data.watch import Stalled, awaited, name_what_hangs, why_it_died


def test_items_and_errors_come_through():
    def source():
        yield from range(5)
        raise KeyError("the end")

    stream = awaited(source(), 10.0, str)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="the end"):
        next(stream)
    assert list(awaited(iter("abc"), 10.0, str)) == ["a", "b", "c"]


def test_a_stream_that_is_left_ends_its_thread():
    before = threading.active_count()
    stream = awaited(iter(range(10**9)), 10.0, str)
    assert next(stream) == 0 and threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


class Examples:
    """Place 1 is damaged, place 2 hangs."""

    def __init__(self):
        self.freed = threading.Event()

    def __call__(self, place):
        if place == 1:
            raise ValueError("damaged")
        return place if place != 2 else self.freed.wait(20)

    def name(self, place):
        return f"picture {place}"


def test_what_hangs_is_named():
    examples = Examples()

    def explain():
        try:
            return name_what_hangs(examples, range(4), 0.4)
        finally:
            examples.freed.set()

    stream = awaited((examples(p) for p in (0, 2)), 0.4, explain)
    assert next(stream) == 0
    with pytest.raises(Stalled, match=r"data.timeout = 0.4 seconds: picture 2 has been under way for \d+ seconds"):
        next(stream)


def test_where_nothing_hangs_any_more_the_disk_or_a_worker_may():
    assert "can be read now" in name_what_hangs(Examples(), range(2), 5.0)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search"),
            "/dev/shm is full: lower",
        ),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search"), "killed for its memory"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code 1. Search"),
            "needs its work under `if",
        ),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -11. Search"), "with exit code -11"),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full: lower"),
    ],
)
def test_a_worker_that_died_says_why(error, says):
    def source():
        yield 1
        raise error

    with pytest.raises(Stalled, match="the same command goes on from the last checkpoint") as caught:
        list(awaited(source(), 10.0, str))
    assert says in str(caught.value)
    assert why_it_died(RuntimeError("something else")) == why_it_died(OSError(errno.EIO, "broken")) == ""


SCRIPT = """
import numpy as np
from resnet_jax.config import AugmentConfig, Config, DataConfig, TrainConfig
from resnet_jax.data.loader import BadImages, train_batches
from resnet_jax.data.sources import ArraySource
from resnet_jax.training.sharding import make_mesh

data, train = DataConfig(image_size=4, on_device=False, workers=WORKERS), TrainConfig(batch_size=4)
config = Config(data=data, augment=AugmentConfig(crop="none", flip="none", interpolation="bilinear"), train=train)
source = ArraySource(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int64))
batches = train_batches(source, config, make_mesh(1), BadImages("error"), range(3))
for batch in batches:
    print(batch["image"].shape)
"""


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            SCRIPT,
            'script.py again, which does all of its work once more: put the work under `if __name__ == "__main__":`',
        ),
        (SCRIPT + "print(__name__)", 'needs its work under `if __name__ == "__main__":`'),
    ],
)
def test_a_script_that_workers_would_run_again_is_told_so(script, says, tmp_path):
    (tmp_path / "script.py").write_text(script.replace("WORKERS", "1"))
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and says in ended.stderr, ended.stderr


def test_a_script_without_workers_may_do_its_work_anywhere(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("WORKERS", "0"))
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "(4, 4, 4, 3)\n" * 3, ended.stderr


def test_the_keeper_of_shared_memory_outlives_the_warnings_of_a_scheduler():
    """It is a process of Python's own, in the group to which they go; without it the next batch breaks a pipe."""
    script = """
import os, signal, subprocess
from multiprocessing.shared_memory import SharedMemory
from resnet_jax.data.watch import keep_tracker

keep_tracker(0)
def children():
    return open(f"/proc/self/task/{os.getpid()}/children").read().split()

assert not children()
keep_tracker(1)
(keeper,) = children()
for number in (signal.SIGUSR1, signal.SIGHUP):
    os.kill(int(keeper), number)
memory = SharedMemory(create=True, size=8)
memory.close()
memory.unlink()
assert children() == [keeper] and open(f"/proc/{keeper}/stat").read().split()[2] != "Z"
print("there")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "there\n", done.stderr
