"""A segmenter of scans scored on label maps: overlap, distance of surfaces and volumes, for each scan and class."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.files.outputs import check_output_folder
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, Score, check_labels, count_units, pick_evenly
from inlay.tasks.groups import list_groups
from inlay.tasks.progress import show_progress
from inlay.tasks.statistics import Indices, score_with_intervals
from inlay.tasks.volumes.box_plot import draw_boxes
from inlay.tasks.volumes.data import Case, load_volumes_to_score
from inlay.tasks.volumes.grid import reorient_from_ras, reorient_to_ras, spacing_of
from inlay.tasks.volumes.loss import WholeVolume
from inlay.tasks.volumes.montage import draw_montage
from inlay.tasks.volumes.scan import aligned_labels, read_image
from inlay.tasks.volumes.scores import SCORES, VOLUME_ERRORS, mean_dice, overlap, score_case
from inlay.tasks.volumes.segment import Segmentation, check_output, segment

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
    drawings = Drawings.from_options(request.options)
    chosen, cases, labels, notes = load_volumes_to_score(data, split=request.split, training=request.training)
    check_labels(data, labels, adapter.labels, adapter.name)
    # From the adapter's numbers of classes to those of the data, with 0 for those that the data lacks.
    numbers = np.array([0, *(labels.index(name) + 1 if name in labels else 0 for name in adapter.labels)], np.int64)
    rows: list[dict[str, Any]] = []
    on_model_grid = []  # voxel counts, N K 3
    picked = [cases[i] for i in pick_evenly(len(cases), request.limit)]
    for case in show_progress(picked, len(picked), "score", "scan"):
        found, of_case = _on_own_grid(adapter, case, labels, numbers, drawings.tolerance_mm)
        rows += of_case
        drawings.add(case, found, of_case)
        if request.compare:
            on_model_grid.append(_on_model_grid(adapter, case, numbers, len(labels)))
    drawings.draw(rows)
    groups = list_groups(picked)
    count, unit, counted = count_units(len(picked), "scan", groups, request.training.group_for(data))
    scores, per_class = summarise_rows(rows, labels, groups, request.resamples, np.array(on_model_grid))
    return Evaluation(
        data=data,
        task="volume-segmentation",
        split=chosen,
        count=count,
        unit=unit,
        scores=scores,
        rows=round_rows(rows),
        per_class=per_class,
        notes=[
            *notes,
            *counted,
            f"Masks are those of `inlay segment` without prompts, on the scans' own grids; surface Dice within "
            f"{drawings.tolerance_mm:g} mm.",
            "The base without the adapter has no score: it names no classes of scans.",
        ],
    )


def summarise_rows(
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    on_model_grid: np.ndarray | None = None,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """The scores of all scans with their intervals, and the means of each class.

    Args:
        rows: Those of `score_case` for each scan, with `value` in each.
        labels: Names of the classes 1..K.
        groups: Of each scan; None: they are independent.
        resamples: For the intervals.
        on_model_grid: Counts of `overlap` for each scan (N, K, 3), for the Dice that recipes write; None or empty: not
            asked for.
    """
    count = len(rows) // len(labels)
    values = {name: np.array([row[name] for row in rows]).reshape(count, len(labels)) for name in SCORES}  # N K
    errors = {
        name: np.array([row[name] for row in rows], np.float64).reshape(count, len(labels))  # None becomes NaN
        for name in VOLUME_ERRORS
    }

    def statistic(scans: Indices) -> dict[str, float]:
        found = {name: float(each[scans].mean()) for name, each in values.items()}
        found |= {f"median_{name}": float(np.median(each[scans])) for name, each in values.items()}
        for name, each in errors.items():
            known = each[scans][~np.isnan(each[scans])]
            found[name] = float(known.mean()) if known.size else np.nan
            found[f"absolute_{name}"] = float(np.abs(known).mean()) if known.size else np.nan
        if len(labels) > 1:
            found |= {f"dice_{label}": float(values["dice"][scans, k].mean()) for k, label in enumerate(labels)}
        if on_model_grid is not None and len(on_model_grid):
            found["dice_model_grid"] = mean_dice(on_model_grid[scans])[0]
        return found

    per_class = [
        {
            "class": label,
            "value": rows[k]["value"],
            **{name: float(values[name][:, k].mean()) for name in SCORES},
            "predicted_ml": float(np.mean([row["predicted_ml"] for row in rows[k :: len(labels)]])),
            "reference_ml": float(np.mean([row["reference_ml"] for row in rows[k :: len(labels)]])),
            "median_dice": float(np.median(values["dice"][:, k])),
            "volume_error_ml": float(np.mean([row["volume_error_ml"] for row in rows[k :: len(labels)]])),
        }
        for k, label in enumerate(labels)
    ]
    return score_with_intervals(statistic, count, groups=groups, resamples=resamples), per_class


def round_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with floats of six decimals."""
    return [{key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


class Drawings:
    """What is drawn of an evaluation: a plot of all scores, and the scans of the lowest mean Dice.

    The masks of the worst so far are kept compressed until they are drawn.

    Args:
        tolerance_mm: Of surface Dice.
        plot: A .png file; None: no plot.
        worst: How many scans; None: none.
        folder: Where they go.

    Raises:
        InlayError: Files that cannot be written.
    """

    def __init__(
        self,
        tolerance_mm: float = TOLERANCE_MM,
        plot: Path | None = None,
        worst: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.tolerance_mm, self.plot = tolerance_mm, plot
        self.count, self.folder = worst or 0, folder or Path("worst")
        self.kept: list[tuple[float, Case, Segmentation, bytes]] = []
        if plot is not None:
            check_output(plot, (".png",))
        if self.count:
            check_output_folder(self.folder)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Drawings":
        """As the task's `score_options` say."""
        return cls(
            options.get("tolerance_mm", TOLERANCE_MM),
            options.get("plot"),
            options.get("worst"),
            options.get("worst_folder"),
        )

    def add(self, case: Case, found: Segmentation, rows: Sequence[dict[str, Any]]) -> None:
        """Keep a scan, of which these are the rows, if it is among the worst."""
        dice = float(np.mean([row["dice"] for row in rows]))
        if self.count and (len(self.kept) < self.count or dice < self.kept[-1][0]):
            packed = zlib.compress(found.mask.tobytes(), 1)
            empty = replace(found, mask=np.zeros((1, 1, 1), found.mask.dtype))
            self.kept = sorted([*self.kept, (dice, case, empty, packed)], key=lambda one: one[0])[: self.count]

    def draw(self, rows: Sequence[dict[str, Any]]) -> None:
        """Save the plot of all rows, and a montage of each of the worst, the reference dashed, by its Dice and name."""
        labels = list(dict.fromkeys(row["class"] for row in rows))
        if self.plot is not None:
            draw_boxes(rows, labels, self.plot)
        if self.kept:
            self.folder.mkdir(parents=True, exist_ok=True)
        for dice, case, found, packed in self.kept:
            channels, affine = read_image(case)
            image = channels[0]
            mask = np.frombuffer(zlib.decompress(packed), found.mask.dtype).reshape(image.shape[-3:])
            whole = replace(found, mask=mask)
            values = {name: value for value, name in found.names.items()}
            numbers = np.array([0, *(values[label] for label in labels)])
            _, grid = reorient_to_ras(image, affine)
            truth = aligned_labels(case, reorient_to_ras(image, affine)[0].shape, grid)  # D H W, -1 to be ignored
            reference = reorient_from_ras(numbers[truth.clip(0)], affine)
            draw_montage(image, whole, self.folder / f"{dice:.3f}_{case.name}.png", reference=reference)


def _on_own_grid(
    adapter: Adapter, case: Case, labels: tuple[str, ...], numbers: np.ndarray, tolerance_mm: float
) -> tuple[Segmentation, list[dict[str, Any]]]:
    """The mask that `segment` gives, and rows of `score_case`."""
    array, affine = read_image(case)
    image, grid = reorient_to_ras(array[0], affine)
    truth = aligned_labels(case, image.shape, grid)  # D H W
    found = segment(adapter, adapter.processor.read(case), progress=False)
    mask = numbers[reorient_to_ras(found.class_mask, affine)[0]]
    rows = score_case(mask, truth, labels, spacing_of(grid), case=case.name, tolerance_mm=tolerance_mm)
    values = {label: value for value, label in found.names.items()}
    named = [{"case": row["case"], "class": row["class"], "value": values[row["class"]], **row} for row in rows]
    return found, named


@torch.inference_mode()
def _on_model_grid(adapter: Adapter, case: Case, numbers: np.ndarray, classes: int) -> np.ndarray:
    """Voxels in both masks, the predicted and the reference, (K, 3), as a recipe counts them."""
    scan = adapter.processor.read(case)
    assert scan.labels is not None  # cases without are refused
    weight = next(p for p in adapter.model.parameters() if p.is_floating_point())
    batch = {
        "pixel_values": scan.image[None].to(weight.device, weight.dtype),
        "labels": scan.labels[None].to(weight.device),
    }
    answer = WholeVolume(adapter.processor.crop)(adapter.model, batch).classes.long()
    return overlap(torch.from_numpy(numbers)[answer], scan.labels[None], classes)[0].numpy()
