"""An image of a scan and its mask: three planes through the mask's centre, and slices through its extent."""

from pathlib import Path

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
INK, BACKGROUND = "#e8e8e8", "#101014"


def draw_montage(image: np.ndarray, segmentation: Segmentation, path: str | Path) -> Path:
    """Save a PNG with an axial, a coronal and a sagittal plane through the mask's centre of mass, and axial slices.

    Sides are true to the spacing. Radiological convention: the patient's right is on the left. Greys go from the
    scan's percentile 1 to 99; outlines are the mask's own voxels, in the colours of the legend. Slices lie evenly
    between the mask's ends, and show only its surroundings; an empty mask shows the middle of the scan.

    Args:
        image: The scan (X, Y, Z) on the mask's grid, as `read_volume` reads it.
        segmentation: From `segment`, or `VolumeSession.segmentation`.
        path: Ends with .png.

    Raises:
        InlayError: Image and mask differ in shape, another suffix, or no such folder.
    """
    path = check_output(path, IMAGES)
    if image.shape != segmentation.mask.shape:
        got = f"{image.shape} and {segmentation.mask.shape}"
        raise BadInput(f"image and mask have the shapes {got}; pass the scan that was segmented.")
    scan, affine = reorient_to_ras(image, segmentation.affine)
    mask, _ = reorient_to_ras(segmentation.class_mask, segmentation.affine)
    spacing, greys = spacing_of(affine), grey_range(scan)
    centre, inside = find_extent(mask)
    shares = np.linspace(0, 1, SLICES + 2)[1:-1]
    slices = sorted({int(inside[0][round(share * (len(inside[0]) - 1))]) for share in shares})

    sheet = Image.new("RGB", (3 * LARGE + 4 * GAP, LARGE + SMALL + 5 * GAP + 4 * TEXT), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, name in enumerate(NAMES):
        x = GAP + i * (LARGE + GAP)
        place = transform_points(affine, centre[::-1])[2 - i]
        draw.text((x, GAP), f"{name}, {'zyx'[i]} = {place:.1f} mm", INK, font)
        cut = tuple(centre[i] if axis == i else slice(None) for axis in range(3))
        panel = _draw_panel(scan[cut], mask[cut], [s for axis, s in enumerate(spacing) if axis != i], greys, LARGE)
        _paste(sheet, panel, (x, GAP + TEXT), LARGE, SIDES[i], font)
    top, window = LARGE + 2 * GAP + TEXT, _surroundings(inside, mask.shape, spacing)
    for i, d in enumerate(slices):
        x = GAP + i * (SMALL + GAP)
        place = transform_points(affine, (centre[2], centre[1], d))[2]
        draw.text((x, top), f"axial, z = {place:.1f} mm", INK, font)
        panel = _draw_panel(scan[(d, *window)], mask[(d, *window)], spacing[1:], greys, SMALL)
        _paste(sheet, panel, (x, top + TEXT), SMALL, ("R", "L", "", ""), font)
    _draw_legend(draw, segmentation, top + TEXT + SMALL + GAP, sheet.width, font)
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
    scan: np.ndarray, mask: np.ndarray, spacing: list[float] | tuple[float, ...], greys: tuple[float, float], edge: int
) -> Image.Image:
    """A plane with the mask's outline, both axes reversed: its longer side is `edge` pixels."""
    scan, mask = scan[::-1, ::-1], mask[::-1, ::-1]
    sides = [n * s for n, s in zip(scan.shape, spacing, strict=True)]
    height, width = (max(1, round(side * edge / max(sides))) for side in sides)
    low, high = greys
    levels = ((scan.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    panel = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
    rows = (np.arange(height) * mask.shape[0] // height)[:, None]
    regions = mask[rows, np.arange(width) * mask.shape[1] // width]
    pixels = np.array(panel.convert("RGB"))
    for k in np.unique(regions[regions > 0]).tolist():
        pixels[_find_rim(regions == k)] = colour(k)
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


def _draw_legend(draw: ImageDraw.ImageDraw, segmentation: Segmentation, y: int, width: int, font: object) -> None:
    """Classes that are there, with colours and volumes, as many as there is room for; then the convention."""
    x, volumes = GAP, segmentation.volumes_ml
    for k, (name, volume) in enumerate(volumes.items(), start=1):
        if not volume and any(volumes.values()):
            continue
        text = f"{name}  {volume:.3g} ml"
        end = x + 20 + draw.textlength(text, font)  # type: ignore[arg-type]
        if end > width - 60 and x > GAP:
            draw.text((x, y), "…", INK, font)  # type: ignore[arg-type]
            break
        draw.rectangle((x, y + 2, x + 12, y + 14), colour(k))
        draw.text((x + 20, y), text, INK, font)  # type: ignore[arg-type]
        x = round(end) + 2 * GAP
    said = "Radiological convention: the patient's right (R) is on the left. A anterior, P posterior, S up, I down."
    draw.text((GAP, y + TEXT + 4), said, "#a0a0a8", font)  # type: ignore[arg-type]
