"""Scans that are segmented one by one, window after window."""

import base64
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from inlay.errors import BadInput, InlayError
from inlay.tasks.adapter import Adapter
from inlay.tasks.serving import Limits, Reply, Row, ServedAdapter, SingleServing, TensorSpec
from inlay.tasks.volumes.annotating import VolumeAnnotating
from inlay.tasks.volumes.segment import Segmentation, segment
from inlay.tasks.volumes.sent import SentHeader, inflate_sent, read_sent_header
from inlay.tasks.volumes.strokes import Stroke, fill_scribble
from inlay.tasks.volumes.windows import check_inside, import_monai

PROMPTS = 256  # points and scribbles of a request at most; and boxes
SENT = "NIfTI, NRRD, MetaImage or MGH"
CHANNEL = "scan_"  # and the name of a channel: the field of that channel's own file


class VolumeServing(SingleServing):
    """A request has a scan, and perhaps prompts or a mask of it to correct; a mask comes back on the scan's own grid.

    The scan of an adapter with several channels is one file, or one file for each: `scan_NAME`.
    """

    action = "segment"
    makes_files = True
    annotating = VolumeAnnotating()
    inputs: ClassVar = (
        TensorSpec("scan", "BYTES", (), f"A file with all channels: {SENT}."),
        TensorSpec("points", "FP32", (-1, 3), "Voxels x, y, z of the scan, from 0.", optional=True),
        TensorSpec(
            "point_labels", "INT32", (-1,), "The class of each: its number in the mask, 0: none.", optional=True
        ),
        TensorSpec("boxes", "FP32", (-1, 6), "x0, y0, z0, x1, y1, z1, two corners, included.", optional=True),
        TensorSpec("box_labels", "INT32", (-1,), "The class in each: its number in the mask.", optional=True),
        TensorSpec(
            "scribbles",
            "FP32",
            (-1, 4),
            "Ends and bends of lines: x, y, z and the line's number, from 0.",
            optional=True,
        ),
        TensorSpec(
            "scribble_labels", "INT32", (-1,), "The class of each line: its number in the mask, 0: none.", optional=True
        ),
        TensorSpec(
            "mask",
            "BYTES",
            (),
            f"A mask to correct ({SENT}); with points, boxes or scribbles it changes only there.",
            optional=True,
        ),
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
    def list_inputs(self, adapter: ServedAdapter) -> Sequence[TensorSpec]:
        channels = adapter.processor.channels
        if len(channels) == 1:
            return self.inputs
        scan, *others = self.inputs
        files = [
            TensorSpec(CHANNEL + name, "BYTES", (), f"A file with the channel {name} alone.", optional=True)
            for name in channels
        ]
        return [replace(scan, optional=True), *files, *others]

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Row:
        """Only headers are read here: a scan that waits is held as its files.

        Args:
            values: As `list_inputs` describes them; from a program for annotating also `paint`, a Paint, and `suffix`,
                that of the file with the mask.
            adapter: That is asked.
            limits: Of the server, for all channels together.

        Raises:
            InlayError: As `Answering.read`.
        """
        scan = _find_scan(values, adapter)
        header = _check_headers(scan, limits)
        x, y, z = header.shape[:3]
        grid = adapter.processor.resampled_shape((x, y, z), header.affine)
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
        paint = values.get("paint")
        for mask in (values.get("mask"), paint and paint.file):
            if mask is not None:
                _check_mask(mask, (x, y, z), limits)
        points = _label_prompts(values, "points", "point_labels")
        inputs = {
            "suffix": values.get("suffix", ".nii.gz"),
            "points": points,
            "strokes": _read_scribbles(values, PROMPTS - len(points), (x, y, z), adapter.processor.values),
            "boxes": _label_prompts(values, "boxes", "box_labels"),
            **{name: bool(values.get(name, False)) for name in ("largest", "flips", "keep_probabilities")},
        }
        only = None if paint is None else paint.selected
        return Row({"scan": scan, "mask": values.get("mask"), "paint": paint, **inputs}, source=only)

    @override
    def compute(self, row: Row, adapter: Adapter, limits: Limits, before_pass: Callable[[], None]) -> Mapping[str, Any]:
        asked = dict(row.inputs)
        given, mask, paint, _ = (asked.pop(name) for name in ("scan", "mask", "paint", "suffix"))
        if isinstance(given, bytes):
            scan: Any = inflate_sent(given, limits.voxels)
        else:
            scan = {name: _name_channel(name, inflate_sent, file, limits.voxels) for name, file in given.items()}
        if mask is not None:
            asked["mask"] = inflate_sent(mask, limits.voxels)
        if paint is not None:
            first = scan if isinstance(scan, bytes) else scan[adapter.processor.channels[0]]
            asked["mask"], painted = paint.read(adapter, first, limits.voxels)
            asked["strokes"] = asked["strokes"] + painted
        return {"segmentation": segment(adapter, scan, **asked, progress=False, before_windows=before_pass)}

    @override
    def reply(
        self, found: Mapping[str, Any], row: Row, adapter: ServedAdapter, tensors: Collection[str] | None
    ) -> Reply:
        """For people the mask is a .nii.gz file in base64."""
        mask: Segmentation = found["segmentation"]
        if row.source is not None:  # where a class was painted, the program takes it alone, as 1
            name = mask.names[row.source]
            mask = replace(mask, mask=(mask.mask == row.source).astype(np.uint8), labels=[name], values=None)
        volumes = mask.volumes_ml
        if tensors is None:
            labels = {str(number): name for number, name in mask.names.items()}
            file = base64.b64encode(mask.to_bytes()).decode()
            return Reply({"volumes_ml": volumes, "labels": labels, "shape": mask.mask.shape, "mask": file})
        make: dict[str, Callable[[], Any]] = {
            "mask_file": lambda: [mask.to_bytes()],
            "class_file": lambda: [replace(mask, mask=mask.class_mask, values=None).to_bytes(row.inputs["suffix"])],
            "mask": lambda: mask.class_mask.astype(np.uint8),
            "labels": lambda: list(mask.labels),
            "volumes_ml": lambda: np.array([volumes[name] for name in mask.labels], np.float32),
        }
        if mask.probabilities is not None:
            probabilities = mask.probabilities
            make["probabilities"] = lambda: probabilities.astype(np.float32)
        return Reply(tensors={name: make[name]() for name in tensors if name in make})


def _find_scan(values: Mapping[str, Any], adapter: ServedAdapter) -> bytes | dict[str, bytes]:
    """The file of a scan, or its files by the names of their channels.

    Raises:
        InlayError: None, both, or a channel that lacks.
    """
    channels = adapter.processor.channels
    files = {name: values[CHANNEL + name] for name in channels if CHANNEL + name in values}
    if "scan" in values:
        if files:
            raise BadInput(f"a scan comes as scan or as {', '.join(CHANNEL + name for name in files)}; leave one out.")
        scan: bytes = values["scan"]
        return scan
    if not files:
        ways = "" if len(channels) == 1 else f"; send scan, or {' and '.join(CHANNEL + name for name in channels)}"
        raise BadInput(f"a request has a scan, which is missing{ways}.")
    adapter.processor.find_case(files)  # names the channels that lack
    return files


def _check_headers(scan: bytes | Mapping[str, bytes], limits: Limits) -> SentHeader:
    """The header of a scan, of several files that of the first.

    Raises:
        InlayError: A file that is no scan, or more voxels in all than the limit.
    """
    if isinstance(scan, bytes):
        return read_sent_header(scan, limits.voxels)
    headers = [_name_channel(name, read_sent_header, file, limits.voxels) for name, file in scan.items()]
    count = sum(math.prod(header.shape) for header in headers)
    if count > limits.voxels:
        raise BadInput(f"the channels have {count:,} voxels together; the limit is {limits.voxels:,} in all.")
    first: SentHeader = headers[0]
    return first


def _name_channel(name: str, work: Callable[[bytes, int], Any], file: bytes, most_voxels: int) -> Any:
    """What a function makes of a channel's file; its errors name the channel."""
    try:
        return work(file, most_voxels)
    except InlayError as error:
        raise type(error)(f"{CHANNEL}{name}: {error}") from error


def _check_mask(mask: bytes, shape: tuple[int, ...], limits: Limits) -> None:
    """Refuse a mask that cannot be on the scan's grid, before it is inflated; its axes may be in another order."""
    own = read_sent_header(mask, limits.voxels).shape
    if math.prod(own) != math.prod(shape):
        sizes = (" x ".join(map(str, each)) for each in (own, shape))
        raise BadInput("the mask has {} voxels and the scan {}; send a mask of this scan.".format(*sizes))


def _label_prompts(values: Mapping[str, Any], name: str, labels: str) -> list[tuple[float, ...]]:
    """Points or boxes, each with its label behind where there are labels."""
    places = values.get(name, np.zeros((0, 3), np.float32)).tolist()
    if len(places) > PROMPTS:
        raise BadInput(f"a request has {PROMPTS} {name} at most, got {len(places)}.")
    return [
        (*place, *label) for place, label in zip(places, _read_labels(values, labels, name, len(places)), strict=True)
    ]


def _read_labels(values: Mapping[str, Any], labels: str, name: str, count: int) -> list[tuple[int, ...]]:
    """What stands behind each prompt: its label, or nothing where there are none."""
    numbers = values.get(labels)
    if numbers is None:
        return [()] * count
    if len(numbers) != count:
        raise BadInput(f"there are {count} {name} and {len(numbers)} {labels}; give one for each.")
    return [(number,) for number in numbers.tolist()]


def _read_scribbles(
    values: Mapping[str, Any], room: int, shape: tuple[int, int, int], numbers: Sequence[int] | None
) -> list[Stroke]:
    """Scribbles, of which there is room for so many, in a scan of this shape; those without a label are of class 1."""
    corners = values.get("scribbles", np.zeros((0, 4), np.float32))
    lines = np.unique(corners[:, 3])
    if lines.tolist() != list(range(len(lines))):
        raise BadInput(
            "the fourth number in scribbles says which line a place is of: 0 for the first, then 1 and so on."
        )
    labels = _read_labels(values, "scribble_labels", "scribbles", len(lines))
    if len(lines) > room:
        raise BadInput(f"{len(lines)} scribbles are too many: a request has {PROMPTS} points and scribbles at most.")
    for corner in corners[:, :3].tolist():
        check_inside(corner, shape, "a scribble")
    return [
        Stroke(
            fill_scribble(corners[corners[:, 3] == line, :3]).clip(0, np.array(shape) - 1),
            label[0] if label else (numbers or (1,))[0],
        )
        for line, label in zip(lines, labels, strict=True)
    ]
