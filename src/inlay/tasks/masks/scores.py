"""How well the masks of a promptable model agree with the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Array2D, Features

from inlay.tasks.metrics import ClassMetric


class MaskIoU(ClassMetric):
    """Mean intersection over union of the masks that were asked for, 0 to 1.

    Predictions are pixels (N, P, 2) in the intersection and in the union of each image's P masks, both 0 for a mask
    that was not asked for; references are not read.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: pixels in intersection and union, (N, P, 2).",
            features=Features({"predictions": Array2D((None, 2), "int64")}),
        )

    def _compute(self, predictions: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
        counts = np.concatenate([np.asarray(row).reshape(-1, 2) for row in predictions])
        counts = counts[counts[:, 1] > 0]
        return {"mean_iou": float((counts[:, 0] / counts[:, 1]).mean()) if len(counts) else 0.0}


@torch.no_grad()
def compute_mean_iou(model: Any, batches: Iterable[dict[str, torch.Tensor]], loss: Any) -> float:
    """Of all prompts of the batches, for the masks that the model thinks best; 0 to 1.

    Args:
        model: A promptable mask model.
        batches: As `MaskLoss` takes them.
        loss: A MaskLoss.
    """
    metric, device = MaskIoU(), next(model.parameters()).device
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        counts, _ = loss.answers(loss(model, batch), batch)
        metric.add_batch(predictions=counts.cpu(), references=None)
    return metric.compute()["mean_iou"]
