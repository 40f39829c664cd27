"""The loss of a classifier of images whose labels are smoothed."""

from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from inlay.train.losses import ModelLoss


class SmoothedClasses(ModelLoss):
    """Cross-entropy with label smoothing in training; evaluation is without, as the model itself computes it.

    Args:
        smoothing: Share of each label that goes to all classes alike, 0 to 1.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (`torch.nn.functional.cross_entropy`).
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's output, with this loss."""
        output = super().__call__(model, batch)
        if model.training:
            output.loss = cross_entropy(output.logits, batch["labels"], label_smoothing=self.smoothing)
        return output
