"""The loss of a classifier of images whose labels are smoothed or mixed."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from inlay.train.losses import ModelLoss


class SmoothedClasses(ModelLoss):
    """Cross-entropy with label smoothing in training; evaluation is without, as the model itself computes it.

    Images that `mix_images` has mixed have two labels, and the loss is the mean of both, weighted by their shares.

    Args:
        smoothing: Share of each label that goes to all classes alike, 0 to 1.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (`torch.nn.functional.cross_entropy`).
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's output, with this loss."""
        inputs = {key: value for key, value in batch.items() if key not in ("share", "other_labels")}
        output = super().__call__(model, inputs)
        if model.training and "share" in batch:
            first, other = (
                cross_entropy(output.logits, batch[key], label_smoothing=self.smoothing, reduction="none")
                for key in ("labels", "other_labels")
            )
            output.loss = torch.lerp(other, first, batch["share"].to(first.dtype)).mean()
        elif model.training:
            output.loss = cross_entropy(output.logits, batch["labels"], label_smoothing=self.smoothing)
        return output
