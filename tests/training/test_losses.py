"""Losses and the weights of classes, against PyTorch and scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from resnet_jax.training.losses import class_weights, focal, make_loss, soft_targets, softmax_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(16, 5)).astype(np.float32) * 3
LABELS = RNG.integers(0, 5, 16)
SETS = RNG.integers(0, 2, (16, 5))
WEIGHTS = np.asarray([0.2, 1.0, 3.0, 0.7, 2.0], np.float32)


def test_focal_attends_to_what_is_wrong():
    targets = soft_targets(LABELS, 5, 0.0)
    np.testing.assert_allclose(focal(LOGITS, targets, 0.0), softmax_cross_entropy(LOGITS, targets), rtol=1e-5)
    p = np.asarray(jax.nn.softmax(LOGITS))[np.arange(16), LABELS]
    np.testing.assert_allclose(focal(LOGITS, targets, 2.0), -((1 - p) ** 2) * np.log(p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_slope_where_a_prediction_is_sure(gamma):
    logits, targets = np.asarray([[200.0, 0.0], [1.0, 0.0]], np.float32), np.asarray([[1.0, 0.0]] * 2, np.float32)
    slope = jax.grad(lambda logits: focal(logits, targets, gamma).sum())(logits)
    np.testing.assert_array_equal(slope[0], 0.0)
    assert np.isfinite(slope).all() and slope[1, 0] < 0


def test_weighted_losses_are_those_of_torch():
    torch = pytest.importorskip("torch")
    nn, logits, weight = torch.nn, torch.from_numpy(LOGITS), torch.from_numpy(WEIGHTS)
    theirs = nn.CrossEntropyLoss(weight=weight, reduction="none")(logits, torch.from_numpy(LABELS))
    ours = make_loss("cross_entropy", class_weights=WEIGHTS)(LOGITS, {"label": LABELS})
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    mixed = np.array(jax.nn.softmax(RNG.normal(size=(16, 5))), np.float32)
    theirs = nn.CrossEntropyLoss(weight=weight, reduction="none")(logits, torch.from_numpy(mixed))
    np.testing.assert_allclose(
        make_loss("cross_entropy", class_weights=WEIGHTS)(LOGITS, {"target": mixed}), theirs, rtol=1e-5
    )
    theirs = nn.BCEWithLogitsLoss(weight=weight, reduction="none")(logits, torch.from_numpy(SETS).float()).mean(1)
    ours = make_loss("binary", class_weights=WEIGHTS)(LOGITS, {"label": SETS})
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_smoothing_of_several_labels_moves_them_towards_one_half():
    np.testing.assert_allclose(soft_targets(np.asarray([[0, 1]]), 2, 0.2), [[0.1, 0.9]], rtol=1e-6)


def test_class_weights():
    counts = np.asarray([1, 10, 500, 10000])
    labels = np.repeat(np.arange(4), counts)
    theirs = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights("balanced", counts), theirs, rtol=1e-6)
    effective = class_weights("effective_number", counts)
    assert np.average(effective, weights=counts) == pytest.approx(1.0) and np.all(np.diff(effective) < 0)
    by_hand = (1 - 0.999**10) / (1 - 0.999**500)
    assert effective[2] / effective[1] == pytest.approx(by_hand, rel=1e-5)
    assert class_weights("none", counts) is None
