"""What a model costs, in one row: it goes into every saved adapter."""

from __future__ import annotations

from torch import Tensor, nn

from inlay.measure.footprint import footprint
from inlay.measure.macs import count_macs
from inlay.measure.speed import latency


def cost(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int | float | str]:
    """Parameters, multiply-accumulates and latency of one forward pass of `inputs`, as `model` is now.

    Returns:
        parameters and trainable_parameters (counts), weights_mb and trainable_mb (10^6 bytes held in memory), mmacs
        (10^6 multiply-accumulates), latency_ms (median of single passes), device and threads it was measured on.
    """
    size, time = footprint(model), latency(model, inputs)
    return {
        "parameters": size.parameters,
        "trainable_parameters": size.trainable,
        "weights_mb": round(size.bytes_total / 1e6, 4),
        "trainable_mb": round(size.bytes_trainable / 1e6, 4),
        "mmacs": round(count_macs(model, inputs) / 1e6, 3),
        "latency_ms": round(time.median_ms, 3),
        "device": time.device,
        "threads": time.threads,
    }
