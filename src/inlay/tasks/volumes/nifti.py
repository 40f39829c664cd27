"""Files of scans, NIfTI and .npz: read whole, checked, with errors that name the file; masks written as NIfTI."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.files.atomic import replacing

SUFFIXES = (".nii.gz", ".nii", ".npz")


def read_volume(path: str | os.PathLike[str], key: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """All voxels of a scan or of a label map, as its file orders them.

    Args:
        path: A .nii or .nii.gz file; or .npz with arrays `image`, `label` and, if there are any, `affine` (4 x 4, voxel
            index to mm) or `spacing` (x, y, z in mm; 1 where there is neither). Further axes of length 1 are dropped.
        key: `image` reads float32, `label` the numbers as they are.

    Returns:
        Voxels (X, Y, Z), and the affine (4, 4) that takes a voxel's index to mm (right, anterior, superior).

    Raises:
        InlayError: No such file, truncated or of another kind, not three axes, an affine that maps no space, voxels
            that are no real numbers, NaN or infinite ones in an image.
    """
    path = Path(path)
    try:
        array, affine = _npz(path, key) if path.suffix == ".npz" else _nifti(path, key)
        array = array.reshape(_three_axes(array.shape))
        if array.dtype.kind not in "buif":
            raise ValueError(f"voxels of type {array.dtype}")
        check_affine(affine)
        if key == "image":
            array = np.asarray(array, np.float32)
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                raise ValueError(f"{bad:,} voxels that are NaN or infinite")
    except InlayError:
        raise
    except Exception as error:  # nibabel, numpy, gzip and zlib raise what they please for a broken file
        raise _unreadable(path, error) from error
    return array, affine


def read_header(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine (4, 4) of an image; of a NIfTI file no voxel is read.

    Raises:
        InlayError: As for `read_volume`, but for what only the voxels tell.
    """
    path = Path(path)
    if path.suffix == ".npz":
        array, affine = read_volume(path)
        return array.shape, affine
    try:
        image = _open(path)
        shape = _three_axes(image.shape)
        check_affine(image.affine)
    except InlayError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return shape, np.asarray(image.affine, np.float64)


def write_volume(path: str | os.PathLike[str], array: np.ndarray, affine: np.ndarray) -> None:
    """Save voxels (X, Y, Z) as .nii.gz or .nii, under a temporary name first; booleans become uint8, int64 int16.

    Raises:
        InlayError: Another suffix, a folder that does not exist, labels that do not fit 16 bits.
    """
    path = Path(path)
    suffix = next((s for s in SUFFIXES[:2] if path.name.endswith(s)), None)
    if suffix is None or not path.parent.is_dir():
        raise BadInput(f"'{path}' must end with .nii.gz or .nii, in a folder that exists.")
    array = np.asarray(array)
    if array.dtype.kind in "bui" and array.dtype not in (np.uint8, np.int16):
        small = np.uint8 if array.dtype == bool or (array.size and 0 <= array.min() <= array.max() < 256) else np.int16
        if array.size and (array.min() < -(2**15) or array.max() >= 2**15):
            raise BadInput(f"labels go up to {array.max()}, and a mask holds 16 bits; number them from 1.")
        array = array.astype(small)
    image = import_nibabel().Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        image.to_filename(temporary)


def case_name(path: Path) -> str:
    """Name of a scan's file without its suffix."""
    return path.name.removesuffix(next((s for s in SUFFIXES if path.name.endswith(s)), ""))


def import_nibabel() -> Any:
    """nibabel, or an InlayError that says how to get it."""
    try:
        import nibabel
    except ImportError:
        raise Unsupported(
            "expected nibabel, which reads scans, but it is not installed. Run: pip install 'inlay[volumes]'"
        ) from None
    return nibabel


def _open(path: Path) -> Any:
    if not path.name.endswith(SUFFIXES[:2]):
        raise BadInput(f"'{path}' is no scan in {', '.join(SUFFIXES)}; convert it.")
    return import_nibabel().load(path)


def _nifti(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    image = _open(path)
    if image.get_data_dtype().kind not in "buif":
        raise ValueError(f"voxels of type {image.get_data_dtype()}")
    _three_axes(image.shape)  # before all of a long series is read
    voxels = image.get_fdata(caching="unchanged", dtype=np.float32) if key == "image" else np.asarray(image.dataobj)
    return voxels, np.asarray(image.affine, np.float64)


def _npz(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # numpy leaves a cut file open
        if key not in file:
            raise ValueError(f"an .npz with {', '.join(file) or 'nothing'}, but no array {key!r}")
        array, affine = file[key], np.eye(4)
        if "affine" in file:
            affine = np.asarray(file["affine"], np.float64)
        elif "spacing" in file:
            spacing = np.asarray(file["spacing"], np.float64).ravel()
            if spacing.size != 3 or not (spacing > 0).all():
                raise ValueError(f"spacing {spacing.tolist()}")
            affine = np.diag([*spacing, 1.0])
    return array, affine


def _three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without further axes of length 1."""
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or 0 in shape:
        several = "a series or several channels: save one volume of it" if len(shape) > 3 else "no volume"
        raise ValueError(f"{len(shape)} axes of {'x'.join(map(str, shape))}, {several}")
    return shape[:3]


def check_affine(affine: np.ndarray) -> None:
    """Raise a ValueError for what is no invertible map (4, 4) of finite numbers."""
    affine = np.asarray(affine, np.float64)
    fine = affine.shape == (4, 4) and np.isfinite(affine).all()
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if fine else np.zeros(3)
    if not (lengths > 1e-6).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise ValueError("an affine that maps no space")


def explain_unreadable(path: Path, error: BaseException) -> str:
    """What is wrong with a file that raised this error when it was read, in a few words."""
    if not path.exists():
        return "no such file"
    if path.is_file() and path.stat().st_size == 0:
        return "an empty file"
    if isinstance(error, EOFError) or "Expected" in str(error):
        return "truncated"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".").replace(str(path), "the file")


def _unreadable(path: Path, error: Exception) -> InlayError:
    return DamagedFile(f"{str(path)!r} cannot be read as a scan of three axes: {explain_unreadable(path, error)}.")
