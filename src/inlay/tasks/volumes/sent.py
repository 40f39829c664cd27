"""Scans that anyone sends, as bytes: NIfTI, NRRD, MetaImage and MGH, told apart by how they begin.

Their headers are read here, and their voxels are inflated up to what the header announces. ITK reads from files only,
and its parsers are not made for data from anyone, so none of it runs here. What is not NIfTI becomes NIfTI.
"""

import gzip
import io
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inlay.errors import BadInput, InlayError
from inlay.tasks.volumes.file_checks import check_affine, four_axes, name_unreadable
from inlay.tasks.volumes.itk import MOST_HEADER, TO_RAS
from inlay.tasks.volumes.nifti import (
    GZIP,
    MOST_MORE,
    affine_of_header,
    import_nibabel,
    inflate_nifti,
    read_nifti_header,
)

NRRD, MGH_VERSION = b"NRRD000", (1).to_bytes(4, "big")  # how such files begin
METAIMAGE = (b"ObjectType", b"NDims", b"Comment")
MGH_VOXELS = 284  # byte at which the voxels of an MGH file begin
NRRD_TYPES = {
    "int8": "i1", "signed char": "i1", "int8_t": "i1", "uint8": "u1", "uchar": "u1", "unsigned char": "u1",
    "uint8_t": "u1", "int16": "i2", "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2",
    "int16_t": "i2", "uint16": "u2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2",
    "uint16_t": "u2", "int32": "i4", "int": "i4", "signed int": "i4", "int32_t": "i4", "uint32": "u4", "uint": "u4",
    "unsigned int": "u4", "uint32_t": "u4", "int64": "i8", "longlong": "i8", "long long": "i8", "long long int": "i8",
    "signed long long": "i8", "signed long long int": "i8", "int64_t": "i8", "uint64": "u8", "ulonglong": "u8",
    "unsigned long long": "u8", "unsigned long long int": "u8", "uint64_t": "u8", "float": "f4", "double": "f8",
}  # fmt: skip
NRRD_SPACES = {  # turns its axes to left, posterior, superior
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1), "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1), "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
}  # fmt: skip
METAIMAGE_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip


class SentHeader(NamedTuple):
    """What a scan's file announces.

    Attributes:
        shape: (X, Y, Z), or (X, Y, Z, C) of several channels.
        affine: (4, 4), voxel index to mm (right, anterior, superior).
    """

    shape: tuple[int, ...]
    affine: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """Where and how the voxels of an NRRD, MetaImage or MGH file lie in it.

    Attributes:
        sizes: Of all axes as they are stored, the fastest first.
        channels: Which of these is that of channels; None: each voxel has one number.
        dtype: Of a number, with its byte order.
        affine: (4, 4) to mm.
        start: Byte of the file at which the voxels begin.
        packed: The voxels are compressed, in the form of gzip or zlib.
        whole: The whole file is compressed, and `start` counts in what it holds.
    """

    sizes: tuple[int, ...]
    channels: int | None
    dtype: np.dtype[Any]
    affine: np.ndarray
    start: int
    packed: bool = False
    whole: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [size for axis, size in enumerate(self.sizes) if axis != self.channels]
        return tuple(sizes if self.channels is None else [*sizes, self.sizes[self.channels]])


def read_sent_header(data: bytes, most_voxels: int) -> SentHeader:
    """Shape and affine of a scan's file from anyone, of which only the first bytes are inflated.

    Raises:
        InlayError: No scan, more voxels than that, or an affine that maps no space.
    """
    layout = _read_layout(data, most_voxels)
    if layout is None:
        header = read_nifti_header(data, most_voxels)
        return SentHeader(header.get_data_shape(), affine_of_header(header))
    return SentHeader(layout.shape, layout.affine)


def inflate_sent(data: bytes, most_voxels: int) -> bytes:
    """A scan's file from anyone as NIfTI without compression: no more than its header announces.

    Raises:
        InlayError: As `read_sent_header`; more or less data than the header announces; damaged.
    """
    layout = _read_layout(data, most_voxels)
    if layout is None:
        return inflate_nifti(data, most_voxels)
    try:
        voxels = _read_voxels(data, layout)
        nibabel = import_nibabel()
        image = nibabel.Nifti1Image(voxels, layout.affine, dtype=voxels.dtype)
        image.header.set_xyzt_units("mm")
        converted: bytes = image.to_bytes()
    except InlayError:
        raise
    except Exception as error:  # zlib and nibabel raise what they please for broken data
        raise name_unreadable(data, error) from error
    return converted


def _read_layout(data: bytes, most_voxels: int) -> _Layout | None:
    """Of a file that is NRRD, MetaImage or MGH; None: of any other, which may be NIfTI."""
    try:
        if data.startswith(NRRD):
            layout = _read_nrrd(data)
        elif data[:64].lstrip().startswith(METAIMAGE):
            layout = _read_metaimage(data)
        elif _first_bytes(data, len(MGH_VERSION)) == MGH_VERSION:
            layout = _read_mgh(data)
        else:
            return None
        shape = four_axes(layout.shape)
        check_affine(layout.affine)
    except InlayError:
        raise
    except KeyError as error:
        raise name_unreadable(data, ValueError(f"a header without {error.args[0]}")) from error
    except Exception as error:  # numbers that are none
        raise name_unreadable(data, error) from error
    if math.prod(shape) > most_voxels:
        size = " x ".join(map(str, shape[:3] if shape[3] == 1 else shape))
        raise BadInput(f"the scan has {size} voxels; the limit is {most_voxels:,} in all.")
    return layout


def _first_bytes(data: bytes, count: int) -> bytes:
    """The first bytes of a file, without its compression if it has one."""
    if not data.startswith(GZIP):
        return data[:count]
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read(count)
    except (OSError, EOFError, zlib.error):
        return b""  # what reads it as NIfTI says what is wrong


def _read_mgh(data: bytes) -> _Layout:
    """Source: FreeSurfer's description of MGH, as nibabel reads it."""
    header = import_nibabel().MGHImage.header_class.from_fileobj(io.BytesIO(_first_bytes(data, MGH_VOXELS)))
    shape = tuple(map(int, header.get_data_shape()))
    sizes = shape if len(shape) == 4 and shape[3] > 1 else shape[:3]
    affine = np.array(header.get_affine(), np.float64)
    channels = 3 if len(sizes) == 4 else None
    return _Layout(sizes, channels, header.get_data_dtype(), affine, MGH_VOXELS, whole=data.startswith(GZIP))


def _read_nrrd(data: bytes) -> _Layout:
    """Source: https://teem.sourceforge.net/nrrd/format.html; spaces as ITK reads them."""
    lines, start = _read_lines(data)
    pairs = (line.partition(":") for line in lines[1:] if not line.startswith("#") and ":=" not in line)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if "data file" in fields or "datafile" in fields:
        raise ValueError("an NRRD header without its data: save it as one .nrrd")
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"data in the encoding {encoding[:20]!r}: save it as raw or gzip")
    if any(int(fields.get(skip, "0")) for skip in ("line skip", "lineskip", "byte skip", "byteskip")):
        raise ValueError("data that begins with bytes to be skipped")
    if fields["type"].lower() not in NRRD_TYPES:
        raise ValueError(f"voxels of type {fields['type'][:20]}")
    dtype = np.dtype(NRRD_TYPES[fields["type"].lower()])
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder("big" if fields["endian"].lower() == "big" else "little")
    sizes = tuple(map(int, fields["sizes"].split()))
    if len(sizes) != int(fields["dimension"]):
        raise ValueError(f"a dimension of {fields['dimension'][:20]} and {len(sizes)} sizes")
    if "space directions" not in fields:
        raise ValueError("an NRRD without space directions, so that nobody knows where it lies: save it with them")
    directions = [
        None if vector == "none" else np.array([float(part) for part in vector.strip("()").split(",")])
        for vector in re.findall(r"\([^()]*\)|none", fields["space directions"].lower())
    ]
    others = [axis for axis, direction in enumerate(directions) if direction is None]
    if len(directions) != len(sizes) or len(others) > 1 or len(directions) - len(others) != 3:
        raise ValueError(f"{len(sizes)} axes, {len(directions) - len(others)} of them in space, no volume")
    origin = [float(part) for part in fields.get("space origin", "(0,0,0)").strip("() ").split(",")]
    lps = np.eye(4)
    lps[:3, :3] = np.stack([direction for direction in directions if direction is not None], axis=1)
    lps[:3, 3] = origin
    turned = np.diag([*NRRD_SPACES.get(fields.get("space", "").lower(), (1, 1, 1)), 1]) @ lps
    return _Layout(sizes, others[0] if others else None, dtype, TO_RAS @ turned, start, packed=encoding != "raw")


def _read_metaimage(data: bytes) -> _Layout:
    """Source: https://itk.org/Wiki/ITK/MetaIO/Documentation; positions as ITK reads them."""
    lines, start = _read_lines(data, last="ElementDataFile")
    fields = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    if fields.get("ElementDataFile") != "LOCAL":
        raise ValueError("a MetaImage header without its data: save it as one .mha")
    if fields.get("BinaryData", "True").lower() != "true":
        raise ValueError("voxels that are written as text")
    if fields["ElementType"] not in METAIMAGE_TYPES:
        raise ValueError(f"voxels of type {fields['ElementType'][:20]}")
    msb = _first_of(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB", default="False")
    dtype = np.dtype(METAIMAGE_TYPES[fields["ElementType"]]).newbyteorder("big" if msb.lower() == "true" else "little")
    sizes = tuple(map(int, fields["DimSize"].split()))
    axes, components = len(sizes), int(fields.get("ElementNumberOfChannels", 1))
    if axes != int(fields["NDims"]) or axes not in (3, 4):
        raise ValueError(f"{axes} axes, no volume")
    identity = " ".join(f"{number:g}" for number in np.eye(axes).ravel())
    matrix = _numbers(_first_of(fields, "TransformMatrix", "Rotation", "Orientation", default=identity), axes**2)
    offset = _numbers(_first_of(fields, "Offset", "Position", "Origin", default="0 " * axes), axes)
    spacing = _numbers(_first_of(fields, "ElementSpacing", "ElementSize", default="1 " * axes), axes)
    lps = np.eye(4)
    lps[:3, :3] = matrix.reshape(axes, axes)[:3, :3].T * spacing[:3]  # a row of the matrix is the way of an axis
    lps[:3, 3] = offset[:3]
    packed = fields.get("CompressedData", "False").lower() == "true"
    if axes == 4:
        if components > 1:
            raise ValueError("four axes of several channels, a series")
        return _Layout(sizes, 3, dtype, TO_RAS @ lps, start, packed)
    if components > 1:
        return _Layout((components, *sizes), 0, dtype, TO_RAS @ lps, start, packed)
    return _Layout(sizes, None, dtype, TO_RAS @ lps, start, packed)


def _read_lines(data: bytes, last: str = "") -> tuple[list[str], int]:
    """The lines of a header up to an empty one, or to the one that begins with `last`, and the byte behind it."""
    lines: list[str] = []
    place = 0
    while (end := data.find(b"\n", place, MOST_HEADER)) >= 0:
        line = data[place:end].decode("utf-8", "replace").rstrip("\r")
        place = end + 1
        if not last and not line:
            return lines, place
        lines.append(line)
        if last and line.startswith(last):
            return lines, place
    raise EOFError  # a header without its end


def _first_of(fields: Mapping[str, str], *names: str, default: str) -> str:
    """The value of the first of several fields that mean the same."""
    return next((fields[name] for name in names if name in fields), default)


def _numbers(text: str, count: int) -> np.ndarray:
    numbers = np.array([float(part) for part in text.split()])
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers where {count} belong")
    return numbers


def _read_voxels(data: bytes, layout: _Layout) -> np.ndarray:
    """The voxels (X, Y, Z), or (X, Y, Z, C), in the byte order of this machine."""
    expected = math.prod(layout.sizes) * layout.dtype.itemsize
    if layout.whole:
        content = _inflate(data, layout.start + expected + MOST_MORE)[layout.start :]
    elif layout.packed:
        content = _inflate(data[layout.start :], expected)
    else:
        content = data[layout.start :]
    if len(content) < expected:
        raise EOFError
    stored = np.frombuffer(content, layout.dtype, math.prod(layout.sizes)).reshape(layout.sizes, order="F")
    voxels = stored if layout.channels is None else np.moveaxis(stored, layout.channels, -1)
    return voxels.astype(layout.dtype.newbyteorder("="), copy=False)


def _inflate(data: bytes, most: int) -> bytes:
    """What a gzip or zlib stream holds, its checksum compared: at most so many bytes."""
    stream = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib
    content = stream.decompress(data, most + 1)
    if len(content) > most:
        raise ValueError("more data than its header announces")
    if not stream.eof:
        raise EOFError
    return content
