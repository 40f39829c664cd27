"""What a batch costs: the model's own loss, or that of the next token."""

import inspect
from typing import Any, Protocol

from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from inlay.train.evaluation import rows_of

IGNORED = -100  # the label of tokens that are read and not learned: prompts, padding


class Loss(Protocol):
    """A mean over what `weight` counts, so that pieces of a batch add up to the loss of the whole."""

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
        return rows_of(batch)


class NextToken:
    """Cross-entropy of the next token, the mean over labels other than -100: every token of the step counts alike.

    Logits are computed from the first column on that has a label in any row; the prompts before it cost no product
    with the vocabulary. Batches are padded on the right, so positions are those of the texts alone.

    Args:
        smoothing: Label smoothing in training, 0 to 1 (0.1 in the E2E set-up of Hu et al. 2021, arXiv:2106.09685);
            evaluation is without.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> CausalLMOutput:
        """`loss`, and `logits` (B, T - first, V) for the columns first + 1 to T."""
        labels = batch["labels"][:, 1:]  # B T-1: the logits of a column predict the next one
        first = int((labels != IGNORED).any(0).nonzero()[0])
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        keep = {"logits_to_keep": labels.shape[1] - first + 1} if _keeps(model) else {}
        logits = model(**inputs, **keep, use_cache=False).logits[:, -(labels.shape[1] - first + 1) : -1]
        loss = cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, first:].flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.smoothing if model.training else 0.0,
        )
        return CausalLMOutput(loss=loss, logits=logits)

    def weight(self, batch: dict[str, Any]) -> int:
        """The tokens that are learned."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())


def _keeps(model: nn.Module) -> bool:
    """True if the model under its wrappers can compute the logits of the last columns alone."""
    inner: Any = getattr(model, "module", model)  # DistributedDataParallel
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
