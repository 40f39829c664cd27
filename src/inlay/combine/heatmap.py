"""The report on adapters that are to be combined as one image: a row for each module, a column for each measure."""

from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from inlay.combine.report import MEASURES, Overlap
from inlay.combine.weights import describe_weight
from inlay.errors import BadInput

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_ROW, _CELL, _GAP, _EDGE, _TOP = 18, 74, 24, 12, 66  # pixels
_ROWS = 2000  # more modules than that no image shows
_INK, _NONE = (30, 30, 30), (232, 232, 232)
# From white to a colour as the value grows; the cosine has another one below zero.
_LOW, _HIGH, _AGAINST = (255, 255, 255), (202, 80, 32), (40, 96, 170)


def draw_heatmap(report: Overlap) -> Image.Image:
    """A heat map; the lighter, the less two adapters touch each other.

    Raises:
        InlayError: There is nothing to show: no module that two adapters change.
    """
    pairs = [p for p in combinations(report.adapters, 2) if any((m.first, m.second) == p for m in report.meetings)]
    modules = list(dict.fromkeys(m.module for m in report.meetings))
    if not modules or len(modules) > _ROWS:
        raise BadInput(
            f"a heat map shows 1 to {_ROWS} modules that two adapters change, not {len(modules)}; write a .txt or "
            ".json report."
        )
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    left = _EDGE + max(round(small.getlength(name)) for name in modules) + 10
    block = len(MEASURES) * _CELL
    wide = left + len(pairs) * (block + _GAP) - _GAP + _EDGE
    image = Image.new("RGB", (max(wide, 480), _TOP + len(modules) * _ROW + 44), "white")
    pen = ImageDraw.Draw(image)
    cells = {(m.first, m.second, m.module): m for m in report.meetings}
    for row, module in enumerate(modules):
        y = _TOP + row * _ROW
        pen.text((left - 10, y + _ROW / 2), module, _INK, small, anchor="rm")
        for column, pair in enumerate(pairs):
            x = left + column * (block + _GAP)
            found = cells.get((*pair, module))
            for i, measure in enumerate(MEASURES):
                _draw_cell(pen, x + i * _CELL, y, None if found is None else getattr(found, measure), small)
    for column, (first, second) in enumerate(pairs):
        x = left + column * (block + _GAP)
        title = ",  ".join(f"{name} x {describe_weight(report.adapters[name])}" for name in (first, second))
        pen.text((x + block / 2, _EDGE + 10), _shorten_text(title, font, block + _GAP), _INK, font, anchor="mm")
        for i, measure in enumerate(MEASURES):
            pen.text((x + (i + 0.5) * _CELL, _TOP - 14), _shorten_text(measure, small, _CELL), _INK, small, anchor="mm")
    _draw_legend(pen, left, _TOP + len(modules) * _ROW + 16, small)
    return image


def _draw_cell(pen: ImageDraw.ImageDraw, x: float, y: float, value: float | None, font: Font) -> None:
    colour = _NONE if value is None else _choose_colour(value)
    pen.rectangle((x, y, x + _CELL - 2, y + _ROW - 2), colour)
    ink = "white" if value is not None and abs(value) > 0.7 else _INK
    pen.text(
        (x + _CELL / 2 - 1, y + _ROW / 2 - 1),
        "-" if value is None else f"{round(value, 2) + 0.0:.2f}",
        ink,
        font,
        anchor="mm",
    )


def _choose_colour(value: float) -> tuple[int, ...]:
    end, share = (_HIGH if value >= 0 else _AGAINST), min(abs(value), 1.0)
    return tuple(round(a + (b - a) * share) for a, b in zip(_LOW, end, strict=True))


def _shorten_text(text: str, font: Font, width: float) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip(".") + "."
    return text


def _draw_legend(pen: ImageDraw.ImageDraw, x: float, y: float, font: Font) -> None:
    for i in range(-10, 11):
        at = x + (i + 10) * 10
        pen.rectangle((at, y, at + 10, y + 12), _choose_colour(i / 10))
    for value, at in ((-1, x), (0, x + 105), (1, x + 205)):
        pen.text((at, y + 20), f"{value}", _INK, font, anchor="mm")


def write_report(report: Overlap, path: str | Path) -> Path:
    """As .png (a heat map), .json or .txt, by the name.

    Raises:
        InlayError: Another kind of file.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".png":
        draw_heatmap(report).save(path)
    elif path.suffix.lower() == ".json":
        path.write_text(report.to_json() + "\n", encoding="utf-8")
    elif path.suffix.lower() == ".txt":
        path.write_text(f"{report}\n", encoding="utf-8")
    else:
        raise BadInput(f"a report is a .png, .json or .txt file, not {str(path)!r}.")
    return path
