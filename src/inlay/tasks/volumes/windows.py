"""Windows over a scan: the prompts in them, a model's probabilities there, and those at the scan's own voxels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from inlay.errors import BadInput, Unsupported
from inlay.tasks.volumes.obedience import lift_clicked
from inlay.tasks.volumes.scan import PADDING, Scan

Voxel = tuple[int, int, int]  # d, h, w
ROWS = 16  # planes of the own grid that are interpolated at a time


@dataclass(frozen=True)
class ScanPrompts:
    """Clicks, boxes and a mask in a tensor (D, H, W), in voxels of it.

    Attributes:
        points: (N, 3), each (d, h, w).
        labels: (N,) 0 = background, k = class k.
        boxes: (M, 6), each (d0, h0, w0, d1, h1, w1), corners included.
        box_labels: (M,) the class in each box.
        mask: (D, H, W) of classes, to be corrected; None: there is none.
    """

    points: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    box_labels: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def none(cls) -> "ScanPrompts":
        """No point and no box."""
        nothing = torch.zeros(0, dtype=torch.long)
        return cls(torch.zeros(0, 3), nothing, torch.zeros(0, 6), nothing)

    @property
    def count(self) -> tuple[int, int]:
        """How many points and boxes: windows with as many of them go into one batch."""
        return len(self.points), len(self.boxes)

    def inside(self, start: Sequence[int], size: Sequence[int]) -> "ScanPrompts":
        """Those of a window, in its own coordinates: points in it, boxes that reach into it and the mask, cut to it."""
        first, side = torch.tensor(start, dtype=torch.float32), torch.tensor(size, dtype=torch.float32)
        points, (low, high) = self.points - first, (self.boxes - first.repeat(2)).split(3, -1)
        near = ((points >= -0.5) & (points <= side - 0.5)).all(-1)
        reach = ((high >= 0) & (low <= side - 1)).all(-1)
        boxes = torch.cat([low.clamp(min=0), high.minimum(side - 1)], -1)
        mask = None if self.mask is None else self.mask[_window_slices(start, size)]
        return ScanPrompts(points[near], self.labels[near], boxes[reach], self.box_labels[reach], mask)

    def newest(self, most: int) -> "ScanPrompts":
        """The same with the last `most` points and boxes."""
        points, labels = self.points[-most:], self.labels[-most:]
        return ScanPrompts(points, labels, self.boxes[-most:], self.box_labels[-most:], self.mask)

    def flipped(self, axes: Sequence[int], size: Sequence[int]) -> "ScanPrompts":
        """The same in a window of that size whose axes (0 = D) are reversed."""
        points, (low, high) = self.points.clone(), self.boxes.clone().split(3, -1)
        for axis in axes:
            points[:, axis] = size[axis] - 1 - points[:, axis]
            low[:, axis], high[:, axis] = size[axis] - 1 - high[:, axis], size[axis] - 1 - low[:, axis]
        mask = None if self.mask is None else self.mask.flip(list(axes))
        return ScanPrompts(points, self.labels, torch.cat([low, high], -1), self.box_labels, mask)


class Grid:
    """A scan's tensor, padded to at least one window, and where the voxels of the scan's own file lie in it.

    Attributes:
        image: (C, D, H, W) float32; a scan that is large enough is not copied.
        shape: D, H, W of it.
        axes: The axis of the own grid (0 = X) that runs along D, H and W.
        along: For each of D, H, W where the own voxels lie, rising or falling.
    """

    def __init__(self, scan: Scan, window: Sequence[int]) -> None:
        self.image, before = pad_to_window(scan.image, window)
        self.before = np.array(before, np.float64)
        self.shape: Voxel = tuple(self.image.shape[1:])
        self.scan, self.own_shape = scan, scan.own_shape
        zero = np.asarray(scan.to_grid((0, 0, 0)), np.float64)
        steps = np.stack([np.asarray(scan.to_grid(unit), np.float64) - zero for unit in np.eye(3)], 1)
        self.axes = np.abs(steps).argmax(1)
        off = np.abs(steps).sum() - np.abs(steps[range(3), self.axes]).sum()
        if sorted(self.axes) != [0, 1, 2] or off > 1e-3:
            raise BadInput(
                f"{scan.name!r} was not resampled along its own axes; read it again with the adapter's processor."
            )
        self.along = [
            self.before[g] + zero[g] + steps[g, a] * np.arange(self.own_shape[a]) for g, a in enumerate(self.axes)
        ]

    @property
    def voxel_sizes(self) -> np.ndarray:
        """Of an own voxel along x, y and z, in voxels of the tensor."""
        sizes = np.ones(3)
        for axis, along in zip(self.axes, self.along, strict=True):
            sizes[axis] = abs(along[1] - along[0]) if len(along) > 1 else 1.0
        return sizes

    def locate(self, xyz: Sequence[float], what: str) -> np.ndarray:
        """(d, h, w) in the tensor of an own voxel index.

        Raises:
            InlayError: The scan has no such voxel.
        """
        check_inside(xyz, self.own_shape, what)
        return self.before + np.asarray(self.scan.to_grid(tuple(xyz)), np.float64)

    def make_prompts(
        self,
        points: Sequence[Any],
        boxes: Sequence[Any],
        labels: Sequence[str],
        values: Sequence[int] | None = None,
    ) -> ScanPrompts:
        """Prompts in the tensor from those in own voxel indices.

        Args:
            points: Each (x, y, z) or (x, y, z, label). A label is 0 for background, a class's number in the mask or its
                name; the first class where there is none.
            boxes: Each (x0, y0, z0, x1, y1, z1) or with a label of a class behind: two opposite corners.
            labels: Names of the K classes.
            values: Their numbers in the mask; None: 1..K.

        Raises:
            InlayError: Too few or too many numbers, no such class, or outside of the scan.
        """
        for kind, size, given in (("a point as x, y, z", 3, points), ("a box as x0, y0, z0, x1, y1, z1", 6, boxes)):
            for one in given:
                if len(one) not in (size, size + 1):
                    raise BadInput(f"{kind} is {size} numbers and perhaps a label, got {tuple(one)}.")
        where = [self.locate(point[:3], "a point") for point in points]
        corners = [[self.locate(box[:3], "a box"), self.locate(box[3:6], "a box")] for box in boxes]
        classes, inside = (
            [class_index(one[n], labels, values) if len(one) > n else 1 for one in given]
            for n, given in ((3, points), (6, boxes))
        )
        if 0 in inside:
            raise BadInput("a box needs a class, and 0 is the background; click on the background instead.")
        return ScanPrompts(
            torch.tensor(np.array(where), dtype=torch.float32).reshape(-1, 3),
            torch.tensor(classes, dtype=torch.long),
            torch.tensor([[*np.minimum(a, b), *np.maximum(a, b)] for a, b in corners]).float().reshape(-1, 6),
            torch.tensor(inside, dtype=torch.long),
        )

    def cut_mask(self, mask: np.ndarray, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A part (d, h, w) of the tensor from a mask (X, Y, Z) on the own grid, by the nearest voxel; 0 beyond it."""
        part = mask.transpose(self.axes)  # a view in the order D H W
        for axis, (along, first, side) in enumerate(zip(self.along, start, size, strict=True)):
            step = along[1] - along[0] if len(along) > 1 else 1.0
            own = np.rint((np.arange(first, first + side) - along[0]) / step).astype(np.int64)
            inside = (own >= 0) & (own < len(along))
            part = part.take(own.clip(0, len(along) - 1), axis)
            part[(slice(None),) * axis + (~inside,)] = 0
        return torch.from_numpy(np.ascontiguousarray(part))

    def find_rows(self, low: Sequence[float], high: Sequence[float]) -> list[slice]:
        """For D, H and W the own indices whose place p in the tensor has low <= p < high."""
        found = []
        for where, least, most in zip(self.along, low, high, strict=True):
            hits = np.flatnonzero((where >= least - 1e-4) & (where < most - 1e-4))
            found.append(slice(int(hits[0]), int(hits[-1]) + 1) if hits.size else slice(0, 0))
        return found

    def interpolate(
        self, values: torch.Tensor, start: Sequence[int], rows: list[slice]
    ) -> Iterator[tuple[tuple, torch.Tensor]]:
        """Values (C, d, h, w) of a part of the tensor, linearly interpolated at own voxels, a few planes at a time.

        Args:
            values: Of the part that begins at `start`.
            start: First plane, row and column of it.
            rows: From `find_rows`.

        Yields:
            The index into an own array that is transposed by `axes`, and (C, n_d, n_h, n_w) values for it.
        """
        for first in range(rows[0].start, rows[0].stop, ROWS):
            planes = slice(first, min(first + ROWS, rows[0].stop))
            part = values
            for axis, (own, begin) in enumerate(zip((planes, *rows[1:]), start, strict=True)):
                part = _interpolate(part, axis + 1, self.along[axis][own] - begin)
            yield (planes, *rows[1:]), part


def check_inside(xyz: Sequence[float], shape: Sequence[int], what: str) -> None:
    """Raise InlayError for an own voxel index that a scan of this shape (X, Y, Z) does not have."""
    if len(xyz) != 3 or not all(-0.5 <= v <= n - 0.5 for v, n in zip(xyz, shape, strict=True)):
        size = " x ".join(map(str, shape))
        got = ", ".join(f"{v:g}" for v in xyz)
        raise BadInput(f"{what} ({got}) lies outside the scan of {size} voxels; x, y, z count from 0.")


def pad_to_window(image: torch.Tensor, window: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """An image (C, D, H, W) with 0 on both sides of axes that are shorter than a window, and how much before each.

    An image that is large enough is not copied. Source: MONAI's sliding_window_inference pads alike.
    """
    lacking = [max(0, side - n) for side, n in zip(window, image.shape[1:], strict=True)]
    if any(lacking):
        sides = [(n // 2, n - n // 2) for n in reversed(lacking)]
        image = F.pad(image, [n for side in sides for n in side], value=PADDING)
    return image, [n // 2 for n in lacking]


def class_index(label: Any, labels: Sequence[str], values: Sequence[int] | None = None) -> int:
    """0 for background, k = 1..K for the class labels[k - 1], from its name or its number in the mask.

    Args:
        label: A name, 0, or a number in the mask.
        labels: Names of the K classes.
        values: Their numbers in the mask; None: 1..K.

    Raises:
        InlayError: No such class.
    """
    numbers = [0, *(values or range(1, len(labels) + 1))]
    if label in labels:
        return list(labels).index(label) + 1
    if str(label) not in map(str, numbers):
        known = ", ".join(f"{number} {name}" for number, name in zip(numbers, ("background", *labels), strict=True))
        raise BadInput(f"unknown label {label!r}; the adapter has {known}.")
    return numbers.index(int(label))


def _interpolate(values: torch.Tensor, axis: int, where: np.ndarray) -> torch.Tensor:
    """Values at places along an axis; beyond its ends those of the ends."""
    where = np.round(where, 4).clip(0, values.shape[axis] - 1)
    lower = np.floor(where).astype(np.int64)
    share = torch.from_numpy(where - lower).to(values.dtype)
    part = values.index_select(axis, torch.from_numpy(lower))
    if not share.any():
        return part
    upper = torch.from_numpy(np.minimum(lower + 1, values.shape[axis] - 1))
    return part.lerp(values.index_select(axis, upper), share.reshape([-1 if i == axis else 1 for i in range(4)]))


Predict = Callable[[torch.Tensor, list[ScanPrompts]], torch.Tensor]


def probabilities(
    model: nn.Module, pixels: torch.Tensor, prompts: Sequence[ScanPrompts], *, flips: Sequence[int] = ()
) -> torch.Tensor:
    """Softmax over background and classes, on the CPU; the mean over the windows that are mirrored along `flips`.

    A voxel that was clicked is of the class that was said.

    Args:
        model: The adapted model, in eval mode.
        pixels: B C d h w.
        prompts: Those of each window, as many in each.
        flips: Axes 0 D, 1 H, 2 W; n of them make 2ⁿ versions.

    Returns:
        B K+1 d h w float32.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), pixels)
    pixels, size = pixels.to(weight.device, weight.dtype), pixels.shape[2:]
    total: torch.Tensor | None = None
    for axes in (axes for count in range(len(flips) + 1) for axes in combinations(flips, count)):
        dims = [axis + 2 for axis in axes]
        said = [one.flipped(axes, size) for one in prompts] if axes else prompts
        arguments = batch_prompts(said, weight.device)
        logits = model(pixel_values=pixels.flip(dims) if axes else pixels, **arguments).logits  # B K+1 d h w
        shares = lift_clicked(logits.float(), said).softmax(1)
        total = shares if total is None else total.add_(shares.flip(dims))
    assert total is not None  # the first version is the window as it is
    return total.div_(2 ** len(flips)).cpu()


def batch_prompts(prompts: Sequence[ScanPrompts], device: torch.device) -> dict[str, torch.Tensor]:
    """The model's arguments for windows with as many prompts in each, and a mask in all or none.

    Places stay float32 whatever the model's type: bfloat16 has no odd number over 256.
    """
    arguments = {}
    points, boxes = prompts[0].count
    if points:
        arguments["input_points"] = torch.stack([one.points for one in prompts]).to(device)
        arguments["input_labels"] = torch.stack([one.labels for one in prompts]).to(device)
    if boxes:
        arguments["input_boxes"] = torch.stack([one.boxes for one in prompts]).to(device)
        arguments["input_box_labels"] = torch.stack([one.box_labels for one in prompts]).to(device)
    masks = [one.mask for one in prompts if one.mask is not None]
    if masks:
        arguments["input_masks"] = torch.stack(masks).to(device)
    return arguments


def slide(
    predict: Predict,
    image: torch.Tensor,
    size: Voxel,
    prompts: ScanPrompts,
    *,
    overlap: float,
    batch_size: int,
    bar: Any = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Predict in overlapping windows, blended by a Gaussian, and give the planes that are finished from D = 0 upwards.

    Held at a time: one window's depth of planes, for each channel and for the sum of weights.

    Args:
        predict: From windows (B, C, d, h, w) and their prompts to (B, K + 1, d, h, w).
        image: (C, D, H, W), at least one window large.
        size: Of a window.
        prompts: In the tensor; each window gets those that fall into it.
        overlap: Share of a window that the next one covers too, 0 to below 1.
        batch_size: Windows in one call of predict, which all have equally many prompts.
        bar: Its `update(n)` is called for every n windows that are done; `reset(total)` before. None: no bar.

    Yields:
        The first plane and (C, d, H, W) values. From the second time on it begins with the last plane of the time
        before, so that one can interpolate between any two planes; the next step overwrites it.

    Source: MONAI's sliding_window_inference with mode="gaussian", which keeps all of the volume.
    """
    shape = tuple(image.shape[1:])
    interval = [s if s == n else max(1, int(s * (1 - overlap))) for s, n in zip(size, shape, strict=True)]
    windows = [
        tuple(cut.start for cut in window) for window in import_monai().dense_patch_slices(shape, size, interval)
    ]
    weights = gaussian_weights(size)
    count = torch.zeros(min(size[0] + 1, shape[0]), *shape[1:])
    total, base = torch.empty(0), 0
    if bar is not None:
        bar.reset(len(windows))
    for d, row in groupby(windows, key=lambda window: window[0]):
        if d > base + 1:
            done = d - base
            yield base, _divide_by_weights(total, count, done)
            _drop_planes(total, count, done - 1)
            base = d - 1
        for starts, inside in _group_windows(row, prompts, size, batch_size):
            pixels = torch.stack([image[(slice(None), *_window_slices(start, size))] for start in starts])
            for start, values in zip(starts, predict(pixels, inside), strict=True):
                if not len(total):
                    total = torch.zeros(len(values), *count.shape)
                box = _window_slices((start[0] - base, *start[1:]), size)
                total[(slice(None), *box)].addcmul_(values, weights)
                count[box] += weights
            if bar is not None:
                bar.update(len(starts))
    yield base, _divide_by_weights(total, count, shape[0] - base)


def gaussian_weights(size: Voxel) -> torch.Tensor:
    """Weights (d, h, w) with which a window counts where several overlap."""
    return import_monai().compute_importance_map(size, mode="gaussian")


def import_monai() -> Any:
    """MONAI's module for windows, which takes seconds to import.

    Raises:
        InlayError: MONAI is not installed.
    """
    try:
        from monai.data import utils
    except ImportError:
        raise Unsupported(
            "sliding windows over scans takes MONAI, which is not installed; run: pip install 'inlay[volumes]'"
        ) from None
    return utils


def _window_slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))


def _group_windows(
    windows: Iterator[tuple], prompts: ScanPrompts, size: Voxel, most: int
) -> Iterator[tuple[list[tuple], list[ScanPrompts]]]:
    """Neighbours that have as many points and boxes as each other."""
    pairs = ((start, prompts.inside(start, size)) for start in windows)
    for _, alike in groupby(pairs, key=lambda pair: pair[1].count):
        while part := list(islice(alike, most)):
            yield [start for start, _ in part], [inside for _, inside in part]


def _divide_by_weights(total: torch.Tensor, count: torch.Tensor, planes: int) -> torch.Tensor:
    """Divide the sum by the weights in the first planes, once: their weight is 1 from then on."""
    total[:, :planes] /= count[:planes]
    count[:planes] = 1
    return total[:, :planes]


def _drop_planes(total: torch.Tensor, count: torch.Tensor, by: int) -> None:
    """Drop the first planes, without a second copy of the rest."""
    left = len(count) - by
    for plane in range(left):
        total[:, plane] = total[:, plane + by]
        count[plane] = count[plane + by]
    total[:, left:], count[left:] = 0, 0
