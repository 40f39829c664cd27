"""An image classifier scored on labelled images: accuracy, per class, and how far its probabilities can be trusted."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from inlay.tasks.adapter import Adapter, check_task, place_inputs
from inlay.tasks.classification import class_probabilities, evaluate_classifier
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, pick_evenly
from inlay.tasks.images.data import load_images_to_score
from inlay.tasks.images.stream import load_image_stream_to_score
from inlay.tasks.images.view import ImageView
from inlay.tasks.progress import show_progress
from inlay.tasks.shards import is_streamed

AT_ONCE = 32  # images in one forward pass


def evaluate(adapter: Adapter, data: str, request: Request = EVERYTHING) -> Evaluation:
    """Score a classifier; a class that it knows and the data lacks can still be predicted, and is then wrong.

    Args:
        adapter: From `load_adapter`.
        data: As for `load_images`; its labels are matched by name.
        request: Which part, and how.

    Raises:
        InlayError: As `load_images`; labels that the adapter does not know; an adapter of another task.
    """
    check_task(adapter, "image-classification")
    labels, logits = adapter.route(request.group)
    training = request.training
    if is_streamed(data, training.asks_to_stream(data)):
        chosen, rows, notes = load_image_stream_to_score(data, labels, split=request.split, training=training)
    else:
        chosen, rows, notes = load_images_to_score(
            data, labels, adapter=adapter.name, split=request.split, training=training
        )
    picked = pick_evenly(len(rows), request.limit)
    images = Subset(ImageView(rows, adapter.processor), picked)
    paths = [image["path"] for image in rows.select(picked)["image"]]
    groups = rows.select(picked)["group"][:] if "group" in rows.column_names else None
    names = [{"image": Path(path).name if path else f"image {i}"} for i, path in zip(picked, paths, strict=True)]
    return evaluate_classifier(
        adapter,
        request,
        data=data,
        split=chosen,
        noun="image",
        groups=groups,
        labels=labels,
        true=np.array(rows["label"][:], np.int64)[picked],
        names=names,
        notes=notes,
        predict=partial(_compute_probabilities, adapter.model, images, logits),
    )


@torch.inference_mode()
def _compute_probabilities(model: Any, images: Any, logits: list[int]) -> np.ndarray:
    """Of the classes that these logits stand for, (N, K)."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    found = []
    batches = DataLoader(images, batch_size=AT_ONCE)
    for batch in show_progress(batches, len(batches), "score", "batch"):
        inputs = place_inputs({key: value for key, value in batch.items() if key != "labels"}, weight)
        output = model(**inputs).logits  # B K
        found.append(class_probabilities(output[:, logits].double(), model.config).cpu())
    return torch.cat(found).numpy()
