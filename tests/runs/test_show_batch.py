"""What stands below the images of a batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.runs.show_batch import caption, unsmoothed
from resnet_jax.training.losses import soft_targets

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
