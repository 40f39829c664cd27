"""Let a loaded adapter, or a model, answer in bfloat16 or float16, where its golden output allows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from inlay.adapters import golden
from inlay.adapters.load import LoadedAdapter
from inlay.adapters.sketch import find_precision
from inlay.bases.bfloat16 import choose_dtype
from inlay.bases.load import Dtype, take_first_line
from inlay.errors import ComputationFailed
from inlay.tasks.adapter import Adapter


@dataclass(frozen=True)
class Precision:
    """In what a model computes from now on.

    Attributes:
        name: float32, bfloat16, float16, int8 or nf4.
        why: Half a sentence.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"computes in {self.name}: {self.why}"


def set_precision(adapter: Adapter, dtype: Dtype | Literal["auto"]) -> Precision:
    """Let an adapter and its base, in place, compute in another type of number, all weights of both.

    The golden input is then answered once more, and may differ from the answer before by as much as rounding explains
    (`inlay doctor` says how much). `auto` takes bfloat16 where the device is faster in it (`choose_dtype`) and the
    golden output stays within that limit, else float32. A base in 8 or 4 bits stays as it is. Except with float32,
    networks of convolutions are laid out channels last, which is faster. While the golden output is computed, both the
    old and the new weights are in memory.

    Args:
        adapter: From `load_adapter`, or a model in its place. To merge it, merge before.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        ComputationFailed: The golden output differs by more in the type that was asked for; all is as before then.
    """
    model: Any = adapter.model
    held = find_precision(model)
    if held in ("int8", "nf4"):
        return Precision(held, "the base is stored so")
    wanted, why = choose_dtype(next(model.parameters()).device) if dtype == "auto" else (dtype, "as asked for")
    problem = _convert_checked(adapter, wanted, channels_last=_is_convolutional(model) and dtype != "float32")
    if problem is None:
        return Precision(wanted, why)
    if dtype == "auto" and wanted != held:
        return Precision(held, f"{problem} in {wanted}")
    raise ComputationFailed(f"{adapter.name!r} cannot compute in {wanted}: {problem}. Use float32.")


def lay_out_channels_last(adapter: Adapter) -> None:
    """Hold the kernels of a classifier made of convolutions channels last, in place, where it computes on a CPU.

    It then takes 0.4 to 1.0 of the time, and its logits move by rounding only (1e-6 of the largest). The golden input
    is answered once more; all stays as it was if that differs by more than rounding explains. Other models, and those
    that are not held in float32, stay as they are.
    """
    model: Any = adapter.model
    if not adapter.task.classifies or not _is_convolutional(model) or find_precision(model) != "float32":
        return
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        _convert_checked(adapter, "float32", channels_last=True)


def _is_convolutional(model: nn.Module) -> bool:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > golden.CONVOLUTIONS


def _convert_checked(adapter: Adapter, dtype: Dtype, channels_last: bool) -> str | None:
    """Convert a model, or say what speaks against it and leave it as it was."""
    model, kind = adapter.model, getattr(torch, dtype)
    if not channels_last and all(p.dtype == kind for p in model.parameters() if p.is_floating_point()):
        return None
    expected = adapter.output if isinstance(adapter, LoadedAdapter) else None
    if expected is None and adapter.processor is not None:
        expected = golden.compute_output(model, adapter.processor, adapter.task)
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    limit = golden.allow_deviation((dtype,), convolutions)
    undo = _convert(model, kind, channels_last)
    if expected is None:  # nothing makes its inputs
        return None
    try:
        found = golden.compute_output(model, adapter.processor, adapter.task)
    except Exception as error:  # a model may lack any operation in another type
        undo()
        return f"it fails ({take_first_line(error)})"
    off = golden.measure_deviation(expected, found)
    if off <= limit:
        return None
    undo()
    return f"its golden output differs by {off:.2g} ({limit:g} allowed)"


def _convert(model: nn.Module, dtype: torch.dtype, channels_last: bool) -> Callable[[], None]:
    """Give all weights another type, in place; what is returned puts the old ones back.

    Buffers that no file holds keep their type, as in transformers' own loading: such are the frequencies of rotary
    positions.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffers = (
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    for tensor in [*model.parameters(), *buffers]:
        if tensor.is_floating_point():
            before.append((tensor, tensor.data))
            layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
            tensor.data = tensor.data.to(dtype, memory_format=layout)

    def undo() -> None:
        for tensor, data in before:
            tensor.data = data

    return undo
