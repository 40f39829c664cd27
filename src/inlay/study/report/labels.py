"""Where the labels of points go: next to each, on no other label and no point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inlay.tasks.canvas import Point

Box = tuple[float, float, float, float]  # left, top, right, bottom

_DISTANCES = np.array((16, 26, 40, 60, 85, 115, 150, 190))  # pixels from a point to its label
_DIRECTIONS = 16
_FAR = 40  # from here on a line leads from a label to its point
_PASSES = 4
_POINT = 13  # pixels around a point that no label may cover
_ON_LABEL, _ON_POINT, _ON_LINE, _AMBIGUOUS, _OUTSIDE = 2000.0, 1000.0, 60.0, 150.0, 10000.0


@dataclass(frozen=True)
class Placed:
    """The middle of a label's left edge, and the end of a line to its point where that could be doubted."""

    at: Point
    leader: Point | None


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    lines: Sequence[Box] = (),
    texts: Sequence[Box] = (),
) -> list[Placed]:
    """Choose a place for each label: near its point, in the frame, on no other label or point, and on few lines.

    Each label in turn takes the cheapest of 128 places around its point, given where all others are; four rounds.

    Args:
        points: In pixels.
        sizes: Width and height of each label.
        frame: That no label may leave.
        lines: Thin boxes, such as error bars, which a label should rather not cover.
        texts: Boxes of other texts, which no label may cover.
    """
    where = np.array(points, dtype=float)
    covered = np.array(lines, dtype=float).reshape(-1, 4)
    written = np.array(texts, dtype=float).reshape(-1, 4)
    blocks = np.concatenate([where - _POINT, where + _POINT], axis=1)
    candidates = [_list_candidates(point, size) for point, size in zip(points, sizes, strict=True)]
    fixed = [
        distance
        + _OUTSIDE * _count_outside(boxes, frame)
        + _ON_POINT * _sum_overlaps(boxes, np.delete(blocks, k, axis=0))
        + _ON_LABEL * _sum_overlaps(boxes, written)
        + _ON_LINE * _sum_overlaps(boxes, covered)
        + _AMBIGUOUS * _count_nearer(boxes, k, where)
        for k, (distance, boxes) in enumerate(candidates)
    ]
    crowded = [sum(math.dist(p, q) < 120 for q in points) for p in points]
    taken = np.zeros((len(points), 4))
    for _ in range(_PASSES):
        for k in sorted(range(len(points)), key=lambda k: -crowded[k]):
            boxes = candidates[k][1]
            costs = fixed[k] + _ON_LABEL * _sum_overlaps(boxes, np.delete(taken, k, axis=0))
            taken[k] = boxes[np.argmin(costs)]
    return [_finish(k, taken[k], where) for k in range(len(points))]


def _list_candidates(point: Point, size: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N,) and boxes (N, 4) around a point, of which the side that faces it is at that distance."""
    angles = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # D 2
    half = np.array(size) / 2
    centres = np.array(point) + directions * (_DISTANCES[:, None, None] + half)  # R D 2
    distances = _DISTANCES[:, None] + 4 * np.abs(directions[:, 1])  # a label to the side reads best
    centres = centres.reshape(-1, 2)
    return distances.reshape(-1), np.concatenate([centres - half, centres + half], axis=1)


def _sum_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each box the sum over the others: 0 where they are apart, else 1 and the share of the smaller one's area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    wide, tall = np.moveaxis(np.maximum(high - low, 0), -1, 0)
    area = np.maximum(np.minimum(_find_areas(boxes)[:, None], _find_areas(others)[None]), 1e-9)
    return np.where((wide > 0) & (tall > 0), 1 + wide * tall / area, 0).sum(axis=1)


def _find_areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _count_outside(boxes: np.ndarray, frame: Box) -> np.ndarray:
    return (boxes[:, :2] < frame[:2]).sum(axis=1) + (boxes[:, 2:] > frame[2:]).sum(axis=1)


def _count_nearer(boxes: np.ndarray, own: int, points: np.ndarray) -> np.ndarray:
    """Points to which a reader would rather give a label: they are as near to it as its own."""
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    distances = np.linalg.norm(points[None] - nearest, axis=-1)  # N P
    others = (points != points[own]).any(axis=1)
    return ((distances <= distances[:, own : own + 1] + 4) & others).sum(axis=1)


def _finish(own: int, box: np.ndarray, points: np.ndarray) -> Placed:
    nearest = np.clip(points[own], box[:2], box[2:])
    unclear = math.dist(points[own], nearest) > _FAR or _count_nearer(box[None], own, points)[0] > 0
    at = (float(box[0]), float(box[1] + box[3]) / 2)
    return Placed(at, (float(nearest[0]), float(nearest[1])) if unclear else None)
