"""Hidden states that transformers records from the block inside a wrapper, made those that leave the wrapper."""

import torch
from transformers.utils import output_capturing


def replace_recorded_state(after: torch.Tensor) -> None:
    """Make `after` the last hidden state that a model records for `output_hidden_states=True`, if it records any.

    transformers takes what the wrapped block gives, not what the adapter around the block makes of it.
    """
    recorded = output_capturing._active_collector.get()
    states = recorded.get("hidden_states") if recorded else None
    if states and states[-1] is not None:
        states[-1] = after


def hide_prompts(tokens: int, before: torch.Tensor, after: torch.Tensor) -> None:
    """Take prompts out of the hidden states and attentions that a model records from the block inside.

    Args:
        tokens: How many tokens are the image's own; the prompts stand behind them.
        before: (B, N, D), what enters the block.
        after: (B, N, D), what leaves it.
    """
    recorded = output_capturing._active_collector.get()
    if not recorded:
        return
    replace_recorded_state(after)
    states = recorded.get("hidden_states")
    if states and len(states) == 2 and states[0] is not None and states[0].shape[1] > tokens:
        states[0] = before
    if weights := recorded.get("attentions"):
        weights[-1] = weights[-1][..., :tokens, :tokens]
