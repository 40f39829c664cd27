"""A segmenter of scans scored on label maps: overlap, distance of surfaces and volumes, for each scan and class."""

from typing import Any

import numpy as np
import torch

from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, check_labels, count_units, pick_evenly
from inlay.tasks.groups import list_groups
from inlay.tasks.statistics import Indices, score_with_intervals
from inlay.tasks.volumes.data import Case, load_volumes_to_score
from inlay.tasks.volumes.grid import reorient_to_ras, spacing_of
from inlay.tasks.volumes.loss import WholeVolume
from inlay.tasks.volumes.scan import aligned_labels, read_image
from inlay.tasks.volumes.scores import SCORES, dice_of, overlap, score_case
from inlay.tasks.volumes.segment import segment

TOLERANCE_MM = 1.0


def evaluate(adapter: Adapter, data: str, request: Request = EVERYTHING) -> Evaluation:
    """Score the masks that `segment` gives, without prompts, on the scans' own grids.

    `dice_model_grid` is what recipes write: Dice on the model's grid, of windows that overlap by a quarter. A class
    that the adapter knows and the data lacks is not scored; where it is predicted, it is no other class. Voxels with
    nnU-Net's label "ignore" are not scored. `value` is the class's number in the adapter's masks.

    Args:
        adapter: From `load_adapter`.
        data: As for `load_volumes`; its classes are matched by name.
        request: Which part, and how.

    Raises:
        InlayError: As `load_volumes`; classes that the adapter does not know; an adapter that is not for scans.
    """
    check_task(adapter, "volume-segmentation")
    chosen, cases, labels, notes = load_volumes_to_score(data, split=request.split, training=request.training)
    check_labels(data, labels, adapter.labels, adapter.name)
    # From the adapter's numbers of classes to those of the data, with 0 for those that the data lacks.
    numbers = np.array([0, *(labels.index(name) + 1 if name in labels else 0 for name in adapter.labels)], np.int64)
    rows: list[dict[str, Any]] = []
    dice = []  # N K, on the model's grid
    picked = [cases[i] for i in pick_evenly(len(cases), request.limit)]
    for case in picked:
        rows += _on_own_grid(adapter, case, labels, numbers)
        if request.compare:
            dice.append(_on_model_grid(adapter, case, numbers, len(labels)))
    values = {name: np.array([row[name] for row in rows]).reshape(len(picked), len(labels)) for name in SCORES}  # N K

    def statistic(scans: Indices) -> dict[str, float]:
        found = {name: float(each[scans].mean()) for name, each in values.items()}
        if len(labels) > 1:
            found |= {f"dice_{label}": float(values["dice"][scans, k].mean()) for k, label in enumerate(labels)}
        return found | ({"dice_model_grid": float(np.array(dice)[scans].mean())} if dice else {})

    per_class = [
        {
            "class": label,
            "value": rows[k]["value"],
            **{name: float(values[name][:, k].mean()) for name in SCORES},
            "predicted_ml": float(np.mean([row["predicted_ml"] for row in rows[k :: len(labels)]])),
            "reference_ml": float(np.mean([row["reference_ml"] for row in rows[k :: len(labels)]])),
        }
        for k, label in enumerate(labels)
    ]
    groups = list_groups(picked)
    count, unit, counted = count_units(len(picked), "scan", groups, request.training.group_for(data))
    return Evaluation(
        data=data,
        task="volume-segmentation",
        split=chosen,
        count=count,
        unit=unit,
        scores=score_with_intervals(statistic, len(picked), groups=groups, resamples=request.resamples),
        rows=[{key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows],
        per_class=per_class,
        notes=[
            *notes,
            *counted,
            f"Masks are those of `inlay segment` without prompts, on the scans' own grids; surface Dice within "
            f"{TOLERANCE_MM:g} mm.",
            "The base without the adapter has no score: it names no classes of scans.",
        ],
    )


def _on_own_grid(adapter: Adapter, case: Case, labels: tuple[str, ...], numbers: np.ndarray) -> list[dict[str, Any]]:
    """Rows of `score_case`."""
    array, affine = read_image(case)
    image, grid = reorient_to_ras(array[0], affine)
    truth = aligned_labels(case, image.shape, grid)  # D H W
    found = segment(adapter, adapter.processor.read(case), progress=False)
    mask = numbers[reorient_to_ras(found.class_mask, affine)[0]]
    rows = score_case(mask, truth, labels, spacing_of(grid), case=case.name, tolerance_mm=TOLERANCE_MM)
    values = {label: value for value, label in found.names.items()}
    return [{"case": row["case"], "class": row["class"], "value": values[row["class"]], **row} for row in rows]


@torch.inference_mode()
def _on_model_grid(adapter: Adapter, case: Case, numbers: np.ndarray, classes: int) -> np.ndarray:
    """Dice of each class, (K,), as a recipe scores it."""
    scan = adapter.processor.read(case)
    assert scan.labels is not None  # cases without are refused
    weight = next(p for p in adapter.model.parameters() if p.is_floating_point())
    batch = {
        "pixel_values": scan.image[None].to(weight.device, weight.dtype),
        "labels": scan.labels[None].to(weight.device),
    }
    answer = WholeVolume(adapter.processor.crop)(adapter.model, batch).classes.long()
    return dice_of(overlap(torch.from_numpy(numbers)[answer], scan.labels[None], classes).numpy())[0]
