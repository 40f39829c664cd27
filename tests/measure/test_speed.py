"""The clock, the bounds and what is left as it was."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from inlay.errors import InlayError
from inlay.measure import latency


class Sleeper(nn.Module):
    """Takes the given seconds, one pass after the other, and then the last again."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = list(seconds)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        time.sleep(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
        return x


def measure(model: nn.Module, **settings: Any) -> Any:
    return latency(model, {"x": torch.zeros(3, 4)}, **settings)


def test_times_single_passes_and_not_the_warmup():
    model = Sleeper(0.5, 0.02, 0.02, 0.02, 0.04)
    result = measure(model, warmup=1, repeats=5)
    assert result.repeats == 5 and len(model.modes) == 6
    # Wide above, as the machine may be busy; the warm-up of 500 ms is outside all the same.
    assert 20 <= result.p10_ms <= result.median_ms <= result.p90_ms < 400
    assert result.p90_ms >= 32  # between the longest, 40 ms, and the next, as numpy interpolates
    assert (result.device, result.threads, result.batch) == ("cpu", torch.get_num_threads(), 3)


def test_runs_in_eval_and_inference_mode_and_restores_mixed_modes():
    model = nn.Sequential(Sleeper(0.0), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    latency(model, {"input": torch.zeros(3, 4)}, repeats=2)
    assert set(model[0].modes) == {(False, True)}
    assert (model.training, [module.training for module in model]) == (True, [True, False, True])
    with pytest.raises(RuntimeError):
        latency(model, {"input": torch.zeros(3, 5)})
    assert (model.training, [module.training for module in model]) == (True, [True, False, True])


def test_budget():
    model = Sleeper(0.03)
    assert 1 <= measure(model, repeats=1000, budget_s=0.3).repeats <= 7
    assert 0.03 * len(model.modes) < 2  # seconds of all passes, on any machine


def test_one_pass_over_the_budget_is_the_measurement():
    model = Sleeper(0.1)
    result = measure(model, budget_s=0.05)
    assert (result.repeats, len(model.modes)) == (1, 1)
    assert 100 <= result.median_ms == result.p10_ms == result.p90_ms


def test_errors():
    with pytest.raises(InlayError, match="repeats must be at least 1, got 0"):
        measure(Sleeper(0.0), repeats=0)
    with pytest.raises(InlayError, match="there are no inputs"):
        latency(Sleeper(0.0), {})
