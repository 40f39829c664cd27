"""Scores of scans as an image: a box for each class and score, with a point for each scan."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inlay.files.atomic import replacing
from inlay.tasks.canvas import GRID, INK, MUTED, Canvas, Line, Text, measure_text
from inlay.tasks.colours import COLOURS
from inlay.tasks.evaluation import title
from inlay.tasks.volumes.segment import check_output

DRAWN = ("dice", "nsd", "hd95_mm", "volume_error_percent")
BOUNDS = {"dice": (0.0, 1.0), "nsd": (0.0, 1.0)}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 90, 380, 70, 70, 70  # pixels of a class, of a panel, and around it
LONGEST = 82  # pixels of a class's name


def draw_boxes(rows: Sequence[dict[str, Any]], labels: Sequence[str], path: str | Path) -> Path:
    """Save a PNG with panels for Dice, surface Dice, HD95 and volume error: a box a class, a point a scan.

    A box goes from the lower to the upper quartile, with a line at the median; whiskers reach the farthest value within
    1.5 times its length (Tukey 1977).

    Args:
        rows: Of `score_case`.
        labels: Names of the classes, from left to right.
        path: Ends with .png.

    Raises:
        InlayError: Another suffix, or no such folder.
    """
    path = check_output(path, (".png",))
    panel = LEFT + max(len(labels) * WIDTH, 220) + 20
    canvas = Canvas(panel * len(DRAWN), TOP + HEIGHT + BOTTOM, "Scores by class")
    for i, name in enumerate(DRAWN):
        values = [[row[name] for row in rows if row["class"] == label and row[name] is not None] for label in labels]
        _draw_panel(canvas, i * panel, panel, name, labels, values)
    with replacing(path) as new:
        canvas.to_image().save(new)
    return path


def _draw_panel(
    canvas: Canvas, x: int, width: int, name: str, labels: Sequence[str], values: Sequence[Sequence[float]]
) -> None:
    """One score: its axis, and for each class box, whiskers and points."""
    everything = [value for each in values for value in each] or [0.0]
    low, high = BOUNDS.get(name, (min(0.0, *everything), max(0.0, *everything)))
    if low == high:  # all are 0
        high = 1.0
    rough = 10 ** math.floor(math.log10((high - low) / 5))
    step = rough * next(times for times in (1, 2, 5, 10) if rough * times * 5 >= high - low - 1e-9)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step

    def at(value: float) -> float:
        return TOP + HEIGHT * (1 - (value - low) / (high - low))

    canvas.add(Text((x + LEFT, TOP - 36), title(name), 20, bold=True))
    for tick in (low + step * np.arange(round((high - low) / step) + 1)).tolist():
        canvas.add(Line([(x + LEFT, at(tick)), (x + width - 20, at(tick))], GRID, 1))
        canvas.add(Text((x + LEFT - 8, at(tick)), f"{tick:.3g}", 14, MUTED, "end"))
    for k, (label, each) in enumerate(zip(labels, values, strict=True)):
        middle, colour = x + LEFT + (k + 0.5) * WIDTH, COLOURS[k % len(COLOURS)]
        shown = label
        while len(shown) > 1 and measure_text(shown, 14) > LONGEST:
            shown = shown[:-1]
        canvas.add(Text((middle, TOP + HEIGHT + 20), shown, 14, INK, "middle"))
        if not each:
            continue
        spread = np.linspace(-12, 12, len(each)) if len(each) > 1 else np.zeros(1)
        lower, median, upper = np.percentile(each, (25, 50, 75)).tolist()
        reach = 1.5 * (upper - lower)
        ends = min(v for v in each if v >= lower - reach), max(v for v in each if v <= upper + reach)
        canvas.add(Line([(middle, at(ends[0])), (middle, at(lower))], INK, 1.5))
        canvas.add(Line([(middle, at(upper)), (middle, at(ends[1]))], INK, 1.5))
        corners = [(middle + dx, at(v)) for dx, v in ((-24, lower), (24, lower), (24, upper), (-24, upper))]
        canvas.add(Line(corners, INK, 1.5, fill=colour))
        canvas.add(Line([(middle - 24, at(median)), (middle + 24, at(median))], INK, 3))
        for dx, value in zip(spread.tolist(), each, strict=True):
            y = at(value)
            dot = [(middle + dx + a, y + b) for a, b in ((-2.5, 0), (0, -2.5), (2.5, 0), (0, 2.5))]
            canvas.add(Line(dot, MUTED, 1, fill=INK))
