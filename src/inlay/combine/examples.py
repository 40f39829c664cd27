"""A few labelled examples of any task, as batches that a model takes, with the loss of each."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from inlay.tasks.adapter import Adapter
from inlay.tasks.evaluation import Training
from inlay.train.losses import Loss


@dataclass(frozen=True)
class Examples:
    """Examples in batches.

    Attributes:
        batches: What the model takes, on its device.
        loss: Of a batch, a mean over what its `weight` counts.
        count: How many examples.
    """

    batches: list[dict[str, Any]]
    loss: Loss
    count: int

    def mean(self, model: Callable[..., Any], *, backward: bool = False) -> torch.Tensor:
        """The mean loss of all batches; `backward` adds its gradient batch by batch, so that memory is for one."""
        weights = [self.loss.weight(batch) for batch in self.batches]
        total = torch.zeros(())
        for batch, weight in zip(self.batches, weights, strict=True):
            part = self.loss(model, batch).loss * (weight / sum(weights))
            if backward:
                part.backward()
            total += part.detach().cpu()
        return total


def load_examples(loaded: Adapter, data: str, count: int, seed: int, *, training: Training | None = None) -> Examples:
    """Up to so many examples of an adapter's own task; equal seeds draw the same.

    Args:
        loaded: Says which task, and makes inputs.
        data: Name of labelled data, as the loader of that task takes it.
        count: How many images, texts or crops of scans.
        seed: Of all that is drawn.
        training: Of the adapter: what it held out of this data is not used. None: what `seed` holds out is not.

    Raises:
        InlayError: Data of other labels, or none of that task.
    """
    labelled = loaded.task.load_labelled(loaded, data, count, seed, training or Training(settings={"seed": seed}))
    with _seed_draws(seed):
        items = [labelled.view[i] for i in range(min(count, len(labelled.view)))]
    weight = next(p for p in loaded.model.parameters() if p.is_floating_point())
    batches = [labelled.collate(items[i : i + labelled.rows]) for i in range(0, len(items), labelled.rows)]
    placed = [{key: value.to(weight.device) for key, value in batch.items()} for batch in batches]
    return Examples(placed, labelled.loss, len(items))


@contextmanager
def _seed_draws(seed: int) -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
