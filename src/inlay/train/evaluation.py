"""Scores on validation data, the same on every process."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    import evaluate


@torch.no_grad()
def evaluate_on(
    model: nn.Module, loader: Any, metrics: "Sequence[evaluate.Metric]", accelerator: Accelerator
) -> dict[str, float]:
    """Mean loss, then what the metrics say of `logits.argmax(-1)` against `labels`; leaves the model in train mode.

    The metrics see all rows once, on the main process: accelerate drops those with which it padded the last batch.
    """
    model.eval()
    losses = []
    for batch in loader:
        output = model(**batch)
        each = output.loss.repeat(rows_of(batch))
        loss, predictions, labels = accelerator.gather_for_metrics((each, output.logits.argmax(-1), batch["labels"]))
        losses.append(loss)
        if accelerator.is_main_process:
            for metric in metrics:
                metric.add_batch(predictions=predictions.cpu(), references=labels.cpu())
    train_mode(model)
    scores: list[dict[str, float]] = [{}]
    if accelerator.is_main_process:
        scores[0]["loss"] = float(torch.cat(losses).double().mean())
        for metric in metrics:
            scores[0] |= metric.compute() or {}
    if accelerator.num_processes > 1:
        broadcast_object_list(scores)
    return scores[0]


def train_mode(model: nn.Module) -> None:
    """Train mode, but batch norms keep the base's statistics: those that moved would not be in the adapter."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def rows_of(batch: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))
