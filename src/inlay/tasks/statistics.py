"""What scores are worth: bootstrap intervals, calibration, and per-class scores of a confusion matrix."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.errors import BadInput
from inlay.tasks.evaluation import Score

BINS = 15
Indices = npt.NDArray[np.int64]


def score_with_intervals(
    statistic: Callable[[Indices], Mapping[str, float]],
    units: int,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores of all units, with 95 % percentile intervals over bootstrap resamples of them, or of their groups.

    Args:
        statistic: From indices of units (N,), some of them repeated, to scores by name. A NaN is left out.
        units: N, independent of each other: images, prompts, scans; never objects or voxels within them.
        groups: Of each unit, where units of one group (patient, slide) are alike: then whole groups are drawn.
        resamples: How many.
        seed: Of the resampling; equal for two models, so that they are resampled alike.

    Raises:
        InlayError: No units, or fewer than one resample.

    Source: Efron & Tibshirani 1993, chapter 13; of groups the cluster bootstrap of Davison & Hinkley 1997, section 3.8
    (groups drawn, and all units of each taken); `numpy.percentile` at 2.5 and 97.5.
    """
    if units < 1 or resamples < 1:
        raise BadInput(f"there must be something to score and at least 1 resample, got {units} units and {resamples}.")
    values = dict(statistic(np.arange(units)))
    members = None if groups is None else [np.flatnonzero(np.asarray(groups) == group) for group in sorted({*groups})]
    independent = units if members is None else len(members)
    if independent == 1:
        return {name: Score(float(value)) for name, value in values.items()}
    generator = np.random.default_rng(seed)

    def draw() -> Indices:
        chosen = generator.integers(0, independent, independent)
        return chosen if members is None else np.concatenate([members[k] for k in chosen])

    drawn = [statistic(draw()) for _ in range(resamples)]
    found = {}
    for name, value in values.items():
        each = np.array([sample[name] for sample in drawn], np.float64)
        low, high = np.nanpercentile(each, (2.5, 97.5)) if not np.isnan(each).all() else (None, None)
        found[name] = Score(float(value), None if low is None else float(low), None if high is None else float(high))
    return found


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error, 0 to 1: |accuracy - mean confidence| in bins of equal width, weighted by their size.

    Args:
        confidence: Probability of the predicted class, (N,), 0 to 1.
        right: Whether it is the true one, (N,).
        bins: Of (0, 1], each with its upper end: 15 in the paper.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    place = find_bins(confidence, bins)
    gaps = np.bincount(place, np.asarray(right, np.float64) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(place))


def find_bins(confidence: np.ndarray, bins: int = BINS) -> npt.NDArray[np.int64]:
    """The number of the bin, from 0, of each confidence (N,), as `calibration_error` has them."""
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, classes: int) -> npt.NDArray[np.int64]:
    """How many of class i (rows) were taken for class j (columns), (K, K)."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_scores(true: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, (K,); NaN for a class that occurs in neither.

    Source: `sklearn.metrics.precision_recall_fscore_support` with zero_division=0, which this equals.
    """
    hit = np.bincount(true[true == predicted], minlength=classes).astype(np.float64)
    there, said = (np.bincount(side, minlength=classes).astype(np.float64) for side in (true, predicted))
    known = there + said > 0
    scores = {
        "precision": hit / np.maximum(said, 1),
        "recall": hit / np.maximum(there, 1),
        "f1": 2 * hit / np.maximum(there + said, 1),
    }
    return {name: np.where(known, values, np.nan) for name, values in scores.items()}


def class_rows(true: np.ndarray, predicted: np.ndarray, labels: list[str], unit: str = "image") -> list[dict[str, Any]]:
    """A row for each class that occurs: its name, precision, recall, F1 and how many units (images, texts) it has."""
    scores, counts = class_scores(true, predicted, len(labels)), np.bincount(true, minlength=len(labels))
    return [
        {"class": label, **{name: float(values[k]) for name, values in scores.items()}, f"{unit}s": int(counts[k])}
        for k, label in enumerate(labels)
        if not np.isnan(scores["f1"][k])
    ]


def matthews_correlation(true: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Matthews correlation of classes (N,), -1 to 1; 0 where all are of one class.

    Source: Matthews 1975; `sklearn.metrics.matthews_corrcoef`.
    """
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(matthews_corrcoef(true, predicted))
