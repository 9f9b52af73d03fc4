"""Plans for TPUs that are not there: what a target is, the bounds, and the real compiler on a small net."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from resnet_jax.config import InputError
from resnet_jax.runs.tpu_target import CHIPS, bounds, largest_batch, parse_target

RECIPE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp

import resnet_jax as rj
from resnet_jax.models.layers import BatchNorm


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = BatchNorm()(nn.Conv(16, (3, 3), use_bias=False)(images), train)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


model = Small()
config = rj.Config()
config = dataclasses.replace(
    config,
    augment=dataclasses.replace(config.augment, crop="none"),
    train=dataclasses.replace(config.train, batch_size=64, ema_decay=None),
)
"""
PARAMETERS, STATISTICS = 3 * 3 * 3 * 16 + 2 * 16 + 16 * 10 + 10, 2 * 16


COMPILER = os.environ.get("TEST_TPU_COMPILER", "")
"""Path of libtpu.so where it is not installed, so that JAX does not look for TPUs elsewhere."""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not os.path.isfile(COMPILER),
    reason="needs the TPU's compiler, libtpu",
)
def test_a_step_compiled_for_eight_chips_moves_gradients_and_statistics_alone(tmp_path):
    (tmp_path / "small.py").write_text(RECIPE)
    command = [sys.executable, "-m", "resnet_jax", "plan", "--config", "small.py", "--target", "v5e:2x4", "--json"]
    environment = os.environ | ({"TPU_LIBRARY_PATH": COMPILER} if COMPILER else {})
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    needs = json.loads(done.stdout)
    assert needs["devices"] == 8
    assert needs["parameters"] == PARAMETERS
    assert set(needs["collectives"]) == {"all-reduce"}  # no activation is gathered
    moved = needs["collectives"]["all-reduce"]
    assert 2 * PARAMETERS <= moved <= 4 * (PARAMETERS + 4 * STATISTICS + 16)  # gradients in 2 or 4 bytes, some sums
    assert needs["bounds"]["fits"]
    assert needs["bounds"]["seconds"] > 0
    assert needs["bytes_accessed"] > 0


def test_without_the_compiler_words_say_what_to_install(tmp_path):
    code = "import sys; sys.modules['libtpu'] = None; from resnet_jax.cli import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-c", code, "plan", "--target", "v5e:2x4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "pip install 'jax[tpu]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("target", ["v5e", "v5e:", "v9:2x2", "v5e:2x2x2", "v4:2x2", "v5e:0x4", "v5e:axb"])
def test_what_is_no_target_is_answered(target):
    with pytest.raises(InputError, match="--target"):
        parse_target(target)


def test_the_bound_is_that_of_the_slower_of_arithmetic_and_memory():
    """A v5e does 197 TFLOP and moves 819 GB in a second."""
    needs = {"flops_a_chip": 197e12, "bytes_accessed": 2 * 819e9, "peak": 15e9}
    found = bounds(needs, "v5e:2x4")
    assert found["seconds_compute"] == 1.0
    assert found["seconds"] == found["seconds_memory"] == 2.0
    assert found["limit"] == "memory"
    assert found["fits"]
    assert not bounds(needs | {"peak": 17e9}, "v5e:2x4")["fits"]
    assert bounds(needs | {"bytes_accessed": 0}, "v5e:2x4")["limit"] == "compute"


@pytest.mark.parametrize(("memory", "expected"), [(1000, 96), (640, 64), (7, 0), (80, 8), (10**9, 4096)])
def test_the_largest_batch_is_found_by_doubling(memory, expected):
    """An image takes 10 bytes."""
    assert largest_batch(lambda images: 10.0 * images, memory) == expected
    assert largest_batch(lambda images: None if 10 * images > memory else 1.0, memory) == expected


def test_what_is_published_of_chips_is_whole():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e"}
    for chip in CHIPS.values():
        assert 1e14 < chip.flops < 1e15
        assert 1e10 < chip.memory < 1e11
        assert 5e11 < chip.bandwidth < 5e12
