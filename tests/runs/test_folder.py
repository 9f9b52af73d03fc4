import json
import os
import subprocess
import sys

import pytest

from resnet_jax.commands import format_runs
from resnet_jax.config import Config, to_dict
from resnet_jax.runs.folder import open_workdir, runs_under
from resnet_jax.runs.trackers import Tracker, read_lines


def test_lines_beyond_a_checkpoint_go_and_a_torn_one_too(tmp_path):
    lines = [
        {"step": 5, "train/loss": 1.0},
        {"step": 7, "train/loss": 2.0},
        {"step": 7, "validation/loss": 3.0},
        {"step": 9},
        {"step": 5, "test/loss": 3.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'
    for eval_pending, kept in ((False, lines[:3]), (True, lines[:2])):
        (tmp_path / "metrics.jsonl").write_text(text)
        Tracker(tmp_path, 7, tensorboard=False, eval_pending=eval_pending).close()
        assert read_lines(tmp_path / "metrics.jsonl") == kept


def test_runs_of_every_state_are_listed(tmp_path):
    for name in ("damaged", "broken", "impossible", "new", "no run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(to_dict(Config())))
    for name in ("damaged", "broken", "impossible", "new"):
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "damaged" / "checkpoints" / "7" / "state").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_text("{")
    recipe = to_dict(Config())
    recipe["train"]["batch_size"] = -4
    (tmp_path / "impossible" / "config.json").write_text(json.dumps(recipe))
    rows = {os.path.basename(row["folder"]): row for row in runs_under(tmp_path)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"damaged": "damaged", "broken": "damaged", "impossible": "invalid", "new": "failed"}
    assert rows["impossible"]["problem"].endswith("no possible recipe: train.batch_size must be at least 1, and is -4")
    assert "the start failed" in rows["new"]["problem"]
    assert open_workdir(tmp_path / "new", Config()) == tmp_path / "new"
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 5, "train/loss": 1.0}\n')
    assert {row["state"] for row in runs_under(tmp_path) if row["folder"].endswith("new")} == {"stopped"}


def test_the_list_of_runs_says_what_best_is_in_columns_that_hold():
    row = {"model": "cifar_resnet8", "data": "digits", "step": 40, "problem": None}
    best = {"metric": "ema/validation/accuracy", "best": 0.9125, "best_step": 30}
    long = {"folder": "runs/" + "x" * 60, "state": "failed", "problem": "it ended", "step": None, "data": None}
    none = dict.fromkeys(("metric", "best", "best_step"))
    loss = {"metric": "validation/loss", "best": 0.25, "best_step": 7}
    rows = [best | {"folder": "a", "state": "finished"}, none | long, loss | {"folder": "b", "state": "stopped"}]
    lines = format_runs([row | other for other in rows])
    assert "best validation accuracy (moving average) 91.25% at step 30" in lines[0]
    assert "best validation loss 0.2500 at step 7" in lines[3] and "no best step" in lines[1]
    assert lines[2] == "    it ended" and lines[1].startswith("runs/" + "x" * 60 + "  failed    step 0 ")
    starts = {
        word: {line.index(word) for line in (lines[0], lines[1], lines[3])} for word in ("step ", "cifar_resnet8")
    }
    assert all(len(places) == 1 for places in starts.values()), lines


def events_in(path):
    """The events of a file; its checksums must be right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        body, after = data[12 : 12 + size], data[12 + size : 16 + size]
        assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
        assert masked_crc32c(body) == int.from_bytes(after, "little")
        events.append(Event.FromString(body))
        data = data[16 + size :]
    return events


def test_tensorboard_reads_what_is_written(tmp_path):
    tracker = Tracker(tmp_path, 3, tensorboard=True)
    tracker.write(4, {"train/loss": 0.5})
    tracker.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    events = events_in(path)
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events if event.session_log.status == 1] == [4]
    values = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert values == [(4, "train/loss", 0.5)]


def test_events_can_be_read_after_the_disk_was_full(tmp_path):
    """A small file system of the writer's own, full for a while in the middle: no event is lost."""
    code = """
import os, shutil, sys, time
from pathlib import Path
from resnet_jax.runs.trackers import Tracker
disk, out = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(disk, 0, tensorboard=True)
for step in range(30):
    if step == 10:
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(512))
            except OSError:
                pass
    if step == 25:
        time.sleep(6)  # events are written every 5 seconds
        (disk / "filler").unlink()
    tracker.write(step, {f"number/{i}": float(i) for i in range(20)})
tracker.close()
for path in disk.iterdir():
    shutil.copy(path, out)
"""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs {disk} || exit 77; "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", code, disk, out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets no user mount a file system of their own")
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("events.out.tfevents.*")
    values = [(event.step, value.tag) for event in events_in(path) for value in event.summary.value]
    assert values == [(step, f"number/{i}") for step in range(30) for i in range(20)]
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [*range(30)]
