"""A confusion matrix as an image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inlay.errors import BadInput
from inlay.files.atomic import replacing

NAMED = 60  # classes up to which rows and columns have names
LONGEST = 24  # characters of a name
DARK = (8, 48, 107)  # of a cell that holds all of its row


def draw_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> Path:
    """Save a confusion matrix: true classes as rows, predicted ones as columns, with the share of its row as blue.

    Args:
        confusion: Counts, (K, K).
        labels: Names of the K classes.
        path: Of the image; its suffix chooses the format.

    Raises:
        InlayError: No such folder, or a suffix that Pillow does not know.
    """
    path, counts = Path(path), np.asarray(confusion)
    if path.suffix.lower() not in Image.registered_extensions() or not path.parent.is_dir():
        raise BadInput(f"'{path}' must be the name of an image, such as matrix.png, in a folder that exists.")
    classes = len(counts)
    side = next(size for most, size in ((8, 64), (20, 44), (NAMED, 26), (10**9, 4)) if classes <= most)
    named = classes <= NAMED
    font, small = ImageFont.load_default(15), ImageFont.load_default({64: 16, 44: 13}.get(side, 9))
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in labels]
    room = round(max(font.getlength(name) for name in names)) + 16 if named else 12
    left = top = room + 26  # the names, and what the axis is
    sheet = Image.new("RGB", (left + classes * side + 16, top + classes * side + 16), "white")
    draw = ImageDraw.Draw(sheet)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i in range(classes):
        for j in range(classes):
            x, y, share = left + j * side, top + i * side, float(shares[i, j])
            fill = tuple(round(255 + (dark - 255) * share) for dark in DARK)
            edge = None if not named else (40, 40, 40) if i == j else (215, 215, 215)
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill, edge)
            if named and counts[i, j]:
                ink = "white" if share > 0.5 else "black"
                draw.text((x + side / 2, y + side / 2), str(counts[i, j]), ink, small, anchor="mm")
    if named:
        for k, name in enumerate(names):
            middle = k * side + side / 2
            draw.text((left - 8, top + middle), name, "black", font, anchor="rm")
            _draw_upwards(sheet, name, (left + middle, top - 8), font)
    draw.text((left + classes * side / 2, 4), "predicted", "dimgray", font, anchor="mt")
    _draw_upwards(sheet, "true", (12, top + classes * side / 2 + 16), font, "dimgray")
    with replacing(path) as new:
        sheet.save(new)
    return path


def _draw_upwards(
    sheet: Image.Image, text: str, at: tuple[float, float], font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    ink: str = "black",
) -> None:  # fmt: skip
    """A text turned by a quarter, which begins at its lower end `at`."""
    width = max(1, round(font.getlength(text)) + 2)
    strip = Image.new("L", (width, 22))
    ImageDraw.Draw(strip).text((0, 11), text, 255, font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    sheet.paste(ink, (round(at[0]) - 11, round(at[1]) - width), turned)
