"""Real processes that are killed, told to stop, run out of disk, or wait for data that never comes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import pytest
from PIL import Image

from resnet_jax.cli import MEMORY
from resnet_jax.config import Config, InputError
from resnet_jax.runs.folder import describe_run, locked, runs_under
from resnet_jax.runs.lock import live_holder
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training.build import read_run
from resnet_jax.training.manifest import damage, steps_in
from resnet_jax.training.parts import make_parts

from ..training.test_loop import lines_of
from . import test_processes
from .small_recipe import Small

FLAGS = [
    "--model.name", "cifar_resnet8", "--train.steps", "240", "--train.batch_size", "32", "--train.ema_decay", "0.9",
    "--augment.flip", "random", "--augment.mixup", "0.2", "--schedule.name", "constant", "--schedule.warmup_epochs",
    "0.5", "--log.no_tensorboard", "--log.no_report",
    "--train.eval_every_epochs", "0.5", "--checkpoint.every_steps", "9", "--log.every_steps", "7",
]  # fmt: skip
"""The schedule does not depend on the length of the run, so that runs of all lengths share their programs."""
SMALL = ["--config", str(Path(__file__).with_name("small_recipe.py")), *FLAGS[2:]]
"""The same with a network that is traced and compiled at once, where the network does not matter."""
ALONE = os.environ | {"XLA_FLAGS": "", "GLIBC_TUNABLES": MEMORY, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
PLACES = {"device": ["--train.steps_per_call", "3"], "host": ["--data.no_on_device"]}


def start(workdir, *flags, recipe=SMALL, before="true", **options):
    """A training process, with `MEMORY` from its start, so that it is not replaced and its number stays.

    `before` is what the shell does that becomes this process.
    """
    command = ["sh", "-c", f'{before}; exec "$@"', "sh", sys.executable, "-m", "resnet_jax.cli"]
    command += ["train", "--workdir", str(workdir), *recipe, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=ALONE, **pipes)


def wait_for(condition, process, seconds=600):
    """Waits while a process runs, which is killed if it takes too long: it would disturb the tests that follow."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            process.kill()
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def finish(process, status=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, out + err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Flags of a run -> the folder of such a run that nothing happened to."""
    made = {}

    def run(*flags, recipe=SMALL):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("undisturbed") / "run"
            finish(start(made[flags], *flags, recipe=recipe))
        return made[flags]

    return run


def same_run(folder, expected, steps, **parts):
    """State, record and every line but its timings, bit for bit."""
    (_, ours, record), (_, theirs, other) = (read_run(x, "latest", make_parts(parts)) for x in (folder, expected))
    chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(theirs))
    assert record == other and ours.step == steps
    assert lines_of(folder) == lines_of(expected)
    summaries = [json.loads((place / "summary.json").read_text()) for place in (folder, expected)]
    assert summaries[0]["best"] == summaries[1]["best"] and summaries[0]["test"] == summaries[1]["test"]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_ten_times_is_the_undisturbed_run_bit_for_bit(place, undisturbed, tmp_path):
    """At random times: while it starts, between checkpoints, and while one is being written."""
    draw, flags = random.Random(place), [*PLACES[place], "--train.steps", "360"]
    folder = tmp_path / "checkpoints"
    for kill in range(10):
        process = start(tmp_path, *flags, stdout=subprocess.DEVNULL)
        seen = set(os.listdir(folder)) if folder.exists() else set()
        if kill == 4:
            time.sleep(draw.uniform(0, 2))
        else:
            wait_for(lambda seen=seen: folder.exists() and set(os.listdir(folder)) - seen, process)
            time.sleep(draw.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()
        if kill == 0:
            with pytest.raises(InputError, match=f"in use by process {process.pid} on"), locked(tmp_path, Config()):
                pass
            assert describe_run(tmp_path)["state"] == "running"
        process.kill()
        process.communicate()
        assert live_holder(tmp_path / "lock") is None
    assert not (tmp_path / "summary.json").exists()
    assert [run["state"] for run in runs_under(tmp_path.parent) if run["folder"] == str(tmp_path)] == ["stopped"]
    finish(start(tmp_path, *flags))
    same_run(tmp_path, undisturbed(*flags), 360, model=Small())
    assert describe_run(tmp_path)["state"] == "finished" and not (tmp_path / "lock").exists()


def test_a_run_that_is_told_to_stop_saves_and_goes_on(undisturbed, tmp_path):
    told = ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGUSR1, 0), (signal.SIGHUP, 0))
    for number, status in told:
        before = max(steps_in(tmp_path / "checkpoints"), default=0)
        process = start(tmp_path, *PLACES["device"], recipe=FLAGS)
        wait_for(lambda b=before: any(x["step"] > b for x in read_lines(tmp_path / "metrics.jsonl")), process)
        process.send_signal(number)
        asked = time.monotonic()
        out, err = finish(process, status)
        assert time.monotonic() - asked < 60
        step = max(steps_in(tmp_path / "checkpoints"))
        name = signal.Signals(number).name
        assert step > before and f"stopped by {name} after step {step}, which is saved" in out and name in err
        assert f"; resnet-jax train --workdir {tmp_path} goes on from there" in out
        assert not (tmp_path / "lock").exists()
    finish(start(tmp_path, recipe=[]))
    same_run(tmp_path, undisturbed(*PLACES["device"], recipe=FLAGS), 240)


def test_under_nohup_a_terminal_that_goes_ends_nothing(tmp_path):
    flags = [*PLACES["device"], "--train.steps", "60", "--train.eval_every_epochs", "2"]
    process = start(tmp_path, *flags, before="trap '' HUP")
    wait_for(lambda: steps_in(tmp_path / "checkpoints"), process)
    process.send_signal(signal.SIGHUP)
    finish(process)
    assert max(steps_in(tmp_path / "checkpoints")) == 60


LONG = ["--train.steps", "100000", "--train.eval_every_epochs", "100000"]


def delete(folder):
    while folder.exists():  # a checkpoint may be on its way
        shutil.rmtree(folder, ignore_errors=True)


def delete_and_put_something_else_there(folder):
    delete(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody else's")


def move(folder):
    folder.rename(folder.with_name("moved"))


def remove_the_lock(folder):
    (folder / "lock").unlink()


@pytest.mark.parametrize("take", [delete, delete_and_put_something_else_there, move, remove_the_lock])
def test_a_run_whose_folder_is_taken_saves_elsewhere_and_says_so(take, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *PLACES["device"], *LONG, recipe=FLAGS)
    wait_for(lambda: len(steps_in(folder / "checkpoints")) > 0, process)
    take(folder)
    _, err = finish(process, 1)
    assert f"{folder} is no longer this run's" in err  # TensorStore has words of its own for a save under way
    (saved,) = [path for path in tmp_path.iterdir() if path != folder]
    assert (saved == tmp_path / "moved") == (take is move)
    step = max(steps_in(saved / "checkpoints"))
    assert f"is saved in {saved}; resnet-jax train --workdir {saved} goes on from there" in err
    assert damage(saved / "checkpoints" / str(step)) is None and not (saved / "lock").exists()
    if take is not remove_the_lock:  # but for the rest of a save that failed, nothing is put where the folder was
        there = [path for path in folder.rglob("*") if path.is_file()]
        left = [path.name for path in there if ".orbax-checkpoint-tmp" not in str(path)]
        assert left == (["notes.txt"] if take is delete_and_put_something_else_there else [])
    if take is delete:
        process = start(saved, recipe=[])
        wait_for(lambda: any(x["step"] > step for x in read_lines(saved / "metrics.jsonl")), process)
        process.terminate()
        finish(process)


@pytest.mark.parametrize("what", [signal.SIGUSR1, "lock"])
def test_two_processes_save_together_when_one_is_told_or_the_lock_goes(what, tmp_path):
    folder = tmp_path / "run"
    running = test_processes.start(folder, 2, 1, more=lambda i: LONG)
    wait_for(lambda: steps_in(folder / "checkpoints"), running[0])
    if what == "lock":
        (folder / "lock").unlink()
    else:
        running[1].send_signal(what)
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [int(what == "lock")] * 2, "\n".join(x for _, x in told)
    (place,) = [path for path in tmp_path.iterdir() if (path != folder) == (what == "lock")]
    step = max(steps_in(place / "checkpoints"))
    assert damage(place / "checkpoints" / str(step)) is None
    for out, err in told:
        assert f"is saved in {place}" in err if what == "lock" else f"after step {step}, which is saved" in out


def test_a_lock_that_another_run_takes_ends_the_first_and_leaves_the_second_alone(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *PLACES["device"], *LONG)
    wait_for(lambda: steps_in(folder / "checkpoints"), process)
    (folder / "lock").unlink()
    with locked(folder, Config()) as ours:
        _, err = finish(process, 1)
        assert f"{folder} is no longer this run's" in err  # TensorStore has words of its own for a save under way
        assert not ours.lost(now=True)
    assert any(steps_in(path / "checkpoints") for path in tmp_path.iterdir() if path != folder)


@pytest.mark.parametrize("redirect", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_a_run_that_cannot_print_goes_on_to_its_end(redirect, tmp_path):
    flags = [*SMALL, *PLACES["device"], "--train.steps", "20"]
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", str(tmp_path / "run"), *flags]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", *command], env=ALONE)
    assert process.wait(600) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
    for name in ("metrics.jsonl", "config.json", "summary.json"):
        for line in (tmp_path / "run" / name).read_text().splitlines() if name == "metrics.jsonl" else ():
            assert json.loads(line)["step"]


FAULTY = """
import os, signal, sys
from resnet_jax import cli
from resnet_jax.training import loop, checkpoints
{fault}
sys.exit(cli.main(sys.argv[1:]))
"""


def faulty(fault, workdir, *flags):
    """The command with a fault in it."""
    command = [sys.executable, "-c", FAULTY.format(fault=fault), "train", "--workdir", str(workdir), *SMALL]
    command += ["--train.steps", "40", *flags]
    return subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_drawn_of_a_run_comes_last_and_is_made_up_for(tmp_path):
    """A start that is killed while curves are drawn, then one whose figures fail, then one that nothing happens to."""
    die = "def kill(folder):\n    os.kill(os.getpid(), signal.SIGKILL)\nloop.draw_curves = kill"
    finish(faulty(die, tmp_path), -signal.SIGKILL)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 40
    assert not (tmp_path / "curves.png").exists() and not (tmp_path / "report.html").exists()
    fail = "def fail(folder, **parts):\n    raise ValueError('no fonts')\nloop.draw_curves = loop.make_report = fail"
    out, err = finish(faulty(fail, tmp_path, "--log.report"))
    assert "the run is finished" in out
    for name in ("curves.png", "report.html"):
        assert f"WARNING: there is no {name} (ValueError: no fonts)" in err
    out, err = finish(faulty("", tmp_path, "--log.report"))
    assert (tmp_path / "curves.png").exists() and (tmp_path / "report.html").exists() and "WARNING" not in err
    written = (tmp_path / "report.html").stat().st_mtime_ns
    finish(faulty("", tmp_path, "--log.report"))
    assert (tmp_path / "report.html").stat().st_mtime_ns == written


def test_a_last_checkpoint_or_summary_that_cannot_be_written_is_its_own_status(tmp_path):
    full = "raise OSError(28, 'No space left on device')"
    fault = f"""
save = checkpoints.ocp.AsyncCheckpointer.save
def refuse(self, folder, *rest, **named):
    if folder.name == "40":
        {full}
    save(self, folder, *rest, **named)
checkpoints.ocp.AsyncCheckpointer.save = refuse
"""
    _, err = finish(faulty(fault, tmp_path), 3)
    assert "the checkpoint of the last step, 40, could not be written" in err and "Traceback" not in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 40 and summary["test"]["count"] == 360
    row = describe_run(tmp_path)
    assert row["state"] == "failed" and "could not be written" in row["problem"]
    fault = f"def full(*_):\n    {full}\nloop.finish = full"
    _, err = finish(faulty(fault, tmp_path), 3)
    assert f"{tmp_path / 'summary.json'} could not be written" in err and "Traceback" not in err
    finish(faulty("", tmp_path))
    assert describe_run(tmp_path)["state"] == "finished"


def test_a_second_interrupt_leaves_at_once(tmp_path):
    """While the step compiles, which nothing interrupts from within."""
    environment = ALONE | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", str(tmp_path), "--model.name"]
    process = subprocess.Popen([*command, "cifar_resnet56"], env=environment, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    assert "SIGINT" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130 and not steps_in(tmp_path / "checkpoints")  # which the first alone would wait for
    process.stderr.close()


def test_a_full_or_read_only_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    """A file system of 12 MB of the run's own, that somebody fills up, and then makes read-only for a while."""
    disk, out = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", f"{disk}/run", *FLAGS, *PLACES["device"]]
    command += ["--train.steps", "600", "--train.eval_every_epochs", "2"]
    script = f'mount -t tmpfs -o size=12m tmpfs {disk} && "$@"; status=$?; cp -r {disk}/run {out}; exit $status'
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["unshare", "-rm", "sh", "-c", script, "sh", *command], env=ALONE, **pipes)
    inside = Path(f"/proc/{process.pid}/root{disk}")
    try:
        wait_for(lambda: steps_in(inside / "run" / "checkpoints"), process)
    except AssertionError as error:
        if "unshare" in str(error) or "mount" in str(error):
            pytest.skip("this system lets no user mount a file system of their own")
        raise
    lines = []
    with open(inside / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    while not any("could not be written" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], process.communicate()
    for line in (inside / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"]
    (inside / "filler").unlink()
    saved = max(steps_in(inside / "run" / "checkpoints"))
    wait_for(lambda: max(steps_in(inside / "run" / "checkpoints")) > saved, process)
    place = f"{disk}/run/checkpoints"
    enter = ["nsenter", "-t", str(process.pid), "-U", "-m", "--preserve-credentials", "sh", "-c"]

    def once_no_file_is_open(command):
        wait_for(lambda: subprocess.run([*enter, command], stderr=subprocess.DEVNULL).returncode == 0, process)

    subprocess.run([*enter, f"mount --bind {place} {place}"], check=True)
    once_no_file_is_open(f"mount -o remount,bind,ro {place}")
    while not any("Read-only file system" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], process.communicate()
    once_no_file_is_open(f"umount {place}")
    finish(process)
    predicted = "".join(lines)
    assert (
        "No space left" in predicted or "RESOURCE_EXHAUSTED" in predicted
    ) and "goes on and tries again" in predicted
    assert max(steps_in(out / "checkpoints")) == 600 and damage(out / "checkpoints" / "600") is None
    logged = [line["step"] for line in read_lines(out / "metrics.jsonl") if "train/loss" in line]
    assert logged == [*range(7, 600, 7), 600]
    best = json.loads((out / "summary.json").read_text())["best"]
    assert best["step"] in steps_in(out / "checkpoints")


def test_data_that_never_comes_ends_the_run_and_is_named(tmp_path):
    """A picture turns into a pipe that nobody writes into, as if its network drive had gone."""
    for split, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(folder / f"{i}.png")
    hanging, pipe = tmp_path / "data" / "train" / "b" / "3.png", tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = ["--data.dataset", f"folder:{tmp_path / 'data'}", "--data.no_on_device", "--data.workers", "1"]
    flags += ["--data.timeout", "6", "--train.batch_size", "8", "--train.eval_every_epochs", "99"]
    process = start(tmp_path / "run", *flags)
    wait_for((tmp_path / "run" / "lock").exists, process)
    pipe.replace(hanging)
    _, err = finish(process, 1)
    assert f"gave nothing for data.timeout = 6 seconds: {hanging} has been under way" in err


def children_of(pid):
    """Process numbers of a process's children, and their command lines."""
    found = " ".join(x.read_text() for x in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return {int(p): Path(f"/proc/{p}/cmdline").read_bytes().replace(b"\0", b" ") for p in found}


def in_own_memory(size, command, env):
    """A process to which /dev/shm is a disk of its own, of some size."""
    own = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*own, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen(
        [*own, f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh", *command], **pipes
    )


def test_nothing_is_left_of_a_run_that_is_killed_with_workers(tmp_path):
    temporary, command = tmp_path / "temporary", [sys.executable, "-m", "resnet_jax.cli", "train", *SMALL]
    temporary.mkdir()
    command += ["--workdir", str(tmp_path / "run"), "--data.no_on_device", "--data.workers", "2"]
    process = in_own_memory("64m", [*command, "--train.steps", "100000"], ALONE | {"TMPDIR": str(temporary)})
    wait_for(lambda: steps_in(tmp_path / "run" / "checkpoints"), process)
    children = children_of(process.pid)
    assert sum(b"spawn_main" in command for command in children.values()) == 2, children
    memory = os.open(f"/proc/{process.pid}/root/dev/shm", os.O_RDONLY)
    assert os.listdir(memory)
    process.kill()
    process.communicate(timeout=30)  # until everything that could write into its pipes has ended
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < until, children
        time.sleep(0.1)
    assert os.listdir(memory) == os.listdir(temporary) == []
    os.close(memory)


def test_a_run_with_few_open_files_evaluates_as_often_as_it_likes(tmp_path):
    flags = ["--data.no_on_device", "--train.steps", "50", "--train.eval_every_epochs", "0.03"]
    finish(start(tmp_path, *flags, before="ulimit -n 128"))
    assert sum("ema/validation/loss" in line for line in read_lines(tmp_path / "metrics.jsonl")) >= 45


def test_full_shared_memory_is_named(tmp_path):
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", str(tmp_path), *SMALL]
    command += ["--data.no_on_device", "--data.workers", "1", "--data.image_size", "96"]
    _, err = finish(in_own_memory("1m", [*command, "--train.batch_size", "64"], ALONE), 1)
    assert "shared memory in /dev/shm is full: lower --data.workers" in err


def test_a_worker_that_dies_ends_the_run(tmp_path):
    process = start(tmp_path, "--data.no_on_device", "--data.workers", "1", "--data.timeout", "10")
    wait_for(lambda: steps_in(tmp_path / "checkpoints"), process)
    workers = [pid for pid, command in children_of(process.pid).items() if b"resource_tracker" not in command]
    assert workers, children_of(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: " in err, out + err


def test_nothing_grows_while_a_run_goes_on(tmp_path):
    process = start(tmp_path, *PLACES["device"], "--train.steps", "100000", "--checkpoint.every_steps", "90")

    def taken():
        status = dict(x.split(":", 1) for x in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(os.listdir(f"/proc/{process.pid}/fd"))

    def least_after(step):
        """Of each number the least within a second: while a checkpoint is written, it holds files."""
        wait_for(lambda: any(x["step"] >= step for x in read_lines(tmp_path / "metrics.jsonl")), process)
        return [min(values) for values in zip(*((time.sleep(0.05), taken())[1] for _ in range(20)), strict=True)]

    early, late = least_after(200), least_after(800)
    process.terminate()
    finish(process)
    assert late[0] < 1.05 * early[0]
    assert late[1] <= early[1] + 2 and late[2] <= early[2] + 2
