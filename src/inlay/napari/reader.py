"""Opens scans so that napari's world is ITK's, in mm: orientation and spacing are not lost.

Axes grow to superior, posterior and left, so that an axial slice is seen as radiologists see it: anterior is up, and
the patient's right on the left.

An oblique scan is shown in its own planes, as the model sees it, turned about its centre: napari slices along the axes
of the world only. Its own affine is kept for the mask.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inlay.napari.layers import AFFINE, SOURCE, WORLDS
from inlay.tasks.volumes.formats import read_volume
from inlay.tasks.volumes.grid import orientation, transform_points

LayerData = tuple[np.ndarray, dict[str, Any], str]


def get_reader(path: str | list[str]) -> Callable[[str], list[LayerData]] | None:
    """What opens a file, as npe2 asks; None for several at once."""
    return open_scan if isinstance(path, str) else None


def open_scan(path: str) -> list[LayerData]:
    """An image layer (D, H, W).

    Raises:
        InlayError: As `read_volume`.
    """
    voxels, affine = read_volume(path)
    turns, _ = orientation(affine, voxels.shape)
    straight = np.zeros((3, 3))  # x, y, z to right, anterior, superior
    straight[turns[:, 0].astype(int), range(3)] = turns[:, 1] * np.linalg.norm(affine[:3, :3], axis=0)
    centre = (np.array(voxels.shape) - 1) / 2
    signs = np.array(WORLDS["LPS"])
    transform = np.eye(4)
    transform[:3, :3] = signs[:, None] * straight[::-1, ::-1]
    transform[:3, 3] = signs * (transform_points(affine, centre) - straight @ centre)[::-1]
    layer = {
        "name": Path(path).name,
        "affine": transform,
        "units": ("mm", "mm", "mm"),
        "metadata": {SOURCE: str(Path(path).absolute()), AFFINE: affine.tolist()},
    }
    return [(voxels.transpose(2, 1, 0), layer, "image")]
