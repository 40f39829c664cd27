"""Segmentation of a scan click by click: the encoder runs once for a window, each click runs the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inlay.bases.device import Device, move_model
from inlay.tasks.volumes.scan import Scan, ScanSource
from inlay.tasks.volumes.segment import Segmentation, empty_mask, open_scan, paint_mask, put_values
from inlay.tasks.volumes.windows import Grid, ScanPrompts, Voxel, batch_prompts, gaussian_weights

if TYPE_CHECKING:
    from inlay.tasks.adapter import Adapter


@dataclass(eq=False)
class Window:
    """A part of the scan that was looked at.

    Attributes:
        start: Its first voxel in the scan's tensor.
        encoded: The model's image_embeddings; None before the first answer.
        answers: Logits (1, K+1, d, h, w) float16 on the CPU, after each of its prompts, with the number of all prompts
            of the session then: the last one is the answer that stands.
    """

    start: Voxel
    encoded: Any = None
    answers: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class VolumeSession:
    """Clicks and boxes on one scan, and the mask that follows from all of them.

    The first click lays a window of `processor.crop` around itself, and the encoder runs on it. A click within windows
    that are there runs only prompt encoder and decoder, with all prompts so far and the logits of the answer before; a
    click elsewhere lays another window. Outside of all windows the mask is background; where windows overlap, their
    probabilities are averaged with Gaussian weights.

    Args:
        adapter: From `load_adapter`, trained on volumes.
        scan: A file, the files of several channels, or what `adapter.processor.read` made of them, as for `segment`.
        device: Move the adapter there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: An adapter for something else, a file that is no scan.
    """

    def __init__(self, adapter: Adapter, scan: Scan | ScanSource, *, device: Device | None = None) -> None:
        self._adapter = adapter
        self._source, self._further, scan = open_scan(adapter, scan)
        move_model(adapter.model, device)
        self._affine = np.asarray(scan.affine, np.float64)
        self._size: Voxel = tuple(adapter.processor.crop)
        self._grid = Grid(scan, self._size)
        self._weights: torch.Tensor | None = None
        self._prompts: list[ScanPrompts] = []
        self._windows: list[Window] = []
        self._mask = empty_mask(self._grid, adapter.labels)  # k for class k
        self._values: tuple[int, ...] | None = adapter.processor.values

    @property
    def mask(self) -> np.ndarray:
        """(X, Y, Z) on the scan's own grid: 0 background, else the class's number in `segmentation.names`. A copy."""
        return put_values(self._mask, self._values).copy()

    @property
    def seen(self) -> np.ndarray:
        """(X, Y, Z): true in the windows that were looked at, outside of which the mask is background."""
        seen = np.zeros(self._grid.own_shape, bool)
        own = seen.transpose(self._grid.axes)
        for window in self._windows:
            own[tuple(self._rows_of(window))] = True
        return seen

    @property
    def segmentation(self) -> Segmentation:
        """The mask with its affine and labels, to save or to draw."""
        labels = list(self._adapter.labels)
        return Segmentation(self.mask, self._affine, labels, None, self._source, self._values, self._further)

    def click(self, point: Sequence[float], positive: bool = True, label: int | str | None = None) -> np.ndarray:
        """Say that a voxel belongs to a class, or to none, and get the new mask.

        Args:
            point: x, y, z of the voxel in the scan's own grid, from 0 as nibabel indexes it.
            positive: False: the voxel is background, whatever the label.
            label: The class, its number in the mask or its name; None: the first one.

        Raises:
            InlayError: A point outside of the scan, or no such class.
        """
        said = (*point, *_as_given(label)) if positive else (*point, 0)
        prompts = self._grid.make_prompts([said], [], self._adapter.labels, self._values)
        return self._add(prompts, prompts.points[0])

    def box(self, first: Sequence[float], last: Sequence[float], label: int | str | None = None) -> np.ndarray:
        """Say that an object lies between two corners x, y, z, both included, and get the new mask.

        A box that is larger than a window is cut to the windows that it reaches into. The label is as for `click`.

        Raises:
            InlayError: A corner outside of the scan, or no such class.
        """
        prompts = self._grid.make_prompts([], [(*first, *last, *_as_given(label))], self._adapter.labels, self._values)
        return self._add(prompts, prompts.boxes[0].view(2, 3).mean(0))

    def undo(self) -> np.ndarray:
        """Take the last click or box back; without one nothing happens. The mask is what it was before."""
        if self._prompts:
            for window in self._windows:
                if window.answers[-1][0] == len(self._prompts):
                    window.answers.pop()
            self._windows = [window for window in self._windows if window.answers]
            self._prompts.pop()
            self._paint()
        return self.mask

    def reset(self) -> np.ndarray:
        """Forget all clicks, boxes and windows."""
        self._prompts, self._windows = [], []
        self._mask[:] = 0
        return self.mask

    def _add(self, prompts: ScanPrompts, centre: torch.Tensor) -> np.ndarray:
        """Answer in every window that holds the prompt's centre, or in a new one around it."""
        sides = zip(centre.tolist(), self._size, self._grid.shape, strict=True)
        around = tuple(min(max(0, round(c) - side // 2), n - side) for c, side, n in sides)
        held = [w for w in self._windows if self._holds(w, centre)] or [Window(around)]
        everything = join_prompts([*self._prompts, prompts])
        answers = [self._answer(window, everything.inside(window.start, self._size)) for window in held]
        self._prompts.append(prompts)  # from here on nothing fails: an interrupted click leaves no trace
        for window, logits in zip(held, answers, strict=True):
            window.answers.append((len(self._prompts), logits))
        self._windows += [window for window in held if window not in self._windows]
        self._paint()
        return self.mask

    def _holds(self, window: Window, centre: torch.Tensor) -> bool:
        sides = zip(centre.tolist(), window.start, self._size, strict=True)
        return all(first - 0.5 <= c <= first + side - 0.5 for c, first, side in sides)

    @torch.inference_mode()
    def _answer(self, window: Window, prompts: ScanPrompts) -> torch.Tensor:
        """Logits for a window; its encoding is kept."""
        model = self._adapter.model
        weight = next(p for p in model.parameters() if p.is_floating_point())
        arguments: dict[str, Any] = batch_prompts([prompts], weight.device)
        if window.answers:
            arguments["input_masks"] = window.answers[-1][1].to(weight)
        if window.encoded is None:
            box = tuple(slice(first, first + side) for first, side in zip(window.start, self._size, strict=True))
            arguments["pixel_values"] = self._grid.image[(slice(None), *box)][None].to(weight)
        else:
            arguments["image_embeddings"] = window.encoded
        output = model(**arguments)
        window.encoded = output.image_embeddings
        return output.logits.cpu().half()

    def _paint(self) -> None:
        """The mask anew from the windows' last answers."""
        self._mask[:] = 0
        for window in self._windows:
            paint_mask(self._grid, self._blended(window), window.start, self._rows_of(window), self._mask)

    def _rows_of(self, window: Window) -> list[slice]:
        """The own voxels in a window, in the order D H W."""
        low = [first - 0.5 for first in window.start]
        return self._grid.find_rows(low, [first + side for first, side in zip(low, self._size, strict=True)])

    def _blended(self, window: Window) -> torch.Tensor:
        """Probabilities (K+1, d, h, w) in a window, those of the windows that overlap it included."""
        shifts = [(other, [b - a for a, b in zip(window.start, other.start, strict=True)]) for other in self._windows]
        near = [one for one in shifts if all(abs(by) < side for by, side in zip(one[1], self._size, strict=True))]
        total = window.answers[-1][1][0].float().softmax(0)
        if len(near) == 1:  # itself
            return total
        if self._weights is None:
            self._weights = gaussian_weights(self._size)
        count = self._weights.clone()
        total *= count
        for other, shift in near:
            if other is window:
                continue
            here = tuple(slice(max(0, by), min(side, side + by)) for by, side in zip(shift, self._size, strict=True))
            there = tuple(slice(max(0, -by), min(side, side - by)) for by, side in zip(shift, self._size, strict=True))
            values = other.answers[-1][1][0].float().softmax(0)[(slice(None), *there)]
            total[(slice(None), *here)] += values * self._weights[there]
            count[here] += self._weights[there]
        return total / count


def _as_given(label: int | str | None) -> tuple[int | str, ...]:
    """What stands behind a point or a box: nothing means the first class."""
    return () if label is None else (label,)


def join_prompts(prompts: Sequence[ScanPrompts]) -> ScanPrompts:
    """All of them as one."""
    parts = ([getattr(one, name) for one in prompts] for name in ("points", "labels", "boxes", "box_labels"))
    return ScanPrompts(*(torch.cat(part) for part in parts))
