"""Files of scans of every format: read whole, checked, with errors that name the file; and written."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import BadInput, InlayError
from inlay.files.atomic import replacing
from inlay.tasks.volumes.dicom import is_dicom, read_dicom, read_dicom_header
from inlay.tasks.volumes.file_checks import check_affine, four_axes, has_suffix, name_unreadable, three_axes
from inlay.tasks.volumes.itk import ITK, read_itk, read_itk_header, write_itk
from inlay.tasks.volumes.nifti import (
    MGH,
    NIFTI,
    affine_mm,
    import_nibabel,
    open_mgh,
    open_nifti,
    read_mgh,
    read_nifti,
)

SUFFIXES = (*NIFTI, ".npz", *ITK, *MGH)
READ = f"{', '.join(SUFFIXES)} or a folder of DICOM slices"
WRITTEN = (*NIFTI, ".nrrd", ".seg.nrrd", ".mha", *MGH)


def read_volume(
    source: str | os.PathLike[str] | bytes, key: str = "image", *, channels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """All voxels of a scan or of a label map, as its file orders them.

    A NIfTI or MGH file may be compressed or not, whatever its name says. A compressed one is read to its end, so that
    its checksum is compared. Positions in NRRD, MetaImage and DICOM are those of ITK.

    Args:
        source: A .nii or .nii.gz file, or the bytes of one; .nrrd, .nhdr, .mha, .mhd, .mgz or .mgh; a folder with the
            slices of a DICOM series, or one of its files; or .npz with arrays `image`, `label` and, if there are any,
            `affine` (4 x 4, voxel index to mm) or `spacing` (x, y, z in mm; 1 where there is neither). Further axes of
            length 1 are dropped.
        channels: Take an image of several channels too. A NIfTI file has them along its fourth axis, as the
            Decathlon's, or its fifth; NRRD and MetaImage as vectors, MGH as frames. In .npz they are the
            first or the last of four axes: the one that its `label` has not, else the shorter one.
        key: `image` reads float32, `label` the numbers as they are, but for whole ones that the file's scaling has
            rounded (nibabel stores 1.0 as 1.0000153 when it scales to 16 bits).

    Returns:
        Voxels (X, Y, Z), or with `channels` (C, X, Y, Z), and the affine (4, 4) that takes a voxel's index to mm
        (right, anterior, superior), whatever unit the file is in.

    Raises:
        InlayError: No such file, truncated, damaged or of another kind, not three axes or four, an affine that maps no
            space, voxels that are no real numbers, NaN or infinite ones in an image; a DICOM series that is no volume;
            a library that is not installed.
    """
    path = source if isinstance(source, bytes) else Path(source)
    try:
        if isinstance(path, bytes) or has_suffix(path, NIFTI):
            array, affine = read_nifti(path, key, channels)
        elif has_suffix(path, (".npz",)):
            array, affine = _read_npz(path, key)
        elif has_suffix(path, ITK):
            (four_axes if channels else three_axes)(read_itk_header(path)[0])
            array, affine = read_itk(path)
        elif has_suffix(path, MGH):
            array, affine = read_mgh(path, channels)
        elif is_dicom(path):
            array, affine = read_dicom(path)
        else:
            raise _unknown(path)
        if channels:
            array = np.moveaxis(array.reshape(four_axes(array.shape)), -1, 0)
        else:
            array = array.reshape(three_axes(array.shape))
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
        raise name_unreadable(path, error) from error
    return array, affine


def read_header(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (4, 4) of an image; no voxel is read, but of .npz.

    Returns:
        (X, Y, Z), or (X, Y, Z, C) where it has several channels; and the affine, voxel index to mm.

    Raises:
        InlayError: As for `read_volume`, but for what only the voxels tell.
    """
    path = Path(path)
    if has_suffix(path, (".npz",)):
        array, affine = read_volume(path, channels=True)
        return array.shape[1:] if len(array) == 1 else (*array.shape[1:], len(array)), affine
    try:
        if has_suffix(path, NIFTI):
            with open_nifti(path) as (image, _):
                shape, affine = tuple(image.shape), affine_mm(image)
        elif has_suffix(path, ITK):
            shape, affine = read_itk_header(path)
        elif has_suffix(path, MGH):
            with open_mgh(path) as (image, _):
                shape, affine = tuple(map(int, image.shape)), np.array(image.affine, np.float64)
        elif is_dicom(path):
            shape, affine = read_dicom_header(path)
        else:
            raise _unknown(path)
        shape = four_axes(shape)
        shape = shape[:3] if shape[3] == 1 else shape
        check_affine(affine)
    except InlayError:
        raise
    except Exception as error:
        raise name_unreadable(path, error) from error
    return shape, affine


def write_volume(path: str | os.PathLike[str], array: np.ndarray, affine: np.ndarray) -> None:
    """Save voxels (X, Y, Z) in the format of the suffix, under a temporary name first; whole numbers in 8 to 32 bits.

    Raises:
        InlayError: Another suffix, a folder that does not exist, labels that do not fit 32 bits.
    """
    path = Path(path)
    if not has_suffix(path, WRITTEN) or not path.parent.is_dir():
        raise BadInput(f"'{path}' must end with {' or '.join(WRITTEN)}, in a folder that exists.")
    array = np.asarray(array)
    if array.dtype.kind in "bui" and array.dtype not in (np.uint8, np.int16, np.int32):
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        array = array.astype(label_dtype(low, high))
    with replacing(path) as temporary:
        if has_suffix(path, ITK):
            write_itk(temporary, array, affine, {})
            return
        nibabel = import_nibabel()
        if has_suffix(path, MGH):
            image = nibabel.MGHImage(array.astype(np.uint8) if array.dtype == bool else array, affine)
        else:
            image = nibabel.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm")
        image.to_filename(temporary)


def label_dtype(low: int, high: int) -> type[np.integer[Any]]:
    """The smallest of uint8, int16 and int32 that holds the labels `low` to `high`: all programs read these.

    Raises:
        InlayError: Labels that need more than 32 bits.
    """
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise BadInput(f"labels go from {low} to {high}, and a mask holds 32 bits; number them from 1.")


def case_name(path: Path) -> str:
    """Name of a scan's file without its suffix."""
    return path.name.removesuffix(suffix_of(path))


def suffix_of(path: Path) -> str:
    """The suffix of a scan's file as it is written, .nii.gz as a whole; "" for no scan, and for a folder of slices."""
    suffix = next((s for s in (*SUFFIXES, ".dcm") if has_suffix(path, (s,)) and not path.is_dir()), "")
    return path.name[len(path.name) - len(suffix) :]


def is_scan(path: Path) -> bool:
    """Whether a path is a file whose name is a scan's, or a folder that holds the slices of a DICOM series."""
    return is_dicom(path) if path.is_dir() else has_suffix(path, SUFFIXES)


def _read_npz(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
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
        if key == "image" and array.ndim == 4:
            array = _put_channels_last(array, file["label"].shape if "label" in file else None)
    return array, affine


def _put_channels_last(array: np.ndarray, label: tuple[int, ...] | None) -> np.ndarray:
    """Voxels (C, X, Y, Z) or (X, Y, Z, C) as (X, Y, Z, C); `label` is the shape of the label map, if there is one."""
    first, last = array.shape[1:] == label, array.shape[:3] == label
    if first == last:
        first, last = array.shape[0] < array.shape[3], array.shape[3] < array.shape[0]
    if first == last:
        size = "x".join(map(str, array.shape))
        raise ValueError(f"an image of {size}, whose first axis is as long as its last: which one is that of channels")
    return np.moveaxis(array, 0, -1) if first else array


def _unknown(path: Path) -> InlayError:
    """The error for a path that has no scan's name, and is no DICOM."""
    if path.is_dir():
        return BadInput(f"'{path}' is a folder without DICOM slices directly in it; give a scan, or such a folder.")
    return BadInput(f"'{path}' is no scan in {READ}; convert it.")
