"""Scores on validation data, equal on all processes."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from inlay.bases.batch_norm import freeze_statistics
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
    """Compute the mean loss and the metrics on validation data; the model is in train mode afterwards.

    The metrics compare what the method `answers` of the loss returns. A loss without this method is scored by
    `logits.argmax(-1)` against `labels`.

    The metrics see every row once, on the main process: accelerate drops the rows with which it padded the last batch.
    That batch is computed row by row, as a mean would mix real rows and padding. The other batches are computed in
    `accumulate` pieces, as in training.

    Returns:
        The scores by name, and the name of the score that chooses the best step (`choose_score_name`).
    """
    model.eval()
    answers = getattr(loss, "answers", _classifier_answers)
    losses, weights = [], []
    for batch in loader:
        state = accelerator.gradient_state
        padded = accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        row_losses, row_weights, answered = [], [], []
        for piece in split_batch(batch, count_rows(batch) if padded else accumulate):
            output, rows = loss(model, piece), count_rows(piece)
            row_losses.append(output.loss.repeat(rows))
            row_weights.append(torch.full_like(row_losses[-1], loss.weight(piece) / rows))
            if metrics:
                answered.append(answers(output, piece))
        batch_losses, batch_weights = accelerator.gather_for_metrics((torch.cat(row_losses), torch.cat(row_weights)))
        losses.append(batch_losses)
        weights.append(batch_weights)
        if not metrics:
            continue
        whole = tuple(torch.cat(side) for side in zip(*answered, strict=True))
        predictions, references = accelerator.gather_for_metrics(whole)
        if accelerator.is_main_process:
            for metric in metrics:
                metric.add_batch(predictions=predictions.cpu(), references=references.cpu())
    set_train_mode(model)
    scores: dict[str, float] = {}
    chooses = best_by or "loss"
    if accelerator.is_main_process:
        weight = torch.cat(weights).double()
        scores["loss"] = float((torch.cat(losses).double() * weight).sum() / weight.sum())
        of_each = [metric.compute() or {} for metric in metrics]
        for found in of_each:
            scores |= found
        if metrics:
            chooses = choose_score_name(metrics[0], of_each[0], scores, best_by)
    if accelerator.num_processes > 1:
        shared: list[Any] = [scores, chooses]
        broadcast_object_list(shared)
        scores, chooses = shared
    return scores, chooses


def choose_score_name(
    metric: "evaluate.Metric", found: dict[str, float], scores: dict[str, float], asked: str | None
) -> str:
    """Name of the score that chooses the best step. A larger score is better.

    Args:
        metric: The first metric. If it gives several scores, the one with the metric's own name is chosen, or the one
            named in its attribute `score_name`.
        found: The scores that this metric gives.
        scores: The scores of all metrics, and the loss.
        asked: The name that the caller gave, or None.

    Raises:
        InlayError: No score has this name, or several scores could be meant.
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


def _classifier_answers(output: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true classes of a classifier: (B,), or (B, T) for text."""
    return output.logits.argmax(-1), batch["labels"]


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, in which batch norms keep their statistics."""
    freeze_statistics(model)
    model.train()


def split_batch(batch: dict[str, Any], count: int) -> "Iterator[dict[str, Any]]":
    """At most `count` pieces of a batch, of equal size except the last one."""
    rows = count_rows(batch)
    size = -(-rows // count)
    for begin in range(0, rows, size):
        yield batch if size >= rows else {k: v[begin : begin + size] for k, v in batch.items()}


def count_rows(batch: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))
