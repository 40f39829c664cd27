"""Generated scans of heads with an atlas of 32 structures: pairs that differ by their side only, some very small."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inlay.builtin.bodies import Body, Floats, Random, cover_share, draw_texture

PAIRS, MIDDLE = 14, 4
LABELS = (
    *(f"{side}_{i:02}" for i in range(1, PAIRS + 1) for side in ("left", "right")),
    *(f"middle_{i}" for i in range(1, MIDDLE + 1)),
)
SIZE_MM = (165.0, 198.0, 168.0)  # of a scan: x to the right, y to the front, z upwards
HEAD_MM = np.array((70.0, 86.0, 72.0))  # radii
SCALP_MM, SKULL_MM = 6.0, 7.0
AIR, SCALP, SKULL, BRAIN = 0.02, 0.6, 0.12, 0.5  # brightness
LARGEST_MM, SMALLEST_MM = 15.0, 2.5  # mean radii of structures
WAVES = 4  # cosines along an axis that make up a smooth field
SEED = 50_000  # not one that pre-training would use


class Structure(NamedTuple):
    """An ellipsoid of the atlas: its place and radii in mm about the head's middle, and its brightness."""

    centre: npt.NDArray[np.float64]
    radii: npt.NDArray[np.float64]
    brightness: float


def generate_heads(count: int = 15, spacing_mm: float = 1.0, seed: int = SEED) -> Iterator[Body]:
    """Scans with label maps of `LABELS`, the same for the same seed; scan i does not depend on `count`.

    All heads share one atlas: 14 pairs of structures, left and right alike but for their place, and 4 in the middle;
    the smallest are one hundred-thousandth of a scan. A structure is as bright as others elsewhere, and a little
    brighter or darker than the tissue around it. Each head is turned by up to 6 degrees, moved, scaled, and deformed
    smoothly by some mm; each structure is moved, scaled and changed in brightness by itself. Over it lie a smooth bias
    field, noise as in the magnitude of MR (Rician) and a scale of its own. Voxels are int16 as a scanner stores them.

    Args:
        count: Number of scans.
        spacing_mm: Edge of a voxel; 1 makes scans of 165 x 198 x 168 voxels.
        seed: Chooses the scans. The atlas is always the same.

    Yields:
        A scan at a time.
    """
    atlas = draw_atlas()
    for number, generator in enumerate(np.random.default_rng(seed).spawn(count)):
        yield _draw_head(f"head_{number:03}", atlas, spacing_mm, generator)


def draw_atlas() -> list[Structure]:
    """The structures in the order of `LABELS`; none touches another before heads are deformed."""
    generator = np.random.default_rng(SEED)
    inside = HEAD_MM - SCALP_MM - SKULL_MM
    pairs: list[Structure] = []
    middle: list[Structure] = []
    sizes = np.geomspace(LARGEST_MM, SMALLEST_MM, PAIRS + MIDDLE)
    for i, size in enumerate(sizes):
        in_middle = i % 5 == 2 and len(middle) < MIDDLE
        radii = size * generator.dirichlet((8, 8, 8)) * 3
        brightness = BRAIN + (0.08 + 0.03 * (i % 4)) * (1 if i % 2 else -1)
        while True:
            centre = generator.uniform(-1, 1, 3) * (inside - radii)
            centre[0] = 0 if in_middle else -abs(centre[0])  # the left of a head has smaller x
            reach = radii.max() + 2
            far = np.linalg.norm(centre / (inside - reach)) > 1
            if far or (not in_middle and centre[0] > -reach):
                continue
            gaps = [np.linalg.norm(centre - other.centre) - other.radii.max() for other in (*pairs, *middle)]
            if min(gaps, default=np.inf) > reach:
                break
        (middle if in_middle else pairs).append(Structure(centre, radii, brightness))
    mirror = np.array((-1, 1, 1))
    return [each for left in pairs for each in (left, left._replace(centre=left.centre * mirror))] + middle


def _draw_head(name: str, atlas: Sequence[Structure], spacing_mm: float, generator: Random) -> Body:
    """One scan and its label map, (X, Y, Z) in RAS."""
    waves = [_list_cosines(round(edge / spacing_mm)) for edge in SIZE_MM]
    place = _draw_places(waves, spacing_mm, generator)
    shape = place.shape[1:]
    depth = -_ellipsoid_distance(place, np.zeros(3), HEAD_MM)
    image = np.full(shape, AIR, np.float32)
    for least, brightness in ((0, SCALP), (SCALP_MM, SKULL), (SCALP_MM + SKULL_MM, BRAIN)):
        image += (brightness - image) * cover_share(np.float32(least) - depth)
    labels = np.zeros(shape, np.uint8)
    for label, (middle, size, brightness) in enumerate(atlas, 1):
        centre, radii = middle + generator.normal(0, 1, 3), size * generator.uniform(0.88, 1.12, 3)
        box = _find_box(place, centre, radii.max(), spacing_mm)
        distance = _ellipsoid_distance(place[:, *box], centre, radii)
        image[box] += (np.float32(brightness + generator.normal(0, 0.015)) - image[box]) * cover_share(distance)
        labels[box][distance < 0] = label
    grain = np.float32(0.02) * draw_texture(shape, (spacing_mm,) * 3, 1.2, generator)
    bright = (image + grain * (image > 2 * AIR)) * np.exp(np.float32(0.12) * _draw_field(waves, generator))
    noise = generator.standard_normal((2, *shape), np.float32) * np.float32(generator.uniform(0.02, 0.04))
    image = np.hypot(bright + noise[0], noise[1]) * np.float32(generator.uniform(300, 3000))
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = generator.uniform(-20, 20, 3) - np.array(SIZE_MM) / 2
    return Body(name, image.astype(np.int16), labels, affine)


def _draw_places(waves: Sequence[Floats], spacing_mm: float, generator: Random) -> Floats:
    """The place in the atlas that each voxel shows, in mm, (3, X, Y, Z): turned, scaled, moved and deformed."""
    turn, _ = np.linalg.qr(np.eye(3) + generator.uniform(-0.1, 0.1, (3, 3)))
    matrix = turn * np.sign(np.diag(turn)) * generator.uniform(0.92, 1.08, 3)
    axes = [(np.arange(len(wave)) - (len(wave) - 1) / 2) * spacing_mm for wave in waves]
    x, y, z = (np.outer(matrix[:, i], axis).astype(np.float32) for i, axis in enumerate(axes))
    place = x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]
    for coordinate in place:
        coordinate += np.float32(2) * _draw_field(waves, generator) + np.float32(generator.uniform(-4, 4))
    return place


def _list_cosines(length: int) -> Floats:
    """The slowest `WAVES` cosines along an axis, (length, WAVES)."""
    at = (np.arange(length) + 0.5) / length
    return np.cos(np.pi * at[:, None] * np.arange(WAVES)).astype(np.float32)


def _draw_field(waves: Sequence[Floats], generator: Random) -> Floats:
    """A smooth random field (X, Y, Z) of unit variance."""
    heights = generator.standard_normal((WAVES, WAVES, WAVES), np.float32)
    heights[0, 0, 0] = 0  # no shift of the whole
    x, y, z = waves
    field = np.tensordot(x, np.tensordot(y, heights @ z.T, (1, 1)), (1, 1))
    return field / field.std()


def _find_box(place: Floats, centre: np.ndarray, reach: float, spacing_mm: float) -> tuple[slice, ...]:
    """A box of voxels that holds all within `reach` of a place of the atlas, found by every fourth voxel.

    From one of these to the next voxels a place changes by less than the 4 voxels that are added.
    """
    near = np.abs(place[:, ::4, ::4, ::4] - centre[:, None, None, None]) < reach + 4 * spacing_mm
    hits = np.nonzero(near.all(0))
    return tuple(slice(max(0, 4 * int(hit.min()) - 4), 4 * int(hit.max()) + 5) for hit in hits)


def _ellipsoid_distance(place: Floats, centre: np.ndarray, radii: np.ndarray) -> Floats:
    """Distance to an ellipsoid's surface in mm, negative inside, true near it where it is rounded least."""
    scaled = (place - centre.astype(np.float32)[:, None, None, None]) / radii.astype(np.float32)[:, None, None, None]
    return (np.sqrt(np.einsum("ixyz,ixyz->xyz", scaled, scaled)) - 1) * np.float32(radii.min())
