"""A mask that is given, to be corrected: read, checked against its scan, and changed only where a prompt reaches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from inlay.errors import BadInput
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.data import Case, read_labels
from inlay.tasks.volumes.formats import label_dtype, read_volume
from inlay.tasks.volumes.grid import reorient_from_ras, reorient_to_ras
from inlay.tasks.volumes.scan import Scan, find_strange_values, is_misplaced
from inlay.tasks.volumes.strokes import Stroke
from inlay.tasks.volumes.windows import class_index

MaskSource: TypeAlias = "np.ndarray | str | os.PathLike[str] | bytes"
Region = tuple[slice, ...]  # of own voxels x, y, z


def read_mask(
    mask: MaskSource,
    scan: Scan,
    labels: Sequence[str],
    values: Sequence[int] | None = None,
    affine: np.ndarray | None = None,
) -> np.ndarray:
    """A mask on the scan's own grid, (X, Y, Z), with k for class k; a copy.

    Args:
        mask: A file, the bytes of a NIfTI file, or voxels. A file may have its axes in another order than the scan's.
        scan: That it belongs to.
        labels: Names of the K classes.
        values: Their numbers in the mask; None: 1..K.
        affine: Of voxels, index to mm, (4, 4); None: that of the scan.

    Raises:
        InlayError: It cannot be read, is on another grid than the scan, or holds numbers that no class has.
    """
    name = "the mask"
    if not isinstance(mask, np.ndarray):
        name = name if isinstance(mask, bytes) else f"the mask '{os.fspath(mask)}'"
        mask, affine = read_volume(mask, "label")
    array, _ = read_labels(Case(name, mask, mask))
    turned, grid = reorient_to_ras(array, scan.affine if affine is None else affine)
    empty, scan_grid = reorient_to_ras(np.broadcast_to(np.int8(0), scan.own_shape), scan.affine)
    if apart := is_misplaced(turned.shape, grid, empty.shape, scan_grid):
        raise BadInput(f"{name} is not on the grid of the scan {scan.name!r}: it has {apart}. Resample it to the scan.")
    numbers = tuple(values or range(1, len(labels) + 1))
    if strange := find_strange_values(array, numbers):
        known = [f"{number} {label}" for number, label in zip(numbers, labels, strict=True)]
        raise BadInput(
            f"{name} holds {list_first(strange)}; it may hold 0 and the adapter's classes: {list_first(known)}."
        )
    order = np.argsort(numbers)
    ranks = np.searchsorted(np.array([0, *np.array(numbers)[order]]), reorient_from_ras(turned, scan.affine))
    return np.array([0, *(order + 1)], label_dtype(0, len(labels)))[ranks]


def correct_mask(
    before: np.ndarray,
    after: np.ndarray,
    points: Sequence[Sequence[Any]],
    boxes: Sequence[Sequence[Any]],
    labels: Sequence[str],
    values: Sequence[int] | None = None,
    strokes: Sequence[Stroke] = (),
) -> np.ndarray:
    """A mask with those changes that a prompt asked for; a copy.

    A voxel changes if it becomes the class of a prompt, and is connected through such voxels (6 neighbours) to it; a
    voxel that was clicked, or is under a stroke, always changes. All others stay as they were: what was right far from
    a click is not lost.

    Args:
        before: (X, Y, Z), classes.
        after: The same, as answered to prompts.
        points: In own voxels, as `Grid.make_prompts` takes them.
        boxes: The same.
        labels: Names of the K classes.
        values: Their numbers in the mask; None: 1..K.
        strokes: In own voxels.

    Source: after Chen et al. 2022 (FocalClick), arXiv:2204.02574, "Progressive Merge".
    """
    from scipy import ndimage

    merged = before.copy()
    regions = [tuple(slice(max(0, round(float(v)) - 1), round(float(v)) + 2) for v in point[:3]) for point in points]
    for box in boxes:
        corners = np.sort(np.rint(np.array([box[:3], box[3:6]], np.float64)).astype(int), 0).clip(0)
        regions.append(tuple(slice(low, high + 1) for low, high in corners.T.tolist()))
    said = [*(point[3:] for point in points), *(box[6:] for box in boxes)]
    classes = [class_index(label[0], labels, values) if len(label) else 1 for label in said]
    drawn = [(voxels, class_index(label, labels, values)) for voxels, label in strokes]
    for label in sorted({*classes, *(label for _, label in drawn)}):
        under = np.concatenate([np.zeros((0, 3), np.int64), *(voxels for voxels, asked in drawn if asked == label)])
        changed = after == label
        changed[tuple(under.T)] = True
        changed &= before != label
        box = find_box(changed)
        components, count = ndimage.label(changed[box])
        reached = np.zeros(count + 1, bool)
        for region, asked in zip(regions, classes, strict=True):
            if asked == label:
                inside = [
                    slice(max(0, side.start - part.start), max(0, side.stop - part.start))
                    for side, part in zip(region, box, strict=True)
                ]
                reached[np.unique(components[tuple(inside)])] = True
        low = np.array([part.start for part in box])
        for step in product((-1, 0, 1), repeat=3):
            near = under + np.array(step) - low
            near = near[((near >= 0) & (near < components.shape)).all(1)]
            reached[components[tuple(near.T)]] = True
        reached[0] = False  # what did not change
        merged[box][reached[components]] = label
    write_said(merged, points, labels, values, strokes)
    return merged


def write_said(
    mask: np.ndarray,
    points: Sequence[Sequence[Any]],
    labels: Sequence[str],
    values: Sequence[int] | None = None,
    strokes: Sequence[Stroke] = (),
) -> None:
    """Give voxels that were clicked or are under strokes their classes, in place; the last one counts, strokes last.

    Args:
        mask: (X, Y, Z), classes.
        points: In own voxels, as `Grid.make_prompts` takes them.
        labels: Names of the K classes.
        values: Their numbers in the mask; None: 1..K.
        strokes: In own voxels.
    """
    for point in points:
        voxel = tuple(min(max(round(float(v)), 0), n - 1) for v, n in zip(point[:3], mask.shape, strict=True))
        mask[voxel] = class_index(point[3], labels, values) if len(point) > 3 else 1
    for voxels, label in strokes:
        mask[tuple(voxels.T)] = class_index(label, labels, values)


def find_box(changed: np.ndarray) -> Region:
    """The smallest box that holds all true voxels; an empty one where there are none."""
    from scipy import ndimage

    return next(iter(ndimage.find_objects(changed.view(np.uint8))), (slice(0, 0),) * 3)
