"""Latency of one forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from inlay.bases.eval_mode import eval_mode
from inlay.errors import BadInput


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass over a batch: the median, and the range of the middle 80 % of the runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    device: str
    threads: int
    batch: int
    repeats: int


def latency(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    repeats: int = 30,
    warmup: int = 3,
    budget_s: float = 2.0,
) -> Latency:
    """Time single forward passes in eval and inference mode, with the number of threads that torch uses now.

    Accelerators are synchronised before and after each pass. Moving inputs to the model's device is not timed.
    Afterwards every module is in its previous mode: a BatchNorm that was in eval mode stays in eval mode.

    More threads than free cores make small models many times slower; on a shared machine check p10 too.
    `torch.utils.benchmark.Timer` is not used, because it returns means of blocks, which give no percentiles.

    Args:
        model: Any module, on one device.
        inputs: Keyword arguments of its forward; the first dimension of the first one is the batch.
        repeats: Passes to time, at least 1.
        warmup: Passes before the timed ones.
        budget_s: No pass starts after this many seconds, but at least one is timed; see `Latency.repeats`.

    Raises:
        InlayError: repeats is below 1, or there are no inputs.
    """
    if repeats < 1:
        raise BadInput(f"repeats must be at least 1, got {repeats}.")
    device = device_of(model)
    times_ms: list[float] = []
    with forward_passes(model, inputs) as run:
        deadline = time.perf_counter() + budget_s
        for count in range(warmup + repeats):
            if times_ms and time.perf_counter() > deadline:
                break
            took = run()
            # If the warm-up has used up the budget, its last pass is the measurement.
            if count >= warmup or time.perf_counter() > deadline:
                times_ms.append(took * 1e3)
    p10, median, p90 = np.quantile(times_ms, [0.1, 0.5, 0.9]).tolist()
    return Latency(
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        batch=len(next(iter(inputs.values()))),
        repeats=len(times_ms),
    )


@contextmanager
def forward_passes(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[Callable[[], float]]:
    """Yield a function that runs one forward pass of `inputs` in eval and inference mode and returns its seconds.

    Raises:
        InlayError: There are no inputs.
    """
    if not inputs:
        raise BadInput("there are no inputs to pass through the model.")
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def run() -> float:
        start = _synchronized_time(device)
        model(**inputs)
        return _synchronized_time(device) - start

    with eval_mode(model), torch.inference_mode():
        yield run


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _synchronized_time(device: torch.device) -> float:
    """Seconds of a clock, read after the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
