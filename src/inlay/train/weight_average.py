"""An exponential moving average of the trained weights, which is evaluated and kept in their place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages of the trained weights: a <- d a + (1 - d) w after each step, with d = min(decay, (1 + n) / (10 + n)).

    n counts the steps: the first ones, which are far from the end, are forgotten sooner. accelerate stores the state
    with each checkpoint. Every process averages its own, equal, weights.

    Source: tf.train.ExponentialMovingAverage with `num_updates`; Polyak and Juditsky 1992, doi:10.1137/0330046.
    """

    def __init__(self, weights: Sequence[nn.Parameter], decay: float) -> None:
        self.weights, self.decay, self.steps = list(weights), decay, 0
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.averages, [weight.detach() for weight in self.weights], self.steps)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """A block in which the model has the averages for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps = state["steps"]
        for average, stored in zip(self.averages, state["averages"], strict=True):
            average.copy_(stored)
