"""DICOM series: the slices in a folder, ordered by where they lie, as one volume.

Geometry: DICOM PS3.3, C.7.6.2.1.1 (image position and orientation), and for files of many frames C.7.6.16.2. Only the
tags that are listed here are read; no name of a patient is among them.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.itk import TO_RAS, import_simpleitk

EVEN = 0.25  # of a voxel: what a slice may be off from an even stack by
ALIKE = 1e-3  # what directions, and the ratio of spacings, of slices of one stack may differ by
TAGS = (
    "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "Rows", "Columns",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
NO_SCANS = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "RTIMAGE")  # modalities


@dataclass(frozen=True)
class Plane:
    """One slice: a file, or a frame of one.

    Attributes:
        file: Where it is.
        frame: Its number in the file, from 0.
        identity: Its own identifier.
        series: Identifier of the series.
        title: Description and modality of the series.
        shape: Columns and rows.
        position: Of its first voxel, in mm (left, posterior, superior); None: the file does not say.
        axes: Directions (2, 3) along which columns and rows are counted.
        spacing: Between columns and between rows, in mm.
        thickness: In mm; 1 where the file does not say.
        is_volume: It is no localizer and has a position.
        is_inverted: Low values are shown bright (MONOCHROME1).
    """

    file: Path
    frame: int
    identity: str
    series: str
    title: str
    shape: tuple[int, int]
    position: np.ndarray | None
    axes: np.ndarray
    spacing: tuple[float, float]
    thickness: float
    is_volume: bool
    is_inverted: bool


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its content, or a folder holds such files directly."""
    if path.is_dir():
        return any(is_dicom(file) for file in _list_files(path))
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine (4, 4) to mm of a series; X counts columns, Y rows, Z slices. No voxel is read.

    Args:
        path: A folder with one series, or one file of the series among others of its folder.

    Raises:
        InlayError: No DICOM, several series, or slices that make no volume: missing or double ones, of several sizes or
            orientations, or shifted sideways (gantry tilt).
    """
    planes, affine = find_stack(path)
    return (*planes[0].shape, len(planes)), affine


def read_dicom(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z), float32, each slice by its own rescale slope and intercept, and the affine (4, 4) to mm.

    Stored values stay as they are otherwise: MONOCHROME1, which is shown inverted, is not inverted.

    Args:
        path: As for `read_dicom_header`.

    Raises:
        InlayError: As `read_dicom_header`; voxels that cannot be read.
    """
    planes, affine = find_stack(path)
    columns, rows = planes[0].shape
    voxels = np.empty((len(planes), rows, columns), np.float32)
    places: dict[Path, list[int]] = {}
    for k, plane in enumerate(planes):
        places.setdefault(plane.file, []).append(k)

    def read(file: Path) -> None:
        inverted = planes[places[file][0]].is_inverted
        slices = _read_inverted(file) if inverted else _read_voxels(file)
        for k in places[file]:
            frame = planes[k].frame
            if slices.shape[1:] != (rows, columns) or frame >= len(slices):
                raise DamagedFile(f"'{file}' holds voxels of {'x'.join(map(str, slices.shape))}, unlike its header.")
            voxels[k] = slices[frame]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, places):
            pass
    return voxels.transpose(2, 1, 0), affine


def _read_voxels(file: Path) -> np.ndarray:
    """Voxels (frames, rows, columns) of one file, rescaled."""
    library = import_simpleitk()
    reader = library.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(os.fspath(file))
    try:
        array = library.GetArrayFromImage(reader.Execute())
    except RuntimeError:
        raise DamagedFile(f"the voxels of '{file}' cannot be read; they are damaged, or of a rare encoding.") from None
    return array.reshape(-1, *array.shape[-2:])


def _read_inverted(file: Path) -> np.ndarray:
    """The same of MONOCHROME1, whose values ITK inverts: by pydicom, which has fewer encodings."""
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale

    try:
        slice_ = dcmread(file)
        if "PerFrameFunctionalGroupsSequence" in slice_:
            raise ValueError  # its slopes stand elsewhere
        return np.asarray(apply_rescale(slice_.pixel_array, slice_))[None]
    except Exception:
        raise DamagedFile(
            f"the voxels of '{file}' (MONOCHROME1) cannot be read; save it without compression."
        ) from None


def find_stack(path: Path) -> tuple[list[Plane], np.ndarray]:
    """The slices of a series in their order, and the affine (4, 4) to mm."""
    try:
        from pydicom import dcmread  # noqa: F401
    except ImportError:
        raise Unsupported("DICOM takes pydicom, which is not installed; run: pip install 'inlay[formats]'") from None
    import_simpleitk()
    if path.is_dir():
        planes = [plane for file in _list_files(path) for plane in _read_planes(file)]
    else:
        chosen = {plane.series for plane in _read_planes(path)}
        files = _list_files(path.parent)
        planes = [plane for file in files for plane in _read_planes(file) if plane.series in chosen]
    if not planes:
        raise BadInput(f"'{path}' holds no slices of a DICOM series; give the folder in which they are.")
    planes = [plane for plane in planes if plane.is_volume] or planes
    series: dict[str, list[Plane]] = {}
    for plane in planes:
        series.setdefault(plane.series, []).append(plane)
    if len(series) > 1:
        listed = list_first(
            [f"{each[0].title}, {len(each)} slices, such as '{each[0].file.name}'" for each in series.values()]
        )
        raise BadInput(
            f"'{path}' holds {len(series)} series ({listed}); give a file of the one that you want instead of the "
            "folder, or put each series in a folder of its own."
        )
    return _stack(planes, path)


def _stack(planes: list[Plane], path: Path) -> tuple[list[Plane], np.ndarray]:
    """Slices ordered along their normal, and their affine (4, 4) to mm (right, anterior, superior)."""
    first = planes[0]
    if any(plane.position is None for plane in planes):
        raise Unsupported(f"'{path}': {first.title} has no positions of its slices, so it is no volume.")
    for what, kinds in (
        ("sizes", Counter("x".join(map(str, plane.shape)) for plane in planes)),
        ("orientations", _count_unlike([plane.axes.ravel() for plane in planes], ALIKE)),
        ("spacings", _count_unlike([np.log(plane.spacing) for plane in planes], ALIKE)),
    ):
        if len(kinds) > 1:
            listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
            raise BadInput(f"the slices in '{path}' have different {what}: {listed}; put each in a folder of its own.")
    x, y = first.axes
    if abs(float(x @ y)) > ALIKE or not np.allclose(np.linalg.norm(first.axes, axis=1), 1, atol=ALIKE):
        raise DamagedFile(f"the slices in '{path}' have directions of rows and columns that are not at right angles.")
    normal = np.cross(x, y)
    places = np.array([plane.position for plane in planes])
    order = np.argsort(places @ normal, kind="stable")
    planes, places = [planes[i] for i in order], places[order]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = x * first.spacing[0], y * first.spacing[1], places[0]
    affine[:3, 2] = normal * _find_step(planes, places @ normal, path)
    shift = places - places[0]
    shift -= (shift @ normal)[:, None] * normal
    sideways = float(np.linalg.norm(shift, axis=1).max())
    if sideways > EVEN * min(first.spacing):
        height = float((places[-1] - places[0]) @ normal)
        raise Unsupported(
            f"the slices in '{path}' are shifted sideways by up to {sideways:.3g} mm, as by a gantry tilt of "
            f"{math.degrees(math.atan2(sideways, height)):.3g} degrees; resample the series first (dcm2niix does)."
        )
    return planes, TO_RAS @ affine


def _find_step(planes: list[Plane], heights: np.ndarray, path: Path) -> float:
    """Distance of slices in mm, if they are evenly spaced; `heights` are their places along the normal, in order."""
    if len(planes) == 1:
        return planes[0].thickness
    gaps = np.diff(heights)
    double = [i for i in range(len(gaps)) if gaps[i] < 1e-3]
    if double:
        one, other = planes[double[0]], planes[double[0] + 1]
        if one.identity == other.identity:
            raise BadInput(
                f"'{path}' holds the same slice twice: '{one.file.name}' and '{other.file.name}'; remove one."
            )
        raise Unsupported(
            f"'{path}' holds several slices at {len(double)} places, the first {heights[double[0]]:.4g} mm along the "
            f"normal ('{one.file.name}' and '{other.file.name}'): several volumes, such as echoes or times; "
            "put each in a folder of its own."
        )
    step = (heights[-1] - heights[0]) / len(gaps)
    if np.abs(heights - heights[0] - step * np.arange(len(heights))).max() > EVEN * step:
        usual, widest = float(np.median(gaps)), int(gaps.argmax())
        missing = max(0, sum(round(gap / usual) - 1 for gap in gaps.tolist()))
        raise DamagedFile(
            f"the slices in '{path}' are not evenly spaced: {gaps[widest]:.4g} mm lie between "
            f"'{planes[widest].file.name}' and '{planes[widest + 1].file.name}' ({heights[widest]:.4g} and "
            f"{heights[widest + 1]:.4g} mm along the normal), {usual:.4g} mm elsewhere"
            + (f"; {missing} slice{'s are' if missing > 1 else ' is'} missing." if missing else ".")
        )
    return float(step)


def _count_unlike(values: Iterable[np.ndarray], most: float) -> Counter[str]:
    """How many are alike, up to `most`, by a number for each kind."""
    kinds: list[np.ndarray] = []
    counts: Counter[str] = Counter()
    for value in values:
        k = next((k for k, kind in enumerate(kinds) if np.abs(kind - value).max() <= most), len(kinds))
        if k == len(kinds):
            kinds.append(value)
        counts[f"kind {k + 1}"] += 1
    return counts


def _list_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())


def _read_planes(file: Path) -> list[Plane]:
    """The slices in a file: none in one that is no DICOM, or DICOM of something else."""
    from pydicom import dcmread

    if not is_dicom(file):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard, and are not read here
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            if not header.get("Rows") or header.get("Modality") in NO_SCANS or header.get("SamplesPerPixel", 1) != 1:
                return []
            return list(_find_planes(file, header))
    except InlayError:
        raise
    except Exception as error:  # pydicom raises what it pleases for a broken file
        raise DamagedFile(f"the header of '{file}' cannot be read: {str(error).splitlines()[0]}.") from None


def _find_planes(file: Path, header: Any) -> Iterator[Plane]:
    """The slices that a header tells of: one, or those of its frames."""
    kind = [str(word).upper() for word in header.get("ImageType") or []]
    if "MOSAIC" in kind:
        raise Unsupported(f"'{file}' is a mosaic, many slices in one image; convert it with dcm2niix.")
    title = f"{str(header.get('SeriesDescription') or 'without a name').strip()!r} ({header.get('Modality') or '?'})"
    frames = header.get("PerFrameFunctionalGroupsSequence")
    groups: list[Any] = [None] if frames is None else list(frames)
    count = int(header.get("NumberOfFrames") or 1)
    for number, frame in enumerate(groups):
        places = [header] if frames is None else [frame, *(header.get("SharedFunctionalGroupsSequence") or [])]
        has_place = count == len(groups)
        position = _find(places, "PlanePositionSequence", "ImagePositionPatient") if has_place else None
        axes = _find(places, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = _find(places, "PixelMeasuresSequence", "PixelSpacing")
        thickness = _find(places, "PixelMeasuresSequence", "SliceThickness")
        has_place = position is not None and axes is not None and spacing is not None
        between_rows, between_columns = _floats(spacing, 2) if has_place else (1.0, 1.0)
        if not (between_rows > 0 and between_columns > 0):
            raise ValueError(f"a pixel spacing of {between_rows:g} x {between_columns:g} mm")
        yield Plane(
            file=file,
            frame=number,
            identity=f"{header.get('SOPInstanceUID')}/{number}",
            series=str(header.get("SeriesInstanceUID")),
            title=title,
            shape=(int(header.Columns), int(header.Rows)),
            position=np.array(_floats(position, 3)) if has_place else None,
            axes=np.reshape(_floats(axes, 6) if has_place else np.eye(3)[:2], (2, 3)),
            spacing=(between_columns, between_rows),
            thickness=float(thickness or 0) or 1.0,
            is_volume=has_place and "LOCALIZER" not in kind,
            is_inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
        )


def _find(places: Iterable[Any], sequence: str, name: str) -> Any:
    """The value of a tag in the first place that has it, there or in a sequence of one item."""
    for place in places:
        for item in (place, *(place.get(sequence) or [])):
            if item.get(name) is not None:
                return item.get(name)
    return None


def _floats(values: Any, count: int) -> list[float]:
    """So many finite numbers."""
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} where {count} numbers should be")
    return numbers
