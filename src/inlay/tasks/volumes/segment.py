"""Masks of whole scans, from NIfTI to NIfTI: a model's windows over the scan, joined on the scan's own grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.errors import BadInput
from inlay.files.atomic import replacing
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.volumes.scan import Scan
from inlay.tasks.volumes.windows import Grid, Place, probabilities, slide

MASKS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Segmentation:
    """A mask on a scan's own grid.

    Attributes:
        mask: (X, Y, Z) uint8, or int16 from 256 classes on; 0 is background, k the class `labels[k - 1]`.
        affine: (4, 4), from a voxel's index to mm.
        labels: Names of the K classes.
        probabilities: (K+1, X, Y, Z) float16, background first; None if they were not asked for.
        source: The scan's file, whose header `save` carries over; None: the scan came from memory.
    """

    mask: np.ndarray
    affine: np.ndarray
    labels: list[str]
    probabilities: np.ndarray | None = None
    source: Path | None = None

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of each class."""
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        voxels = np.bincount(self.mask.reshape(-1), minlength=len(self.labels) + 1)
        return {name: int(n) * voxel_ml for name, n in zip(self.labels, voxels[1:], strict=True)}

    def save(self, path: str | Path) -> Path:
        """Write the mask as NIfTI, with affine, orientation codes and units of the scan's file; whole or not at all.

        Raises:
            InlayError: A name that does not end with .nii.gz or .nii, or a folder that does not exist.
        """
        import nibabel

        path = output_name(path, MASKS)
        kind, header = nibabel.Nifti1Image, None
        if self.source is not None and self.source.name.endswith(MASKS):
            scan = nibabel.load(self.source)
            kind, header = type(scan), scan.header.copy()  # NIfTI-1 or -2
            header.set_slope_inter(1, 0)
            header.set_intent("none")
            header["cal_min"], header["cal_max"] = 0, 0
            header["descrip"] = b"mask by inlay"
        image = kind(self.mask, self.affine, header, dtype=self.mask.dtype)
        if header is None:
            image.header.set_xyzt_units("mm")
        with replacing(path) as new:
            image.to_filename(new)
        return path


def segment(
    adapter: Adapter,
    scan: Scan | str | os.PathLike[str],
    *,
    points: Sequence[Sequence[Any]] = (),
    boxes: Sequence[Sequence[Any]] = (),
    overlap: float = 0.5,
    flips: bool = False,
    largest: bool = False,
    batch_size: int = 1,
    keep_probabilities: bool = False,
    progress: bool = True,
) -> Segmentation:
    """Find the adapter's classes in a scan of any size, in windows of the size that it was trained on.

    Windows that hold a prompt are answered with it, all others without one. Probabilities are averaged where windows
    overlap, with Gaussian weights, and interpolated at the scan's own voxels; a voxel gets its most probable class.
    Beside the scan and the mask only the planes of one window's depth are held, so memory does not grow with length.

    Args:
        adapter: From `load_adapter`, trained on volumes.
        scan: A .nii, .nii.gz or .npz file, or what `adapter.processor.read` made of one.
        points: Each (x, y, z) or (x, y, z, label) in the scan's own voxels, from 0 as nibabel indexes them. The
            label is 0 for background, 1..K or a class name; default 1.
        boxes: Each (x0, y0, z0, x1, y1, z1), or with a label behind: two opposite corners, included.
        overlap: Share of a window that the next one covers too, 0 to below 1.
        flips: Average over the eight mirrored versions of each window: eight times the work.
        largest: Keep only the largest connected component of each class (26 neighbours).
        batch_size: Windows in one forward pass.
        keep_probabilities: Also return them.
        progress: Show a bar, where standard error is a terminal.

    Raises:
        InlayError: An adapter for something else, a file that is no scan, a prompt outside of the scan or of no class,
            overlap or batch_size out of range.
    """
    if not 0 <= overlap < 1 or batch_size < 1:
        raise BadInput(f"overlap must be from 0 to below 1 and batch_size at least 1, got {overlap} and {batch_size}.")
    from tqdm.auto import tqdm

    source, scan = open_scan(adapter, scan)
    grid = Grid(scan, adapter.processor.crop)
    prompts = grid.prompts(points, boxes, adapter.labels)
    mask = empty_mask(grid, adapter.labels)
    kept = np.zeros((len(adapter.labels) + 1, *scan.own_shape), np.float16) if keep_probabilities else None
    predict, size = partial(probabilities, adapter.model, flips=flips), tuple(adapter.processor.crop)
    # disable=None: no bar where the output is no terminal
    bar = tqdm(desc="segment", unit="window", disable=None if progress else True)
    with bar, torch.inference_mode():
        planes = slide(predict, grid.image, size, prompts, overlap=overlap, batch_size=batch_size, bar=bar)
        for first, values in planes:
            last = first + values.shape[1]
            low = -np.inf if first == 0 else first
            high = np.inf if last == grid.shape[0] else last - 1
            paint_mask(
                grid, values, (first, 0, 0), grid.rows((low, -np.inf, -np.inf), (high, np.inf, np.inf)), mask, kept
            )
    if largest:
        keep_largest(mask, len(adapter.labels))
    return Segmentation(mask, np.asarray(scan.affine, np.float64), list(adapter.labels), kept, source)


def open_scan(adapter: Adapter, scan: Any) -> tuple[Path | None, Scan]:
    """The scan's file, if it is one, and what the adapter's processor makes of it.

    Raises:
        InlayError: The adapter is not for volumes, or the file is no scan.
    """
    check_task(adapter, "volume-segmentation")
    if isinstance(scan, Scan):
        return None, scan
    return Path(scan), adapter.processor.read(Path(scan))


def output_name(path: str | Path, suffixes: Sequence[str]) -> Path:
    """The path, if something can be written there under such a name.

    Raises:
        InlayError: Another suffix, or no such folder.
    """
    path = Path(path)
    if not path.name.endswith(tuple(suffixes)) or not path.parent.is_dir():
        raise BadInput(f"'{path}' must be a name ending with {' or '.join(suffixes)}, in a folder that exists.")
    return path


def empty_mask(grid: Grid, labels: Sequence[str]) -> np.ndarray:
    """Background on the own grid."""
    return np.zeros(grid.own_shape, np.uint8 if len(labels) < 256 else np.int16)


def paint_mask(
    grid: Grid, values: torch.Tensor, start: Place, rows: list[slice], mask: np.ndarray, kept: np.ndarray | None = None
) -> None:
    """Write the most probable classes, and the probabilities if wanted, of a part of the tensor into own voxels.

    Args:
        grid: Where things lie.
        values: Probabilities (K+1, d, h, w) of the part.
        start: Where it begins in the tensor.
        rows: The own voxels to write.
        mask: (X, Y, Z).
        kept: (K+1, X, Y, Z).
    """
    own = mask.transpose(grid.axes)  # a view in the order D H W
    own_kept = None if kept is None else kept.transpose(0, *(grid.axes + 1))
    for index, part in grid.parts(values, start, rows):
        own[index] = most_probable(part).numpy()
        if own_kept is not None:
            own_kept[(slice(None), *index)] = part.numpy()


def most_probable(values: torch.Tensor) -> torch.Tensor:
    """argmax of (C, d, h, w) over C as int16, the first of equals; class by class it is ten times faster than torch."""
    best = values[0].clone()
    classes = torch.zeros(best.shape, dtype=torch.int16)
    for k in range(1, len(values)):
        classes.masked_fill_(values[k] > best, k)
        torch.maximum(best, values[k], out=best)
    return classes


def keep_largest(mask: np.ndarray, classes: int) -> None:
    """Turn all but the largest connected component (26 neighbours) of each class into background, in place."""
    from scipy import ndimage

    for k, box in enumerate(ndimage.find_objects(mask, classes), start=1):
        if box is None:
            continue
        part = mask[box]
        components, count = ndimage.label(part == k, np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(components.reshape(-1))
            sizes[0] = 0
            part[(components > 0) & (components != sizes.argmax())] = 0
