"""Scribbles, lassos and paint: the voxels under them, and a few of these that tell the model the same."""

from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from inlay.errors import BadInput

MOST = 32  # clicks of a stroke
STEP = 2.0  # voxels between two of them at least: what the model sees as one click is about as wide
REACH = 4096  # voxels that a contour may span


def sample_scribble(points: npt.ArrayLike, most: int = MOST) -> np.ndarray:
    """Voxels at equal distances along a polyline, both of its ends included: (N, 3), N at most `most`.

    Args:
        points: (M, 3), where the line begins, bends and ends, in voxels x, y, z.
        most: At least 2.

    Raises:
        InlayError: No points, or not three finite numbers each.
    """
    line = _read_points(points, 3, 1, "a scribble")
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    count = min(most, max(2, int(along[-1] / STEP) + 1)) if along[-1] else 1
    places = np.linspace(0, along[-1], count)
    return np.stack([np.interp(places, along, line[:, axis]) for axis in range(3)], axis=1)


def fill_scribble(points: npt.ArrayLike) -> np.ndarray:
    """The voxels that a polyline passes through: (N, 3) whole numbers, each once.

    Raises:
        InlayError: As `sample_scribble`.
    """
    line = _read_points(points, 3, 1, "a scribble")
    parts = [line[:1]]
    for first, last in pairwise(line):
        steps = max(1, int(np.ceil(2 * np.abs(last - first).max())))  # half a voxel or less at a time
        parts.append(np.linspace(first, last, steps + 1)[1:])
    return np.unique(np.rint(np.concatenate(parts)).astype(np.int64), axis=0)


def sample_lasso(polygon: npt.ArrayLike, axis: int, index: float, most: int = MOST) -> np.ndarray:
    """Voxels inside a closed contour in one slice, evenly spread: (N, 3), N at most `most`.

    Args:
        polygon: (M, 2), the corners, in voxels along the other two axes in their order; the last one is joined to the
            first.
        axis: That the slice is perpendicular to: 0 x, 1 y, 2 z.
        index: Of the slice along it.
        most: At least 1.

    Raises:
        InlayError: Fewer than three corners, not two finite numbers each, or no such axis.
    """
    inside = fill_lasso(polygon, axis, index)
    others = [each for each in range(3) if each != axis]
    step = max(1, int(np.sqrt(len(inside) / most)))
    while len(chosen := _take_lattice(inside[:, others], step)) > most:
        step += 1
    return np.insert(chosen.astype(np.float64), axis, index, axis=1)


def fill_lasso(polygon: npt.ArrayLike, axis: int, index: float) -> np.ndarray:
    """The voxels whose middle a closed contour in one slice encloses or runs through: (N, 3) whole numbers, each once.

    One that encloses none stands for the voxel nearest to it. Args and errors are those of `sample_lasso`.
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


def sample_paint(painted: np.ndarray, most: int = MOST) -> np.ndarray:
    """Some of the voxels that are true, evenly along their order in the array: (N, 3), N at most `most`."""
    places = np.argwhere(painted)
    return places[np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)]


def _take_lattice(inside: np.ndarray, step: int) -> np.ndarray:
    """Those of the voxels (N, 2) that lie on a lattice through the one that is nearest to their middle."""
    middle = inside[np.square(inside - inside.mean(0)).sum(1).argmin()]
    return inside[((inside - middle) % step == 0).all(1)]


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
