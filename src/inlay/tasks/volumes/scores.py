"""How well masks of scans agree: overlap, and the distance of surfaces in mm, per class and per case.

    rows = score_case(predicted, truth, labels=["anterior", "posterior"], spacing_mm=(1.0, 1.0, 1.0), case="006")
    write_csv(rows, "scores.csv")
    summarise(rows)["dice"]

Of empty masks: where a class is in neither mask, Dice, IoU and NSD are 1 and HD95 is 0; where it is in one of them
only, Dice, IoU and NSD are 0 and HD95 is the diagonal of the volume: a missed object costs as much as the farthest.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import evaluate
import numpy as np
import torch
from datasets import Array2D, Features

from inlay.errors import BadInput, Unsupported
from inlay.files.atomic import replacing
from inlay.tasks.metrics import ClassMetric

SCORES = ("dice", "iou", "hd95_mm", "nsd")
VOLUME_ERRORS = ("volume_error_ml", "volume_error_percent")
COLUMNS = ("case", "class", *SCORES, "predicted_ml", "reference_ml", *VOLUME_ERRORS)
Mask: TypeAlias = np.ndarray | torch.Tensor


def score_case(
    predicted: Mask,
    reference: Mask,
    labels: Sequence[str],
    spacing_mm: Sequence[float],
    *,
    case: str = "",
    tolerance_mm: float = 1.0,
) -> list[dict[str, Any]]:
    """Scores of one case, a row for each class: Dice, IoU, HD95 and normalised surface Dice.

    HD95 is the larger of the two 95th percentiles of the distances from one surface's voxels to the other surface. NSD
    is the share of both surfaces, by area, that lies within `tolerance_mm` of the other one. Voxels whose reference is
    negative are left out of both masks.

    Args:
        predicted: Integers (D, H, W) or any other order of axes: 0 background, 1..K the classes.
        reference: The same, of the same shape.
        labels: Names of the classes 1..K.
        spacing_mm: In the order of the masks' axes.
        case: Its name, for the rows.
        tolerance_mm: What counts as no distance for NSD, above 0.

    Returns:
        Rows with the keys `COLUMNS`; volumes are in ml. The error of a volume is predicted minus reference, and its
        percentage that of the reference: None where only the reference is empty.

    Raises:
        InlayError: Masks of other shapes, a class without a name, or spacing that is none.

    Source: `monai.metrics.compute_hausdorff_distance` (percentile 95); Nikolov et al. 2018, arXiv:1809.04430, by
    `monai.metrics.compute_surface_dice` with subvoxels; the conventions for empty masks are this package's.
    """
    predicted, reference = (
        np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask) for mask in (predicted, reference)
    )
    spacing = [float(s) for s in spacing_mm]
    _check_masks(predicted, reference, labels, spacing, tolerance_mm)
    predicted = np.where(reference < 0, 0, predicted)
    diagonal = math.dist([n * s for n, s in zip(reference.shape, spacing, strict=True)], [0.0] * 3)
    ml, rows = math.prod(spacing) / 1000, []
    for value, label in enumerate(labels, 1):
        a, b = predicted == value, reference == value
        counts = np.array([[np.count_nonzero(a & b), np.count_nonzero(a), np.count_nonzero(b)]])
        _, p, r = (int(n) for n in counts[0])
        distance, nsd = (
            _measure_surfaces(a, b, spacing, tolerance_mm) if p and r else (diagonal if p or r else 0.0, float(p == r))
        )
        scores = dice_of(counts)[0], iou_of(counts)[0], distance, nsd
        named = {"case": case, "class": label} | {k: float(v) for k, v in zip(SCORES, scores, strict=True)}
        volumes = {"predicted_ml": p * ml, "reference_ml": r * ml, "volume_error_ml": (p - r) * ml}
        percent = 100 * (p - r) / r if r else None if p else 0.0
        rows.append({**named, **volumes, "volume_error_percent": percent})
    return rows


def overlap(predicted: torch.Tensor, reference: torch.Tensor, classes: int) -> torch.Tensor:
    """What Dice and IoU are made of: voxels in both masks, in the predicted, in the reference; int64 (B, K, 3).

    Args:
        predicted: Integers (B, ...), 0 background, 1..K.
        reference: The same; where it is negative, nothing counts.
        classes: K.
    """
    predicted, reference = predicted.flatten(1), reference.flatten(1)
    predicted = predicted.masked_fill(reference < 0, 0)
    both = predicted.where(predicted == reference, 0)
    counts = [
        torch.stack([torch.bincount(row.clamp(0, classes).long(), minlength=classes + 1)[1:] for row in masks])
        for masks in (both, predicted, reference)
    ]
    return torch.stack(counts, -1)


def dice_of(counts: np.ndarray) -> np.ndarray:
    """Dice of `overlap`'s counts (..., 3); 1 where both masks are empty."""
    both, p, r = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    return np.where(p + r > 0, 2 * both / np.maximum(p + r, 1), 1.0)


def iou_of(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of `overlap`'s counts (..., 3); 1 where both masks are empty."""
    both, p, r = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    return np.where(p + r > 0, both / np.maximum(p + r - both, 1), 1.0)


def mean_dice(counts: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean Dice of the classes that are there, and that of each class, (K,), of `overlap`'s counts (N, K, 3).

    A case says nothing of a class that is in neither of its masks, and is left out for it, as nnU-Net does; where the
    class is predicted without being there it counts 0. So a rare class is judged by the cases that have it. A class
    that is in no mask at all has 1, and no part in the mean.
    """
    there = np.asarray(counts)[..., 1:].any(-1)  # N K
    cases = there.sum(0)
    each = np.where(cases > 0, (dice_of(counts) * there).sum(0) / np.maximum(cases, 1), 1.0)
    return float(each[cases > 0].mean()) if cases.any() else 1.0, each


class VolumeDice(ClassMetric):
    """`mean_dice`: of the classes that are there as `dice`, and of each class as `dice_` and its name.

    Predictions are the rows of `overlap`, (K, 3) for a case; references are not read. So a case of any size is three
    numbers a class, which processes can gather.

    Args:
        labels: Names of the classes 1..K.
    """

    score_name = "dice"  # chooses the best step; the others are of single classes

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: voxels in both masks, the predicted and the reference, (N, K, 3).",
            features=Features({"predictions": Array2D((len(self.labels), 3), "int64")}),
        )

    def _compute(self, predictions: Any) -> dict[str, float]:
        mean, dice = mean_dice(np.asarray(predictions))
        each = {f"dice_{label}": float(value) for label, value in zip(self.labels, dice, strict=True)}
        return {"dice": mean} | (each if len(each) > 1 else {})


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the scores over cases and classes, and under `classes` those of each class; `cases` counts.

    Raises:
        InlayError: No rows.
    """
    if not rows:
        raise BadInput("there are no rows to summarise; score a case first.")
    labels = dict.fromkeys(row["class"] for row in rows)
    each = {label: _average([row for row in rows if row["class"] == label]) for label in labels}
    return _average(rows) | {"cases": len({row["case"] for row in rows}), "classes": each}


def write_csv(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """One line a case and class, with a header; the file appears whole, or stays as it was."""
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in SCORES}


def _measure_surfaces(a: np.ndarray, b: np.ndarray, spacing: list[float], tolerance: float) -> tuple[float, float]:
    """HD95 in mm and NSD of two masks that are not empty."""
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ImportError:
        raise Unsupported(
            "measuring surfaces takes MONAI, which is not installed; run: pip install 'inlay[volumes]'"
        ) from None
    # Only their box, with a margin: no surface lies elsewhere, and MONAI's own cropping comes after several copies.
    box = tuple(_find_extent((a | b).any(tuple(axis for axis in range(3) if axis != i))) for i in range(3))
    first, second = (torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (a, b))
    options: dict[str, Any] = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of its own calls
        distance = compute_hausdorff_distance(first, second, percentile=95, **options)
        nsd = compute_surface_dice(first, second, [tolerance], use_subvoxels=True, **options)
    return float(distance), float(nsd)


def _find_extent(any_along: np.ndarray) -> slice:
    found = np.flatnonzero(any_along)
    return slice(int(found[0]), int(found[-1]) + 1)


def _check_masks(
    predicted: np.ndarray, reference: np.ndarray, labels: Sequence[str], spacing: list[float], tolerance: float
) -> None:
    if predicted.shape != reference.shape or reference.ndim != 3:
        got = f"{predicted.shape} and {reference.shape}"
        raise BadInput(f"masks must have three axes and one shape, got {got}; bring them to one grid.")
    if predicted.dtype.kind == "f" or reference.dtype.kind == "f":
        raise BadInput("masks must hold whole numbers, got floats; take the argmax of the scores first.")
    most = max(int(predicted.max()), int(reference.max()))
    if isinstance(labels, str) or most > len(labels):
        raise BadInput(f"{most} classes need a name each, got {labels!r}.")
    if len(spacing) != 3 or not all(0 < s < math.inf for s in [*spacing, tolerance]):
        raise BadInput(f"spacing and tolerance must be lengths in mm above 0, got {spacing} and {tolerance}.")
