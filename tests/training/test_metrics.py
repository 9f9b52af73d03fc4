import jax
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from resnet_jax.training.losses import binary, cross_entropy, soft_targets, softmax_cross_entropy
from resnet_jax.training.metrics import add, eval_sums, means

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, 50).astype(np.int32)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)


def test_metrics_are_those_of_scikit_learn():
    parts = []
    for start in range(0, 50, 16):
        logits = np.resize(LOGITS[start : start + 16], (16, 7))
        labels = np.resize(LABELS[start : start + 16], 16)
        mask = np.arange(16) < min(16, 50 - start)
        losses = cross_entropy(logits, {"label": labels})
        parts.append(eval_sums(losses, logits, labels, mask))
    result = means(add(parts))
    assert result["count"] == 50
    np.testing.assert_allclose(result["loss"], log_loss(LABELS, PROBABILITIES, labels=range(7)), rtol=1e-6)
    np.testing.assert_allclose(result["accuracy"], accuracy_score(LABELS, LOGITS.argmax(-1)), rtol=1e-6)
    np.testing.assert_allclose(result["top5"], top_k_accuracy_score(LABELS, LOGITS, k=5), rtol=1e-6)
    per_class = recall_score(LABELS, LOGITS.argmax(-1), average=None)
    np.testing.assert_allclose(result["class_accuracy"], per_class, rtol=1e-6)


def test_top5_needs_more_than_five_classes():
    sums = eval_sums(np.zeros(4, np.float32), np.zeros((4, 5), np.float32), np.zeros(4, np.int32), np.ones(4, bool))
    assert "top5" not in sums


def test_losses_are_their_formulas():
    targets = np.asarray(soft_targets(LABELS, 7, 0.1))
    np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(targets[0, LABELS[0]], 0.9 + 0.1 / 7, rtol=1e-6)
    np.testing.assert_allclose(
        softmax_cross_entropy(LOGITS, targets), -(targets * np.log(PROBABILITIES)).sum(-1), rtol=1e-5
    )
    p = 1 / (1 + np.exp(-LOGITS))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(binary(LOGITS, targets), expected, rtol=1e-5)


def test_loss_of_half_precision_logits_is_float32():
    assert cross_entropy(jax.numpy.asarray(LOGITS, "bfloat16"), {"label": LABELS}).dtype == np.float32


def test_steps_that_were_skipped_are_counted_and_not_averaged_over_examples():
    kept, skipped = {"loss": 16.0, "count": 8.0, "skipped": 0.0}, {"loss": 0.0, "count": 0.0, "skipped": 1.0}
    assert means([kept, skipped, kept, skipped]) == {"loss": 2.0, "count": 16, "skipped": 2}


def test_a_mean_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        means({"loss": 0.0, "count": 0.0})
