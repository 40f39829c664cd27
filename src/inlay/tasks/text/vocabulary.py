"""The tokens that a base knows: those that its embedding has rows for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlay.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


def vocabulary_of(model: Any) -> int:
    """Tokens that a base's embedding has rows for."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabulary(name: str, largest: int, rows: int) -> None:
    """Refuse tokens beyond the rows of a base's embedding: torch would stop with an index, or on a GPU with nothing.

    Args:
        name: Of the base.
        largest: The largest token id of some texts.
        rows: Of the embedding.

    Raises:
        InlayError: Names both sizes.
    """
    if largest >= rows:
        raise BadInput(
            f"the tokenizer of {name} makes the token {largest}, but the base has embeddings for {rows} tokens only "
            f"(0 to {rows - 1}); use the tokenizer it was trained with, or a base whose embeddings were resized."
        )


def token_ids(config: Any, rows: int, length: int, added: int = 0) -> Tensor:
    """Any tokens (B, T) of a base's vocabulary.

    Raises:
        InlayError: The base reads fewer.
    """
    import torch

    positions = getattr(config, "max_position_embeddings", None) or length + added
    if length + added > positions:
        also = f", and the prompt takes {added}" if added else ""
        raise BadInput(f"this base reads {positions} tokens at most, but length is {length}{also}; lower it.")
    return torch.arange(rows * length).view(rows, length) % config.vocab_size
