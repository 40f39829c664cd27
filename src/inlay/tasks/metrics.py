"""How often a classifier is right: metrics of evaluate's kind that need no network and no cache folder.

    for metric in (Accuracy(), F1()):
        metric.add_batch(predictions=logits.argmax(-1), references=labels)
        scores |= metric.compute()

Across processes gather first and add on the main process only: rows are kept in that process's memory. They
stay until `compute`, so an evaluation that was broken off is started again with new metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import evaluate
from datasets import Features, Value
from sklearn.metrics import accuracy_score, f1_score

from inlay.errors import BadInput
from inlay.tasks.statistics import matthews_correlation


class ClassMetric(evaluate.Metric):
    """Metric on predicted and true classes, both integers of shape (N,)."""

    def __init__(self) -> None:
        # The base class makes a cache folder, by default in the user's home, and leaves it empty here.
        with TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: class indices of shape (N,).",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def compute(
        self, *, predictions: Sequence[int] | None = None, references: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Score of all rows added since the last call, which are then forgotten.

        Raises:
            InlayError: no rows were added.
        """
        if predictions is None and self.buf_writer is None:
            raise BadInput(f"expected predictions to score, but {self.name} has none. Call add_batch before compute.")
        return super().compute(predictions=predictions, references=references)


class Accuracy(ClassMetric):
    """Share of predictions that are right, 0 to 1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(ClassMetric):
    """Macro F1, 0 to 1: the mean over classes of the harmonic mean of precision and recall.

    A class that occurs in neither predictions nor references does not count.

    Source: `sklearn.metrics.f1_score`.
    """

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro"))}


class Matthews(ClassMetric):
    """Matthews correlation, -1 to 1: 0 for guessing, also where one class is far more frequent than the others.

    Source: Matthews 1975; `sklearn.metrics.matthews_corrcoef`.
    """

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": matthews_correlation(references, predictions)}
