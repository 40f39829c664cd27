"""Scribbles, lassos and paint: the voxels under them, and a few of these that tell the model the same.

A model that has learned from single clicks takes many of one class side by side for a reason to enlarge that class.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inlay.errors import BadInput
from inlay.tasks.volumes.windows import check_inside

MOST = 8  # clicks of a stroke
STEP = 12.0  # voxels of the model between two of them at least
REACH = 4096  # voxels that a contour may span


class Stroke(NamedTuple):
    """Voxels that are all of one class, such as those that were painted: `Stroke(np.argwhere(painted), "lesion")`.

    Attributes:
        voxels: (N, 3) whole numbers x, y, z on a scan's own grid, from 0.
        label: 0 for background, a class's number in the mask, or its name.
    """

    voxels: npt.NDArray[np.integer]
    label: int | str


def fill_scribble(points: npt.ArrayLike) -> np.ndarray:
    """The voxels that a polyline passes through: (N, 3) whole numbers, each once.

    Args:
        points: (M, 3), where the line begins, bends and ends, in voxels x, y, z.

    Raises:
        InlayError: No points, or not three finite numbers each.
    """
    line = read_line(points)
    parts = [line[:1]]
    for first, last in pairwise(line):
        steps = max(1, int(np.ceil(2 * np.abs(last - first).max())))  # half a voxel or less at a time
        parts.append(np.linspace(first, last, steps + 1)[1:])
    return np.unique(np.rint(np.concatenate(parts)).astype(np.int64), axis=0)


def read_line(points: npt.ArrayLike) -> np.ndarray:
    """Where a polyline begins, bends and ends, (M, 3) floats; errors as of `fill_scribble`."""
    return _read_points(points, 3, 1, "a scribble")


def fill_lasso(polygon: npt.ArrayLike, axis: int, index: float) -> np.ndarray:
    """The voxels whose middle a closed contour in one slice encloses or runs through: (N, 3) whole numbers, each once.

    One that encloses none stands for the voxel nearest to it.

    Args:
        polygon: (M, 2), the corners, in voxels along the other two axes in their order; the last one is joined to the
            first.
        axis: That the slice is perpendicular to: 0 x, 1 y, 2 z.
        index: Of the slice along it.

    Raises:
        InlayError: Fewer than three corners, not two finite numbers each, or no such axis.
    """
    corners = _read_points(polygon, 2, 3, "a lasso")
    if axis not in (0, 1, 2):
        raise BadInput(f"axis must be 0, 1 or 2 for x, y or z, got {axis!r}.")
    low = np.floor(corners.min(0)).astype(int)
    size = np.ceil(corners.max(0)).astype(int) - low + 1
    if max(size) > REACH:
        raise BadInput(f"a lasso spans at most {REACH:,} voxels, got {max(size):,}.")
    inside = np.argwhere(_fill_polygon(corners - low, size)) + low
    if not len(inside):
        inside = np.rint(corners.mean(0, keepdims=True)).astype(np.int64)
    return np.insert(inside, axis, round(index), axis=1)


def _fill_polygon(corners: np.ndarray, size: np.ndarray) -> np.ndarray:
    """True at the whole numbers of a grid of that size that lie in a polygon (M, 2) or on its edge.

    By even and odd crossings, which belong to one of the two sides that they part: so from all four sides. Pillow's
    polygons have up to half a pixel more all around.
    """
    filled = np.zeros(size, bool)
    for signs in product((1, -1), repeat=2):
        first = np.where(np.array(signs) > 0, corners, size - 1 - corners)
        last = np.roll(first, -1, 0)
        rows = np.arange(size[0])[:, None]
        row, edge = np.nonzero((np.minimum(first, last)[:, 0] <= rows) & (rows < np.maximum(first, last)[:, 0]))
        rise = (last - first)[edge]
        at = first[edge, 1] + (row - first[edge, 0]) * rise[:, 1] / rise[:, 0]
        crossings = np.zeros((size[0], size[1] + 1), np.int64)
        np.add.at(crossings, (row, np.ceil(at - 1e-6).astype(np.int64).clip(0, size[1])), 1)
        filled |= (crossings.cumsum(1)[:, :-1] % 2 == 1)[:: signs[0], :: signs[1]]
    return filled


def check_stroke(stroke: Stroke, shape: Sequence[int]) -> None:
    """Raise InlayError for a stroke that is none, or not within a scan of this shape (X, Y, Z)."""
    voxels = np.asarray(stroke.voxels)
    if voxels.ndim != 2 or voxels.shape[1:] != (3,) or not len(voxels) or voxels.dtype.kind not in "iu":
        raise BadInput(f"a stroke has one or more voxels as whole numbers (N, 3), got {voxels.dtype} {voxels.shape}.")
    outside = ((voxels < 0) | (voxels >= shape)).any(1)
    if outside.any():
        check_inside(voxels[outside.argmax()].tolist(), shape, "a stroke's voxel")


def choose_clicks(voxels: npt.NDArray[np.integer], sizes: npt.ArrayLike = (1.0, 1.0, 1.0)) -> np.ndarray:
    """A few of the voxels under a stroke, about as a user would click: (n, 3), n from 1 to `MOST`.

    The first is the one nearest to their middle. Each further one is the nearest to the middle of those that are at
    least `STEP` away from all before it, or more where these would be too many.

    Args:
        voxels: (N, 3), N at least 1.
        sizes: Of a voxel along each axis, in those that the model sees.
    """
    voxels = np.unique(voxels, axis=0)  # whatever their order
    places = voxels * np.asarray(sizes, np.float64)
    order = np.linalg.norm(places - places.mean(0), axis=1).argsort(kind="stable")
    apart = STEP
    while True:
        chosen: list[int] = []
        left = order
        while len(left) and len(chosen) <= MOST:
            chosen.append(left[0])
            left = left[np.linalg.norm(places[left] - places[left[0]], axis=1) >= apart]
        if len(chosen) <= MOST:
            return voxels[chosen]
        apart *= 1.25


def _read_points(points: npt.ArrayLike, numbers: int, least: int, what: str) -> np.ndarray:
    """(M, numbers) as floats, M at least `least`."""
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 2 or array.shape[1] != numbers or len(array) < least or not np.isfinite(array).all():
        raise BadInput(f"{what} is a list of {least} or more points of {numbers} numbers, got {_shorten(points)}.")
    return array


def _shorten(points: object) -> str:
    text = repr(points.tolist() if isinstance(points, np.ndarray) else points)
    return text if len(text) < 80 else f"{text[:76]} ..."
