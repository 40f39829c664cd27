"""Settings of torch that make steps faster, for as long as a run trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from inlay.train.config import TrainConfig
from inlay.train.frozen_cache.frozen_blocks import find_blocks
from inlay.train.frozen_cache.states import NotCacheable


@contextmanager
def accelerated(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """A block in which the model computes as `tf32`, `channels_last` and `compile` say; afterwards as before."""
    uses_tf32 = config.tf32 and accelerator.device.type == "cuda" and _find_matmul_precision() == "highest"
    compiled = _list_compiled(model) if config.compile else []
    try:
        if uses_tf32:
            torch.set_float32_matmul_precision("high")
            accelerator.print("float32 matrix products are computed in TF32; --tf32 false computes them in full.")
        if config.channels_last:
            _set_memory_format(model, torch.channels_last)
        for module in compiled:
            module.compile()
        yield
    finally:
        if uses_tf32:
            torch.set_float32_matmul_precision("highest")
        if config.channels_last:
            _set_memory_format(model, torch.contiguous_format)
        for module in compiled:
            module._compiled_call_impl = None


def _find_matmul_precision() -> str | None:
    """highest, high or medium; None where it was set by `torch.backends.fp32_precision`, which has the last word."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to tell by one interface what was set by the other
        return None


def _list_compiled(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, which share one compilation, or the model itself where its blocks are not known."""
    try:
        return list(find_blocks(getattr(model, "model", model)).values())
    except NotCacheable:
        return [model]


def _set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Order the weights of 2D convolutions. A convolution computes in the order of its weights."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
