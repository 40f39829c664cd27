"""The loss of a classifier of texts."""

from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from inlay.bases.attention_masks import make_masks_unread
from inlay.methods.prompt import check_prompt
from inlay.train.evaluation import count_rows


class SequenceLoss:
    """Cross-entropy over the rows of a batch, smoothed in training.

    Args:
        smoothing: Share of each label that goes to all classes alike, 0 to 1.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (`torch.nn.functional.cross_entropy`).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's output, with this loss."""
        check_prompt(getattr(model, "module", model))  # DistributedDataParallel's
        with make_masks_unread(masked=True, device=batch["labels"].device):
            output = model(**batch)
        if self.smoothing and model.training:
            output.loss = cross_entropy(output.logits.float(), batch["labels"], label_smoothing=self.smoothing)
        return output

    def weight(self, batch: dict[str, Any]) -> int:
        """The rows."""
        return count_rows(batch)
