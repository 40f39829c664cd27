"""The last features of a model: what its head reads."""

from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.load import find_head
from inlay.errors import Unsupported
from inlay.methods._peft import PeftModel


def read_head_inputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the head of a model is given for a batch: of each example, or of each token that is no padding.

    Args:
        model: Of transformers, with a head or an output projection, with an adapter or without.
        batch: What it takes; labels are left out.

    Returns:
        (N, D). The positions of an image that a convolutional head reads are averaged.

    Raises:
        InlayError: The head is not called, or not with features.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    drawn = getattr(inner, "new_poolers", [])  # with the head, by a seed
    head = inner.get_output_embeddings() or inner.get_submodule((drawn or find_head(inner))[0])
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend([value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]),
        with_kwargs=True,
    )
    try:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        handle.remove()
    if not seen or seen[0].ndim not in (2, 3, 4):
        raise Unsupported(f"the head of {type(inner).__name__} is not given features, so that none can be compared.")
    features, mask = seen[0], batch.get("attention_mask")
    if features.ndim == 4:
        return features.mean((2, 3))  # B C h w
    if features.ndim == 2:
        return features
    if mask is None:
        return features.flatten(0, 1)  # B T D
    return features[:, -mask.shape[1] :][mask.bool()]  # a learned prompt stands in front of the text
