"""What classifiers of images and of texts share when they are scored."""

from collections.abc import Callable
from typing import Any

import numpy as np

from inlay.bases.load import read_config, resolve_base
from inlay.errors import InlayError
from inlay.tasks.adapter import Adapter
from inlay.tasks.evaluation import Evaluation, Request, Score
from inlay.tasks.statistics import (
    BINS,
    Indices,
    calibration_error,
    class_rows,
    class_scores,
    confusion_matrix,
    matthews_correlation,
    score_with_intervals,
)


def evaluate_classifier(
    adapter: Adapter,
    request: Request,
    *,
    data: str,
    split: str,
    unit: str,
    labels: list[str],
    true: np.ndarray,
    names: list[dict[str, Any]],
    notes: list[str],
    predict: Callable[[], np.ndarray],
) -> Evaluation:
    """All scores of a classifier, next to its base where that has the same labels.

    Args:
        adapter: From `load_adapter`.
        request: How.
        data: Its name.
        split: Which part of it.
        unit: What one example is called.
        labels: Class names, in the order of the columns of probabilities.
        true: Indices of `labels`, (N,).
        names: What tells each example from the others, the first columns of its row.
        notes: On the data.
        predict: Gives the probabilities (N, K) of the model as it is at the time.
    """
    probabilities = predict()
    scores = score_probabilities(probabilities, true, request.resamples)
    base, remark = None, ""
    if request.compare:
        remark = _explain_missing_base(adapter, labels)
        if not remark:
            with adapter.model.disable_adapter():
                base = score_probabilities(predict(), true, request.resamples)
    predicted = probabilities.argmax(1)
    rows = [
        {
            **name,
            "true": labels[t],
            "predicted": labels[p],
            "probability": round(float(row[p]), 6),
            "probability_of_true": round(float(row[t]), 6),
            "right": bool(t == p),
        }
        for name, t, p, row in zip(names, true, predicted, probabilities, strict=True)
    ]
    told = f"Expected calibration error: {BINS} bins of equal width (Guo et al. 2017, arXiv:1706.04599)."
    return Evaluation(
        data=data,
        task=adapter.task.name,
        split=split,
        count=len(true),
        unit=unit,
        scores=scores,
        base=base,
        rows=rows,
        per_class=class_rows(true, predicted, labels, unit),
        labels=labels,
        confusion=confusion_matrix(true, predicted, len(labels)).tolist(),
        notes=[*notes, told, *filter(None, [remark])],
    )


def score_probabilities(probabilities: np.ndarray, true: np.ndarray, resamples: int) -> dict[str, Score]:
    """Accuracy, macro F1, precision and recall, Matthews correlation, cross-entropy and calibration error.

    Args:
        probabilities: (N, K).
        true: (N,).
        resamples: Of the bootstrap; 0: no intervals.
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    surprise = -np.log(np.maximum(probabilities[np.arange(len(true)), true], 1e-300))
    right, classes = predicted == true, probabilities.shape[1]

    def statistic(rows: Indices) -> dict[str, float]:
        each = class_scores(true[rows], predicted[rows], classes)
        return {
            "accuracy": float(right[rows].mean()),
            **{name: float(np.nanmean(each[name])) for name in ("f1", "precision", "recall")},
            "matthews": matthews_correlation(true[rows], predicted[rows]),
            "loss": float(surprise[rows].mean()),
            "ece": calibration_error(confidence[rows], right[rows]),
        }

    return score_with_intervals(statistic, len(true), resamples=resamples)


def _explain_missing_base(adapter: Adapter, labels: list[str]) -> str:
    """Why the base alone has no score; nothing where its labels are the adapter's."""
    if not hasattr(adapter.model, "disable_adapter"):
        return "The base alone was not scored: the adapter is merged into it."
    name = adapter.model.get_base_model().name_or_path
    try:
        own = read_config(name, resolve_base(name), None).id2label
    except InlayError:
        return "The base alone was not scored: its own labels are not known."
    if [own[i] for i in sorted(own)] != labels:
        return "The base alone has no score: its head for these labels is new."
    return ""
