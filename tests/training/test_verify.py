"""A run as evidence: a sound one passes, and forgeries are called what they are."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from resnet_jax.config import AugmentConfig, Config, InputError, ParallelConfig, TrainConfig
from resnet_jax.training import loop
from resnet_jax.training.verify import verify

pytestmark = pytest.mark.xdist_group("verify")  # one process makes what they share


def recipe(seed=0, **train):
    """Twelve steps with a checkpoint each four, and evaluations and lines at other steps than those."""
    base = Config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, name="cifar_resnet8"),
        augment=AugmentConfig(crop="pad", pad=1, flip="random", mixup=0.2),
        train=TrainConfig(
            **{"steps": 12, "batch_size": 32, "ema_decay": 0.9, "eval_every_epochs": 0.17, "seed": seed} | train
        ),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.1),
        parallel=ParallelConfig(devices=1),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=4, keep=9),
        log=dataclasses.replace(base.log, every_steps=3, tensorboard=False, report=False),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and that of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        loop.train(recipe(seed), folder / str(seed))
    return folder


def contents(folder):
    """Bytes and times of all files of a folder."""
    return {str(p): (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def test_a_sound_run_passes_bit_by_bit_and_nothing_in_it_is_touched(runs):
    before = contents(runs / "0")
    report = verify(runs / "0")
    assert report.ok and report.exact and report.replayed == ((0, 4), (4, 8), (8, 12)), str(report)
    assert contents(runs / "0") == before
