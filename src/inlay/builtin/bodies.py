"""Generated scans: a body with an organ, vessels, and round lesions that no single slice can tell from vessels."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Random = np.random.Generator

LABELS = ("organ", "lesion")
CHANNELS = ("first", "second")  # of `generate_pairs_of_channels`
PAIR_LABELS = ("alike", "opposite")
SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.5), (0.9, 0.9, 2.0), (0.9, 0.9, 2.5), (1.0, 1.0, 3.0))  # x, y, z in mm
TISSUE, ORGAN, CYST, VESSEL = 0.45, 0.62, 0.25, 0.9  # brightness; lesions have that of vessels
SEED = 30_000  # not one that pre-training would use


class Body(NamedTuple):
    """A scan: float32 voxels (X, Y, Z), uint8 labels of that shape (0, then the classes), affine to mm (4, 4)."""

    name: str
    image: Floats
    label: npt.NDArray[np.uint8]
    affine: npt.NDArray[np.float64]


def generate_bodies(count: int = 48, seed: int = SEED) -> Iterator[Body]:
    """Scans with label maps in memory, the same for the same seed; scan i does not depend on `count`.

    Each is an ellipsoid of textured tissue in air with an organ, an unlabelled cyst, one to four lesions (spheres of
    2.5 to 5 mm radius) and two to four vessels of the same brightness, which run from slice to slice: in one slice both
    are discs of like radii, and their neighbours above and below tell them apart. Over it lie a smooth bias field,
    noise as in the magnitude of MR (Rician) and a scale from 100 to 100,000. 1 to 3 mm lie between slices; axes are
    flipped, permuted and, in half of the cases, oblique.

    Yields:
        A scan at a time.
    """
    for number, generator in enumerate(np.random.default_rng(seed).spawn(count)):
        spacing = SPACINGS[generator.integers(len(SPACINGS))]
        image, labels = _draw_body(spacing, generator)
        image, labels, affine = _store(image, labels, spacing, generator)
        yield Body(f"body_{number:03}", image, labels, affine)


def generate_pairs_of_channels(count: int = 48, seed: int = SEED) -> Iterator[Body]:
    """Scans of two channels, float32 (2, X, Y, Z), whose classes neither channel tells by itself: an exclusive or.

    In a body of textured tissue lie up to six balls of 2.5 to 4 mm radius. In each channel a ball is brighter or darker
    than the tissue, at random. Class 1 has the same sign in both channels, class 2 the opposite ones. Each channel has
    noise, a bias field and a scale of its own. Voxels are 1 mm.

    Yields:
        A scan at a time; scan i does not depend on `count`.
    """
    for number, generator in enumerate(np.random.default_rng(seed + 1).spawn(count)):
        shape = tuple(generator.integers(22, 29, 3).tolist())
        mm = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")).astype(np.float32)
        body = _ellipsoid_distance(mm, np.zeros(3), np.array(shape) * 0.47, generator)
        tissue = 0.03 + (0.5 - 0.03) * cover_share(body)
        channels = [tissue + 0.02 * draw_texture(shape, (1.0, 1.0, 1.0), 1.2, generator) for _ in range(2)]
        labels = np.zeros(shape, np.uint8)
        placed: list[tuple[np.ndarray, float]] = []
        for _ in range(generator.integers(4, 7)):
            radius = generator.uniform(2.5, 4.0)
            centre = _random_point(np.array(shape) * 0.47 - radius - 1, 0.95, generator)
            if any(np.linalg.norm(centre - other) < radius + reach + 1 for other, reach in placed):
                continue
            placed.append((centre, radius))
            distance = np.linalg.norm(mm - centre[:, None, None, None], axis=0) - np.float32(radius)
            signs = generator.choice((-1, 1), 2)
            for channel, sign in zip(channels, signs, strict=True):
                channel += np.float32(0.25 * sign) * cover_share(distance)
            labels[distance < 0] = 1 if signs[0] == signs[1] else 2
        place = mm / np.array(shape, np.float32)[:, None, None, None]
        for i, channel in enumerate(channels):
            slope = generator.uniform(-0.3, 0.3, 3).astype(np.float32)
            noise = np.float32(0.03) * generator.standard_normal((2, *shape), np.float32)
            bright = channel * np.exp(np.tensordot(slope, place, 1))
            channels[i] = np.hypot(bright + noise[0], noise[1]) * np.float32(10 ** generator.uniform(2, 5))
        yield Body(f"channels_{number:03}", np.stack(channels).astype(np.float32), labels, np.eye(4))


def _draw_body(spacing: tuple[float, float, float], generator: Random) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """One scan and its label map, (X, Y, Z) in RAS."""
    extents = generator.uniform(34, 44, 3) * (1, 1, 1 + 0.3 * (spacing[2] - 1))
    axes = [
        (np.arange(n) - (n - 1) / 2) * s for n, s in zip(np.round(extents / spacing).astype(int), spacing, strict=True)
    ]
    mm = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)  # 3 X Y Z
    radii = extents * generator.uniform(0.42, 0.48, 3)
    wobble = draw_texture(mm.shape[1:], spacing, 6.0, generator)
    body = _ellipsoid_distance(mm, np.zeros(3), radii, generator) + 0.8 * wobble
    image = 0.03 + (TISSUE + 0.05 * draw_texture(mm.shape[1:], spacing, 1.2, generator) - 0.03) * cover_share(body)

    organ = (
        _ellipsoid_distance(mm, _random_point(radii, 0.35, generator), generator.uniform(6, 10, 3), generator) + wobble
    )
    grain = 0.08 * draw_texture(mm.shape[1:], spacing, 0.7, generator)
    cyst = _ellipsoid_distance(mm, _random_point(radii, 0.6, generator), generator.uniform(3, 6, 3), generator)
    for distance, brightness in ((cyst, CYST), (organ, ORGAN + grain)):
        image += (brightness - image) * cover_share(np.maximum(distance, body))
    lesions, vessels = _draw_lesions_and_vessels(mm, radii, generator)
    bright = VESSEL * generator.uniform(0.9, 1.1) + 0.5 * grain
    image += (bright - image) * cover_share(np.maximum(np.minimum(lesions, vessels), body))

    labels = np.zeros(image.shape, np.uint8)
    labels[(organ < 0) & (body < 0) & (vessels >= 0)] = 1
    labels[lesions < 0] = 2
    place = mm / extents.astype(np.float32)[:, None, None, None]
    slope, bend = generator.uniform(-0.5, 0.5, (2, 3)).astype(np.float32)
    image *= np.exp(np.tensordot(slope, place, 1) + np.tensordot(2 * bend, place**2, 1))
    noise = generator.standard_normal((2, *image.shape), np.float32) * np.float32(generator.uniform(0.02, 0.06))
    image = np.hypot(image + noise[0], noise[1]) * np.float32(10 ** generator.uniform(2, 5))
    return image.astype(np.float32), labels


def _draw_lesions_and_vessels(mm: Floats, radii: np.ndarray, generator: Random) -> tuple[Floats, Floats]:
    """Signed distances to lesions and to vessels, in mm; they do not touch."""
    z = mm[2, 0, 0]
    paths, widths = [], generator.uniform(1.8, 4.0, generator.integers(2, 5))
    vessels = np.full(mm.shape[1:], np.inf, np.float32)
    for width in widths:
        # A gentle curve across the slices, that leans by less than 20 degrees.
        lean, wave, phase = generator.uniform(-0.3, 0.3, 2), generator.uniform(-1.5, 1.5, 2), generator.uniform(0, 6.3)
        path = (
            _random_point(radii, 0.65, generator)[:2, None] + lean[:, None] * z + wave[:, None] * np.sin(z / 9 + phase)
        )
        paths.append(path)
        x, y = path.astype(np.float32)
        vessels = np.minimum(vessels, np.hypot(mm[0] - x, mm[1] - y) - np.float32(width))
    lesions = np.full_like(vessels, np.inf)
    placed: list[tuple[np.ndarray, float]] = []
    wanted = generator.integers(1, 5)
    for _ in range(200):  # a crowded body gets fewer
        if len(placed) == wanted:
            break
        radius = generator.uniform(2.5, 5.0)
        centre = _random_point(radii - radius, 0.85, generator)
        slices = np.abs(z - centre[2]) < radius + 2
        gaps = [
            np.hypot(*(path[:, slices] - centre[:2, None])).min() - radius - width
            for path, width in zip(paths, widths, strict=True)
        ]
        gaps += [np.linalg.norm(centre - other) - radius - reach for other, reach in placed]
        if min(gaps) < 1.5:
            continue
        placed.append((centre, radius))
        lesions = np.minimum(lesions, np.linalg.norm(mm - centre[:, None, None, None], axis=0) - radius)
    return lesions.astype(np.float32), vessels


def _random_point(radii: np.ndarray, share: float, generator: Random) -> np.ndarray:
    """A random point (3,) within `share` of an ellipsoid about 0."""
    direction = generator.standard_normal(3)
    return radii * share * direction / np.linalg.norm(direction) * generator.random() ** (1 / 3)


def _ellipsoid_distance(mm: Floats, centre: np.ndarray, radii: np.ndarray, generator: Random) -> Floats:
    """Distance to an ellipsoid in mm, negative inside, true near its surface; turned by up to 0.3 about each axis."""
    turn, _ = np.linalg.qr(np.eye(3) + generator.uniform(-0.3, 0.3, (3, 3)))
    scaled = np.tensordot(turn / radii[:, None], mm - centre[:, None, None, None], 1)
    return ((np.linalg.norm(scaled, axis=0) - 1) * radii.min()).astype(np.float32)


def cover_share(distance: Floats) -> Floats:
    """Share of a voxel inside an edge: a ramp of 1 mm."""
    return np.clip(0.5 - distance, 0, 1)


def draw_texture(shape: tuple[int, ...], spacing: tuple[float, ...], size: float, generator: Random) -> Floats:
    """Random field of unit variance whose grains measure `size` mm."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(generator.standard_normal(shape, np.float32), [size / s for s in spacing], mode="wrap")
    return field / field.std()


def _store(
    image: Floats, labels: npt.NDArray[np.uint8], spacing: tuple[float, float, float], generator: Random
) -> tuple[Floats, npt.NDArray[np.uint8], np.ndarray]:
    """Image and labels with axes flipped and permuted as a scanner stores them, and the affine of these, in mm."""
    affine = np.diag([*spacing, 1.0])
    if generator.random() < 0.5:
        turn, _ = np.linalg.qr(np.eye(3) + generator.uniform(-0.1, 0.1, (3, 3)))
        affine[:3, :3] = turn * np.sign(np.diag(turn)) @ affine[:3, :3]
    affine[:3, 3] = generator.uniform(-100, 100, 3)
    order, flips = generator.permutation(3), generator.random(3) < 0.5
    own = np.zeros((4, 4))  # from stored indices to those in RAS
    own[3, 3] = 1
    for axis, flip in enumerate(flips):
        own[order[axis], axis] = -1 if flip else 1
        own[order[axis], 3] = image.shape[order[axis]] - 1 if flip else 0
    along = tuple(np.flatnonzero(flips).tolist())
    image, labels = np.flip(image.transpose(order), along), np.flip(labels.transpose(order), along)
    return np.ascontiguousarray(image), np.ascontiguousarray(labels), affine @ own
