"""Scores on validation data, the same on every process."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import evaluate

    from inlay.train.losses import Loss


@torch.no_grad()
def evaluate_on(
    model: nn.Module,
    loader: Any,
    loss: "Loss",
    metrics: "Sequence[evaluate.Metric]",
    accelerator: Accelerator,
    accumulate: int = 1,
) -> dict[str, float]:
    """Mean loss, then what the metrics say of the loss's `answers`; leaves the model in train mode.

    Without such a method these are `logits.argmax(-1)` against `labels`.

    The metrics see all rows once, on the main process: accelerate drops those with which it padded the last batch. That
    batch is taken row by row, as a mean over rows and padding could not be told apart. The others go through the model
    in `accumulate` pieces, as in training.
    """
    model.eval()
    answers = getattr(loss, "answers", _classes)
    losses, weights = [], []
    for batch in loader:
        at_end, over = accelerator.gradient_state.end_of_dataloader, accelerator.gradient_state.remainder
        padded = accelerator.num_processes > 1 and at_end and over > 0
        each, share, answered = [], [], []  # a value for every row
        for piece in pieces(batch, rows_of(batch) if padded else accumulate):
            output, rows = loss(model, piece), rows_of(piece)
            each.append(output.loss.repeat(rows))
            share.append(torch.full_like(each[-1], loss.weight(piece) / rows))
            if metrics:
                answered.append(answers(output, piece))
        values = accelerator.gather_for_metrics((torch.cat(each), torch.cat(share)))
        losses.append(values[0])
        weights.append(values[1])
        if not metrics:
            continue
        whole = tuple(torch.cat(side) for side in zip(*answered, strict=True))
        predictions, references = accelerator.gather_for_metrics(whole)
        if accelerator.is_main_process:
            for metric in metrics:
                metric.add_batch(predictions=predictions.cpu(), references=references.cpu())
    train_mode(model)
    scores: list[dict[str, float]] = [{}]
    if accelerator.is_main_process:
        weight = torch.cat(weights).double()
        scores[0]["loss"] = float((torch.cat(losses).double() * weight).sum() / weight.sum())
        for metric in metrics:
            scores[0] |= metric.compute() or {}
    if accelerator.num_processes > 1:
        broadcast_object_list(scores)
    return scores[0]


def _classes(output: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers of a classifier: (B,) or of text (B, T), predicted and true."""
    return output.logits.argmax(-1), batch["labels"]


def train_mode(model: nn.Module) -> None:
    """Train mode, but batch norms keep the base's statistics: those that moved would not be in the adapter."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def pieces(batch: dict[str, Any], count: int) -> "Iterator[dict[str, Any]]":
    """At most `count` pieces of a batch, equal in size but for the last."""
    rows = rows_of(batch)
    size = -(-rows // count)
    for begin in range(0, rows, size):
        yield batch if size >= rows else {k: v[begin : begin + size] for k, v in batch.items()}


def rows_of(batch: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))
