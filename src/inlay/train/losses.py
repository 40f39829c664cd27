"""The loss of a batch: the protocol that `fit` expects, and the loss that the model itself returns."""

from typing import Any, Protocol

from torch import nn

from inlay.train.evaluation import count_rows


class Loss(Protocol):
    """A mean loss. `weight` says over how much it is the mean, so that pieces of a batch add up to the whole batch.

    A GPU that is asked for a number first ends all of its work, so training reads what it needs of a batch while that
    is on the CPU: `weight` is called there, and so is a method `prepare(batch) -> batch`, which a loss may have. The
    call then gets on the device what `prepare` returned.

    A loss may have another method, `answers(output, batch) -> (predictions, references)`. It returns what the metrics
    compare: two tensors with one row per example, of the same size in all batches. Without it the metrics compare
    `logits.argmax(-1)` with `batch["labels"]`.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Compute the output of the model, with `loss` and `logits`."""

    def weight(self, batch: dict[str, Any]) -> float:
        """Over how much the loss of a batch is the mean: examples or tokens, or the sum of their weights."""


class ModelLoss:
    """The `loss` that the model itself returns, a mean over the rows of a batch."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Compute the output of the model."""
        return model(**batch)

    def weight(self, batch: dict[str, Any]) -> int:
        """Number of rows."""
        return count_rows(batch)
