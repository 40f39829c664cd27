"""Procedural images: filled shapes in five textures, and drawn strokes, over cluttered backgrounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

TEXTURES = ("solid", "striped", "checked", "dotted", "outlined")
FILLED = ("disc", "square", "triangle", "star", "cross", "crescent")
STROKES = ("arc", "spiral", "wave", "hook", "angle", "zigzag", "tee")
SHAPE_LABELS: tuple[str, ...] = (*(f"{texture} {name}" for name in FILLED for texture in TEXTURES), *STROKES)

_CHUNK = 512  # images drawn at a time: the arrays of one shape then stay in the cache
_DRAWS = 96  # uniform numbers per image, of which 90 are used


def generate_shapes(count: int, *, seed: int, size: int = 32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Labelled images, the same for the same seed; image i does not depend on `count`.

    Every image holds one figure at a random place, size, angle and mirror image, in random colours (a third
    are grey), over a gradient with waves, thin lines, specks and pixel noise.

    Args:
        count: Number of images, at least 0.
        seed: Chooses the images; other seeds give independent ones.
        size: Height and width in pixels, at least 16.

    Returns:
        Images of shape (N, H, W, 3), RGB from 0 to 255, and labels of shape (N,) into `SHAPE_LABELS`.

    Raises:
        ValueError: count is negative, or size is under 16.
    """
    if count < 0 or size < 16:
        raise ValueError(f"expected count >= 0 and size >= 16, but got count={count} and size={size}")
    uniform, normal = np.random.default_rng(seed).spawn(2)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, count))
        n = chunk.stop - chunk.start
        # Both generators fill row by row, so the chunks read one stream each.
        draws = _Draws(uniform.random((n, _DRAWS), np.float32))
        noise = normal.standard_normal((n, 3, size * size), np.float32)
        labels[chunk], canvas = _draw(draws, noise, size)
        images[chunk] = canvas.reshape(n, 3, size, size).transpose(0, 2, 3, 1)
    return images, labels


class _Draws:
    """Uniform random numbers, one row per image, handed out column by column."""

    def __init__(self, values: Floats) -> None:
        self.values, self.used = values, 0

    def take(self, low: float, high: float, width: int = 1) -> Floats:
        """The next `width` columns, scaled to low..high, of shape (N, width)."""
        columns = self.values[:, self.used : self.used + width]
        self.used += width
        return columns * np.float32(high - low) + np.float32(low)


def _draw(draws: _Draws, noise: Floats, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Labels (N,) and images (N, 3, H·W); lengths are in pixels of a 32 x 32 image (`scale` converts)."""
    labels = np.minimum(draws.take(0, len(SHAPE_LABELS)), len(SHAPE_LABELS) - 1).astype(np.int64)[:, 0]
    scale = size / 32
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / scale - 16).astype(np.float32)
    x, y = (grid.reshape(1, -1) for grid in np.meshgrid(axis, axis))  # (1, H·W)

    grey = draws.take(0, 3) < 1
    # Three colours around a circle of circumference 1: in no channel do two come closer than 0.24.
    ground = draws.take(0, 1, 3)
    direction = np.where(draws.take(0, 1, 3) < 0.5, -1, 1).astype(np.float32)
    figure = (ground + direction * draws.take(0.27, 0.38, 3)) % 1
    second = (figure + direction * draws.take(0.27, 0.38, 3)) % 1
    ground, figure, second = (_grey(colour, grey) for colour in (ground, figure, second))
    canvas = _background(draws, x, y, ground, grey)

    reach = draws.take(8, 13.5)  # of the figure from its centre to its farthest point
    slack = 16.5 - reach
    turn, mirror = draws.take(0, 2 * np.pi), np.where(draws.take(0, 1) < 0.5, 1, -1).astype(np.float32)
    u, v = _rotate(x - draws.take(-1, 1) * slack, y - draws.take(-1, 1) * slack, turn)
    distance = _distance(labels, mirror * u / reach, v / reach, draws) * reach
    cover, mix = _texture(labels, distance, u, v, draws, scale)

    colour = figure + (second - figure) * mix[:, None]
    canvas += (colour - canvas) * cover[:, None]
    canvas += noise * draws.take(0, 0.07)[:, None]
    return labels, (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _grey(colour: Floats, grey: npt.NDArray[np.bool_]) -> Floats:
    """Colours (N, 3) as (N, 3, 1), with all channels equal to the first where `grey` (N, 1)."""
    return np.where(grey, colour[:, :1], colour)[..., None]


def _rotate(x: Floats, y: Floats, angle: Floats) -> tuple[Floats, Floats]:
    """Coordinates (N, H·W) in axes turned by `angle` (N, 1), in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _coverage(signed: Floats, scale: float) -> Floats:
    """Share of a pixel that lies inside (negative distance) of an edge, from 0 to 1."""
    return np.clip(0.5 - signed * scale, 0, 1)


def _background(draws: _Draws, x: Floats, y: Floats, ground: Floats, grey: npt.NDArray[np.bool_]) -> Floats:
    """Gradient, soft wave, two lines and two specks around the colour `ground` (N, 3, 1); (N, 3, H·W)."""
    along, _ = _rotate(x, y, draws.take(0, 2 * np.pi))
    across, _ = _rotate(x, y, draws.take(0, 2 * np.pi))
    slope = _grey(draws.take(-0.0125, 0.0125, 3), grey)
    canvas = ground + slope * along[:, None]
    wave = np.sin(across * draws.take(0.1, 0.7) + draws.take(0, 2 * np.pi)) * draws.take(0, 0.08)
    canvas += wave[:, None]
    for _ in range(2):
        line, _ = _rotate(x, y, draws.take(0, 2 * np.pi))
        cover = np.clip(1 - np.abs(line - draws.take(-16, 16)), 0, 1) * np.maximum(draws.take(-0.5, 1), 0)
        canvas += cover[:, None] * _grey(draws.take(-0.3, 0.3, 3), grey)
    for _ in range(2):
        away = np.hypot(x - draws.take(-15, 15), y - draws.take(-15, 15))
        cover = np.clip(draws.take(0, 2.5) - away, 0, 1)
        canvas += cover[:, None] * _grey(draws.take(-0.4, 0.4, 3), grey)
    return canvas


def _texture(
    labels: npt.NDArray[np.int64], distance: Floats, u: Floats, v: Floats, draws: _Draws, scale: float
) -> tuple[Floats, Floats]:
    """Opacity of the figure, and share of its second colour; both (N, H·W), from 0 to 1."""
    filled = labels < len(FILLED) * len(TEXTURES)
    kind = np.where(filled, labels % len(TEXTURES), 0)
    band = draws.take(0.7, 1.1)
    hollow = (kind == TEXTURES.index("outlined"))[:, None]
    cover = _coverage(np.where(hollow, np.abs(distance + band) - band, distance), scale)

    period = draws.take(4.0, 6.5)
    turned, crossed = _rotate(u, v, draws.take(0, np.pi))
    first = turned * (2 * np.pi / period) + draws.take(0, 2 * np.pi)
    other = crossed * (2 * np.pi / period) + draws.take(0, 2 * np.pi)
    mix = np.zeros_like(distance)
    for name in ("striped", "checked", "dotted"):
        rows = np.flatnonzero(kind == TEXTURES.index(name))
        a, b = first[rows], other[rows]
        if name == "striped":
            level = np.sin(a)
        elif name == "checked":
            level = np.sin(a / 1.5) * np.sin(b / 1.5) * 1.5
        else:
            level = np.cos(a) + np.cos(b) - 0.6
        # Near its zero, a sine of this period grows by 2π/period per pixel.
        mix[rows] = _coverage(-level * (period[rows] / (2 * np.pi)), scale)
    return cover, mix


def _distance(labels: npt.NDArray[np.int64], u: Floats, v: Floats, draws: _Draws) -> Floats:
    """Distance (N, H·W) to the figure of each label, negative inside; u, v have the farthest point at 1."""
    first_stroke = len(FILLED) * len(TEXTURES)
    shape = np.where(labels < first_stroke, labels // len(TEXTURES), labels - first_stroke + len(FILLED))
    wobble = draws.take(-0.05, 0.05, 32).reshape(-1, 16, 2)
    depth = draws.take(0.35, 0.6)  # of the crescent's bite, and the half width of strokes
    result = np.empty_like(u)
    for index, name in enumerate((*FILLED, *STROKES)):
        rows = np.flatnonzero(shape == index)
        p, q, bite = u[rows], v[rows], depth[rows]
        if name == "disc":
            result[rows] = np.hypot(p, q) - 0.9
        elif name == "crescent":
            result[rows] = np.maximum(np.hypot(p, q) - 0.95, 0.85 - np.hypot(p - bite, q))
        else:
            points = _POINTS[name] + wobble[rows, : len(_POINTS[name])]
            closed = name in FILLED
            edge, inside = _path(p, q, points, closed)
            result[rows] = np.where(inside, -edge, edge) if closed else edge - bite / 3
    return result


def _path(p: Floats, q: Floats, points: Floats, closed: bool) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Distance (N, H·W) to the path through `points` (N, P, 2), and whether a closed path encloses the pixel.

    Source: I. Quilez, "2D distance functions" (polygon, exact).
    """
    nearest = np.full_like(p, np.inf)
    inside = np.zeros(p.shape, np.bool_)
    corners = [(points[:, i, :1], points[:, i, 1:]) for i in range(points.shape[1])]
    ends = corners[1:] + corners[:1] if closed else corners[1:]
    for (ax, ay), (bx, by) in zip(corners, ends, strict=False):
        dx, dy, px, py = bx - ax, by - ay, p - ax, q - ay
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, (px - t * dx) ** 2 + (py - t * dy) ** 2)
        if closed:
            # A ray to the right crosses this edge: an odd number of crossings is inside.
            inside ^= ((ay > q) != (by > q)) & ((px * dy < py * dx) == (dy > 0))
    return np.sqrt(nearest), inside


def _polar(radii: npt.ArrayLike, degrees: npt.ArrayLike) -> Floats:
    """Points (P, 2) at radii and angles about the origin."""
    angle, radius = np.radians(np.asarray(degrees, np.float32)), np.asarray(radii, np.float32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _xy(*points: tuple[float, float]) -> Floats:
    """Points (P, 2)."""
    return np.array(points, np.float32)


_POINTS: dict[str, Floats] = {  # corners of the filled shapes; paths of the strokes
    "square": _polar([0.95] * 4, [45, 135, 225, 315]),
    "triangle": _polar([1.0] * 3, [90, 210, 330]),
    "star": _polar([1.0, 0.42] * 5, range(0, 360, 36)),
    "cross": _polar([0.95, 0.95, 0.38] * 4, [a + b for a in range(0, 360, 90) for b in (-18, 18, 45)]),
    "arc": _polar([0.8] * 10, np.linspace(0, 215, 10)),
    "spiral": _polar(np.linspace(0.9, 0.05, 16), np.linspace(0, 560, 16)),
    "wave": _xy(*((a / 4.95, 0.35 * np.cos(a)) for a in np.linspace(-4.7, 4.7, 12))),
    "hook": np.concatenate([_xy((0.45, -0.9)), _polar([0.45] * 6, np.linspace(0, 180, 6)) + _xy((0, 0.4))]),
    "angle": _xy((-0.6, -0.85), (-0.6, 0.6), (0.7, 0.6)),
    "zigzag": _xy((-0.65, -0.75), (0.6, -0.6), (-0.6, 0.6), (0.65, 0.75)),
    "tee": _xy((-0.7, -0.65), (0.7, -0.65), (0, -0.65), (0, 0.9)),
}
