"""Shapes and text that are drawn twice: as a .png by Pillow, and as an .svg."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

# What every drawing is made of, besides the colours of kinds. In a page these names are its CSS variables.
PAPER, INK, MUTED, GRID = "paper", "ink", "muted", "grid"
COLOURS = {PAPER: "#ffffff", INK: "#1b1b1f", MUTED: "#66666e", GRID: "#e3e3e8"}
_HALO = 4  # pixels
_FINER = 2  # a .png is drawn larger, and made smaller at the end: Pillow draws no soft edges


@dataclass(frozen=True)
class Line:
    """A line through points, of a width in pixels; closed and filled where there is a `fill`."""

    points: Sequence[Point]
    colour: str
    width: float = 2
    dashed: bool = False
    fill: str | None = None


@dataclass(frozen=True)
class Text:
    """One line of text, whose middle height is at y; with a halo it is read on lines too."""

    at: Point
    text: str
    size: float
    colour: str = INK
    anchor: Anchor = "start"
    bold: bool = False
    halo: bool = False


@dataclass
class Canvas:
    """A drawing of a size in pixels; what is added later lies above."""

    width: int
    height: int
    title: str
    shapes: list[Line | Text] = field(default_factory=list)

    def add(self, *shapes: Line | Text) -> None:
        """Draw above what is there."""
        self.shapes += shapes

    def to_image(self) -> Image.Image:
        """The drawing as pixels."""
        image = Image.new("RGB", (self.width * _FINER, self.height * _FINER), COLOURS[PAPER])
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Text):
                _draw_text(pen, shape)
            else:
                _draw_line(pen, shape)
        return image.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def to_svg(self, *, inline: bool = False) -> str:
        """The drawing as SVG.

        Args:
            inline: For a page: as wide as its place, in the colours that the page gives as --ink and so on.
        """
        size = "" if inline else f' width="{self.width}" height="{self.height}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"{size} role="img" '
            f'font-family="Helvetica, Arial, sans-serif"><title>{html.escape(self.title)}</title>'
        )
        paper = "" if inline else f'<rect width="100%" height="100%" fill="{COLOURS[PAPER]}"/>'
        shapes = (_write_text(s, inline) if isinstance(s, Text) else _write_line(s, inline) for s in self.shapes)
        return "\n".join([head + paper, *shapes, "</svg>\n"])


def measure_text(text: str, size: float, *, bold: bool = False) -> float:
    """Its width in pixels, in the font of a .png; in an .svg it is made as wide."""
    return ImageFont.load_default(size).getlength(_write_plainly(text)) * (1.05 if bold else 1.0)


def _write_plainly(text: str) -> str:
    """Pillow's own font has the letters of ASCII, and a box for every other."""
    return text.encode("ascii", "replace").decode("ascii")


def _draw_text(pen: ImageDraw.ImageDraw, text: Text) -> None:
    at = (text.at[0] * _FINER, text.at[1] * _FINER)
    anchor = {"start": "lm", "middle": "mm", "end": "rm"}[text.anchor]
    font = ImageFont.load_default(text.size * _FINER)
    written, weight = _write_plainly(text.text), text.size * _FINER / 45 if text.bold else 0
    if text.halo:
        pen.text(at, written, COLOURS[PAPER], font, anchor, stroke_width=weight + _HALO * _FINER)
    pen.text(at, written, _to_hex(text.colour), font, anchor, stroke_width=weight)


def _draw_line(pen: ImageDraw.ImageDraw, line: Line) -> None:
    points = [(x * _FINER, y * _FINER) for x, y in line.points]
    if line.fill is not None:
        pen.polygon(points, _to_hex(line.fill), _to_hex(line.colour), max(1, round(line.width * _FINER)))
        return
    pieces = _cut_into_dashes(points, 12 * _FINER) if line.dashed else [points]
    for piece in pieces:
        pen.line(piece, _to_hex(line.colour), max(1, round(line.width * _FINER)), joint="curve")


def _cut_into_dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """Pieces of a length along each straight part, with gaps of the same length."""
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(points):
        whole = math.hypot(x1 - x0, y1 - y0)
        for k in range(0, math.ceil(whole / length), 2):
            start, end = k * length / whole, min((k + 1) * length / whole, 1.0)
            pieces.append([(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in (start, end)])
    return pieces


def _to_hex(colour: str) -> str:
    return COLOURS.get(colour, colour)


def _to_css(colour: str, inline: bool) -> str:
    return f"var(--{colour})" if inline and colour in COLOURS else _to_hex(colour)


def _write_line(line: Line, inline: bool) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.points)
    stroke = f'stroke="{_to_css(line.colour, inline)}" stroke-width="{line.width:g}" stroke-linejoin="round"'
    if line.fill is not None:
        return f'<polygon points="{points}" fill="{_to_css(line.fill, inline)}" {stroke}/>'
    dashes = ' stroke-dasharray="12 12"' if line.dashed else ""
    return f'<polyline points="{points}" fill="none" {stroke}{dashes}/>'


def _write_text(text: Text, inline: bool) -> str:
    x, y = text.at
    style = f' textLength="{measure_text(text.text, text.size, bold=text.bold):.0f}" lengthAdjust="spacingAndGlyphs"'
    style += ' font-weight="600"' if text.bold else ""
    if text.halo:
        style += f' paint-order="stroke" stroke="{_to_css(PAPER, inline)}" stroke-width="{2 * _HALO}"'
    return (
        f'<text x="{x:.1f}" y="{y + 0.35 * text.size:.1f}" font-size="{text.size:g}" text-anchor="{text.anchor}" '
        f'fill="{_to_css(text.colour, inline)}"{style}>{html.escape(text.text)}</text>'
    )
