"""Intervals, calibration and per-class scores, against numpy, scikit-learn and sums done by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import precision_recall_fscore_support

from inlay import InlayError
from inlay.tasks.statistics import (
    calibration_error,
    class_rows,
    class_scores,
    confusion_matrix,
    matthews_correlation,
    score_with_intervals,
)


def test_an_interval_is_numpys_percentiles_of_resamples():
    values = np.random.default_rng(1).normal(size=40)
    found = score_with_intervals(lambda rows: {"mean": float(values[rows].mean())}, 40, resamples=300, seed=5)["mean"]
    generator = np.random.default_rng(5)
    means = [values[generator.integers(0, 40, 40)].mean() for _ in range(300)]
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


def test_an_interval_covers_as_often_as_scipys():
    from scipy.stats import bootstrap

    values = np.random.default_rng(2).exponential(size=60)
    found = score_with_intervals(lambda rows: {"mean": float(values[rows].mean())}, 60, resamples=4000)["mean"]
    ours = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", random_state=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((ours.low, ours.high), abs=0.02)


def test_equal_seeds_give_equal_intervals_and_one_unit_gives_none():
    values = np.arange(12.0)
    once, again = (score_with_intervals(lambda rows: {"m": float(values[rows].mean())}, 12) for _ in range(2))
    assert once == again and once["m"].low < once["m"].value < once["m"].high
    alone = score_with_intervals(lambda rows: {"m": 3.0}, 1)["m"]
    assert (alone.value, alone.low, alone.high) == (3.0, None, None) and str(alone) == "3.0000"
    with pytest.raises(InlayError, match="0 units"):
        score_with_intervals(lambda rows: {"m": 3.0}, 0)


def test_a_resample_without_a_score_is_left_out():
    found = score_with_intervals(lambda rows: {"m": float("nan") if rows[0] else 1.0}, 4)["m"]
    assert (found.low, found.high) == (1.0, 1.0)


def test_calibration_error_is_the_papers():
    # Bins of a fifth: 0.1 and 0.2 in the first (the upper end belongs to it), 0.5 in the third, others in the last.
    confidence = np.array([0.1, 0.2, 0.5, 0.9, 1.0])
    right = np.array([False, True, True, True, False])
    by_hand = (2 * abs(0.5 - 0.15) + 1 * abs(1 - 0.5) + 2 * abs(0.5 - 0.95)) / 5
    assert calibration_error(confidence, right, 5) == pytest.approx(by_hand)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert calibration_error(np.array([0.0]), np.array([False])) == 0
    assert calibration_error(np.array([1.0]), np.array([False])) == 1


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_per_class_is_scikit_learns(classes):
    generator = np.random.default_rng(classes)
    true, predicted = generator.integers(0, classes, 50), generator.integers(0, classes - 1, 50)
    expected = precision_recall_fscore_support(true, predicted, labels=range(classes), zero_division=0)
    found = class_scores(true, predicted, classes)
    for name, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert np.allclose(found[name], values)
    assert np.array_equal(confusion_matrix(true, predicted, classes), sklearn_confusion(true, predicted))


def test_a_class_that_occurs_nowhere_has_no_row():
    rows = class_rows(np.array([0, 0, 2]), np.array([0, 2, 2]), ["a", "b", "c"])
    assert [(row["class"], row["images"]) for row in rows] == [("a", 2), ("c", 1)]
    assert rows[0]["recall"] == 0.5 and rows[1]["precision"] == 0.5


def test_a_correlation_of_one_class_is_zero_without_a_warning():
    assert matthews_correlation([1, 1, 1], [1, 1, 1]) == 0
    assert matthews_correlation([0, 1, 1, 0], [0, 1, 0, 0]) == pytest.approx(1 / np.sqrt(3))
