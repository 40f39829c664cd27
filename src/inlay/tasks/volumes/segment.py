"""Masks of whole scans, from file to file: a model's windows over the scan, joined on the scan's own grid."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from inlay.bases.device import Device, move_model
from inlay.errors import BadInput, Unsupported
from inlay.files.atomic import replacing
from inlay.files.outputs import check_output_file
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.correction import MaskSource, correct_mask, read_mask, write_said
from inlay.tasks.volumes.data import Case, read_labels
from inlay.tasks.volumes.dicom_seg import SEG, check_dicom_seg, write_dicom_seg
from inlay.tasks.volumes.file_checks import APART, corner_distance, has_suffix
from inlay.tasks.volumes.formats import WRITTEN, label_dtype
from inlay.tasks.volumes.itk import ITK, import_simpleitk, write_itk
from inlay.tasks.volumes.nifti import MGH, NIFTI, find_affine_conflict, import_nibabel, open_nifti, unit_mm
from inlay.tasks.volumes.scan import Scan, ScanSource
from inlay.tasks.volumes.strokes import Stroke, check_stroke, choose_clicks
from inlay.tasks.volumes.windows import Grid, ScanPrompts, Voxel, probabilities, slide

logger = logging.getLogger(__name__)

MASKS = (*WRITTEN, *SEG)
MOST = 32767  # what a probability of 1 is stored as
SLAB = 16  # planes of an ensemble's probabilities whose classes are found at a time


@dataclass(frozen=True)
class Segmentation:
    """A mask on a scan's own grid.

    Attributes:
        mask: (X, Y, Z) in the smallest of uint8, int16 and int32 that holds it; 0 is background, `values[k - 1]` the
            class `labels[k - 1]`.
        affine: (4, 4), from a voxel's index to mm.
        labels: Names of the K classes.
        probabilities: (K+1, X, Y, Z) float16, or float32 of an ensemble, background first; None if they were not asked
            for.
        source: The scan's file, or its bytes, whose header `save` carries over; of several the first; None: voxels from
            memory.
        values: The numbers of the K classes in the mask: those of the label maps that were trained on. None: 1..K.
        further: The files of the scan's other channels, which `save` does not overwrite either.
    """

    mask: np.ndarray
    affine: np.ndarray
    labels: list[str]
    probabilities: np.ndarray | None = None
    source: Path | bytes | None = None
    values: tuple[int, ...] | None = None
    further: tuple[Path, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        """Names of the classes by their numbers in the mask."""
        return dict(zip(class_values(self.labels, self.values), self.labels, strict=True))

    @cached_property
    def class_mask(self) -> np.ndarray:
        """The mask with k for the class `labels[k - 1]`, whatever its number: the mask itself where these are 1..K."""
        if self.values is None:
            return self.mask
        order = np.argsort(self.values)
        known = np.array([0, *(self.values[i] for i in order)])
        classes = np.array([0, *(order + 1)], label_dtype(0, len(self.labels)))
        return classes[np.searchsorted(known, self.mask)]

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of each class."""
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        found = np.unique(self.mask, return_counts=True)
        counts = dict(zip(*(each.tolist() for each in found), strict=True))
        return {name: counts.get(value, 0) * voxel_ml for value, name in self.names.items()}

    def with_mask(self, mask: np.ndarray) -> Segmentation:
        """Another mask (X, Y, Z) of the same classes on the same grid, with the same numbers, such as a reference.

        Raises:
            InlayError: Another shape, or numbers that no class has.
        """
        if mask.shape != self.mask.shape:
            raise BadInput(f"the masks have the shapes {mask.shape} and {self.mask.shape}; pass two of the same scan.")
        strange = np.setdiff1d(mask, [0, *self.names]).tolist()
        if strange:
            numbers = list_first([0, *self.names])
            raise BadInput(f"the mask to compare holds the labels {list_first(strange)}; it may hold {numbers}.")
        return replace(self, mask=mask.astype(self.mask.dtype), probabilities=None)

    def save(self, path: str | Path) -> Path:
        """Write the mask in the format of its name, on the scan's grid; whole or not at all.

        NIfTI has orientation codes and units of the scan's file; .seg.nrrd is a segmentation of 3D Slicer. The names of
        the classes stand in a header extension of NIfTI (code 6, a comment) and in the field `classes` of NRRD and
        MetaImage, as JSON {"labels": {"number": "name"}}, and in the segments of .seg.nrrd. MGH has no place for them.
        .dcm is a DICOM segmentation of a DICOM series, and carries the name of its patient; its segments are 1..K.

        Raises:
            InlayError: A name that does not end as one of `MASKS` does, a folder that cannot be written, the scan's own
                file, a library that is not installed, or .dcm of a scan that is no DICOM.
        """
        for scan in (self.source if isinstance(self.source, Path) else None, *self.further):
            path = check_output(path, MASKS, scan)
        path = Path(path)
        with replacing(path) as new:
            if has_suffix(path, ITK):
                like = self.source if isinstance(self.source, Path) and has_suffix(self.source, ITK) else None
                write_itk(new, self.mask, self.affine, self._make_fields(path), like)
            elif has_suffix(path, SEG):
                assert isinstance(self.source, Path)  # else `check_output` has refused it
                write_dicom_seg(new, self.class_mask, self.source, self.labels)
            elif has_suffix(path, MGH):
                import_nibabel().MGHImage(self.mask, self.affine).to_filename(new)
            else:
                self._make_image().to_filename(new)
        return path

    def save_probabilities(self, path: str | Path) -> Path:
        """Write the probabilities as NIfTI with a fourth axis, background first; whole or not at all.

        They are stored in 16 bits in steps of 1/32767, which nibabel, ITK and MONAI give back as 0 to 1: NIfTI has no
        float16. A header extension names the classes by their place, as JSON {"labels": {"0": "background", ...}}.

        Raises:
            InlayError: They were not kept; as `save`.
        """
        if self.probabilities is None:
            raise BadInput("this segmentation has no probabilities; pass keep_probabilities to segment.")
        path = check_output(path, NIFTI, self.source if isinstance(self.source, Path) else None)
        nibabel = import_nibabel()
        steps = make_scratch((*self.mask.shape, len(self.probabilities)), np.int16, order="F")  # as the file has them
        for k, values in enumerate(self.probabilities):
            for x in range(0, len(values), SLAB):
                scaled = np.asarray(values[x : x + SLAB], np.float32) * MOST
                steps[x : x + SLAB, ..., k] = np.rint(scaled).clip(0, MOST)
        image = nibabel.Nifti1Image(steps, self.affine, dtype=np.int16)
        image.header.set_slope_inter(1 / MOST, 0)
        image.header.set_xyzt_units("mm")
        image.header["cal_max"] = 1
        _name_classes(image, dict(enumerate(["background", *self.labels])))
        with replacing(path) as new:
            image.to_filename(new)
        return path

    def _make_fields(self, path: Path) -> dict[str, str]:
        """Names of the classes as the header of NRRD or MetaImage holds them.

        Source: 3D Slicer's developer guide, "Segmentation labelmap file format (.seg.nrrd)".
        """
        if not has_suffix(path, (".seg.nrrd",)):
            return {"classes": json.dumps({"labels": {"0": "background", **self.names}}, ensure_ascii=False)}
        fields = {
            "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
            "Segmentation_SourceRepresentation": "Binary labelmap",
            "Segmentation_ReferenceImageExtentOffset": "0 0 0",
        }
        extent = " ".join(f"0 {size - 1}" for size in self.mask.shape)
        for i, (value, name) in enumerate(self.names.items()):
            own = {"ID": f"class_{value}", "Name": name, "LabelValue": str(value), "Layer": "0", "Extent": extent}
            fields |= {f"Segment{i}_{key}": text for key, text in own.items()}
        return fields

    def to_bytes(self, suffix: str = ".nii.gz") -> bytes:
        """What `save` writes into a file of this suffix."""
        if suffix == ".nii.gz":
            return gzip.compress(self._make_image().to_bytes(), compresslevel=6, mtime=0)
        with tempfile.TemporaryDirectory() as folder:
            return self.save(Path(folder) / f"mask{suffix}").read_bytes()

    def _make_image(self) -> Any:
        """nibabel's image of the mask."""
        nibabel = import_nibabel()
        kind, header, affine = nibabel.Nifti1Image, None, self.affine
        if isinstance(self.source, bytes) or (self.source is not None and has_suffix(self.source, NIFTI)):
            with open_nifti(self.source) as (scan, _):
                kind, header = type(scan), scan.header.copy()  # NIfTI-1 or -2
            affine = np.vstack([self.affine[:3] / unit_mm(header), self.affine[3:]])
            header.set_slope_inter(1, 0)
            header.set_intent("none")
            header["cal_min"], header["cal_max"] = 0, 0
            header["descrip"] = b"mask by inlay"
            header.extensions.clear()  # they tell of the scan
        image = kind(self.mask, affine, header, dtype=self.mask.dtype)
        if header is None:
            image.header.set_xyzt_units("mm")
        _name_classes(image, {0: "background", **self.names})
        return image


def read_reference(path: str | Path, segmentation: Segmentation) -> np.ndarray:
    """A second mask (X, Y, Z) from a file, such as the reference, to compare with a segmentation of the same scan.

    Raises:
        InlayError: A file that is no label map, on another grid by more than a tenth of a voxel, or with numbers that
            no class has.
    """
    array, affine = read_labels(Case(Path(path).name, Path(path), Path(path)))
    mask = segmentation.with_mask(array).mask
    apart = corner_distance(affine, segmentation.affine, mask.shape)
    if apart > APART * np.linalg.norm(segmentation.affine[:3, :3], axis=0).min():
        raise BadInput(f"'{path}' is not on the scan's grid: its affine moves a corner by {apart:.3g} mm.")
    return mask


def _name_classes(image: Any, names: dict[int, str]) -> None:
    """Add a header extension to nibabel's image with the names of classes by their numbers."""
    named = json.dumps({"labels": names}, ensure_ascii=False)
    image.header.extensions.append(import_nibabel().nifti1.Nifti1Extension("comment", named.encode()))


def class_values(labels: Sequence[str], values: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the classes in masks: `values`, or 1..K where there are none of their own.

    Raises:
        InlayError: Not a number for each class.
    """
    if values is not None and len(values) != len(labels):
        raise BadInput(f"{len(labels)} classes need as many values, got {list(values)}.")
    return range(1, len(labels) + 1) if values is None else values


def put_values(class_mask: np.ndarray, values: Sequence[int] | None) -> np.ndarray:
    """A mask with k for class k, with the classes' own numbers instead."""
    if values is None:
        return class_mask
    return np.array([0, *values], label_dtype(0, max(values)))[class_mask]


class OpenScan(NamedTuple):
    """A scan as an adapter's processor makes it, and the files or bytes that it is of; None: it was in memory."""

    source: Path | bytes | None
    further: tuple[Path, ...]
    scan: Scan


def segment(
    adapter: Adapter,
    scan: Scan | OpenScan | ScanSource,
    *,
    ensemble: Sequence[Adapter] = (),
    points: Sequence[Sequence[Any]] = (),
    boxes: Sequence[Sequence[Any]] = (),
    strokes: Sequence[Stroke] = (),
    mask: Segmentation | MaskSource | None = None,
    overlap: float = 0.5,
    flips: bool = False,
    largest: bool = False,
    batch_size: int = 1,
    keep_probabilities: bool | np.ndarray = False,
    progress: bool = True,
    device: Device | None = None,
    before_windows: Callable[[], None] | None = None,
) -> Segmentation:
    """Find the adapter's classes in a scan of any size, in windows of the size that it was trained on.

    Windows that hold a prompt are answered with it, all others without one. Probabilities are averaged where windows
    overlap, with Gaussian weights, and interpolated at the scan's own voxels. A voxel gets its most probable class, and
    one that was clicked the class that was said. Besides scan and mask only the planes of one window's depth are held,
    so memory does not grow with length. Probabilities of an ensemble are averaged at the scan's own voxels, in a file
    without a name where temporary files are (TMPDIR).

    Args:
        adapter: From `load_adapter`, trained on volumes.
        scan: A file or a DICOM folder, as `read_volume` takes it, the bytes of a NIfTI file, or what
            `adapter.processor.read` or `open_scan` made of one. Of several channels a file with all of them, one file
            of an nnU-Net case (case_0000.nii.gz), {channel: file}, or files in the order of
            `adapter.processor.channels`.
        ensemble: Further adapters of the same classes, on whatever bases and with whatever crops and spacings: the
            probabilities of all are averaged.
        points: Each (x, y, z) or (x, y, z, label) in the scan's own voxels, from 0 as nibabel indexes them. The
            label is 0 for background, a class's number in the mask, or its name; default: the first class.
        boxes: Each (x0, y0, z0, x1, y1, z1), or with a label behind: two opposite corners, included.
        strokes: Each a `Stroke`: voxels that all get its class, of which the model hears a few as points.
        mask: A mask of the scan to correct: a Segmentation, a file, the bytes of a NIfTI file, or voxels (X, Y, Z) on
            the scan's own grid. Every window gets it. With prompts only those voxels change that become the class of
            one and are connected to it; without, the answer is the model's everywhere.
        overlap: Share of a window that the next one covers too, 0 to below 1.
        flips: Average over the versions of each window that are mirrored along the axes that training mirrored
            (`processor.flip`): 2, 4 or 8 times the work for 1, 2 or 3 axes.
        largest: Keep only the largest connected component of each class (26 neighbours).
        batch_size: Windows in one forward pass.
        keep_probabilities: Also return them. An array (K+1, X, Y, Z) of zeros, such as one of `make_scratch`, is
            filled with them.
        progress: Show a bar, where standard error is a terminal.
        device: Move the adapters there first, such as to "cuda:1"; default: where they are.
        before_windows: Called before each batch of windows; what it raises ends the work.

    Raises:
        InlayError: An adapter for something else, a file that is no scan, a prompt outside of the scan or of no class,
            a mask on another grid or with numbers that no class has, overlap or batch_size out of range, flips of an
            adapter that was trained without, an ensemble of different classes.
    """
    members = [adapter, *ensemble]
    check_settings(members, overlap=overlap, flips=flips, batch_size=batch_size)
    opened = open_scan(adapter, scan)
    source, further, first = opened
    shape, kept = (len(adapter.labels) + 1, *first.own_shape), None
    if isinstance(keep_probabilities, np.ndarray):
        kept = keep_probabilities
    elif ensemble:
        kept = make_scratch(shape, np.float32)
    elif keep_probabilities:
        kept = np.zeros(shape, np.float16)
    found = empty_mask(first, adapter.labels)
    for stroke in strokes:
        check_stroke(stroke, first.own_shape)
    given = None if mask is None else open_mask(adapter, first, mask)
    for member in members:
        move_model(member.model, device)
        own = opened if member is adapter else _reopen(member, adapter, opened)
        _fill_mask(
            member, own.scan, found, kept, share=1 / len(members), points=points, boxes=boxes, strokes=strokes,
            given=given, overlap=overlap, mirrored=member.processor.flip if flips else (), batch_size=batch_size,
            progress=progress, before_windows=before_windows,
        )  # fmt: skip
    if ensemble and kept is not None:
        for x in range(0, len(found), SLAB):
            found[x : x + SLAB] = most_probable(torch.from_numpy(np.array(kept[:, x : x + SLAB]))).numpy()
    if given is not None and (points or boxes or strokes):
        found = correct_mask(given, found, points, boxes, adapter.labels, adapter.processor.values, strokes)
    if largest:
        keep_largest(found, len(adapter.labels))
    write_said(found, points, adapter.labels, adapter.processor.values, strokes)
    affine, numbers = np.asarray(first.affine, np.float64), adapter.processor.values
    wanted = kept if keep_probabilities is not False else None
    return Segmentation(put_values(found, numbers), affine, list(adapter.labels), wanted, source, numbers, further)


def _fill_mask(
    adapter: Adapter,
    scan: Scan,
    mask: np.ndarray,
    kept: np.ndarray | None,
    *,
    share: float,
    points: Sequence[Sequence[Any]],
    boxes: Sequence[Sequence[Any]],
    strokes: Sequence[Stroke],
    given: np.ndarray | None,
    overlap: float,
    mirrored: Sequence[int],
    batch_size: int,
    progress: bool,
    before_windows: Callable[[], None] | None,
) -> None:
    """Slide one adapter over a scan: classes go into `mask`, probabilities times `share` are added to `kept`."""
    from tqdm.auto import tqdm

    grid = Grid(scan, adapter.processor.crop)
    heard = [(*voxel, label) for voxels, label in strokes for voxel in choose_clicks(voxels, grid.voxel_sizes).tolist()]
    prompts = grid.make_prompts([*points, *heard], boxes, adapter.labels, adapter.processor.values)
    if given is not None:
        prompts = replace(prompts, mask=grid.cut_mask(given, (0, 0, 0), grid.shape))

    def predict(pixels: torch.Tensor, inside: Sequence[ScanPrompts]) -> torch.Tensor:
        if before_windows is not None:
            before_windows()
        return probabilities(adapter.model, pixels, inside, flips=mirrored)

    # disable=None: no bar where the output is no terminal. leave=None: it stays if it is the only one.
    bar = tqdm(desc="segment", unit="window", disable=None if progress else True, leave=None)
    with bar, torch.inference_mode():
        planes = slide(
            predict, grid.image, tuple(adapter.processor.crop), prompts, overlap=overlap, batch_size=batch_size, bar=bar
        )
        for first, values in planes:
            last = first + values.shape[1]
            low = -np.inf if first == 0 else first
            high = np.inf if last == grid.shape[0] else last - 1
            rows = grid.find_rows((low, -np.inf, -np.inf), (high, np.inf, np.inf))
            paint_mask(grid, values, (first, 0, 0), rows, mask, kept, share)


def check_settings(adapters: Sequence[Adapter], *, overlap: float, flips: bool, batch_size: int) -> None:
    """Raise InlayError for what `segment` refuses whatever the scan.

    Args:
        adapters: One, or those of an ensemble.
        overlap: As for `segment`.
        flips: The same.
        batch_size: The same.
    """
    if not 0 <= overlap < 1 or batch_size < 1:
        raise BadInput(f"overlap must be from 0 to below 1 and batch_size at least 1, got {overlap} and {batch_size}.")
    for adapter in adapters:
        check_task(adapter, "volume-segmentation")
        if flips and not adapter.processor.flip:
            raise Unsupported(
                f"adapter {adapter.name!r} was not trained on mirrored scans, or does not say so, and would answer "
                "wrongly on them; leave flips out, or train with --flip."
            )
    first = adapters[0]
    numbers = list(class_values(first.labels, first.processor.values))
    for place, other in enumerate(adapters[1:], 2):
        pairs = (
            ("the classes", list(first.labels), list(other.labels)),
            ("the numbers of classes", numbers, list(class_values(other.labels, other.processor.values))),
            ("the channels", _channels_of(first), _channels_of(other)),
        )
        for what, wanted, found in pairs:
            if found != wanted:
                raise BadInput(
                    f"adapter {place} of the ensemble, {other.name!r}, has {what} {list_first(found) or 'none'}, and "
                    f"the first one, {first.name!r}, has {list_first(wanted) or 'none'}; average adapters of the same."
                )


def _channels_of(adapter: Adapter) -> list[str]:
    """Names of the channels that an adapter reads; none: one without a name."""
    return list(adapter.processor.to_dict().get("channels", ()))


def open_scan(adapter: Adapter, scan: Scan | OpenScan | ScanSource) -> OpenScan:
    """The scan's file, if it is one, or its bytes, of several the first; its other files; and what is made of them.

    Raises:
        InlayError: The adapter is not for volumes, or the file is no scan.
    """
    check_task(adapter, "volume-segmentation")
    if isinstance(scan, OpenScan):
        return scan
    if isinstance(scan, Scan):
        return OpenScan(None, (), scan)
    if isinstance(scan, bytes):
        sources: tuple[Path | bytes, ...] = (scan,)
        read = adapter.processor.read(scan)
    else:
        case = adapter.processor.find_case(scan)
        sources, read = case.image if isinstance(case.image, tuple) else case.files, adapter.processor.read(case)
    for source in sources:
        if conflict := find_affine_conflict(source):
            logger.warning("%s: %s.", read.name if isinstance(source, bytes) else source, conflict)
    return OpenScan(sources[0], tuple(file for file in sources[1:] if isinstance(file, Path)), read)


def _reopen(adapter: Adapter, first: Adapter, opened: OpenScan) -> OpenScan:
    """The scan as another adapter's processor makes it: read again, unless both make the same of it.

    Raises:
        InlayError: It is to be read again, and is in memory only.
    """
    ours, others = (
        {key: value for key, value in one.processor.to_dict().items() if key not in ("crop", "flip", "values")}
        for one in (first, adapter)
    )
    if ours == others:
        return opened
    if opened.source is None:
        raise BadInput(
            f"adapter {adapter.name!r} reads scans at another spacing or intensity than {first.name!r}; give the "
            "scan's file, and not one that was read already."
        )
    files: Any = (opened.source, *opened.further) if opened.further else opened.source
    return open_scan(adapter, files)


def make_scratch(shape: Sequence[int], dtype: Any, order: Literal["C", "F"] = "C") -> np.ndarray:
    """Zeros in a file without a name where temporary files are, which is gone when the array is: they may be larger
    than memory.

    Raises:
        OSError: The disk has no room for them.
    """
    with tempfile.TemporaryFile(prefix="inlay-") as file:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later, without a word
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "w+", shape=tuple(shape), order=order)


def open_mask(adapter: Adapter, scan: Scan, mask: Segmentation | MaskSource) -> np.ndarray:
    """A given mask on the scan's own grid, (X, Y, Z), with k for class k of the adapter; a copy.

    Raises:
        InlayError: As `read_mask`.
    """
    labels, values = adapter.labels, adapter.processor.values
    if isinstance(mask, Segmentation):
        return read_mask(mask.mask, scan, labels, values, mask.affine)
    return read_mask(mask, scan, labels, values)


def check_output(path: str | Path, suffixes: Sequence[str], scan: str | Path | None = None) -> Path:
    """The path, if something can be written there under such a name, and it is not the scan itself.

    Raises:
        InlayError: Another suffix, a folder that does not exist or cannot be written, or the scan's own file, also
            through a link; a format whose library is not installed; .dcm of a scan that is no DICOM.
    """
    path = Path(path)
    if not has_suffix(path, suffixes):
        raise BadInput(f"'{path}' must be a name ending with {' or '.join(suffixes)}.")
    if has_suffix(path, ITK):
        import_simpleitk()  # else it would be missed after all the work
    if has_suffix(path, SEG):
        check_dicom_seg(path, None if scan is None else Path(scan))
    check_output_file(path)
    if scan is not None and path.exists() and Path(scan).exists() and path.samefile(scan):
        raise BadInput(f"'{path}' is the scan itself, which would be overwritten; give another name.")
    return path


def empty_mask(grid: Grid | Scan, labels: Sequence[str]) -> np.ndarray:
    """Background on the own grid, in a type that holds the numbers 0..K."""
    return np.zeros(grid.own_shape, label_dtype(0, len(labels)))


def paint_mask(
    grid: Grid,
    values: torch.Tensor,
    start: Voxel,
    rows: list[slice],
    mask: np.ndarray,
    kept: np.ndarray | None = None,
    share: float = 1.0,
) -> None:
    """Write the most probable classes of a part of the tensor into own voxels, and add the probabilities if wanted.

    Args:
        grid: Where things lie.
        values: Probabilities (K+1, d, h, w) of the part.
        start: Where it begins in the tensor.
        rows: The own voxels to write.
        mask: (X, Y, Z), which gets k for class k.
        kept: (K+1, X, Y, Z), to which the probabilities are added.
        share: What they are multiplied with before.
    """
    own = mask.transpose(grid.axes)  # a view in the order D H W
    own_kept = None if kept is None else kept.transpose(0, *(grid.axes + 1))
    for index, part in grid.interpolate(values, start, rows):
        own[index] = most_probable(part).numpy()
        if own_kept is not None:
            own_kept[(slice(None), *index)] += part.numpy() * np.float32(share)


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
