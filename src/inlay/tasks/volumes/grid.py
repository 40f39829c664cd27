"""The geometry of scans: from a file's own axes to D, H, W in RAS, other spacings, and back."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from inlay.tasks.volumes.nifti import import_nibabel

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]


def reorient_to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A view of voxels (X, Y, Z) as (D, H, W) in RAS, and the affine (4, 4) from its indices (w, h, d) to mm.

    Axes are only flipped and permuted: those of an oblique scan become the nearest of D, H and W.
    """
    turns, towards = orientation(affine, array.shape)
    return import_nibabel().orientations.apply_orientation(array, turns).transpose(2, 1, 0), affine @ towards


def reorient_from_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The inverse of `reorient_to_ras`, for voxels (..., D, H, W) and the own affine; (..., X, Y, Z), contiguous."""
    turns, _ = orientation(affine, (1, 1, 1))
    axes, flips = turns[:, 0].astype(int), turns[:, 1].astype(int)
    # Own axis i lies along axis axes[i] of x, y, z in RAS, which is the last but that one of D, H, W.
    array = array.transpose([*range(array.ndim - 3), *(array.ndim - 1 - axes)])
    x, y, z = (slice(None, None, int(flip)) for flip in flips)
    return np.ascontiguousarray(array[..., x, y, z])


def orientation(affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """nibabel's orientation (3, 2) of an affine, and the map (4, 4) of indices x, y, z in RAS to the own ones."""
    library = import_nibabel().orientations
    turns = library.io_orientation(affine)
    return turns, library.inv_ornt_aff(turns, shape)


def spacing_of(affine: np.ndarray) -> Triple:
    """Spacing in mm in D, H, W, of an affine in RAS as `reorient_to_ras` gives it."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return z, y, x


def transform_points(affine: np.ndarray, points: npt.ArrayLike) -> np.ndarray:
    """Points (..., 3) through an affine (4, 4)."""
    return np.asarray(points, np.float64) @ affine[:3, :3].T + affine[:3, 3]


def resize(values: np.ndarray, shape: Shape, mode: Literal["nearest", "linear"]) -> np.ndarray:
    """Values (..., D, H, W) in another number of voxels between the same edges.

    `nearest` takes the voxel that holds the new one's centre, of any type. `linear` interpolates along one axis after
    the other, and averages where voxels get larger (torch's antialias), so that no structure falls between them.
    """
    if values.shape[-3:] == shape:
        return values
    if mode == "nearest":
        for axis, size in zip((-3, -2, -1), shape, strict=True):
            count = values.shape[axis]
            if size != count:
                values = values.take(((np.arange(size) + 0.5) * count / size).astype(np.int64), axis)
        return values
    first = values.shape[:-3]
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(-1, *values.shape[-3:])
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": True}
    if tensor.shape[2:] != shape[1:]:
        tensor = functional.interpolate(tensor, shape[1:], **options)  # C D H W: slices as channels
    if tensor.shape[1] != shape[0]:
        columns = tensor.flatten(2)[:, None]  # C 1 D H·W
        tensor = functional.interpolate(columns, (shape[0], columns.shape[-1]), **options)
    return tensor.reshape(*first, *shape).numpy()
