"""A few labelled examples of any task, as batches that a model takes, with the loss of each."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from inlay.adapters.load import LoadedAdapter
from inlay.errors import InlayError
from inlay.tasks.images.data import load_images
from inlay.tasks.images.view import ImageView
from inlay.tasks.masks.data import load_masks
from inlay.tasks.masks.loss import MaskLoss
from inlay.tasks.masks.view import MaskView, collate_masks
from inlay.tasks.text.data import load_texts
from inlay.tasks.text.loss import NextToken
from inlay.tasks.text.view import TextView
from inlay.tasks.volumes.data import load_volumes
from inlay.tasks.volumes.view import VolumeView, collate_volumes
from inlay.train.losses import Loss, ModelLoss


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


def load_examples(loaded: LoadedAdapter, data: str, count: int, seed: int) -> Examples:
    """Up to so many examples of an adapter's own task; equal seeds draw the same.

    Args:
        loaded: Says which task, and makes inputs.
        data: Name of labelled data, as the loader of that task takes it.
        count: How many pictures, texts or crops of scans.
        seed: Of all that is drawn.

    Raises:
        InlayError: Data of other labels, or none of that task.
    """
    task = loaded.file.record.get("task")
    if task not in _TASKS:
        raise InlayError(f"weights are fitted for the tasks {', '.join(_TASKS)}, not for {task}; give them yourself.")
    view, collate, loss, rows = _TASKS[task](loaded, data, count, seed)
    with _seeded(seed):
        items = [view[i] for i in range(min(count, len(view)))]
    device = next(loaded.model.parameters()).device
    batches = [collate(items[i : i + rows]) for i in range(0, len(items), rows)]
    placed = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    return Examples(placed, loss, len(items))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def _images(loaded: LoadedAdapter, data: str, count: int, seed: int) -> Any:
    """The classes take turns; numbers of labels are those of the adapter."""
    images = load_images(data, seed=seed)
    strange = [label for label in images.labels if label not in loaded.labels]
    if strange:
        raise InlayError(
            f"the data {data!r} has labels that the combination does not have ({', '.join(strange[:5])}); it has "
            f"{', '.join(loaded.labels[:10])}."
        )
    places = torch.tensor([loaded.labels.index(label) for label in images.labels])
    view = ImageView(images.train.select(_mixed(images.train["label"][:], seed)[:count]), loaded.processor)

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_collate(items)
        return {**batch, "labels": places[batch["labels"]]}

    return view, collate, ModelLoss(), 8


def _texts(loaded: LoadedAdapter, data: str, count: int, seed: int) -> Any:
    rows = load_texts(data, seed=seed).train
    view = TextView(rows.shuffle(seed=seed).select(range(min(count, len(rows)))), loaded.processor)
    return view, view.collate, NextToken(), 8


def _masks(loaded: LoadedAdapter, data: str, count: int, seed: int) -> Any:
    """Up to 8 objects of a picture, asked for by points, boxes or both."""
    rows = load_masks(data, seed=seed).train
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return MaskView([rows[i] for i in order.tolist()], loaded.processor, seed=seed), collate_masks, MaskLoss(), 1


def _volumes(loaded: LoadedAdapter, data: str, count: int, seed: int) -> Any:
    """A crop of each scan, without prompts."""
    volumes = load_volumes(data, seed=seed)
    if list(volumes.labels) != loaded.labels:
        raise InlayError(
            f"the data {data!r} has the classes {', '.join(volumes.labels)}, the combination {', '.join(loaded.labels)}"
            "; fit on data of the same ones."
        )
    order = np.random.default_rng(seed).permutation(len(volumes.train))[:count]
    cases = [volumes.train[i] for i in order.tolist()]
    return VolumeView(cases, loaded.processor, training=True, augment=False), collate_volumes, ModelLoss(), 1


_TASKS = {
    "image-classification": _images,
    "text-generation": _texts,
    "mask-generation": _masks,
    "volume-segmentation": _volumes,
}


def _mixed(labels: list[int], seed: int) -> list[int]:
    """Rows at random, the classes taking turns."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn: dict[int, int] = {}
    keyed = []
    for i in order.tolist():
        turn[labels[i]] = turn.get(labels[i], 0) + 1
        keyed.append((turn[labels[i]], i))
    return [i for _, i in sorted(keyed, key=lambda pair: pair[0])]
