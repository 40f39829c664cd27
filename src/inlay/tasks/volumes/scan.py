"""One scan as a model takes it, and a model's prediction back on the scan's own grid."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.data import (
    CLASSES,
    LARGEST,
    NUMBERED,
    Case,
    VolumeData,
    count_channels,
    explain_channels,
    number_channels,
    read_labels,
)
from inlay.tasks.volumes.file_checks import APART, check_affine, corner_distance
from inlay.tasks.volumes.formats import case_name, read_header, read_volume, suffix_of
from inlay.tasks.volumes.grid import (
    Shape,
    Triple,
    orientation,
    reorient_from_ras,
    reorient_to_ras,
    resize,
    spacing_of,
    transform_points,
)

Intensity = Literal["percentile", "ct"]
ScanFile = str | os.PathLike[str] | bytes
ScanSource = ScanFile | Mapping[str, ScanFile] | Sequence[ScanFile]  # a scan, as people name it
IGNORED = -1  # a label without a loss: padding, and what nnU-Net calls "ignore"
PADDING = 0.0  # the image there: the mean of a scan, and what a convolution pads with
PERCENTILES = (0.5, 99.5)
WINDOW = (-1000.0, 1000.0)  # HU
SAMPLED = 4_000_000  # voxels that the percentiles are taken of
FOUND = 10_000  # voxels of a case that the window of CT is found by


@dataclass(frozen=True)
class Scan:
    """A scan on the model's grid: axes D, H, W grow to Superior, Anterior and Right.

    Attributes:
        name: The case's.
        image: Float (C, D, H, W), each channel normalised.
        labels: Integers (D, H, W), 0 background, 1..K the classes, -1 to be ignored; None: no label map.
        spacing_mm: Between voxels of `image`, in D, H, W.
        affine: Of the own grid, voxel index to mm, (4, 4).
        own_shape: Of the own grid, (X, Y, Z).
    """

    name: str
    image: torch.Tensor
    labels: torch.Tensor | None
    spacing_mm: Triple
    affine: np.ndarray
    own_shape: Shape

    def to_grid(self, xyz: npt.ArrayLike) -> np.ndarray:
        """Voxel indices x, y, z of the own grid, (3,) or (N, 3), as d, h, w of `image`; fractions are kept."""
        towards, ratio = self._steps()
        return ((transform_points(np.linalg.inv(towards), xyz) + 0.5) * ratio - 0.5)[..., ::-1]

    def to_own(self, dhw: npt.ArrayLike) -> np.ndarray:
        """The inverse of `to_grid`."""
        towards, ratio = self._steps()
        return transform_points(towards, (np.asarray(dhw, np.float64)[..., ::-1] + 0.5) / ratio - 0.5)

    @property
    def ras_shape(self) -> Shape:
        """Shape (D, H, W) of the own voxels in RAS, before they were resampled."""
        d, h, w = reorient_to_ras(np.broadcast_to(np.int8(0), self.own_shape), self.affine)[0].shape
        return d, h, w

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices x, y, z in RAS to the own ones (4, 4), and voxels of `image` for one of RAS along x, y, z."""
        ratio = np.array(self.image.shape[1:]) / np.array(self.ras_shape)
        return orientation(self.affine, self.own_shape)[1], ratio[::-1]


class VolumeProcessor:
    """How a scan becomes a model's input; saved with an adapter.

    A scan is reoriented to RAS (its axes are only flipped and permuted: an oblique scan stays in its own planes), the
    intensities of each channel are normalised by themselves, and it is resampled about its own edges, linearly
    (averaged where voxels get larger), label maps by the nearest voxel. So the whole field of view stays, and the
    spacing is the one asked for, up to rounding of the number of voxels. `back` undoes all of it.

    Args:
        spacing_mm: Of the model's grid in D, H, W; None: each scan's own.
        crop: Voxels in D, H, W that the model sees at a time in training, and a sliding window at inference.
        intensity: `percentile` clips each scan to its percentiles 0.5 and 99.5 and gives it mean 0 and variance 1;
            `ct` clips to the window low..high in HU, the same for all, and maps it to -1..1. One for all channels, or
            one for each.
        low: Lower end of the window.
        high: Upper end of the window.
        flip: Axes along which training mirrors half of the crops: 0 D, 1 H, 2 W (left and right). A model has no right
            answer for a scan that is mirrored along another.
        values: The numbers of the classes 1..K in the label maps that were trained on, and so in the masks; None: 1..K.
        channels: Names of a scan's channels, in their order; none: it has one.

    Raises:
        InlayError: A spacing, crop, window, axis or value that is not valid.
    """

    def __init__(
        self,
        spacing_mm: Triple | None,
        crop: Shape,
        intensity: Intensity | Sequence[Intensity] = "percentile",
        low: float = WINDOW[0],
        high: float = WINDOW[1],
        flip: Sequence[int] = (),
        values: Sequence[int] | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        if spacing_mm is not None and not _are_three(spacing_mm, lambda s: 1e-5 <= s <= 1e4):
            raise BadInput(f"spacing_mm must be three lengths D, H, W in mm, or None, got {spacing_mm}.")
        if not _are_three(crop, lambda n: isinstance(n, int) and 0 < n < 2**13):
            raise BadInput(f"crop must be three whole numbers of voxels, got {crop}.")
        if not isinstance(channels, list | tuple) or not all(map(_is_name, channels)) or _has_twins(channels):
            raise BadInput(f"channels must be different names, got {channels!r}.")
        self.channels: tuple[str, ...] = tuple(channels) if len(channels) > 1 else number_channels(1)
        kinds = [intensity] * len(self.channels) if isinstance(intensity, str) else intensity
        if (
            not isinstance(kinds, list | tuple)
            or len(kinds) != len(self.channels)
            or not all(kind in ("percentile", "ct") for kind in kinds)
            or not (_is_number(low) and _is_number(high) and low < high)
        ):
            raise BadInput(
                "intensity must be percentile or ct, one for all channels or one for each of "
                f"{len(self.channels)}, and low below high, got {intensity!r} from {low} to {high}."
            )
        self.intensities: tuple[Intensity, ...] = tuple(kinds)
        if not isinstance(flip, list | tuple) or not set(flip) <= {0, 1, 2}:
            raise BadInput(f"flip must name axes 0, 1 or 2, got {flip!r}.")
        if values is not None and not _are_class_values(values):
            raise BadInput(f"values must be different whole numbers from 1 to {LARGEST}, got {values!r}.")
        self.flip = tuple(sorted(set(flip)))
        self.values: tuple[int, ...] | None = None  # 1..K is not written down: it is what an adapter without has
        if values is not None and tuple(values) != tuple(range(1, len(values) + 1)):
            self.values = tuple(map(int, values))
        self.spacing_mm: Triple | None = None
        if spacing_mm is not None:
            self.spacing_mm = float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])
        self.crop: Shape = (crop[0], crop[1], crop[2])
        self.low, self.high = float(low), float(high)

    @classmethod
    def fitted(
        cls,
        data: VolumeData,
        crop: Shape,
        spacing_mm: Triple | Literal["median"] | None = "median",
        flip: Sequence[int] = (),
        window: Sequence[float] | None = None,
    ) -> "VolumeProcessor":
        """A processor for a data set: its channels with the intensities of their modalities, its labels' values and its
        median spacing.

        Args:
            data: With a training part.
            crop: As for the processor, and `flip` too.
            spacing_mm: Of the model's grid; `median`: `median_spacing` of the training cases.
            window: Low and high of channels of CT, in HU; default: `find_window` of the training cases.

        Raises:
            InlayError: A window for data without CT; as `find_window`.
        """
        if spacing_mm == "median":
            spacing_mm = median_spacing(data.train)
        modalities = list(data.channels.values()) or [data.modality]
        kinds: list[Intensity] = ["ct" if modality == "ct" else "percentile" for modality in modalities]
        ct = [channel for channel, kind in enumerate(kinds) if kind == "ct"]
        if window is not None and not ct:
            raise BadInput(
                f"window = {list(window)} is for CT, and {data.name!r} names no channel CT in its dataset.json; leave "
                "it out, or name the modality."
            )
        low, high = WINDOW if not ct else find_window(data.train, ct) if window is None else window
        return cls(
            spacing_mm, crop, kinds, low, high, flip=flip, values=data.train[0].values, channels=tuple(data.channels)
        )

    @property
    def intensity(self) -> Intensity | tuple[Intensity, ...]:
        """The one of all channels, or where they differ that of each."""
        return self.intensities[0] if len(set(self.intensities)) == 1 else self.intensities

    def read(self, source: Case | ScanSource) -> Scan:
        """A case with its label map, or a scan as `find_case` takes it.

        Raises:
            InlayError: A file that cannot be read, an image with NaN, channels on different grids, a channel that lacks
                or is unknown, a label map with another shape or affine than its image, or with numbers that no class
                has; each names the file.
        """
        case = source if isinstance(source, Case) else self.find_case(source)
        order = self._order_channels(case)
        array, affine = read_image(case)
        _, grid = reorient_to_ras(array[0], affine)
        ras = [reorient_to_ras(array[channel], affine)[0] for channel in order]
        shape, spacing = self._resampled_grid(ras[0].shape, grid)
        labels = None
        if case.label is not None:
            labels = resize(aligned_labels(case, ras[0].shape, grid), shape, "nearest")
            labels = torch.from_numpy(np.ascontiguousarray(labels, np.int64))
        channels = [
            torch.from_numpy(np.ascontiguousarray(resize(self.normalise(each, i), shape, "linear")))
            for i, each in enumerate(ras)
        ]
        image = channels[0][None] if len(channels) == 1 else torch.stack(channels)
        _, x, y, z = array.shape
        return Scan(case.name, image, labels, spacing, affine, (x, y, z))

    def find_case(self, source: ScanSource) -> Case:
        """The case of a scan that was given, with a file for each of the adapter's channels where they have files.

        Args:
            source: A file with all channels, or one file of an nnU-Net case (case_0000.nii.gz), whose other channels
                lie next to it; {channel: file}; files in the order of `channels`; or the bytes of NIfTI files.

        Raises:
            InlayError: Channels that lack or are unknown.
        """
        if isinstance(source, bytes):
            voxels, affine = read_volume(source, channels=True)
            return Case("scan", voxels, affine=affine)
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            return Case(case_name(path), self._find_neighbours(path) if len(self.channels) > 1 else path)
        if isinstance(source, Mapping):
            self._check_names(list(source))
            source = [source[name] for name in self.channels]
        if len(source) != len(self.channels):
            raise BadInput(
                f"the adapter takes the channels {', '.join(self.channels)}, and got {len(source)} files; give one for "
                "each, in that order."
            )
        files = tuple(file if isinstance(file, bytes) else Path(file) for file in source)
        if len(files) == 1:
            return self.find_case(files[0])
        return Case("scan" if isinstance(files[0], bytes) else case_name(files[0]), files, channels=self.channels)

    def find_channel(self, name: str) -> int:
        """The number of a channel.

        Raises:
            InlayError: No such channel.
        """
        if name not in self.channels:
            raise BadInput(f"unknown channel {name!r}; the adapter has {', '.join(self.channels)}.")
        return self.channels.index(name)

    def read_channel(self, source: ScanSource, channel: int = 0) -> np.ndarray:
        """Voxels (X, Y, Z) of one channel of a scan as its file has them, to be drawn.

        Raises:
            InlayError: As `read`.
        """
        case = self.find_case(source)
        order = self._order_channels(case)
        return read_image(case)[0][order[channel]]

    def _find_neighbours(self, path: Path) -> Path | tuple[Path, ...]:
        """All files of the nnU-Net case that a file belongs to; the file itself where it is none."""
        numbered = NUMBERED.fullmatch(case_name(path))
        if numbered is None:
            return path
        files = [path.with_name(f"{numbered[1]}_{i:04}{suffix_of(path)}") for i in range(len(self.channels))]
        if path not in files or sum(file.exists() for file in files) < 2:
            return path
        lacking = [
            f"{name} ({file.name})" for name, file in zip(self.channels, files, strict=True) if not file.exists()
        ]
        if lacking:
            raise BadInput(
                f"the case of '{path}' lacks the channel {', '.join(lacking)}; put it next to the others, or give all "
                "as NAME=FILE."
            )
        return tuple(files)

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise InlayError unless these are the names of the channels, in any order."""
        lacking = [name for name in self.channels if name not in names]
        unknown = [name for name in names if name not in self.channels]
        if lacking or unknown:
            said = [f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown"] * bool(unknown)
            said += [f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"] * bool(lacking)
            raise BadInput(f"the adapter takes the channels {', '.join(self.channels)}: {' and '.join(said)}.")

    def _order_channels(self, case: Case) -> list[int]:
        """Which channel of a case each of the adapter's is: by name where both have names, else in their order.

        Raises:
            InlayError: Channels that lack or are unknown.
        """
        if case.channels and self.channels != number_channels(len(self.channels)):
            self._check_names(case.channels)
            return [case.channels.index(name) for name in self.channels]
        count = count_channels(case)
        if count != len(self.channels):
            where = str(case.files[0]) if case.files else case.name
            remedy = (
                "Give one file for each channel, as NAME=FILE." if count == 1 else "Save those alone, in this order."
            )
            if len(self.channels) == 1:
                raise BadInput(
                    f"'{where}' has {count} channels and the adapter takes one; save the one that it was trained on."
                )
            raise BadInput(
                f"the adapter takes the channels {', '.join(self.channels)}, and '{where}' has "
                f"{explain_channels(count, self.channels)}. {remedy}"
            )
        return list(range(count))

    def resampled_shape(self, shape: Shape, affine: np.ndarray) -> Shape:
        """Shape (D, H, W) on the model's grid of a scan of this shape (X, Y, Z) and affine; no voxel is needed."""
        image, grid = reorient_to_ras(np.broadcast_to(np.int8(0), shape), affine)
        return self._resampled_grid(image.shape, grid)[0]

    def normalise(self, array: np.ndarray, channel: int = 0) -> np.ndarray:
        """The intensities of one channel of a whole scan, of any shape, as float32; a scan of one value becomes 0."""
        array = np.asarray(array, np.float32)
        if self.intensities[channel] == "ct":
            middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
            return (np.clip(array, self.low, self.high) - np.float32(middle)) / np.float32(half)
        sampled = array.reshape(-1)[:: -(-array.size // SAMPLED)]
        low, high = np.percentile(sampled, PERCENTILES)
        if high <= low:  # nearly all is one value: what differs is the object
            low, high = array.min(), array.max()
        array = np.clip(array, np.float32(low), np.float32(high))
        mean = array.mean(dtype=np.float64)
        parts = np.array_split(array.ravel(order="K"), max(1, array.size // SAMPLED))  # numpy's own takes a copy
        deviation = math.sqrt(sum(float(np.square(part - mean).sum()) for part in parts) / array.size)
        if not deviation > 1e-6 * max(abs(mean), 1e-30):
            return np.zeros_like(array)
        array -= np.float32(mean)
        array /= np.float32(deviation)
        return array

    def back(
        self, values: np.ndarray | torch.Tensor, scan: Scan, mode: Literal["nearest", "linear"] = "nearest"
    ) -> np.ndarray:
        """A prediction on the model's grid, brought back to the scan's own: (X, Y, Z), or (C, X, Y, Z) of (C, D, H, W).

        At the scan's own spacing, and at any finer one, `nearest` brings a label map back voxel by voxel.

        Args:
            values: (D, H, W) or (C, D, H, W); `linear` takes and gives floats.
            scan: From `read`.
            mode: `nearest` for label maps, `linear` for probabilities.

        Raises:
            InlayError: values are on another grid than the scan's image.
        """
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if array.ndim not in (3, 4) or array.shape[-3:] != tuple(scan.image.shape[1:]):
            wanted = "x".join(map(str, scan.image.shape[1:]))
            raise BadInput(f"values must be on the grid {wanted} of {scan.name!r}, got shape {array.shape}.")
        return reorient_from_ras(resize(array, scan.ras_shape, mode), scan.affine)

    def to_dict(self) -> dict[str, Any]:
        """Settings for `from_dict`, as JSON takes them."""
        return {
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "crop": list(self.crop),
            "intensity": self.intensity if isinstance(self.intensity, str) else list(self.intensity),
            "low": self.low,
            "high": self.high,
            **({"flip": list(self.flip)} if self.flip else {}),
            **({"values": list(self.values)} if self.values else {}),
            **({"channels": list(self.channels)} if len(self.channels) > 1 else {}),
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "VolumeProcessor":
        """A processor with the settings of `to_dict`.

        Raises:
            InlayError: Settings of another kind.
        """
        names = ("spacing_mm", "crop", "intensity", "low", "high")
        more = ("flip", "values", "channels")
        if not isinstance(settings, dict) or not set(names) <= set(settings) <= {*names, *more}:
            got = sorted(map(str, settings)) if isinstance(settings, dict) else type(settings).__name__
            raise DamagedFile(f"a volume processor has the settings {', '.join(names)}, got {got}.")
        return cls(**settings)

    def _resampled_grid(self, shape: Sequence[int], affine: np.ndarray) -> tuple[Shape, Triple]:
        """Shape (D, H, W) to resample to, and the spacing that this gives."""
        spacing = spacing_of(affine)
        wanted = self.spacing_mm or spacing
        d, h, w = (max(1, round(n * s / new)) for n, s, new in zip(shape, spacing, wanted, strict=True))
        x, y, z = (n * s / m for n, s, m in zip(shape, spacing, (d, h, w), strict=True))
        return (d, h, w), (x, y, z)


def read_image(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (C, X, Y, Z), float32, and affine (4, 4) of a case's image, from its files or from memory.

    Raises:
        InlayError: As `read_volume`; channels on different grids; voxels in memory that are not finite numbers along
            three axes, or four with the channels first.
    """
    if isinstance(case.image, tuple):
        array, affine = _read_channels(case, case.image)
        return array, affine if case.affine is None else case.affine
    if not isinstance(case.image, np.ndarray):
        array, affine = read_volume(case.image, channels=True)
        return array, affine if case.affine is None else case.affine
    if case.image.ndim not in (3, 4) or not np.isfinite(case.image).all():
        raise DamagedFile(
            f"the voxels of case {case.name!r} must be finite numbers along three axes, or four with channels first."
        )
    affine = np.eye(4) if case.affine is None else np.asarray(case.affine, np.float64)
    try:
        check_affine(affine)
    except ValueError as error:
        raise DamagedFile(f"the affine of case {case.name!r} is wrong: {error}.") from error
    array = np.asarray(case.image, np.float32)
    return array if array.ndim == 4 else array[None], affine


def _read_channels(case: Case, files: Sequence[Path | bytes]) -> tuple[np.ndarray, np.ndarray]:
    """`read_image` of a case whose channels are files of their own, on the grid of the first."""
    first, affine = read_volume(files[0])
    array = np.empty((len(files), *first.shape[::-1]), np.float32).transpose(0, 3, 2, 1)  # x runs fastest, as in NIfTI
    array[0] = first
    for i, file in enumerate(files[1:], start=1):
        channel, own = read_volume(file)
        apart = explain_shift(own, affine, first.shape)
        if channel.shape != first.shape:
            apart = f"shape {'x'.join(map(str, channel.shape))} and not {'x'.join(map(str, first.shape))} (X, Y, Z)"
        if apart:
            name = case.channels[i] if case.channels else f"channel_{i}"
            where = f"'{file}'" if isinstance(file, Path) else "a file"
            raise DamagedFile(
                f"{where}, the channel {name} of {case.name!r}, is not on the grid of the first channel: it has "
                f"{apart}. Resample it to that grid."
            )
        array[i] = channel
    return array, affine


def median_spacing(cases: Sequence[Case]) -> Triple:
    """Median of the spacings of cases in D, H, W, each axis by itself, to four digits; only headers are read."""
    d, h, w = (float(f"{s:.4g}") for s in np.median([_spacing_of_case(case) for case in cases], axis=0))
    return d, h, w


def find_window(cases: Sequence[Case], channels: Sequence[int] = (0,)) -> tuple[float, float]:
    """The window of CT that holds the classes: percentiles 0.5 and 99.5 of their voxels' HU, as whole numbers.

    Each case counts alike, by up to 10,000 voxels. Without a voxel of a class, or where all are alike, it is -1000 to
    1000 HU.

    Args:
        cases: To train on, with label maps.
        channels: Those of CT, which get one window.

    Raises:
        InlayError: As `VolumeProcessor.read`.

    Source: the normalisation of CT in nnU-Net (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).
    """
    labelled = [case for case in cases if case.label is not None]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = [values for values in pool.map(lambda case: _sample_classes(case, channels), labelled) if values.size]
    if not found:
        return WINDOW
    values, shares = np.concatenate(found), np.concatenate([np.full(len(one), 1 / len(one)) for one in found])
    order = np.argsort(values)
    ranks = np.cumsum(shares[order]) / shares.sum()
    places = np.searchsorted(ranks, np.array(PERCENTILES) / 100).clip(0, len(values) - 1)
    low, high = values[order][places]
    return (float(np.floor(low)), float(np.ceil(high))) if np.floor(low) < np.ceil(high) else WINDOW


def _sample_classes(case: Case, channels: Sequence[int]) -> np.ndarray:
    """Intensities of voxels of any class, evenly spread over them."""
    array, affine = read_image(case)
    image, grid = reorient_to_ras(array[0], affine)
    inside = aligned_labels(case, image.shape, grid) > 0
    values = np.concatenate([reorient_to_ras(array[channel], affine)[0][inside] for channel in channels])
    return values[:: -(-len(values) // FOUND)] if len(values) else values


def _spacing_of_case(case: Case) -> Triple:
    if isinstance(case.image, np.ndarray):
        shape, affine = case.image.shape[-3:], np.eye(4)
    else:
        shape, affine = read_header(case.files[0])
        shape = shape[:3]
    return spacing_of(
        reorient_to_ras(np.broadcast_to(np.int8(0), shape), affine if case.affine is None else case.affine)[1]
    )


def aligned_labels(case: Case, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The label map of a case as a view (D, H, W) in RAS, with the classes as 0..K, and -1 for voxels to be ignored.

    Args:
        case: With a label map.
        shape: Of its image in RAS, (D, H, W).
        affine: Of its image in RAS, as `reorient_to_ras` gives it.

    Raises:
        InlayError: The label map is not on the grid of the image, by shape or by more than a tenth of a voxel, or has
            numbers that are no class.
    """
    array, own = read_labels(case)
    where = case.name if isinstance(case.label, np.ndarray) else str(case.label)
    labels, grid = reorient_to_ras(array, own)
    apart = is_misplaced(labels.shape, grid, shape, affine)
    if apart:
        raise DamagedFile(f"the label map {where!r} is not on the grid of its image: it has {apart}. Repair the file.")
    strange = find_strange_values(labels, case.values, case.ignored)
    if strange:
        wanted = list_first([0, *case.values]) if case.values else f"0 to {CLASSES}"
        raise DamagedFile(f"{where!r} holds the labels {list_first(strange)}; it may hold {wanted}.")
    plain = case.values is None or case.values == tuple(range(1, len(case.values) + 1))
    if case.values is None or (plain and case.ignored is None):
        return labels.astype(np.int16)
    ignored = [] if case.ignored is None else [case.ignored]
    known, classes = np.array([0, *case.values, *ignored]), [*range(len(case.values) + 1), *(IGNORED for _ in ignored)]
    order = np.argsort(known)
    return np.array(classes, np.int16)[order][np.searchsorted(known[order], labels)]


def is_misplaced(
    labels: tuple[int, ...], grid: np.ndarray, shape: tuple[int, ...], affine: np.ndarray, most: float = APART
) -> str | None:
    """How a label map's shape (D, H, W) and affine in RAS differ from its image's, by more than `most` of a voxel."""
    if labels != shape:
        return f"shape {'x'.join(map(str, labels))} and not {'x'.join(map(str, shape))} (D, H, W)"
    return explain_shift(grid, affine, shape[::-1], most)


def explain_shift(grid: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], most: float = APART) -> str | None:
    """How an affine of a grid (X, Y, Z) differs from another one, by more than `most` of a voxel."""
    apart = corner_distance(grid, affine, shape)
    return None if apart <= most * min(spacing_of(affine)) else f"an affine that moves a corner by {apart:.3g} mm"


def find_strange_values(labels: np.ndarray, values: tuple[int, ...] | None, ignored: int | None = None) -> list[int]:
    """The values of a label map that are no class: not 0 nor in `values`, or without these not in 0..`CLASSES`."""
    known = np.arange(CLASSES + 1) if values is None else [0, *values, *([] if ignored is None else [ignored])]
    return np.setdiff1d(labels, known).tolist()


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _has_twins(values: Sequence[Any]) -> bool:
    return len(set(values)) < len(values)


def _are_class_values(values: Any) -> bool:
    whole = isinstance(values, list | tuple) and len(values) and all(isinstance(v, int | np.integer) for v in values)
    return bool(whole) and 0 < min(values) <= max(values) <= LARGEST and len(set(values)) == len(values)


def _are_three(values: Any, fine: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == 3 and all(_is_number(v) and fine(v) for v in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
