"""Stop signals, and the search for the cause of NaN or Inf."""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inlay.train.evaluation import split_batch

if TYPE_CHECKING:
    from inlay.train.losses import Loss


class StopRequest:
    """A block in which SIGTERM and Ctrl-C set `signal` instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous_handlers[number] = signal.signal(number, self._note_signal)
            except ValueError:  # outside the main thread (notebook server, web worker) no handler can be set
                break
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def find_first_bad_number(model: nn.Module, batch: dict[str, Any], loss: "Loss", accumulate: int = 1) -> str | None:
    """Say where NaN or Inf comes from: the batch, a weight, the output of a module, the loss, or a gradient.

    Repeats the step with hooks, in the same number of pieces, so a normal step costs nothing extra. `model` is
    unwrapped. Returns None if the repeated step shows neither NaN nor Inf.
    """
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and _has_nan_or_inf(value):
            rows = [i for i, row in enumerate(value) if _has_nan_or_inf(row)]
            return f"the input {name!r} holds NaN or Inf (rows {rows[:5]} of the batch)"
    for name, parameter in model.named_parameters():
        if _has_nan_or_inf(parameter):
            return f"the weight {name!r} is already NaN or Inf"
    model.zero_grad()
    for piece in split_batch(batch, accumulate):
        if found := _find_bad_number_in(model, piece, loss):
            return found
    return None


def _find_bad_number_in(model: nn.Module, piece: dict[str, Any], compute: "Loss") -> str | None:
    culprits: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and _has_nan_or_inf(first):
                culprits.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        loss = compute(model, piece).loss
    finally:
        for handle in handles:
            handle.remove()
    if culprits:
        inside = [name for name, _ in model.get_submodule(culprits[0]).named_parameters()]
        return f"the output of {culprits[0]!r} (parameters: {', '.join(inside[:4]) or 'none'}) is NaN or Inf"
    if _has_nan_or_inf(loss):
        return "the loss is NaN or Inf although the output of every module is finite; check the labels"
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _has_nan_or_inf(parameter.grad):
            return f"the gradient of {name!r} is NaN or Inf"
    return None


def _has_nan_or_inf(values: torch.Tensor) -> bool:
    return values.is_floating_point() and not bool(torch.isfinite(values).all())
