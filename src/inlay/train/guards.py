"""What a run does when it is told to stop, or when its numbers stop being numbers."""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inlay.train.evaluation import split_batch

if TYPE_CHECKING:
    from inlay.train.losses import Loss


class StopRequest:
    """Within the block, SIGTERM and Ctrl-C set `signal` instead of killing; a second Ctrl-C kills as usual."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread (a notebook server, a web worker): signals are not ours there
                break
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def find_first_bad_number(model: nn.Module, batch: dict[str, Any], loss: "Loss", accumulate: int = 1) -> str | None:
    """Say where NaN or Inf comes from: the batch, a weight, the first module that puts it out, the loss, or a gradient.

    Runs the step once more with hooks, in as many pieces, so it costs nothing until it is needed. `model` is unwrapped.
    None: the step, repeated, shows nothing.
    """
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and _bad(value):
            rows = [i for i, row in enumerate(value) if _bad(row)]
            return f"the input {name!r} holds NaN or Inf (rows {rows[:5]} of the batch)"
    for name, parameter in model.named_parameters():
        if _bad(parameter):
            return f"the weight {name!r} is already NaN or Inf"
    model.zero_grad()
    for piece in split_batch(batch, accumulate):
        if found := _blame_piece(model, piece, loss):
            return found
    return None


def _blame_piece(model: nn.Module, piece: dict[str, Any], compute: "Loss") -> str | None:
    culprits: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and _bad(first):
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
    if _bad(loss):
        return "the loss is NaN or Inf though every module's output is finite: look at the labels"
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return f"the gradient of {name!r} is NaN or Inf"
    return None


def _bad(values: torch.Tensor) -> bool:
    return values.is_floating_point() and not bool(torch.isfinite(values).all())
