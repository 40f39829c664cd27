"""NRRD and MetaImage files, read and written by SimpleITK, which counts mm to the left, posterior and superior."""

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import Unsupported

ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from left, posterior, superior, and back
MOST_HEADER = 2**20  # bytes of a MetaImage's header
ELEMENT_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4,
    "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip


def import_simpleitk() -> Any:
    """SimpleITK, or an InlayError that says how to get it."""
    try:
        import SimpleITK
    except ImportError:
        raise Unsupported(
            "NRRD, MetaImage and DICOM take SimpleITK, which is not installed; run: pip install 'inlay[formats]'"
        ) from None
    return SimpleITK


def read_itk_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z), or (X, Y, Z, C) of vectors and of a fourth axis, and affine (4, 4) to mm; no voxel is read.

    Raises:
        ValueError: A header that ITK does not read.
    """
    reader = _read_information(path)
    shape, components = tuple(map(int, reader.GetSize())), reader.GetNumberOfComponents()
    if components > 1:
        shape = (*shape, components)
    return shape, _affine_of(reader)


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels as `read_itk_header` describes them, of the file's own type, and the affine (4, 4) to mm.

    Raises:
        ValueError: A file that ITK does not read, or whose data is not what its header announces.
        EOFError: A truncated file.
        zlib.error: Compressed data that does not match its checksum, which ITK does not compare.
    """
    library = import_simpleitk()
    _read_information(path)
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(path)
    else:
        _check_nrrd(path)
    try:
        image = library.ReadImage(os.fspath(path))
    except RuntimeError as error:
        raise _translate(error, path) from error
    array = library.GetArrayFromImage(image)  # Z Y X, components last
    axes = image.GetDimension()
    return array.transpose(*reversed(range(axes)), *range(axes, array.ndim)), _affine_of(image)


def write_itk(
    path: Path, array: np.ndarray, affine: np.ndarray, fields: Mapping[str, str], like: Path | None = None
) -> None:
    """Save voxels (X, Y, Z) as NRRD or MetaImage, compressed.

    Args:
        path: Its suffix chooses the format.
        array: Of a type that ITK has.
        affine: (4, 4), to mm.
        fields: Written into the header, by name.
        like: A file whose origin, spacing and direction are taken to the last bit, instead of the affine.
    """
    library = import_simpleitk()
    array = array.astype(np.uint8) if array.dtype == bool else array
    image = library.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    if like is None:
        lps = TO_RAS @ np.asarray(affine, np.float64)
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    else:
        grid = _read_information(like)
        axes = grid.GetDimension()
        image.SetOrigin(grid.GetOrigin()[:3])
        image.SetSpacing(grid.GetSpacing()[:3])
        image.SetDirection(np.reshape(grid.GetDirection(), (axes, axes))[:3, :3].ravel().tolist())
    for name, value in fields.items():
        image.SetMetaData(name, value)
    library.WriteImage(image, os.fspath(path), useCompression=True)


def _read_information(path: Path) -> Any:
    """SimpleITK's reader of a file, with its header read."""
    reader = import_simpleitk().ImageFileReader()
    reader.SetFileName(os.fspath(path))
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _translate(error, path) from error
    return reader


def _affine_of(image: Any) -> np.ndarray:
    """The affine (4, 4) to mm (right, anterior, superior) of ITK's image or reader."""
    axes, affine = image.GetDimension(), np.eye(4)
    if axes >= 3:  # else it is no volume, and refused for that
        affine[:3, :3] = np.reshape(image.GetDirection(), (axes, axes))[:3, :3] * np.array(image.GetSpacing()[:3])
        affine[:3, 3] = image.GetOrigin()[:3]
    return TO_RAS @ affine


def _translate(error: RuntimeError, path: Path) -> Exception:
    """ITK's error in a few words: its own begin with a place in its source, and end with what was wrong."""
    text = str(error)
    if "got only" in text or "bytes but received" in text:
        return EOFError("truncated")
    if "Unable to determine ImageIO reader" in text:
        return ValueError(f"ITK finds no {path.suffix.lstrip('.').lower()} in it")
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return ValueError(said[-1].removeprefix("[nrrd] ").replace(os.fspath(path), "the file"))


def _check_metaimage(path: Path) -> None:
    """Compare the data of a MetaImage with its header: ITK reads on where compressed data is damaged or short."""
    fields, data, start = _read_metaimage_fields(path)
    try:
        count = math.prod(map(int, fields["DimSize"].split())) * int(fields.get("ElementNumberOfChannels", 1))
        expected = count * ELEMENT_BYTES[fields["ElementType"]]
    except KeyError as error:
        raise ValueError(f"a MetaImage header without a known {error.args[0]}") from error
    if fields.get("BinaryData", "True") != "True":
        return
    if fields.get("CompressedData", "False") != "True":
        if data.stat().st_size - start < expected:
            raise EOFError("truncated")
        return
    found = _count_inflated(data, start)
    if found != expected:
        raise ValueError(f"{'more' if found > expected else 'less'} data than its header announces")


def _check_nrrd(path: Path) -> None:
    """Compare the checksum of an NRRD file's compressed data; whether it is long enough, ITK says."""
    with path.open("rb") as file:
        header = file.read(MOST_HEADER)
    lines, place, data = [], 0, path
    while place < len(header):  # up to an empty line, or the end of a header whose data is elsewhere
        end = header.find(b"\n", place)
        end = len(header) if end < 0 else end
        line = header[place:end].decode("utf-8", "replace").strip()
        place = end + 1
        if not line:
            break
        lines.append(line)
    fields = {
        name.strip().lower(): value.strip() for name, sign, value in (line.partition(": ") for line in lines) if sign
    }
    if fields.get("encoding", "").lower() not in ("gzip", "gz"):
        return
    where = fields.get("data file") or fields.get("datafile")
    if where is not None:
        data, place = path.parent / where, 0
        if not data.is_file():
            raise ValueError(f"its data in {where!r}: save it as one .nrrd")
    _count_inflated(data, place)


def _count_inflated(data: Path, start: int) -> int:
    """Length of the compressed data that begins at a byte of a file, with its checksum compared."""
    inflate, found = zlib.decompressobj(wbits=47), 0  # 32 + 15: zlib or gzip
    with data.open("rb") as file:
        file.seek(start)
        while not inflate.eof:
            chunk = inflate.unconsumed_tail or file.read(2**20)
            if not chunk:
                raise EOFError("truncated")
            found += len(inflate.decompress(chunk, 2**22))
    return found


def _read_metaimage_fields(path: Path) -> tuple[dict[str, str], Path, int]:
    """The fields of a MetaImage's header, the file with its data, and where that begins there."""
    with path.open("rb") as file:
        header = file.read(MOST_HEADER)
    fields, place = {}, 0
    while "ElementDataFile" not in fields:
        end = header.find(b"\n", place)
        line = header[place : len(header) if end < 0 else end].decode("utf-8", "replace")
        name, equals, value = line.partition("=")
        if equals:
            fields[name.strip()] = value.strip()
        if end < 0:
            break
        place = end + 1
    where = fields.get("ElementDataFile")
    if where is None:
        raise ValueError("a MetaImage header without its end, ElementDataFile")
    if where == "LOCAL":
        return fields, path, place
    if where.startswith("LIST") or "%" in where:
        raise ValueError("a MetaImage of several files: save it as one .mha")
    data = path.parent / where
    if not data.is_file():
        raise ValueError(f"its data file {where!r} is missing")
    start = int(fields.get("HeaderSize", 0))
    return fields, data, max(start, 0)
