"""An image of a scan and its mask: three planes through the mask's centre, and slices through its extent."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inlay.errors import BadInput
from inlay.files.atomic import replacing
from inlay.tasks.colours import colour
from inlay.tasks.volumes.grid import reorient_to_ras, spacing_of, transform_points
from inlay.tasks.volumes.segment import Segmentation, check_output

IMAGES = (".png",)
GAP, TEXT = 12, 22  # pixels
LARGE, SMALL, SLICES = 392, 190, 6  # edges of a plane and of a slice in pixels, and slices
SIDES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))  # left, right, top, bottom of the planes
NAMES = ("axial", "coronal", "sagittal")
INK, FAINT, BACKGROUND = "#e8e8e8", "#a0a0a8", "#101014"
DASH = 6  # pixels of a reference's dashes, and between them


def draw_montage(
    image: np.ndarray, segmentation: Segmentation, path: str | Path, *, reference: np.ndarray | None = None
) -> Path:
    """Save a PNG with an axial, a coronal and a sagittal plane through the mask's centre of mass, and axial slices.

    Sides are true to the spacing. Radiological convention: the patient's right is on the left. Greys go from the
    scan's percentile 1 to 99; outlines are the mask's own voxels, in the colours of the legend. Slices lie evenly
    between the mask's ends, and show only its surroundings; an empty mask shows the middle of the scan. The legend
    names every class, with its volume.

    Args:
        image: The scan (X, Y, Z) on the mask's grid, as `read_volume` reads it.
        segmentation: From `segment`, or `VolumeSession.segmentation`.
        path: Ends with .png.
        reference: A second mask (X, Y, Z) with the same numbers (`segmentation.names`), drawn as dashed white outlines;
            planes and slices then lie within both masks together.

    Raises:
        InlayError: Image and masks differ in shape, a reference with numbers of no class, another suffix, or no such
            folder.
    """
    path = check_output(path, IMAGES)
    if image.shape != segmentation.mask.shape:
        got = f"{image.shape} and {segmentation.mask.shape}"
        raise BadInput(f"image and mask have the shapes {got}; pass the scan that was segmented.")
    scan, affine = reorient_to_ras(image, segmentation.affine)
    mask, _ = reorient_to_ras(segmentation.class_mask, segmentation.affine)
    second = None if reference is None else segmentation.with_mask(reference)
    other = np.zeros_like(mask) if second is None else reorient_to_ras(second.class_mask, segmentation.affine)[0]
    spacing, greys = spacing_of(affine), grey_range(scan)
    centre, inside = find_extent(mask if second is None else (mask > 0) | (other > 0))
    shares = np.linspace(0, 1, SLICES + 2)[1:-1]
    slices = sorted({int(inside[0][round(share * (len(inside[0]) - 1))]) for share in shares})

    font, width = ImageFont.load_default(14), 3 * LARGE + 4 * GAP
    entries, columns = _lay_out_legend(segmentation, second, width - 2 * GAP, font)
    rows, lines = -(-len(entries) // columns), 1 if second is None else 2
    sheet = Image.new("RGB", (width, LARGE + SMALL + 5 * GAP + (2 + rows + lines) * TEXT), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(NAMES):
        x = GAP + i * (LARGE + GAP)
        place = transform_points(affine, centre[::-1])[2 - i]
        draw.text((x, GAP), f"{name}, {'zyx'[i]} = {place:.1f} mm", INK, font)
        cut = tuple(centre[i] if axis == i else slice(None) for axis in range(3))
        sides = [s for axis, s in enumerate(spacing) if axis != i]
        panel = _draw_panel(scan[cut], mask[cut], other[cut], sides, greys, LARGE)
        _paste(sheet, panel, (x, GAP + TEXT), LARGE, SIDES[i], font)
    top, window = LARGE + 2 * GAP + TEXT, _surroundings(inside, mask.shape, spacing)
    for i, d in enumerate(slices):
        x = GAP + i * (SMALL + GAP)
        place = transform_points(affine, (centre[2], centre[1], d))[2]
        draw.text((x, top), f"axial, z = {place:.1f} mm", INK, font)
        cut = (d, *window)
        panel = _draw_panel(scan[cut], mask[cut], other[cut], spacing[1:], greys, SMALL)
        _paste(sheet, panel, (x, top + TEXT), SMALL, ("R", "L", "", ""), font)
    legend = top + TEXT + SMALL + GAP
    for i, (text, is_there) in enumerate(entries):
        x, y = GAP + i % columns * ((width - 2 * GAP) // columns), legend + i // columns * TEXT
        draw.rectangle((x, y + 2, x + 12, y + 14), colour(i + 1))
        draw.text((x + 20, y), text, INK if is_there else FAINT, font)
    said = ["Radiological convention: the patient's right (R) is on the left. A anterior, P posterior, S up, I down."]
    if second is not None:
        said.append("Dashed white lines: the reference, whose volumes stand in brackets.")
    for line, text in enumerate(said, start=rows):
        draw.text((GAP, legend + line * TEXT + 4), text, FAINT, font)
    with replacing(path) as new:
        sheet.save(new)
    return path


def grey_range(scan: np.ndarray) -> tuple[float, float]:
    """Values that become black and white: percentiles 1 and 99 of at most about a million voxels."""
    step = max(1, round((scan.size / 1e6) ** (1 / 3)))
    low, high = np.percentile(scan[::step, ::step, ::step], (1, 99)).tolist()
    return (low, high) if high > low else (float(scan.min()), float(scan.max()) + 1e-6)


def find_extent(mask: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The voxel of the mask that is nearest to its centre of mass; and along each axis the planes that it reaches.

    Of an empty mask the middle, and all planes.
    """
    counts = [np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    if not counts[0].any():
        return [len(count) // 2 for count in counts], [np.arange(len(count)) for count in counts]
    mean = [float(np.average(np.arange(len(count)), weights=count)) for count in counts]
    centre = [round(m) for m in mean]
    if not mask[tuple(centre)]:  # a ring, or several lesions
        places = np.argwhere(mask)
        centre = places[((places - mean) ** 2).sum(1).argmin()].tolist()
    return centre, [np.flatnonzero(count) for count in counts]


def _surroundings(
    inside: list[np.ndarray], shape: tuple[int, ...], spacing: tuple[float, float, float]
) -> tuple[slice, slice]:
    """Rows and columns H, W of a square in the scan: the mask with half its extent around it, at least 10 mm."""
    edge = max((inside[axis][-1] + 1 - inside[axis][0]) * spacing[axis] for axis in (1, 2))
    edge += max(edge, 20.0)
    rows = []
    for axis in (1, 2):
        half, middle = edge / spacing[axis] / 2, (inside[axis][0] + inside[axis][-1] + 1) / 2
        rows.append(slice(max(0, round(middle - half)), min(shape[axis], round(middle + half))))
    return rows[0], rows[1]


def _draw_panel(
    scan: np.ndarray,
    mask: np.ndarray,
    reference: np.ndarray,
    spacing: list[float] | tuple[float, ...],
    greys: tuple[float, float],
    edge: int,
) -> Image.Image:
    """A plane with the masks' outlines, both axes reversed: its longer side is `edge` pixels."""
    scan, mask, reference = scan[::-1, ::-1], mask[::-1, ::-1], reference[::-1, ::-1]
    sides = [n * s for n, s in zip(scan.shape, spacing, strict=True)]
    height, width = (max(1, round(side * edge / max(sides))) for side in sides)
    low, high = greys
    levels = ((scan.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    panel = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
    rows = (np.arange(height) * mask.shape[0] // height)[:, None]
    columns = np.arange(width) * mask.shape[1] // width
    pixels = np.array(panel.convert("RGB"))
    regions = mask[rows, columns]
    for k in np.unique(regions[regions > 0]).tolist():
        pixels[_find_rim(regions == k)] = colour(k)
    dashes = (np.arange(height)[:, None] + np.arange(width)) // DASH % 2 == 0
    regions = reference[rows, columns]
    for k in np.unique(regions[regions > 0]).tolist():
        pixels[_find_rim(regions == k) & dashes] = 255
    return Image.fromarray(pixels)


def _find_rim(region: np.ndarray, thickness: int = 2) -> np.ndarray:
    """The region's outermost pixels."""
    inner = region
    for _ in range(thickness):
        framed = np.pad(inner, 1, mode="edge")  # no line where the image ends
        inner = inner & framed[2:, 1:-1] & framed[:-2, 1:-1] & framed[1:-1, 2:] & framed[1:-1, :-2]
    return region & ~inner


def _paste(
    sheet: Image.Image, panel: Image.Image, corner: tuple[int, int], edge: int, sides: tuple[str, ...], font: object
) -> None:
    """A panel in the middle of its square, with a letter at each side."""
    x, y = corner[0] + (edge - panel.width) // 2, corner[1] + (edge - panel.height) // 2
    sheet.paste(panel, (x, y))
    draw, (w, h) = ImageDraw.Draw(sheet), panel.size
    places = (
        (x + 5, y + h // 2, "lm"),
        (x + w - 5, y + h // 2, "rm"),
        (x + w // 2, y + 3, "ma"),
        (x + w // 2, y + h - 4, "md"),
    )
    for letter, (px, py, anchor) in zip(sides, places, strict=True):
        draw.text((px, py), letter, "#ffffff", font, anchor=anchor, stroke_width=2, stroke_fill="#000000")  # type: ignore[arg-type]


def _lay_out_legend(
    segmentation: Segmentation, reference: Segmentation | None, width: int, font: Any
) -> tuple[list[tuple[str, bool]], int]:
    """The text of every class, and whether the class is there; and the number of columns that fit side by side."""
    others = None if reference is None else reference.volumes_ml
    entries = []
    for name, volume in segmentation.volumes_ml.items():
        amount = f"  {volume:.3g} ml" + ("" if others is None else f" ({others[name]:.3g})")
        shown = name
        while len(shown) > 1 and font.getlength(shown + amount) > width - 20:
            shown = shown[:-2] + "…"
        entries.append((shown + amount, bool(volume or (others and others[name]))))
    widest = max((font.getlength(text) for text, _ in entries), default=0)
    return entries, max(1, int(width // (20 + widest + 2 * GAP)))
