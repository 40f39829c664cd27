"""The course of a training as one image, which goes into the adapter's folder and onto its card."""

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CURVE = "training.png"
_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (460, 300), 58, 14, 34, 42  # pixels of a panel, and its margins
_INK, _GRID, _COLOURS = (40, 40, 40), (225, 225, 225), ((60, 90, 170), (200, 90, 40), (50, 130, 80), (120, 70, 140))
_OTHERS = 4  # scores next to the losses that a panel shows at most


def is_drawable(history: Any) -> bool:
    """True for two evaluations or more, of which a loss is known: rows of numbers by name, with `step`."""
    if not isinstance(history, list) or len(history) < 2:
        return False
    return all(isinstance(row, dict) and _numbers(row) and {"step", "loss"} <= row.keys() for row in history)


def _numbers(row: dict[str, Any]) -> bool:
    return all(isinstance(value, int | float) for value in row.values())


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    """Draw losses, and next to them what else was scored, over the steps: a .png of 460 x 300 pixels a panel."""
    losses: list[str] = [name for name in ("train_loss", "loss") if name in history[-1]]
    others = [name for name in history[-1] if name not in ("step", "train_loss", "loss")][:_OTHERS]
    panels: list[list[str]] = [losses, others] if others else [losses]
    image = Image.new("RGB", (_SIZE[0] * len(panels), _SIZE[1]), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for column, names in enumerate(panels):
        _panel(pen, font, column * _SIZE[0], history, names)
    image.save(path, optimize=True)


def _panel(pen: ImageDraw.ImageDraw, font: Any, x0: int, history: list[dict[str, float]], names: list[str]) -> None:
    """One pair of axes, with a line for each name."""
    values = [row[name] for row in history for name in names if math.isfinite(row.get(name, math.nan))]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    low, high = low - pad, high + pad
    first, last = history[0]["step"], history[-1]["step"]
    left, right, top, bottom = x0 + _LEFT, x0 + _SIZE[0] - _RIGHT, _TOP, _SIZE[1] - _BOTTOM
    for i in range(5):
        y = bottom - (bottom - top) * i / 4
        pen.line((left, y, right, y), _GRID)
        pen.text((left - 6, y), f"{low + (high - low) * i / 4:.3g}", _INK, font, anchor="rm")
        step = first + (last - first) * i / 4
        pen.text((left + (right - left) * i / 4, bottom + 8), f"{step:.0f}", _INK, font, anchor="mt")
    pen.text(((left + right) / 2, bottom + 26), "step", _INK, font, anchor="mt")
    at = left
    for name, colour in zip(names, _COLOURS, strict=False):
        points = [
            (
                left + (right - left) * (row["step"] - first) / max(last - first, 1),
                bottom - (bottom - top) * (row[name] - low) / (high - low),
            )
            for row in history
            if math.isfinite(row.get(name, math.nan))
        ]
        if len(points) > 1:
            pen.line(points, colour, 2, joint="curve")
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        said = {"loss": "validation loss", "train_loss": "training loss"}.get(name, name.replace("_", " "))
        pen.rectangle((at, 14, at + 10, 18), colour)
        pen.text((at + 14, 16), said, _INK, font, anchor="lm")
        at += 24 + round(font.getlength(said))
