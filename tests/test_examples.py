"""The examples run, and learn what they are about."""

import os
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import resnet_jax as rj

from .conftest import ROOT

LEARNT = {
    "own_module": (r"test accuracy ([\d.]+)%", 85.0, 100.0),
    "own_data_and_loss": (r"distance on the test pictures: ([\d.]+)", 0.0, 0.1),
    "own_loop": (r"accuracy ([\d.]+)% on 8 devices", 95.0, 100.0),
}
"""What each prints in the end, and between which numbers it must lie."""


@pytest.mark.parametrize("name", LEARNT)
def test_an_example_learns(name, tmp_path):
    source = ROOT / "examples" / f"{name}.py"
    assert len(source.read_text().splitlines()) < 60
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # ours compile slower code
    command = [sys.executable, source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    pattern, least, most = LEARNT[name]
    assert least <= float(re.findall(pattern, done.stdout)[-1]) <= most


def test_the_pyramid_finds_new_squares():
    source = ROOT / "examples" / "fpn.py"
    assert len(source.read_text().splitlines()) < 60
    example = runpy.run_path(str(source))
    detector, state, overlaps = example["main"](steps=60)
    new = example["squares"](jax.random.key(7), 256)
    apply = jax.jit(detector.apply)

    def mean_iou(state):
        boxes = apply({"params": state.params, "batch_stats": state.batch_stats}, new["image"])
        return float(example["iou"](boxes, new["label"]).mean())

    untrained = rj.create_state(detector, optax.identity(), jax.random.key(1), (64, 64, 3))
    assert mean_iou(untrained) < 0.3 and overlaps[0] < 0.3
    assert mean_iou(state) > 0.6
    box = jnp.asarray([[0.0, 0.0, 2.0, 2.0]])
    assert abs(float(example["iou"](box, box + 1)[0]) - 1 / 7) < 1e-6


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*LEARNT, "fpn"}
