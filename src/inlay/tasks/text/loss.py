"""The loss of a language model: that of the next token, where there is something to learn."""

import inspect
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.modeling_outputs import CausalLMOutput

from inlay.bases.attention_masks import make_masks_unread
from inlay.errors import BadInput
from inlay.tasks.text.chunked_logits import CHUNK, IGNORED, can_split, run_in_chunks, sum_losses, unwrap
from inlay.tasks.text.packing import flatten_rows
from inlay.tasks.text.vocabulary import vocabulary_of


class LearnedPlaces(NamedTuple):
    """What a step needs to know of the values of a batch (B, T).

    Attributes:
        first: The first column of next tokens (B, T - 1) with a label in any row.
        places: (N,), int64: of the B*T tokens those whose next one has a label.
        masked: True if a token is padding, or a row holds several texts.
    """

    first: int
    places: Tensor
    masked: bool


def read_batch(batch: dict[str, Any]) -> LearnedPlaces:
    """Find what is learned in a batch. The host waits for a GPU that the batch is on."""
    learned = pad(batch["labels"][:, 1:] != IGNORED, (0, 1))  # B T
    columns = learned.any(0).nonzero()
    first = int(columns[0]) if len(columns) else max(learned.shape[1] - 2, 0)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    masked = mask is not None and not bool(mask.all())
    masked = masked or (positions is not None and bool((positions.diff(dim=-1) != 1).any()))
    return LearnedPlaces(first, learned.flatten().nonzero()[:, 0], masked)


class NextToken:
    """Cross-entropy of the next token, the mean over labels other than -100: every token of the step counts alike.

    Logits are computed from the first column on that has a label in any row; the prompts before it cost no product
    with the vocabulary. Of more than 2²⁴ logits (334 tokens of GPT-2's vocabulary) only those of tokens with a label
    are computed, and at most 2²⁴ at a time: the loss is the same but for rounding. Batches are padded on the right, so
    positions are those of the texts. A batch, or a piece of one, in which no token is learned has a loss and gradients
    of 0.

    Args:
        smoothing: Label smoothing in training, 0 to 1 (0.1 in the E2E set-up of Hu et al. 2021, arXiv:2106.09685);
            evaluation is without.

    Raises:
        InlayError: smoothing is not between 0 and 1.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing <= 1:
            raise BadInput(f"label smoothing is a share of the loss, from 0 to 1, got {smoothing}.")
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> CausalLMOutput:
        """`loss`; and `logits` (B, T - first, V) for the columns first + 1 to T, unless computed in chunks."""
        batch = flatten_rows(model, batch)
        first, places, masked = batch["learned"] if "learned" in batch else read_batch(batch)
        labels = batch["labels"][:, 1:]  # B T-1: the logits of a column predict the next one
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "learned")}
        with make_masks_unread(masked, labels.device):
            if len(places) and labels[:, first:].numel() * vocabulary_of(unwrap(model)) > CHUNK and can_split(model):
                loss = self._add_up_chunks(model, inputs, labels, places)
                if loss is not None:
                    return CausalLMOutput(loss=loss / len(places))
            keep = {"logits_to_keep": labels.shape[1] - first + 1} if _takes_logits_to_keep(model) else {}
            logits = model(**inputs, **keep, use_cache=False).logits[:, -(labels.shape[1] - first + 1) : -1]
        if len(places):
            loss = cross_entropy(
                logits.flatten(0, 1).float(),
                labels[:, first:].flatten(),
                ignore_index=IGNORED,
                label_smoothing=self.smoothing if model.training else 0.0,
            )
        else:  # a mean over no token is NaN; other processes wait for a gradient of this piece, too
            loss = 0.0 * logits.float().sum()
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with what a step has to read of it, `learned`."""
        return {**batch, "learned": read_batch(batch)}

    def _add_up_chunks(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, places: Tensor) -> Tensor | None:
        """The losses of all tokens, added up chunk by chunk; None where the model cannot be split."""
        smoothing = self.smoothing if model.training else 0.0
        add_up = partial(sum_losses, vocabulary=vocabulary_of(unwrap(model)), smoothing=smoothing)
        return run_in_chunks(model, inputs, labels, places, add_up)

    def weight(self, batch: dict[str, Any]) -> int:
        """The tokens that are learned."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())


def _takes_logits_to_keep(model: nn.Module) -> bool:
    """True if the model under its wrappers can compute the logits of the last columns only."""
    return "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters
