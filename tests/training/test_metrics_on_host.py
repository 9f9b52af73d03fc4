"""Measures against scikit-learn's, and calibration against what was put in."""

import numpy as np
import pytest
from sklearn import metrics as sk

from resnet_jax.training.metrics import at_thresholds, calibration_error, fit_calibration, measure, probabilities
from resnet_jax.weights.tags import Calibration

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 7, 400)
LOGITS = RNG.normal(size=(400, 7)).astype(np.float32) + 1.5 * np.eye(7, dtype=np.float32)[LABELS]
SETS = (RNG.random((300, 5)) < (0.5, 0.3, 0.2, 0.1, 0.05)).astype(np.int32)
SCORES = (RNG.normal(size=(300, 5)) + 1.2 * SETS - 0.4).astype(np.float32)


def test_measures_of_one_label_are_those_of_scikit_learn():
    found, predicted = measure(LOGITS, LABELS, tuple("abcdefg")), LOGITS.argmax(1)
    p = probabilities(LOGITS, False)
    expected = {
        "accuracy": sk.accuracy_score(LABELS, predicted),
        "top5": sk.top_k_accuracy_score(LABELS, LOGITS, k=5),
        "macro_precision": sk.precision_score(LABELS, predicted, average="macro"),
        "macro_recall": sk.balanced_accuracy_score(LABELS, predicted),
        "macro_f1": sk.f1_score(LABELS, predicted, average="macro"),
        "auc": sk.roc_auc_score(LABELS, p, multi_class="ovr"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(found["confusion"], sk.confusion_matrix(LABELS, predicted))
    report = sk.classification_report(LABELS, predicted, target_names=list("abcdefg"), output_dict=True)
    for row in found["classes"]:
        theirs = report[row["name"]]
        ours = [row["precision"], row["recall"], row["f1"], row["support"]]
        assert ours == pytest.approx([theirs[k] for k in ("precision", "recall", "f1-score", "support")], abs=1e-6)


def test_measures_of_several_labels_are_those_of_scikit_learn():
    found, predicted = measure(SCORES, SETS, tuple("abcde")), SCORES > 0
    expected = {
        "accuracy": sk.accuracy_score(SETS, predicted),
        "map": sk.average_precision_score(SETS, SCORES, average="macro"),
        "macro_f1": sk.f1_score(SETS, predicted, average="macro"),
        "auc": sk.roc_auc_score(SETS, SCORES, average="macro"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_shares_of_thresholds_are_those_of_the_measures():
    calibration = Calibration(0.7, (0.1, 0.3, 0.5, 0.7, 0.9))
    found, measured = at_thresholds(SCORES, SETS, calibration), measure(SCORES, SETS, tuple("abcde"), calibration)
    names = ("accuracy", "macro_recall", "macro_f1", "count")
    assert {name: found[name] for name in names} == pytest.approx({name: measured[name] for name in names})
    assert found["class_accuracy"] == pytest.approx([row["recall"] for row in measured["classes"]])
    assert found["class_count"] == [row["support"] for row in measured["classes"]]


def test_classes_without_images_are_left_out_of_the_means_that_need_them():
    found = measure(LOGITS, np.zeros(400, np.int32), tuple("abcdefg"))
    assert found["auc"] is None and [row["support"] for row in found["classes"]] == [400] + 6 * [0]
    empty = measure(SCORES, SETS * (1, 1, 1, 1, 0), tuple("abcde"))
    assert empty["classes"][4]["auc"] is None and 0 < empty["map"] < 1


def test_the_calibration_error_of_what_is_known():
    """Ten predictions of confidence 0.9, six right; ten of 0.35, five right: 0.5 * 0.3 + 0.5 * 0.15."""
    confidence, hits = np.repeat([0.9, 0.35], 10), np.repeat([1, 0, 1, 0], [6, 4, 5, 5])
    rows, error = calibration_error(confidence, hits)
    assert error == pytest.approx(0.225) and [row["count"] for row in rows] == [10, 10]


def test_a_temperature_that_was_put_in_is_found():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20000, 4)) * 2
    labels = (probabilities(logits, False).cumsum(1) > rng.random((20000, 1))).argmax(1)
    found = fit_calibration(3.0 * logits, labels)
    assert found.temperature == pytest.approx(3.0, rel=0.05) and found.thresholds is None
    before, after = (measure(3.0 * logits, labels, tuple("abcd"), c)["ece"] for c in (None, found))
    assert after < 0.02 < 0.1 < before


def test_without_a_mistake_the_temperature_stays():
    assert fit_calibration(5.0 * np.eye(4)[LABELS % 4], LABELS % 4).temperature == 1.0


def test_thresholds_give_each_class_its_best_f1():
    found = fit_calibration(SCORES, SETS)
    p = probabilities(SCORES, True, found.temperature)
    for k in range(5):
        best = max(sk.f1_score(SETS[:, k], p[:, k] >= cut) for cut in p[:, k])
        assert sk.f1_score(SETS[:, k], p[:, k] >= found.thresholds[k]) == pytest.approx(best)
    plain, tuned = (measure(SCORES, SETS, tuple("abcde"), c)["macro_f1"] for c in (Calibration(), found))
    assert tuned > plain


def test_thresholds_part_the_pictures_alike_where_probabilities_are_rounded():
    """A prediction computes them in float32, and folds the norms."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 8)) < 0.4).astype(int)
    logits = (rng.normal(0, 1.5, labels.shape) + 2 * labels - 1).astype(np.float32)
    found = fit_calibration(logits, labels)
    p = probabilities(logits, True, found.temperature)
    for rounded in (p.astype(np.float32), p - 1e-6, p + 1e-6):
        np.testing.assert_array_equal(p >= found.thresholds, rounded >= found.thresholds)


def test_a_single_class_that_images_have_or_not_is_measured_by_those_that_have_it():
    truth, scores = SETS[:, :1], SCORES[:, :1]
    found = measure(scores, truth, ("a",))
    row = found["classes"][0]
    expected = {
        "precision": sk.precision_score(truth, scores > 0),
        "recall": sk.recall_score(truth, scores > 0),
        "f1": sk.f1_score(truth, scores > 0),
        "support": truth.sum(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert found["macro_f1"] == pytest.approx(expected["f1"])
