"""Stop signals, and the search for the cause of NaN or Inf."""

import signal
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from inlay.train.evaluation import split_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    unwrapped. All processes take part, and all get what the first of them found: weights in shards are gathered by all,
    so none may end before the others. Returns None if the repeated step shows neither NaN nor Inf.
    """
    for found in _search_step(model, batch, loss, accumulate):
        if found := next(filter(None, gather_object([found])), None):
            return found
    return None


def _search_step(model: nn.Module, batch: dict[str, Any], compute: "Loss", accumulate: int) -> "Iterator[str | None]":
    """What is found in each part of the step, or None, as often in every process."""
    yield _find_in_batch(batch)
    yield next(
        (f"the weight {name!r} is already NaN or Inf" for name, p in model.named_parameters() if _has_nan_or_inf(p)),
        None,
    )
    model.zero_grad()
    for piece in split_batch(batch, accumulate):
        culprits: list[str] = []
        with _watch_outputs(model, culprits):
            loss = compute(model, piece).loss
        if culprits:
            inside = [name for name, _ in model.get_submodule(culprits[0]).named_parameters()]
            yield f"the output of {culprits[0]!r} (parameters: {', '.join(inside[:4]) or 'none'}) is NaN or Inf"
        elif _has_nan_or_inf(loss):
            yield "the loss is NaN or Inf although the output of every module is finite; check the labels"
        else:
            yield None
        loss.backward()
        gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        yield next((f"the gradient of {name!r} is NaN or Inf" for name, g in gradients if _has_nan_or_inf(g)), None)


def _find_in_batch(batch: dict[str, Any]) -> str | None:
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and _has_nan_or_inf(value):
            rows = [i for i, row in enumerate(value) if _has_nan_or_inf(row)]
            return f"the input {name!r} holds NaN or Inf (rows {rows[:5]} of the batch)"
    return None


@contextmanager
def _watch_outputs(model: nn.Module, culprits: list[str]) -> "Iterator[None]":
    """Note the names of the modules that return NaN or Inf, the innermost first."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and _has_nan_or_inf(first):
                culprits.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_nan_or_inf(values: torch.Tensor) -> bool:
    """Of a shard, whether the part of this process has."""
    own = values.to_local() if isinstance(values, DTensor) else values
    return own.is_floating_point() and not bool(torch.isfinite(own).all())
