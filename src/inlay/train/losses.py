"""The loss of a batch: what `fit` asks of one, and the model's own."""

from typing import Any, Protocol

from torch import nn

from inlay.train.evaluation import count_rows


class Loss(Protocol):
    """A mean over what `weight` counts, so that pieces of a batch add up to the loss of the whole.

    A loss may have a third method, `answers(output, batch) -> (predictions, references)`: what the metrics compare, two
    tensors with a row for each example, of one size in all batches. Without it these are `logits.argmax(-1)` and
    `batch["labels"]`.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """An output with `loss` and `logits`."""

    def weight(self, batch: dict[str, Any]) -> int:
        """Over how many examples or tokens the loss of a batch is the mean."""


class ModelLoss:
    """What the model itself gives as `loss`, a mean over the rows of a batch."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's own output."""
        return model(**batch)

    def weight(self, batch: dict[str, Any]) -> int:
        """The rows."""
        return count_rows(batch)
