"""Scores on validation data, the same on every process."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from inlay.errors import BadInput

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
    best_by: str | None = None,
) -> tuple[dict[str, float], str]:
    """Mean loss and what the metrics say of the loss's `answers`; leaves the model in train mode.

    Gives the scores by name, and the name of the one that chooses the best step (`name_of_best`).

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
        for piece in split_batch(batch, count_rows(batch) if padded else accumulate):
            output, rows = loss(model, piece), count_rows(piece)
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
    scores: dict[str, float] = {}
    chooses = best_by or "loss"
    if accelerator.is_main_process:
        weight = torch.cat(weights).double()
        scores["loss"] = float((torch.cat(losses).double() * weight).sum() / weight.sum())
        of_each = [metric.compute() or {} for metric in metrics]
        for found in of_each:
            scores |= found
        if metrics:
            chooses = name_of_best(metrics[0], of_each[0], scores, best_by)
    if accelerator.num_processes > 1:
        shared: list[Any] = [scores, chooses]
        broadcast_object_list(shared)
        scores, chooses = shared
    return scores, chooses


def name_of_best(
    metric: "evaluate.Metric", found: dict[str, float], scores: dict[str, float], asked: str | None
) -> str:
    """Name of the score that chooses the best step, of which more is better.

    Args:
        metric: The first metric. Where it gives several scores, the one of its own name or of its attribute
            `score_name` is meant.
        found: What it gives.
        scores: What all metrics give, and the loss.
        asked: The name that the caller gave.

    Raises:
        InlayError: There is no such score, or several that could be meant.
    """
    if asked is not None:
        if asked not in scores or asked == "loss":
            has = ", ".join(name for name in scores if name != "loss")
            raise BadInput(f"unknown score {asked!r} in best_by; the metrics give {has}.")
        return asked
    own = getattr(metric, "name", type(metric).__name__)
    declared = getattr(metric, "score_name", own)
    if declared in found:
        return declared
    if len(found) != 1:
        raise BadInput(
            f"the metric {own} gives {', '.join(found) or 'no score'}; name the score that chooses the best "
            "step: fit(..., best_by=NAME)."
        )
    return next(iter(found))


def _classes(output: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers of a classifier: (B,) or of text (B, T), predicted and true."""
    return output.logits.argmax(-1), batch["labels"]


def train_mode(model: nn.Module) -> None:
    """Train mode, but batch norms keep the base's statistics: those that moved would not be in the adapter."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def split_batch(batch: dict[str, Any], count: int) -> "Iterator[dict[str, Any]]":
    """At most `count` pieces of a batch, equal in size but for the last."""
    rows = count_rows(batch)
    size = -(-rows // count)
    for begin in range(0, rows, size):
        yield batch if size >= rows else {k: v[begin : begin + size] for k, v in batch.items()}


def count_rows(batch: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))
