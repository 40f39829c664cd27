"""Scans, clicks and paint as programs for annotating send them, 3D Slicer before all, in the terms of MONAI Label."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter
from inlay.tasks.serving import AnnotatedModel, Annotating, Limits, ServedAdapter
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.formats import label_dtype, read_volume
from inlay.tasks.volumes.grid import transform_points
from inlay.tasks.volumes.itk import ITK
from inlay.tasks.volumes.segment import Segmentation, class_values
from inlay.tasks.volumes.sent import inflate_sent, read_sent_header
from inlay.tasks.volumes.strokes import Stroke

FOREGROUND, BACKGROUND = "foreground_scribbles", "background_scribbles"  # names of what was painted
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha", ".mgz")  # of masks
OTHER = 0  # the number in a mask of what belongs to no class of the adapter


@dataclass(frozen=True)
class Paint:
    """A label map from a program for annotating: a mask to correct, and scribbles that were painted over it.

    Attributes:
        file: As it was sent.
        numbers: The number in a mask of each number in the file.
        foreground: The number in the file of scribbles inside of the class `selected`; None: there are none.
        background: The same of scribbles outside of it.
        selected: The number of a class in masks; None: nothing was painted.
    """

    file: bytes
    numbers: Mapping[int, int]
    foreground: int | None = None
    background: int | None = None
    selected: int | None = None

    def read(self, adapter: Adapter, scan: bytes, most_voxels: int) -> tuple[Segmentation, list[Stroke]]:
        """The mask, in which what was painted is already true, and the paint as strokes in the scan.

        Args:
            adapter: Whose classes they are.
            scan: Its file: strokes count its voxels.
            most_voxels: Of the label map.

        Raises:
            InlayError: A file that cannot be read, or with numbers that no class has.
        """
        painted, affine = read_volume(inflate_sent(self.file, most_voxels), "label")
        numbers = {OTHER: OTHER, **self.numbers}
        if self.foreground is not None and self.selected is not None:
            numbers[self.foreground] = self.selected
        if self.background is not None:
            numbers[self.background] = OTHER
        found, places = np.unique(painted, return_inverse=True)
        if strange := [number for number in found.tolist() if number not in numbers]:
            raise BadInput(f"the label map holds {list_first(strange)}, which label_info does not name.")
        values = np.array([numbers[number] for number in found.tolist()], label_dtype(0, max(numbers.values())))
        mask = Segmentation(
            values[places.reshape(painted.shape)], affine, list(adapter.labels), values=adapter.processor.values
        )
        header = read_sent_header(scan, sys.maxsize)
        towards = np.linalg.inv(header.affine) @ affine
        strokes: list[Stroke] = []
        for number, label in ((self.foreground, self.selected), (self.background, OTHER)):
            if number is None or label is None:
                continue
            voxels = np.rint(transform_points(towards, np.argwhere(painted == number))).astype(np.int64)
            voxels = voxels[((voxels >= 0) & (voxels < header.shape[:3])).all(1)]
            if len(voxels):
                strokes.append(Stroke(voxels, label))
        return mask, strokes


class VolumeAnnotating(Annotating):
    """Clicks are lists of voxels under the name of their class, or under foreground and background.

    Source: MONAI Label 0.8.5, plugins/slicer/MONAILabel/MONAILabel.py. Its clicks are indices i, j, k of the file that
    it sent, so x, y, z of that file. Scribbles come as a label map of all segments, whose numbers `label_info` names.
    """

    outputs: ClassVar = ("class_file", "labels", "volumes_ml")

    @override
    def describe(self, adapter: ServedAdapter) -> AnnotatedModel:
        options = {"largest": False, **({"flips": False} if adapter.processor.flip else {})}
        return AnnotatedModel({name: k for k, name in enumerate(adapter.labels, start=1)}, options)

    @override
    def check(self, scan: bytes, limits: Limits) -> None:
        read_sent_header(scan, limits.voxels)

    @override
    def read(
        self, scan: bytes, params: Mapping[str, Any], adapter: ServedAdapter, label: bytes | None = None
    ) -> dict[str, Any]:
        numbers = dict(zip(adapter.labels, class_values(adapter.labels, adapter.processor.values), strict=True))
        values: dict[str, Any] = {"scan": scan, "suffix": _read_suffix(params)}
        points: list[list[float]] = []
        labels: list[int] = []
        for name, given in params.items():
            if name in ("roi", "label_info") or not (isinstance(given, list) and given):
                continue
            number = OTHER if name == "background" else numbers.get(name)
            if name == "foreground":
                number = _find_label(params, numbers, adapter)
            if number is None:
                classes = ", ".join(adapter.labels)
                raise BadInput(f"adapter {adapter.name!r} has no class {name!r} to click at; it has {classes}.")
            places = _read_places(name, given)
            points += places
            labels += [number] * len(places)
        if points:
            values |= {"points": np.array(points, np.float32), "point_labels": np.array(labels, np.int32)}
        if params.get("roi"):
            values["boxes"] = _read_region(params["roi"], scan)
            values["box_labels"] = np.array([_find_label(params, numbers, adapter)], np.int32)
        if label is not None:
            values["paint"] = _read_paint(label, params, numbers, adapter)
        for name in self.describe(adapter).options:
            values[name] = params.get(name) is True
        return values

    @override
    def reply(self, tensors: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        names = tensors["labels"]
        volumes = dict(zip(names, map(float, tensors["volumes_ml"]), strict=True))
        (file,) = tensors["class_file"]
        return file, {"label_names": {name: k for k, name in enumerate(names, start=1)}, "volumes_ml": volumes}


def _read_suffix(params: Mapping[str, Any]) -> str:
    """That of the file with the mask, which a program asks for as `result_extension`; its answer names the file.

    3D Slicer always asks for .nrrd. Where the library that writes it is not installed, it gets .nii.gz.
    """
    suffix = params.get("result_extension") or SUFFIXES[0]
    if suffix not in SUFFIXES:
        raise BadInput(f"unknown result_extension {str(suffix)[:20]!r}; choose one of {', '.join(SUFFIXES)}.")
    return SUFFIXES[0] if suffix in ITK and find_spec("SimpleITK") is None else str(suffix)


def _read_paint(label: bytes, params: Mapping[str, Any], numbers: Mapping[str, int], adapter: ServedAdapter) -> Paint:
    """What the numbers in a label map mean: `label_info` names them; without it they are 1..K, as in the answers."""
    info = params.get("label_info") or []
    named: dict[int, str] = dict(enumerate(adapter.labels, start=1)) if not info else {}
    for entry in info if isinstance(info, list) else [None]:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or number < 1 or not isinstance(name, str):
            raise BadInput("label_info must be a list of {'name': text, 'id': number in the label map, from 1}.")
        named[number] = name
    places = {name: number for number, name in named.items()}
    has_paint = FOREGROUND in places or BACKGROUND in places
    return Paint(
        label,
        {number: numbers.get(name, OTHER) for number, name in named.items()},
        places.get(FOREGROUND),
        places.get(BACKGROUND),
        _find_label(params, numbers, adapter) if has_paint else None,
    )


def _find_label(params: Mapping[str, Any], numbers: Mapping[str, int], adapter: ServedAdapter) -> int:
    """The number of the class that clicks, or with `selected_label_name` scribbles, are for; of an adapter's only one
    without."""
    label = params.get("label", params.get("selected_label_name"))
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if len(numbers) > 1:
        raise BadInput(
            f"foreground clicks, scribbles and a roi need a label: one of {', '.join(adapter.labels)}; got {label!r}."
        )
    return next(iter(numbers.values()))


def _read_places(name: str, given: Sequence[Any]) -> list[list[float]]:
    """Clicks of one class: lists of three numbers."""
    places = _read_array(given)
    if places is None or places.ndim != 2 or places.shape[1] != 3:
        raise BadInput(f"the clicks of {name!r} must be voxels [i, j, k], as a list.")
    return places.tolist()


def _read_region(given: Any, scan: bytes) -> np.ndarray:
    """A box (1, 6) from i, i, j, j, k, k, cut to the scan."""
    ends = _read_array(given)
    if ends is None or ends.shape != (6,):
        raise BadInput("roi must be six numbers: i, i, j, j, k, k.")
    corners = ends.reshape(3, 2).T
    last = np.array(read_sent_header(scan, most_voxels=sys.maxsize).shape[:3]) - 1
    return corners.clip(0, last).reshape(1, 6).astype(np.float32)


def _read_array(given: Any) -> np.ndarray | None:
    """Finite numbers, or None."""
    try:
        array = np.array(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if np.isfinite(array).all() else None
