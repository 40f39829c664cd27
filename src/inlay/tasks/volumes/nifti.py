"""Files of scans of every format: read whole, checked, with errors that name the file; NIfTI itself, .npz and MGH."""

import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.files.atomic import replacing
from inlay.tasks.volumes.dicom import is_dicom, read_dicom, read_dicom_header
from inlay.tasks.volumes.itk import read_itk, read_itk_header, write_itk

NIFTI = (".nii.gz", ".nii")
ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")  # read by SimpleITK
MGH = (".mgz", ".mgh")
SUFFIXES = (*NIFTI, ".npz", *ITK, *MGH)
READ = f"{', '.join(SUFFIXES)} or a folder of DICOM slices"
WRITTEN = (*NIFTI, ".nrrd", ".seg.nrrd", ".mha", *MGH)
GZIP = b"\x1f\x8b"  # how a gzip file begins, whatever it is called
NIFTI2 = (540).to_bytes(4, "little"), (540).to_bytes(4, "big")  # how a NIfTI-2 header begins
MM = {"meter": 1000.0, "micron": 0.001}  # length of a unit in mm; mm itself and an unknown unit count as mm
MOST_MORE = 2**20  # bytes of a header with its extensions, and of what stands behind the voxels
APART = 0.1  # of a voxel: what qform and sform, or image and label map, may differ by


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
            array, affine = _read_nifti(path, key, channels)
        elif has_suffix(path, (".npz",)):
            array, affine = _read_npz(path, key)
        elif has_suffix(path, ITK):
            (_four_axes if channels else _three_axes)(read_itk_header(path)[0])
            array, affine = read_itk(path)
        elif has_suffix(path, MGH):
            array, affine = _read_mgh(path, channels)
        elif is_dicom(path):
            array, affine = read_dicom(path)
        else:
            raise _unknown(path)
        if channels:
            array = np.moveaxis(array.reshape(_four_axes(array.shape)), -1, 0)
        else:
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
            with _open_mgh(path) as (image, _):
                shape, affine = tuple(map(int, image.shape)), np.array(image.affine, np.float64)
        elif is_dicom(path):
            shape, affine = read_dicom_header(path)
        else:
            raise _unknown(path)
        shape = _four_axes(shape)
        shape = shape[:3] if shape[3] == 1 else shape
        check_affine(affine)
    except InlayError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return shape, affine


def find_affine_conflict(source: Path | bytes) -> str | None:
    """What to say of a NIfTI file whose qform and sform both hold and place a corner elsewhere; None for all others.

    nibabel, and so inlay, then takes the sform; other programs may take the qform, and show left and right swapped.

    Raises:
        InlayError: As `read_header`.
    """
    if isinstance(source, Path) and not has_suffix(source, NIFTI):
        return None
    try:
        with open_nifti(source) as (image, _):
            header, shape = image.header, _four_axes(image.shape)[:3]
            if not (header["qform_code"] and header["sform_code"]):  # a code of 0: it does not hold
                return None
            scale, sform = unit_mm(header), header.get_sform()
    except InlayError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error
    try:
        apart = corner_distance(header.get_qform(), sform, shape)
    except ValueError:  # nibabel's, of four numbers that are no quaternion
        return "its qform is no rotation; inlay takes the sform, other programs may fail"
    if apart <= APART * np.linalg.norm(sform[:3, :3], axis=0).min():
        return None
    return (
        f"its sform and its qform place a corner {apart * scale:.3g} mm apart; inlay takes the sform, other programs "
        "may take the qform"
    )


def corner_distance(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """The farthest that two affines (4, 4) place a corner voxel of a grid apart, in their unit."""
    ends = np.array(np.meshgrid(*([0, n - 1] for n in shape))).reshape(3, -1)
    difference = np.asarray(first, np.float64) - second
    return float(np.linalg.norm(difference[:3, :3] @ ends + difference[:3, 3:], axis=0).max())


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


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends with one of these, in letters of any size (SCAN.NII.GZ)."""
    return path.name.lower().endswith(tuple(suffixes))


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


def import_nibabel() -> Any:
    """nibabel, or an InlayError that says how to get it."""
    try:
        import nibabel
    except ImportError:
        raise Unsupported(
            "reading scans takes nibabel, which is not installed; run: pip install 'inlay[volumes]'"
        ) from None
    return nibabel


@contextmanager
def open_nifti(source: Path | bytes) -> Iterator[tuple[Any, BinaryIO]]:
    """A NIfTI file, or its bytes, as nibabel's image, and the open stream that its voxels are read from.

    Whether it is compressed, and whether NIfTI-1 or 2, is read from its first bytes and not from its name.
    """
    nibabel = import_nibabel()
    with _inflating(source) as stream:
        kind = nibabel.Nifti2Image if stream.read(4) in NIFTI2 else nibabel.Nifti1Image
        stream.seek(0)
        yield kind.from_stream(stream), stream


@contextmanager
def _open_mgh(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
    """A file of FreeSurfer's, as nibabel's image, and the open stream that its voxels are read from."""
    with _inflating(path) as stream:
        yield import_nibabel().MGHImage.from_stream(stream), stream


@contextmanager
def _inflating(source: Path | bytes) -> Iterator[BinaryIO]:
    """The open content of a file, or of its bytes, without its compression, if it has one."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        yield stream


def inflate_nifti(data: bytes, most_voxels: int) -> bytes:
    """The bytes of a NIfTI file from anyone without their compression: no more than its header announces.

    Raises:
        InlayError: More voxels than that, or more data than they take; truncated, damaged, or no NIfTI.
    """
    try:
        header = read_nifti_header(data, most_voxels)
        if not data.startswith(GZIP):
            return data
        end = header["vox_offset"] + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        return _inflate(data, int(end) + MOST_MORE)
    except InlayError:
        raise
    except Exception as error:  # nibabel and zlib raise what they please for a broken file
        raise _unreadable(data, error) from error


def read_nifti_header(data: bytes, most_voxels: int) -> Any:
    """nibabel's header of a NIfTI file from anyone, of which only the first bytes are inflated.

    Raises:
        InlayError: No NIfTI, or one that announces more voxels than that.
    """
    nibabel = import_nibabel()
    try:
        stream: Any = gzip.GzipFile(fileobj=io.BytesIO(data)) if data.startswith(GZIP) else io.BytesIO(data)
        first = stream.read(540)
        kind = nibabel.Nifti2Header if first[:4] in NIFTI2 else nibabel.Nifti1Header
        header = kind.from_fileobj(io.BytesIO(first))
        shape = _four_axes(header.get_data_shape())
        if not 0 <= header["vox_offset"] <= MOST_MORE:
            raise ValueError(f"voxels that begin at byte {float(header['vox_offset']):.0f}")
    except Exception as error:  # nibabel and zlib raise what they please for a broken file
        raise _unreadable(data, error) from error
    if math.prod(shape) > most_voxels:
        size = " x ".join(map(str, shape[:3] if shape[3] == 1 else shape))
        raise BadInput(f"the scan has {size} voxels; the limit is {most_voxels:,} in all.")
    return header


def _inflate(data: bytes, most: int) -> bytes:
    """All members of a gzip file, checksums compared, of at most so many bytes in all."""
    parts, size = [], 0
    while data:
        member = zlib.decompressobj(wbits=31)
        parts.append(member.decompress(data, most - size + 1))
        size += len(parts[-1])
        if size > most:
            raise ValueError("more data than its header announces")
        if not member.eof:
            raise EOFError
        data = member.unused_data.lstrip(b"\0")  # zeros fill the blocks of a tape
    return b"".join(parts)


def unit_mm(header: Any) -> float:
    """Length in mm of the unit that a NIfTI header says its affines are in."""
    return MM.get(header.get_xyzt_units()[0], 1.0)


def affine_mm(image: Any) -> np.ndarray:
    """The affine (4, 4) of nibabel's image, from a voxel's index to mm; nibabel leaves it in the file's unit."""
    affine = np.array(image.affine, np.float64)
    affine[:3] *= unit_mm(image.header)
    return affine


def affine_of_header(header: Any) -> np.ndarray:
    """The affine (4, 4) of nibabel's header from anyone, from a voxel's index to mm.

    Raises:
        InlayError: It maps no space.
    """
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        affine[:3] *= unit_mm(header)
        check_affine(affine)
    except Exception as error:  # nibabel raises what it pleases for a broken header
        raise DamagedFile(f"the affine of the scan cannot be read: {error}.") from error
    return affine


def _read_nifti(source: Path | bytes, key: str, channels: bool) -> tuple[np.ndarray, np.ndarray]:
    with open_nifti(source) as (image, stream):
        if image.get_data_dtype().kind not in "buif":
            raise ValueError(f"voxels of type {image.get_data_dtype()}")
        (_four_axes if channels else _three_axes)(image.shape)  # before all of a long series is read
        if key == "image":
            voxels = image.get_fdata(caching="unchanged", dtype=np.float32)
        else:
            voxels = _round_scaled(np.asarray(image.dataobj), image.dataobj.slope)
        _read_to_end(stream)
        return voxels, affine_mm(image)


def _read_mgh(path: Path, channels: bool) -> tuple[np.ndarray, np.ndarray]:
    with _open_mgh(path) as (image, stream):
        (_four_axes if channels else _three_axes)(tuple(map(int, image.shape)))
        voxels = np.asarray(image.dataobj)
        _read_to_end(stream)
        return voxels, np.array(image.affine, np.float64)


def _read_to_end(stream: BinaryIO) -> None:
    """Compare the checksum of a compressed stream, which is behind its last byte."""
    if isinstance(stream, gzip.GzipFile):
        while stream.read(2**20):
            pass


def _round_scaled(labels: np.ndarray, slope: float) -> np.ndarray:
    """Labels that were stored as integers times `slope`, rounded, if all are whole but for half a step of that.

    Whole numbers are never less than 1 apart: where half a step is a quarter or more, nothing is rounded.
    """
    step = abs(float(slope)) / 2
    if labels.dtype.kind != "f" or step >= 0.25:
        return labels
    whole = np.rint(labels)
    return whole if np.abs(labels - whole).max(initial=0) <= step * 1.001 else labels


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


def _three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without further axes of length 1."""
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        several = "a series or several channels: save one volume of it" if len(shape) > 3 else "no volume"
        raise ValueError(f"{len(shape)} axes of {'x'.join(map(str, shape))}, {several}")
    return shape[:3]


def _four_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
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


def _unknown(path: Path) -> InlayError:
    """The error for a path that has no scan's name, and is no DICOM."""
    if path.is_dir():
        return BadInput(f"'{path}' is a folder without DICOM slices directly in it; give a scan, or such a folder.")
    return BadInput(f"'{path}' is no scan in {READ}; convert it.")


def _unreadable(source: Path | bytes, error: Exception) -> InlayError:
    name = repr(str(source)) if isinstance(source, Path) else "the file given"
    return DamagedFile(f"{name} cannot be read as a scan of three axes: {explain_unreadable(source, error)}.")
