"""Scans that are segmented one by one, window after window."""

import base64
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter
from inlay.tasks.serving import (
    AnnotatedModel,
    Annotating,
    Limits,
    Reply,
    Row,
    ServedAdapter,
    SingleServing,
    TensorSpec,
)
from inlay.tasks.volumes.nifti import affine_of_header, inflate_nifti, read_nifti_header
from inlay.tasks.volumes.segment import Segmentation, class_values, segment
from inlay.tasks.volumes.windows import import_monai

PROMPTS = 256  # points, or boxes, of a request at most


class VolumeAnnotating(Annotating):
    """Clicks are lists of voxels under the name of their class, or under foreground and background.

    Source: MONAI Label 0.8.5, plugins/slicer/MONAILabel/MONAILabel.py. Its clicks are indices i, j, k of the file that
    it sent, so x, y, z of that file.
    """

    outputs: ClassVar = ("class_file", "labels", "volumes_ml")

    @override
    def describe(self, adapter: ServedAdapter) -> AnnotatedModel:
        options = {"largest": False, **({"flips": False} if adapter.processor.flip else {})}
        return AnnotatedModel({name: k for k, name in enumerate(adapter.labels, start=1)}, options)

    @override
    def check(self, scan: bytes, limits: Limits) -> None:
        read_nifti_header(scan, limits.voxels)

    @override
    def read(self, scan: bytes, params: Mapping[str, Any], adapter: ServedAdapter) -> dict[str, Any]:
        numbers = dict(zip(adapter.labels, class_values(adapter.labels, adapter.processor.values), strict=True))
        values: dict[str, Any] = {"scan": scan}
        points: list[list[float]] = []
        labels: list[int] = []
        for name, given in params.items():
            if name == "roi" or not (isinstance(given, list) and given):
                continue
            number = 0 if name == "background" else numbers.get(name)
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
        for name in self.describe(adapter).options:
            values[name] = params.get(name) is True
        return values

    @override
    def reply(self, tensors: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        names = tensors["labels"]
        volumes = dict(zip(names, map(float, tensors["volumes_ml"]), strict=True))
        (file,) = tensors["class_file"]
        return file, {"label_names": {name: k for k, name in enumerate(names, start=1)}, "volumes_ml": volumes}


class VolumeServing(SingleServing):
    """A request has a scan, and perhaps points and boxes in it; a mask comes back on the scan's own grid."""

    action = "segment"
    makes_files = True
    annotating = VolumeAnnotating()
    inputs: ClassVar = (
        TensorSpec("scan", "BYTES", (), "A NIfTI file with all channels, compressed or not."),
        TensorSpec("points", "FP32", (-1, 3), "Voxels x, y, z of the scan, from 0.", optional=True),
        TensorSpec(
            "point_labels", "INT32", (-1,), "The class of each: its number in the mask, 0: none.", optional=True
        ),
        TensorSpec("boxes", "FP32", (-1, 6), "x0, y0, z0, x1, y1, z1, two corners, included.", optional=True),
        TensorSpec("box_labels", "INT32", (-1,), "The class in each: its number in the mask.", optional=True),
        TensorSpec("largest", "BOOL", (), "Keep only the largest connected component of each class.", optional=True),
        TensorSpec("flips", "BOOL", (), "Average over mirrored windows.", optional=True),
        TensorSpec("keep_probabilities", "BOOL", (), "Answer with probabilities too.", optional=True),
    )
    outputs: ClassVar = (
        TensorSpec("mask_file", "BYTES", (1,), "The mask as .nii.gz, with the numbers that the classes have there."),
        TensorSpec("mask", "UINT8", (-1, -1, -1), "0 background, k the class k of labels, on the scan's grid: X Y Z."),
        TensorSpec("labels", "BYTES", (-1,), "Class names, the first one that of class 1.", is_text=True),
        TensorSpec("volumes_ml", "FP32", (-1,), "Volume of each class."),
        TensorSpec("probabilities", "FP32", (-1, -1, -1, -1), "Background and classes: K+1 X Y Z.", optional=True),
    )

    def __init__(self) -> None:
        import_monai()  # seconds, which the first request would wait for

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Row:
        """Only the header is read here: a scan that waits is held as its file."""
        if "scan" not in values:
            raise BadInput("a request has a scan, which is missing.")
        header = read_nifti_header(values["scan"], limits.voxels)
        x, y, z = header.get_data_shape()[:3]
        grid = adapter.processor.resampled_shape((x, y, z), affine_of_header(header))
        if math.prod(grid) * len(adapter.processor.channels) > limits.voxels:
            raise BadInput(
                f"at the spacing of the adapter the scan has {' x '.join(map(str, grid))} voxels; the limit is "
                f"{limits.voxels:,} in all."
            )
        count = (len(adapter.labels) + 1) * x * y * z
        if values.get("keep_probabilities", False) and count > limits.voxels:
            raise BadInput(
                f"probabilities of {len(adapter.labels)} classes and the background in {x} x {y} x {z} voxels are "
                f"{count:,} numbers; the limit is {limits.voxels:,}. Leave keep_probabilities out."
            )
        inputs = {
            "points": _label_prompts(values, "points", "point_labels"),
            "boxes": _label_prompts(values, "boxes", "box_labels"),
            **{name: bool(values.get(name, False)) for name in ("largest", "flips", "keep_probabilities")},
        }
        return Row({"scan": values["scan"], **inputs})

    @override
    def compute(self, row: Row, adapter: Adapter, limits: Limits, before_pass: Callable[[], None]) -> Mapping[str, Any]:
        asked = dict(row.inputs)
        scan = inflate_nifti(asked.pop("scan"), limits.voxels)
        return {"segmentation": segment(adapter, scan, **asked, progress=False, before_windows=before_pass)}

    @override
    def reply(
        self, found: Mapping[str, Any], row: Row, adapter: ServedAdapter, tensors: Collection[str] | None
    ) -> Reply:
        """For people the mask is a .nii.gz file in base64."""
        mask: Segmentation = found["segmentation"]
        volumes = mask.volumes_ml
        if tensors is None:
            labels = {str(number): name for number, name in mask.names.items()}
            file = base64.b64encode(mask.to_bytes()).decode()
            return Reply({"volumes_ml": volumes, "labels": labels, "shape": mask.mask.shape, "mask": file})
        make: dict[str, Callable[[], Any]] = {
            "mask_file": lambda: [mask.to_bytes()],
            "class_file": lambda: [replace(mask, mask=mask.class_mask, values=None).to_bytes()],
            "mask": lambda: mask.class_mask.astype(np.uint8),
            "labels": lambda: list(mask.labels),
            "volumes_ml": lambda: np.array([volumes[name] for name in mask.labels], np.float32),
        }
        if mask.probabilities is not None:
            probabilities = mask.probabilities
            make["probabilities"] = lambda: probabilities.astype(np.float32)
        return Reply(tensors={name: make[name]() for name in tensors if name in make})


def _label_prompts(values: Mapping[str, Any], name: str, labels: str) -> list[tuple[float, ...]]:
    """Points or boxes, each with its label behind where there are labels."""
    places = values.get(name, np.zeros((0, 3), np.float32)).tolist()
    numbers = values.get(labels)
    if len(places) > PROMPTS:
        raise BadInput(f"a request has {PROMPTS} {name} at most, got {len(places)}.")
    if numbers is None:
        return [tuple(place) for place in places]
    if len(numbers) != len(places):
        raise BadInput(f"there are {len(places)} {name} and {len(numbers)} {labels}; give one for each.")
    return [(*place, number) for place, number in zip(places, numbers.tolist(), strict=True)]


def _find_label(params: Mapping[str, Any], numbers: Mapping[str, int], adapter: ServedAdapter) -> int:
    """The number of the class that `label` names; of an adapter's only class without it."""
    label = params.get("label")
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if len(numbers) > 1:
        raise BadInput(f"foreground clicks and a roi need a label: one of {', '.join(adapter.labels)}; got {label!r}.")
    return next(iter(numbers.values()))


def _read_places(name: str, given: list[Any]) -> list[list[float]]:
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
    last = np.array(read_nifti_header(scan, most_voxels=sys.maxsize).get_data_shape()[:3]) - 1
    return corners.clip(0, last).reshape(1, 6).astype(np.float32)


def _read_array(given: Any) -> np.ndarray | None:
    """Finite numbers, or None."""
    try:
        array = np.array(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if np.isfinite(array).all() else None
