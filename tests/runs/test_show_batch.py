"""What stands below the images of a batch."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.runs.show_batch import caption, unsmoothed
from resnet_jax.training.losses import soft_targets
from resnet_jax.weights import sources

NAMES = ("tea", "coffee", "milk", "water")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothed_targets_are_named_as_the_class_they_are_of(smoothing):
    targets = np.asarray(soft_targets(jnp.asarray([2, 0]), 4, smoothing))
    assert [caption(row, NAMES) for row in unsmoothed(targets, smoothing, False)] == ["milk", "tea"]
    mixed = 0.7 * targets[:1] + 0.3 * targets[1:]
    assert caption(unsmoothed(mixed, smoothing, False)[0], NAMES) == "70 % milk\n30 % tea"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_images_of_several_labels_have_all_of_them(smoothing):
    targets = np.asarray(soft_targets(jnp.asarray([[1, 0, 1, 0], [0, 0, 0, 0]]), 4, smoothing))
    assert [caption(row, NAMES, True) for row in unsmoothed(targets, smoothing, True)] == ["tea\nmilk", "no label"]


@pytest.mark.parametrize("words", ["show-batch out.png", "plan"])
def test_pretrained_weights_are_not_fetched_for_pictures_and_plans(words, tmp_path, monkeypatch, capsys):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # which plan sets
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_download", lambda repository, name: pytest.fail(f"{name} of {repository}"))
    for i in range(8):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    flags = ["--data.dataset", "folder:pictures", "--data.workers", "0", "--train.batch_size", "3"]
    flags += ["--model.pretrained", "test_resnet.r160_in1k", "--config", "finetune_folder"]
    assert main([*words.split(), *flags]) == 0, capsys.readouterr().err
    if words != "plan":
        with Image.open("out.png") as drawn:
            assert drawn.width == 3 * (160 + 8)  # of the size that the tag says
