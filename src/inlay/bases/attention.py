"""Which code computes the attention of a base: torch's fused kernels, FlashAttention 2, or plain products."""

import os
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from inlay.errors import BadInput, Unsupported

Attention = Literal["sdpa", "flash", "eager"]
_NAMES = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}  # in transformers


def request_attention(config: Any, attention: Attention) -> None:
    """Write into a config which code is to compute the attention of the model that is made of it.

    Raises:
        InlayError: No such code; FlashAttention without a CUDA GPU, or without its package. (With the package `kernels`
            transformers would take its code from the Hub, which inlay never runs.)
    """
    if attention not in _NAMES:
        raise BadInput(f"unknown attention {attention!r}; choose one of {', '.join(_NAMES)}.")
    if attention == "flash" and not torch.cuda.is_available():
        raise Unsupported("flash attention needs a CUDA GPU, and there is none here; choose sdpa, or leave it out.")
    if attention == "flash" and not is_flash_attn_2_available():
        raise Unsupported("flash attention needs the package flash-attn: pip install flash-attn, or choose sdpa.")
    config._attn_implementation = _NAMES[attention]


def explain_attention_error(name: str, attention: Attention | None, error: Exception) -> Unsupported | None:
    """What is to be said if a model could not be made because it lacks this attention; None of other errors."""
    if attention is None or not isinstance(error, ValueError) or "does not support" not in str(error):
        return None
    return Unsupported(f"{name} has no {attention} attention in transformers; leave attention out.")


def check_precision(model: nn.Module, precision: str) -> None:
    """Refuse to train in float32 with FlashAttention, whose kernels do not know it.

    Args:
        model: A base, with an adapter or without.
        precision: As in `TrainConfig`; auto: that of `accelerate launch`, or that of the weights.

    Raises:
        InlayError: The forward would be in float32.
    """
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if uses_flash(model) and precision not in ("bf16", "fp16") and not halves:
        raise Unsupported("flash attention computes in 16 bits only; add --precision bf16, or choose sdpa.")


def leave_flash_attention(model: nn.Module) -> None:
    """Go back to torch's kernels where the weights are in float32, in which the model is used after a bf16 training."""
    if not uses_flash(model) or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("sdpa" if module._supports_sdpa else "eager")


def uses_flash(model: nn.Module) -> bool:
    """True if a model, or a part of it, computes its attention by FlashAttention 2."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "_attn_implementation", None) == _NAMES["flash"] for config in configs)
