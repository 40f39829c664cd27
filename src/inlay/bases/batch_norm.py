"""One rule for batch norms: a base keeps its running statistics, whatever is trained on it, and however.

An adapter's file holds no statistics. Where they move in training, the adapter computes something else once it is
loaded on the base as it was: LoRA on MobileNetV2 fell from an accuracy of 1.0 to 0.125. So a batch norm normalises with
its stored statistics in train mode too, with every method; full fine-tuning does the same, to be comparable.
"""

from typing import Any

from torch import nn


def freeze_statistics(model: nn.Module) -> None:
    """Let the batch norms of `model` normalise with their running statistics from now on, after `model.train()` too.

    Those without any (`track_running_stats=False`) stay as they are.
    """
    for module in model.modules():
        if is_batch_norm(module) and _use_stored_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_use_stored_statistics)


def is_batch_norm(module: nn.Module) -> bool:
    """True for a batch norm with running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _use_stored_statistics(norm: nn.Module, inputs: Any) -> None:
    if norm.training:
        norm.eval()
