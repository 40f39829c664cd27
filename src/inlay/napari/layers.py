"""Layers of napari as scans, clicks and masks: what the panel does, without Qt.

An image's axes are D, H, W; a scan's own are X, Y, Z: the same in reverse. napari's world has no anatomical axes, so
one has to say which way they grow: `WORLDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.colours import colour
from inlay.tasks.volumes.data import Case
from inlay.tasks.volumes.file_checks import APART, corner_distance
from inlay.tasks.volumes.segment import Segmentation, segment
from inlay.tasks.volumes.session import VolumeSession

World = Literal["LPS", "RAS"]
# Axes 0, 1, 2 of the world grow to superior, posterior and left, as ITK has it; or to superior, anterior and right.
WORLDS: dict[World, tuple[float, float, float]] = {"LPS": (1, -1, -1), "RAS": (1, 1, 1)}
NEGATIVE = "background"  # the class of a point that belongs to none
FEATURE = "class"  # of a point: the name of its class
# Keys of an image's metadata: the file whose voxels it shows, axes reversed, and that file's affine.
SOURCE, AFFINE = "inlay_scan", "inlay_affine"
STRAIGHT = 1e-3  # of a voxel, that a step along an axis of the data may leave an axis of the world


class Layer(Protocol):
    """What is needed of a layer of napari."""

    name: str
    data: Any
    ndim: int
    units: Sequence[Any]
    metadata: dict[str, Any]

    def data_to_world(self, position: Any) -> Any:
        """Indices to the world."""

    def world_to_data(self, position: Any) -> Any:
        """The inverse."""


@dataclass(frozen=True)
class Click:
    """A point in a scan.

    Attributes:
        point: Voxel x, y, z of the scan.
        label: The name of its class, or NEGATIVE.
    """

    point: tuple[float, float, float]
    label: str


class LayerSession:
    """An image layer that an adapter segments, as a whole and click by click.

    Args:
        adapter: From `load_adapter`, trained on volumes.
        image: An image layer of three axes.
        world: Which way the axes of napari's world grow.
        others: Layers of the adapter's further channels, in their order.

    Raises:
        InlayError: An adapter for something else, a layer that is no scan, or not as many as there are channels.
    """

    def __init__(self, adapter: Adapter, image: Layer, world: World = "LPS", others: Sequence[Layer] = ()) -> None:
        check_task(adapter, "volume-segmentation")
        self.adapter, self.image, self.world, self.others = adapter, image, world, list(others)
        self._scan = adapter.processor.read(read_case(image, world, others))
        self._session = VolumeSession(adapter, self._scan)
        self._clicks: list[Click] = []  # that the session has heard
        self._settled: list[Click] = []  # those before, which the mask that it corrects follows from

    @property
    def names(self) -> dict[int, str]:
        """Classes by their numbers in masks."""
        return self._session.segmentation.names

    @property
    def mask(self) -> np.ndarray:
        """(D, H, W): what follows from all clicks, and from the mask that they correct, if there is one."""
        return self._session.mask.transpose(2, 1, 0)

    def follow(self, clicks: Sequence[Click], painted: np.ndarray | None = None) -> np.ndarray:
        """The mask that follows from these clicks: what they share with the last ones is not computed again.

        At first it is what a session says around the clicks. After `segment_all`, or where somebody has painted, new
        clicks correct the mask that is there; those which it follows from stay in it, also if they are taken away.

        Args:
            clicks: All that there are.
            painted: The mask (D, H, W) as it is shown now, with what somebody has painted over it.

        Raises:
            InlayError: A click outside of the scan, or of no class, where those before it stand; paint of no class.
        """
        if painted is not None and not np.array_equal(painted, self.mask):
            self._correct(np.asarray(painted).transpose(2, 1, 0), [*self._settled, *self._clicks])
        clicks = [click for click in clicks if click not in self._settled]
        pairs = zip(clicks, self._clicks, strict=False)
        shared = next((i for i, (new, old) in enumerate(pairs) if new != old), min(len(clicks), len(self._clicks)))
        while len(self._clicks) > shared:
            self._session.undo()
            self._clicks.pop()
        for click in clicks[shared:]:
            is_positive = click.label != NEGATIVE
            self._session.click(click.point, is_positive, click.label if is_positive else None)
            self._clicks.append(click)
        return self.mask

    def segment_all(self, clicks: Sequence[Click] = (), *, largest: bool = False) -> np.ndarray:
        """The mask of the whole scan, with these clicks as prompts; later ones correct it.

        Args:
            clicks: Voxels of classes, and of none.
            largest: Keep only the largest connected component of each class.

        Raises:
            InlayError: As `follow`.
        """
        points = [(*click.point, 0 if click.label == NEGATIVE else click.label) for click in clicks]
        self._correct(segment(self.adapter, self._scan, points=points, largest=largest, progress=False), clicks)
        return self.mask

    def _correct(self, mask: Segmentation | np.ndarray, clicks: Sequence[Click]) -> None:
        """Begin to correct a mask, X Y Z, which follows from these clicks."""
        self._session = VolumeSession(self.adapter, self._scan, mask=mask)
        self._clicks, self._settled = [], list(clicks)

    def save(self, mask: np.ndarray, path: str | Path) -> Path:
        """Write a mask (D, H, W), such as one that was painted over, on the grid of the scan.

        Raises:
            InlayError: Numbers of no class, or what `Segmentation.save` says.
        """
        source = self.image.metadata.get(SOURCE)
        found = self._session.segmentation
        scan = None if source is None else Path(source)
        found = Segmentation(found.mask, found.affine, found.labels, None, scan, found.values)
        return found.with_mask(np.asarray(mask).transpose(2, 1, 0)).save(path)


def read_case(image: Layer, world: World = "LPS", others: Sequence[Layer] = ()) -> Case:
    """The scan that an image layer shows, with its place in RAS and mm; others on its grid are further channels.

    The world is taken as mm where the layer's units are pixels.

    Raises:
        InlayError: A layer of other than three axes, with numbers that are not finite, or on another grid.
    """
    affine = find_affine(image, world)
    channels = [_read_voxels(image)]
    for other in others:
        channels.append(_read_voxels(other))
        fits = channels[-1].shape == channels[0].shape
        apart = corner_distance(find_affine(other, world), affine, channels[0].shape) if fits else np.inf
        if apart > APART * np.linalg.norm(affine[:3, :3], axis=0).min():
            raise BadInput(f"layers {image.name!r} and {other.name!r} are not on the same grid; resample one of them.")
    return Case(image.name, np.stack(channels) if others else channels[0], affine=affine)


def find_affine(image: Layer, world: World) -> np.ndarray:
    """The affine (4, 4) of a layer, from a voxel's index x, y, z to RAS in mm: its file's, where inlay has opened it.

    Raises:
        InlayError: A layer of another reader that is rotated: napari shows its slices straight, so points that are
            placed by eye would lie elsewhere.
    """
    if AFFINE in image.metadata:
        return np.array(image.metadata[AFFINE], np.float64)
    transform = find_transform(image)
    columns = np.abs(transform[:3, :3])
    if (np.sort(columns, 0)[:2] > STRAIGHT * columns.max(0)).any():
        raise BadInput(
            f"layer {image.name!r} is rotated, and napari shows its slices straight; open its file with inlay's reader."
        )
    scales = np.array(WORLDS[world]) * [_length_mm(unit) for unit in image.units]
    affine = np.eye(4)
    affine[:3] = (transform[:3] * scales[:, None])[::-1][:, [2, 1, 0, 3]]  # axes of the world and of voxels reversed
    return affine


def find_transform(image: Layer) -> np.ndarray:
    """The affine (4, 4) of a layer in napari's terms, for a layer on the same grid."""
    origin = np.array(image.data_to_world((0, 0, 0)), np.float64)
    transform = np.eye(4)
    transform[:3, :3] = np.stack([np.array(image.data_to_world(unit), np.float64) - origin for unit in np.eye(3)], 1)
    transform[:3, 3] = origin
    return transform


def read_clicks(points: Layer, image: Layer, labels: Sequence[str]) -> list[Click]:
    """The points of a layer as clicks in the scan of an image layer, whose places in the world may differ."""
    places = (image.world_to_data(points.data_to_world(place)) for place in np.asarray(points.data))
    return [Click(_voxel(place), str(label)) for place, label in zip(places, labels, strict=True)]


def choose_colours(names: dict[int, str]) -> dict[str, tuple[float, float, float]]:
    """Red, green and blue, 0 to 1, of every class, and white for points that belong to none."""
    found = {name: colour(k) for k, name in enumerate(names.values(), start=1)}
    return {name: (r / 255, g / 255, b / 255) for name, (r, g, b) in {**found, NEGATIVE: (255, 255, 255)}.items()}


def _read_voxels(image: Layer) -> np.ndarray:
    shape = tuple(image.data.shape)
    if len(shape) != 3:
        raise BadInput(f"layer {image.name!r} has the shape {shape}; choose an image of three axes, without colours.")
    return np.asarray(image.data, np.float32).transpose(2, 1, 0)


def _voxel(place: Any) -> tuple[float, float, float]:
    d, h, w = (float(round(float(x), 6)) for x in place)
    return w, h, d


def _length_mm(unit: Any) -> float:
    """A unit of pint in mm; a pixel is taken for one."""
    return float((1 * unit).to("mm").magnitude) if unit.is_compatible_with("mm") else 1.0
