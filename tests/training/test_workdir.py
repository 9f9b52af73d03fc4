import json
import os
import subprocess
import sys

import pytest

from resnet_jax.config import Config
from resnet_jax.recipes import to_dict
from resnet_jax.training.trackers import Tracker, read_lines
from resnet_jax.training.workdir import open_workdir, runs_under


@pytest.mark.parametrize("first", ["", "import torch"])
def test_tensorboard_brings_no_torch_and_takes_none_away(tmp_path, first):
    pytest.importorskip("torch")
    code = f"""{first}
import sys
from pathlib import Path
from resnet_jax.training.trackers import Events
events = Events(Path(sys.argv[1]), 0)
print("torch" in sys.modules)
import torch
print(torch.ones(2).sum().item())
"""
    told = subprocess.check_output([sys.executable, "-c", code, tmp_path], text=True)
    assert told == f"{bool(first)}\n2.0\n"


def test_lines_beyond_a_checkpoint_go_and_a_torn_one_too(tmp_path):
    lines = [
        {"step": 5, "train/loss": 1.0},
        {"step": 7, "train/loss": 2.0},
        {"step": 7, "validation/loss": 3.0},
        {"step": 9},
        {"step": 5, "test/loss": 3.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'
    for owed, kept in ((False, lines[:3]), (True, lines[:2])):
        (tmp_path / "metrics.jsonl").write_text(text)
        Tracker(tmp_path, 7, tensorboard=False, owed=owed).close()
        assert read_lines(tmp_path / "metrics.jsonl") == kept


def test_runs_of_every_state_are_listed(tmp_path):
    for name in ("damaged", "broken", "new", "no run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(to_dict(Config())))
    for name in ("damaged", "broken", "new"):
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "damaged" / "checkpoints" / "7" / "state").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_text("{")
    rows = {os.path.basename(row["folder"]): row["state"] for row in runs_under(tmp_path)}
    assert rows == {"damaged": "damaged", "broken": "damaged", "new": "stopped"}
    assert open_workdir(tmp_path / "new", Config()) == tmp_path / "new"


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    tracker = Tracker(tmp_path, 3, tensorboard=True)
    tracker.write(4, {"train/loss": 0.5})
    tracker.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[1].step == 4 and events[1].session_log.status == 1
    (value,) = events[2].summary.value
    assert (events[2].step, value.tag, value.simple_value) == (4, "train/loss", 0.5)
