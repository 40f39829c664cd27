"""NIfTI files, and FreeSurfer's MGH, read by nibabel: whole, or only their headers, and from anyone."""

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.tasks.volumes.file_checks import (
    APART,
    check_affine,
    corner_distance,
    four_axes,
    has_suffix,
    name_unreadable,
    three_axes,
)

NIFTI = (".nii.gz", ".nii")
MGH = (".mgz", ".mgh")
GZIP = b"\x1f\x8b"  # how a gzip file begins, whatever it is called
NIFTI1 = (348).to_bytes(4, "little"), (348).to_bytes(4, "big")  # how a NIfTI-1 header begins
NIFTI2 = (540).to_bytes(4, "little"), (540).to_bytes(4, "big")  # how a NIfTI-2 header begins
MM = {"meter": 1000.0, "micron": 0.001}  # length of a unit in mm; mm itself and an unknown unit count as mm
MOST_MORE = 2**20  # bytes of a header with its extensions, and of what stands behind the voxels


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
        first = stream.read(4)
        kind = nibabel.Nifti2Image if first in NIFTI2 else nibabel.Nifti1Image
        stream.seek(0)
        try:
            image = kind.from_stream(stream)
        except Exception as error:  # nibabel's own words tell of a binary block, of a code or of a dimension
            raise _name_other_file(first, isinstance(stream, gzip.GzipFile)) or error from error
        yield image, stream


def _name_other_file(first: bytes, packed: bool) -> ValueError | None:
    """What to say of a file that could not be read and does not begin as NIfTI does; None: it does so."""
    if any(start.startswith(first) for start in (*NIFTI1, *NIFTI2)):
        return None
    return ValueError("what its gzip holds is no NIfTI" if packed else "it is neither NIfTI nor gzip")


@contextmanager
def open_mgh(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
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


def read_nifti(source: Path | bytes, key: str, channels: bool) -> tuple[np.ndarray, np.ndarray]:
    """All voxels (X, Y, Z), or with `channels` (X, Y, Z, C), and the affine (4, 4) to mm; `key` as in `read_volume`."""
    with open_nifti(source) as (image, stream):
        if image.get_data_dtype().kind not in "buif":
            raise ValueError(f"voxels of type {image.get_data_dtype()}")
        (four_axes if channels else three_axes)(image.shape)  # before all of a long series is read
        if key == "image":
            voxels = image.get_fdata(caching="unchanged", dtype=np.float32)
        else:
            voxels = _round_scaled(np.asarray(image.dataobj), image.dataobj.slope)
        _read_to_end(stream)
        return voxels, affine_mm(image)


def read_mgh(path: Path, channels: bool) -> tuple[np.ndarray, np.ndarray]:
    """All voxels of a file of FreeSurfer's, (X, Y, Z) or with `channels` (X, Y, Z, C), and its affine (4, 4) to mm."""
    with open_mgh(path) as (image, stream):
        (four_axes if channels else three_axes)(tuple(map(int, image.shape)))
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
            header, shape = image.header, four_axes(image.shape)[:3]
            if not (header["qform_code"] and header["sform_code"]):  # a code of 0: it does not hold
                return None
            scale, sform = unit_mm(header), header.get_sform()
    except InlayError:
        raise
    except Exception as error:
        raise name_unreadable(source, error) from error
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
        raise name_unreadable(data, error) from error


def read_nifti_header(data: bytes, most_voxels: int) -> Any:
    """nibabel's header of a NIfTI file from anyone, of which only the first bytes are inflated.

    Raises:
        InlayError: No NIfTI, or one that announces more voxels than that.
    """
    nibabel, first = import_nibabel(), b""
    try:
        stream: Any = gzip.GzipFile(fileobj=io.BytesIO(data)) if data.startswith(GZIP) else io.BytesIO(data)
        first = stream.read(540)
        kind = nibabel.Nifti2Header if first[:4] in NIFTI2 else nibabel.Nifti1Header
        header = kind.from_fileobj(io.BytesIO(first))
        shape = four_axes(header.get_data_shape())
        if not 0 <= header["vox_offset"] <= MOST_MORE:
            raise ValueError(f"voxels that begin at byte {float(header['vox_offset']):.0f}")
    except Exception as error:  # nibabel and zlib raise what they please for a broken file
        raise name_unreadable(data, _name_other_file(first[:4], data.startswith(GZIP)) or error) from error
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
