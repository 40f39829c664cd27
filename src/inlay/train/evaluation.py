"""Scores on validation data, the same on every process."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import evaluate


@torch.no_grad()
def evaluate_on(
    model: nn.Module, loader: Any, metrics: "Sequence[evaluate.Metric]", accelerator: Accelerator, accumulate: int = 1
) -> dict[str, float]:
    """Mean loss, then what the metrics say of `logits.argmax(-1)` against `labels`; leaves the model in train mode.

    The metrics see all rows once, on the main process: accelerate drops those with which it padded the last batch. That
    batch is taken row by row, as a mean over rows and padding could not be told apart. The others go through the model
    in `accumulate` pieces, as in training.
    """
    model.eval()
    losses = []
    for batch in loader:
        at_end, over = accelerator.gradient_state.end_of_dataloader, accelerator.gradient_state.remainder
        padded = accelerator.num_processes > 1 and at_end and over > 0
        each, predicted = [], []
        for piece, _ in pieces(batch, rows_of(batch) if padded else accumulate):
            output = model(**piece)
            each.append(output.loss.repeat(rows_of(piece)))
            predicted.append(output.logits.argmax(-1))
        rows = (torch.cat(each), torch.cat(predicted), batch["labels"])
        loss, predictions, labels = accelerator.gather_for_metrics(rows)
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


def pieces(batch: dict[str, Any], count: int) -> "Iterator[tuple[dict[str, Any], float]]":
    """At most `count` pieces of a batch, equal in size but for the last, each with its share of the rows."""
    rows = rows_of(batch)
    size = -(-rows // count)
    for begin in range(0, rows, size):
        piece = batch if size >= rows else {k: v[begin : begin + size] for k, v in batch.items()}
        yield piece, min(size, rows - begin) / rows


def rows_of(batch: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))
