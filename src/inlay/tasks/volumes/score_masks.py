"""Masks from anywhere, such as those of nnU-Net or of a person, scored against label maps: no model is needed."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Evaluation
from inlay.tasks.progress import show_progress
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.data import (
    PAIRS,
    TEST_PAIRS,
    Case,
    FoundCases,
    find_cases,
    find_scans,
    name_present_classes,
    read_labels,
)
from inlay.tasks.volumes.evaluate import TOLERANCE_MM, Drawings, round_rows, summarise_rows
from inlay.tasks.volumes.grid import reorient_to_ras, spacing_of
from inlay.tasks.volumes.scan import aligned_labels, find_strange_values, is_misplaced
from inlay.tasks.volumes.scores import score_case
from inlay.tasks.volumes.segment import Segmentation

logger = logging.getLogger(__name__)


def score_masks(
    masks: str | Path,
    reference: str | Path,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    plot: Path | None = None,
    worst: int | None = None,
    worst_folder: Path | None = None,
    resamples: int = 1000,
) -> Evaluation:
    """Score a folder of masks: the scores of `inlay evaluate`, on the grids of the references.

    Args:
        masks: A folder of them, one a case, by its name.
        reference: A folder of label maps of the same names; or labelled scans as training takes them, whose
            dataset.json names the classes. imagesTr/ next to labelsTr/, and what else belongs to such data, is found.
        tolerance_mm: Distance of surfaces that surface Dice takes for none.
        plot: Draw a box of each class and score into this .png.
        worst: Draw so many scans of the lowest Dice, with both masks: on their images where these are known.
        worst_folder: Where they go; None: worst.
        resamples: Of the cases, for the intervals.

    Raises:
        InlayError: A folder without masks, a mask without a reference, one on another grid, or with a number that no
            class has; each names the file.
    """
    drawings = Drawings(tolerance_mm, plot, worst, worst_folder)
    found = _find_references(str(reference))
    every = [*found.train, *found.validation, *found.test]
    cases = {case.name: case for case in every}
    predicted = {case.name: case for case in find_scans(masks)}
    alone = [name for name in predicted if name not in cases]
    if alone:
        raise BadInput(
            f"{len(alone)} of the {len(predicted)} masks in '{masks}' have no label map in '{reference}' "
            f"({list_first(alone)}); a mask and its label map have the same name."
        )
    lacking = [name for name in cases if name not in predicted]
    scored = [cases[name] for name in predicted]
    named = name_present_classes(found, scored, str(reference))
    labels, values = [*named.values()], tuple(named)
    rows: list[dict[str, Any]] = []
    for case in show_progress(scored, len(scored), "score", "scan"):
        known = replace(case, values=values, ignored=found.ignored)
        mask, of_case = _score_mask(known, predicted[case.name].files[0], labels, tolerance_mm)
        rows += of_case
        drawings.add(known, mask, of_case)
    drawings.draw(rows)
    scores, per_class = summarise_rows(rows, labels, None, resamples)
    notes = [f"{len(lacking)} of {len(cases)} label maps have no mask and are not scored: {list_first(lacking)}."]
    return Evaluation(
        data=str(reference),
        task="volume-segmentation",
        split="all",
        count=len(scored),
        unit="scan",
        scores=scores,
        rows=round_rows(rows),
        per_class=per_class,
        notes=[
            *(notes if lacking else []),
            f"Masks are those of {masks}, on the grids of the label maps; surface Dice within {tolerance_mm:g} mm.",
        ],
    )


def _find_references(reference: str) -> FoundCases:
    """Labelled scans, or the label maps of a folder as cases whose images are these maps themselves."""
    folder = Path(reference).expanduser()
    for images, labels in (*PAIRS, *TEST_PAIRS):
        if folder.name == labels and (folder.parent / images).is_dir():
            return find_cases(str(folder.parent))
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else {"dataset.json"}
    if inside & {"dataset.json", "train", *(name for pair in PAIRS for name in pair)}:
        return find_cases(reference)
    return FoundCases([Case(case.name, case.image, case.image) for case in find_scans(folder)])  # type: ignore[arg-type]


def _score_mask(
    case: Case, file: Path, labels: Sequence[str], tolerance_mm: float
) -> tuple[Segmentation, list[dict[str, Any]]]:
    """A mask as it is stored, and rows of `score_case`."""
    assert case.values is not None
    array, affine = read_labels(case)
    reference, grid = reorient_to_ras(array, affine)
    truth = aligned_labels(case, reference.shape, grid)
    stored, own = read_labels(Case(case.name, file, file))
    placed, place = reorient_to_ras(stored, own)
    apart = is_misplaced(placed.shape, place, reference.shape, grid)
    if apart:
        raise DamagedFile(
            f"the mask '{file}' is not on the grid of its label map: it has {apart}. Resample it to that grid."
        )
    strange = find_strange_values(stored, case.values, case.ignored)
    if strange:
        wanted = ", ".join(f"{value} ({label})" for value, label in zip(case.values, labels, strict=True))
        raise DamagedFile(
            f"the mask '{file}' holds {list_first(strange)}, which no label map has; classes are {wanted}."
        )
    mask = aligned_labels(replace(case, label=file), truth.shape, grid)
    rows = score_case(mask.clip(0), truth, labels, spacing_of(grid), case=case.name, tolerance_mm=tolerance_mm)
    values = dict(zip(labels, case.values, strict=True))
    named = [{"case": row["case"], "class": row["class"], "value": values[row["class"]], **row} for row in rows]
    return Segmentation(stored, own, list(labels), source=file, values=case.values), named
