import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from resnet_jax.config import Config, InputError
from resnet_jax.runs import lock as locks
from resnet_jax.runs.folder import locked
from resnet_jax.runs.lock import Holder, acquire, hold, kernel, live_holder, start_of

HERE = Holder(socket.gethostname(), os.getpid(), start_of(os.getpid()), kernel(), "mine")
ELSEWHERE = Holder("elsewhere", 7, "1", "another-boot pid:[1]", "theirs")

SERVE = """
import sys
from pathlib import Path
from resnet_jax.config import InputError
from resnet_jax.runs import lock
lock.TOUCHED_EVERY = 0.1
def no_flock(*_):
    raise OSError(95, "Operation not supported")
if sys.argv[1] == "no flock":
    lock.fcntl.flock = no_flock
print("ready", flush=True)
while path := sys.stdin.readline().strip():
    try:
        with lock.hold(Path(path)) as held:
            print("held", flush=True)
            sys.stdin.readline()
            lost = held.lost(now=True)
        print("lost" if lost else "kept", flush=True)
    except InputError as error:
        print(error, flush=True)
"""


class Other:
    """Another process, which holds the lock of a path until it is told something else."""

    def __init__(self, disk="flock", prefix=()):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*prefix, sys.executable, "-c", SERVE, disk], **pipes)
        assert self.hear() == "ready"

    def tell(self, text):
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def ask(self, text):
        self.tell(text)
        return self.hear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("disk", ["flock", "no flock"])
def test_of_two_processes_that_start_at_once_one_holds(tmp_path, disk):
    """In every second trial a killed run has left its lock behind."""
    with Other(disk) as one, Other(disk) as two:
        for trial in range(20):
            path = tmp_path / str(trial)
            if trial % 2:
                path.write_text(json.dumps(asdict(HERE) | {"start": "1"}))
            for process in (one, two):
                process.tell(path)
            told = [process.hear() for process in (one, two)]
            assert told.count("held") == 1, (trial, told)
            assert any("is in use by" in text for text in told), (trial, told)
            assert (one, two)[told.index("held")].ask("let go") == "kept"
            assert not path.exists()
    assert sorted(tmp_path.iterdir()) == []


def test_a_process_with_other_numbers_is_seen(tmp_path):
    """As in another container of the same host."""
    prefix = ("unshare", "-rpf", "--mount-proc")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user have process numbers of their own")
    path = tmp_path / "lock"
    with Other(prefix=prefix) as inside:
        assert inside.ask(path) == "held"
        assert live_holder(path).pid < 100
        with pytest.raises(InputError, match="is in use by process"):
            acquire(path)
        assert inside.ask("let go") == "kept"
        with hold(path):
            assert "is in use by process" in inside.ask(path)
        assert inside.ask(path) == "held"
    began = time.monotonic()
    while live_holder(path) is not None:
        assert time.monotonic() - began < 30  # until what we killed is dead
    with hold(path):
        assert live_holder(path).pid == os.getpid()
    assert time.monotonic() - began < 30  # without watching whether it is touched


def test_a_killed_holder_is_recognised_at_once(tmp_path):
    path = tmp_path / "lock"
    for disk in ("flock", "no flock"):
        with Other(disk) as other:
            assert other.ask(path) == "held"
            with pytest.raises(InputError, match="is in use by process"):
                acquire(path)
        assert path.exists() and live_holder(path) is None
        began = time.monotonic()
        with hold(path):
            pass
        assert time.monotonic() - began < 30  # without watching whether it is touched


@pytest.mark.parametrize("disk", ["flock", "no flock"])
def test_a_holder_notices_that_its_lock_was_removed_or_taken(tmp_path, disk):
    path = tmp_path / "lock"
    with Other(disk) as one, Other(disk) as two:
        assert one.ask(path) == "held"
        path.unlink()
        assert one.ask("let go") == "lost"
        assert one.ask(path) == "held"
        path.unlink()
        assert two.ask(path) == "held"
        assert one.ask("let go") == "lost" and path.exists()
        assert two.ask("let go") == "kept" and not path.exists()


def test_a_folder_that_was_renamed_is_found(tmp_path):
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run" / "lock") as lock:
        assert not lock.lost(now=True)
        (tmp_path / "run").rename(tmp_path / "moved")
        assert lock.lost(now=True) and lock.moved_to() == tmp_path / "moved"
        assert live_holder(tmp_path / "moved" / "lock") == lock.holder
    assert not (tmp_path / "moved" / "lock").exists()


@pytest.mark.parametrize(
    ("holder", "age", "held"),
    [
        (HERE, 0, True),
        (HERE, 9999, True),  # this host knows better than the clock
        (Holder(HERE.host, HERE.pid, HERE.start), 9999, True),
        (Holder(HERE.host, HERE.pid, "1", HERE.kernel), 0, False),  # another process had our number before
        (Holder(HERE.host, 2**22 + 1, HERE.start, HERE.kernel), 0, False),
        (ELSEWHERE, 30, True),
        (ELSEWHERE, 300, False),
        (ELSEWHERE, -9e8, False),  # touched by a clock that was years ahead, and no more
    ],
)
def test_a_lock_that_was_left_behind_is_recognised(tmp_path, holder, age, held, monkeypatch):
    monkeypatch.setattr(locks, "WATCHED_FOR", 0.2)
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    assert (live_holder(path) is not None) == held
    if held:
        with (
            pytest.raises(InputError, match=f"in use by process {holder.pid} on {holder.host}"),
            locked(tmp_path, Config()),
        ):
            pass
        assert json.loads(path.read_text()) == asdict(holder)
    else:
        threads = threading.active_count()
        with locked(tmp_path, Config()) as lock:
            assert threading.active_count() == threads + 1
            assert json.loads(path.read_text()) == asdict(lock.holder)
        assert not path.exists() and threading.active_count() == threads


@pytest.mark.parametrize("ahead", [-180, 180])
def test_a_clock_three_minutes_off_calls_no_live_lock_stale(tmp_path, ahead, monkeypatch):
    """Ours, and that of a holder elsewhere whose disk takes the time from it."""
    monkeypatch.setattr(locks, "WATCHED_FOR", 2.0)
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    clock = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + ahead)
        assert live_holder(path) == ELSEWHERE
        with pytest.raises(InputError, match="is in use by process 7 on elsewhere"):
            acquire(path)
    done = threading.Event()

    def touch():
        while not done.wait(0.05):
            os.utime(path, (clock() + ahead,) * 2)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(InputError, match="is in use by process 7 on elsewhere"):
            acquire(path)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("text", ["", '{"host": ', "[]", "null", '{"host": 1, "pid": "x"}', "\0\xff", "[" * 100_000])
def test_a_damaged_lock_holds_nothing_unless_it_is_held(tmp_path, text, capfd):
    path = tmp_path / "lock"
    path.write_text(text, "latin-1")
    assert live_holder(path) is None
    with hold(path) as lock:
        assert live_holder(path) == lock.holder
        path.write_text(text, "latin-1")
        assert not lock.lost(now=True)
        with pytest.raises(InputError, match="is in use by"):
            acquire(path)
    assert bool(text) == (f"{path} was damaged" in capfd.readouterr().err)


def test_a_lock_that_is_no_file_is_named_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("as it was")
    for make in (lambda p: p.mkdir(), lambda p: p.symlink_to(outside), os.mkfifo):
        folder = tmp_path / "run"
        folder.mkdir()
        make(folder / "lock")
        with pytest.raises(InputError, match="cannot be written"), locked(folder, Config()):
            pass
        shutil.rmtree(folder)
    assert outside.read_text() == "as it was"
