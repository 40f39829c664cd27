"""Scribbles, lassos and paint as clicks: a few voxels that say the same, however long the stroke is."""

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
    from PIL import Image, ImageDraw

    corners = _read_points(polygon, 2, 3, "a lasso")
    if axis not in (0, 1, 2):
        raise BadInput(f"axis must be 0, 1 or 2 for x, y or z, got {axis!r}.")
    low = np.floor(corners.min(0)).astype(int)
    size = np.ceil(corners.max(0)).astype(int) - low + 1
    if max(size) > REACH:
        raise BadInput(f"a lasso spans at most {REACH:,} voxels, got {max(size):,}.")
    drawn = Image.new("1", (int(size[0]), int(size[1])))
    ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in (corners - low).tolist()], fill=1)
    inside = np.argwhere(np.asarray(drawn).T) + low  # the image has its second axis downwards
    step = max(1, int(np.sqrt(len(inside) / most)))
    while len(chosen := _take_lattice(inside, step)) > most:
        step += 1
    return np.insert(chosen.astype(np.float64), axis, index, axis=1)


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
