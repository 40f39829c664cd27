"""What the readers of all formats check of a file, and how they say what is wrong with it."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inlay.errors import DamagedFile, InlayError

APART = 0.1  # of a voxel: what qform and sform, or image and label map, may differ by


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends with one of these, in letters of any size (SCAN.NII.GZ)."""
    return path.name.lower().endswith(tuple(suffixes))


def three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without further axes of length 1."""
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        several = "a series or several channels: save one volume of it" if len(shape) > 3 else "no volume"
        raise ValueError(f"{len(shape)} axes of {'x'.join(map(str, shape))}, {several}")
    return shape[:3]


def four_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """X, Y, Z and C: the shape with its channels along one axis."""
    further = [n for n in shape[3:] if n != 1]
    if len(shape) < 3 or len(further) > 1 or min(shape) < 1:
        raise ValueError(f"{len(shape)} axes of {'x'.join(map(str, shape))}, {'a series' if further else 'no volume'}")
    return *shape[:3], math.prod(further)


def check_affine(affine: np.ndarray) -> None:
    """Raise a ValueError for what is no invertible map (4, 4) of finite numbers."""
    affine = np.asarray(affine, np.float64)
    fine = affine.shape == (4, 4) and np.isfinite(affine).all()
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if fine else np.zeros(3)
    if not (lengths > 1e-6).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise ValueError("an affine that maps no space")


def corner_distance(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """The farthest that two affines (4, 4) place a corner voxel of a grid apart, in their unit."""
    ends = np.array(np.meshgrid(*([0, n - 1] for n in shape))).reshape(3, -1)
    difference = np.asarray(first, np.float64) - second
    return float(np.linalg.norm(difference[:3, :3] @ ends + difference[:3, 3:], axis=0).max())


def explain_unreadable(source: Path | bytes, error: BaseException) -> str:
    """What is wrong with a file, or its bytes, that raised this error when it was read, in a few words."""
    if isinstance(source, Path) and not source.exists():
        return "no such file"
    if isinstance(source, Path) and source.is_dir():
        return "a folder, not a file"
    if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
        return "an empty file"
    if isinstance(error, EOFError) or "Expected" in str(error):
        return "truncated"
    if isinstance(error, gzip.BadGzipFile | zlib.error) or "CRC" in str(error):
        return "damaged, its compressed data does not match its checksum"
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return said.replace(str(source), "the file") if isinstance(source, Path) else said


def name_unreadable(source: Path | bytes, error: Exception) -> InlayError:
    """The error for a file, or its bytes, that raised this one when it was read."""
    name = repr(str(source)) if isinstance(source, Path) else "the file given"
    return DamagedFile(f"{name} cannot be read as a scan of three axes: {explain_unreadable(source, error)}.")
