"""An image classifier scored on labelled images: accuracy, per class, and how far its probabilities can be trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from inlay.bases.load import read_config, resolve_base
from inlay.errors import InlayError
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, Score, pick_evenly
from inlay.tasks.images.data import load_images_to_score
from inlay.tasks.images.view import ImageView
from inlay.tasks.statistics import (
    BINS,
    Indices,
    calibration_error,
    class_rows,
    class_scores,
    confusion_matrix,
    score_with_intervals,
)

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
    labels, logits = adapter.route(request.task)
    chosen, rows, notes = load_images_to_score(
        data, labels, adapter=adapter.name, split=request.split, training=request.training
    )
    picked = pick_evenly(len(rows), request.limit)
    images = Subset(ImageView(rows, adapter.processor), picked)
    true = np.array(rows["label"][:], np.int64)[picked]
    probabilities = _probabilities(adapter.model, images, logits)  # N K
    scores = _scores(probabilities, true, request.resamples)
    base, remark = None, ""
    if request.compare:
        remark = _no_base(adapter, labels)
        if not remark:
            with adapter.model.disable_adapter():
                base = _scores(_probabilities(adapter.model, images, logits), true, request.resamples)
    predicted = probabilities.argmax(1)
    paths = [image["path"] for image in rows.select(picked)["image"]]
    table = [
        {
            "image": Path(path).name if path else f"image {i}",
            "true": labels[t],
            "predicted": labels[p],
            "probability": round(float(row[p]), 6),
            "probability_of_true": round(float(row[t]), 6),
            "right": bool(t == p),
        }
        for i, path, t, p, row in zip(picked, paths, true, predicted, probabilities, strict=True)
    ]
    told = f"Expected calibration error: {BINS} bins of equal width (Guo et al. 2017, arXiv:1706.04599)."
    return Evaluation(
        data=data,
        task="image-classification",
        split=chosen,
        count=len(picked),
        unit="image",
        scores=scores,
        base=base,
        rows=table,
        per_class=class_rows(true, predicted, labels),
        labels=labels,
        confusion=confusion_matrix(true, predicted, len(labels)).tolist(),
        notes=[*notes, told, *filter(None, [remark])],
    )


@torch.inference_mode()
def _probabilities(model: Any, images: Any, logits: list[int]) -> np.ndarray:
    """Of the classes that these logits stand for, (N, K)."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    found = []
    for batch in DataLoader(images, batch_size=AT_ONCE):
        output = model(pixel_values=batch["pixel_values"].to(weight.device, weight.dtype)).logits  # B K
        found.append(output[:, logits].double().softmax(-1).cpu())
    return torch.cat(found).numpy()


def _scores(probabilities: np.ndarray, true: np.ndarray, resamples: int) -> dict[str, Score]:
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    surprise = -np.log(np.maximum(probabilities[np.arange(len(true)), true], 1e-300))
    right, classes = predicted == true, probabilities.shape[1]

    def statistic(rows: Indices) -> dict[str, float]:
        each = class_scores(true[rows], predicted[rows], classes)
        return {
            "accuracy": float(right[rows].mean()),
            **{name: float(np.nanmean(each[name])) for name in ("f1", "precision", "recall")},
            "loss": float(surprise[rows].mean()),
            "ece": calibration_error(confidence[rows], right[rows]),
        }

    return score_with_intervals(statistic, len(true), resamples=resamples)


def _no_base(adapter: Adapter, labels: list[str]) -> str:
    """Why the base alone has no score; nothing where its labels are the adapter's."""
    if not hasattr(adapter.model, "disable_adapter"):
        return "The base alone was not scored: the adapter is merged into it."
    name = adapter.model.get_base_model().name_or_path
    try:
        own = read_config(name, resolve_base(name), None).id2label
    except InlayError:
        return "The base alone was not scored: its own labels are not known."
    if [own[i] for i in sorted(own)] != labels:
        return "The base alone has no score: its head for these labels is new."
    return ""
