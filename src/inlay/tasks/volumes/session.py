"""Segmentation of a scan click by click: the encoder runs once for a window, each click runs the decoder.

A session holds the scan, its mask, and with each window a few numbers more: encodings of the last windows only, and
what undo needs up to a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from inlay.bases.device import Device, move_model
from inlay.tasks.volumes.correction import MaskSource, Region, correct_mask, find_box
from inlay.tasks.volumes.obedience import lift_clicked
from inlay.tasks.volumes.scan import Scan, ScanSource
from inlay.tasks.volumes.segment import Segmentation, empty_mask, open_mask, open_scan, paint_mask, put_values
from inlay.tasks.volumes.strokes import Stroke, check_stroke, choose_clicks, fill_lasso, fill_scribble, read_line
from inlay.tasks.volumes.windows import Grid, ScanPrompts, Voxel, batch_prompts, gaussian_weights

if TYPE_CHECKING:
    from inlay.tasks.adapter import Adapter

ENCODED = 8  # windows whose encoding is kept
HISTORY = 2**30  # bytes of what undo and redo need
HEARD = 256  # points in a window that the model hears, the newest


@dataclass(eq=False)
class Window:
    """A part of the scan that was looked at.

    Attributes:
        start: Its first voxel in the scan's tensor.
        encoded: The model's image_embeddings; None before the first answer, or where it was long ago.
        answers: Logits (1, K+1, d, h, w) float16 on the CPU, after each of its prompts that can be undone and one
            before: the last one is the answer that stands. None where a mask is corrected.
    """

    start: Voxel
    encoded: Any = None
    answers: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Step:
    """What one click, box, scribble or lasso did.

    Attributes:
        prompts: What the model was told.
        voxels: Own voxels (N, 3) whose class was said: clicked, or under a scribble or in a lasso.
        label: Their class.
        answers: Windows that answered, with their logits.
        change: Where a mask was corrected: the voxels there before and after.
    """

    prompts: ScanPrompts
    voxels: np.ndarray
    label: int
    answers: list[tuple[Window, torch.Tensor]]
    change: tuple[Region, np.ndarray, np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Memory."""
        changed = 0 if self.change is None else 2 * self.change[1].nbytes
        return changed + sum(logits.nbytes for _, logits in self.answers)


class VolumeSession:
    """Clicks, boxes, scribbles and lassos on one scan, and the mask that follows from all of them.

    The first click lays a window of `processor.crop` around itself, and the encoder runs on it. A click within windows
    that are there runs only prompt encoder and decoder, with all prompts so far and the logits of the answer before; a
    click elsewhere lays another window. Voxels that were clicked, scribbled on or enclosed by a lasso have the class
    that was said of them last, whatever the model answers. Outside of all windows the mask is background; where windows
    overlap, their probabilities are averaged with Gaussian weights.

    With `mask` the session corrects it: the decoder gets the mask as it is instead of earlier logits, and of its answer
    only those voxels are taken that become the class of the prompt and are connected to it. All else stays.

    Args:
        adapter: From `load_adapter`, trained on volumes.
        scan: A file, the files of several channels, or what `adapter.processor.read` made of them, as for `segment`.
        mask: What to correct, such as the result of `segment`: a Segmentation, a file, or voxels (X, Y, Z) on the
            scan's own grid, with the numbers that the classes have in masks. Default: nothing is there yet.
        device: Move the adapter there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: An adapter for something else, a file that is no scan, a mask of another grid or of other classes.
    """

    def __init__(
        self,
        adapter: Adapter,
        scan: Scan | ScanSource,
        *,
        mask: Segmentation | MaskSource | None = None,
        device: Device | None = None,
    ) -> None:
        self._adapter = adapter
        self._source, self._further, scan = open_scan(adapter, scan)
        self._given = None if mask is None else open_mask(adapter, scan, mask)
        move_model(adapter.model, device)
        self._affine = np.asarray(scan.affine, np.float64)
        self._size: Voxel = tuple(adapter.processor.crop)
        self._grid = Grid(scan, self._size)
        self._weights: torch.Tensor | None = None
        self._settled = ScanPrompts.none()  # prompts that cannot be undone any more
        self._settled_voxels: list[tuple[np.ndarray, int]] = []  # what was said of voxels with them
        self._steps: list[Step] = []
        self._undone: list[Step] = []
        self._windows: list[Window] = []
        self._encoded: list[Window] = []  # those whose encoding is kept, the last used at the end
        self._values: tuple[int, ...] | None = adapter.processor.values
        self._mask = empty_mask(self._grid, adapter.labels)  # k for class k
        self._begin()

    @property
    def mask(self) -> np.ndarray:
        """(X, Y, Z) on the scan's own grid: 0 background, else the class's number in `segmentation.names`. A copy."""
        return put_values(self._mask, self._values).copy()

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
        return self._add([said], [])

    def box(self, first: Sequence[float], last: Sequence[float], label: int | str | None = None) -> np.ndarray:
        """Say that an object lies between two corners x, y, z, both included, and get the new mask.

        A box that is larger than a window is cut to the windows that it reaches into. The label is as for `click`.

        Raises:
            InlayError: A corner outside of the scan, or no such class.
        """
        return self._add([], [(*first, *last, *_as_given(label))])

    def scribble(self, points: npt.ArrayLike, positive: bool = True, label: int | str | None = None) -> np.ndarray:
        """Say that a line belongs to a class, or to none, and get the new mask.

        Each voxel on the line gets the class; the model hears a few of them as clicks.

        Args:
            points: (N, 3), where the line begins, bends and ends: voxels x, y, z.
            positive: As for `click`.
            label: As for `click`.

        Raises:
            InlayError: A point outside of the scan, no points, or no such class.
        """
        for point in read_line(points):
            self._grid.locate(point, "a point")
        return self._draw(fill_scribble(points).clip(0, np.array(self._grid.own_shape) - 1), positive, label)

    def lasso(
        self,
        polygon: npt.ArrayLike,
        axis: int,
        index: float,
        positive: bool = True,
        label: int | str | None = None,
    ) -> np.ndarray:
        """Say that what a closed contour in one slice encloses belongs to a class, or to none, and get the new mask.

        Each voxel inside gets the class; the model hears a few of them as clicks. Nothing is said of what lies outside,
        which may be another class.

        Args:
            polygon: (N, 2), the corners, in voxels along the other two axes in their order.
            axis: That the slice is perpendicular to: 0 x, 1 y, 2 z.
            index: Of the slice along it.
            positive: As for `click`.
            label: As for `click`.

        Raises:
            InlayError: Fewer than three corners, a voxel outside of the scan, or no such class.
        """
        return self._draw(fill_lasso(polygon, axis, index), positive, label)

    def undo(self) -> np.ndarray:
        """Take the last prompt back; without one nothing happens. The mask is what it was before.

        Prompts before the last ones cannot be undone where more than 1 GB would be needed for it.
        """
        if self._steps:
            step = self._steps.pop()
            self._undone.append(step)
            for window, _ in step.answers:
                window.answers.pop()
            self._windows = [window for window in self._windows if window.answers or self._given is not None]
            self._show(step, after=False)
        return self.mask

    def redo(self) -> np.ndarray:
        """Say again what was undone last; without it, or after another prompt, nothing happens."""
        if self._undone:
            step = self._undone.pop()
            self._steps.append(step)
            self._keep(step.answers)
            self._show(step, after=True)
        return self.mask

    def reset(self) -> np.ndarray:
        """Forget all prompts and windows: the mask is empty, or the one that was given."""
        self._begin()
        return self.mask

    def _begin(self) -> None:
        self._settled, self._settled_voxels, self._steps, self._undone = ScanPrompts.none(), [], [], []
        self._windows, self._encoded = [], []
        self._mask[:] = 0 if self._given is None else self._given

    def _draw(self, voxels: np.ndarray, positive: bool, label: int | str | None) -> np.ndarray:
        """A stroke over voxels."""
        named = (self._values or (1,))[0] if label is None else label
        stroke = Stroke(voxels, named if positive else 0)
        check_stroke(stroke, self._grid.own_shape)
        heard = choose_clicks(voxels, self._grid.voxel_sizes).tolist()
        return self._add([(*voxel, stroke.label) for voxel in heard], [], stroke)

    def _add(self, points: list[Any], boxes: list[Any], stroke: Stroke | None = None) -> np.ndarray:
        """Answer in every window that holds a point, or the middle of a box, and in new ones around those in none.

        All points are of one class, which they get, or the voxels of the stroke that they stand for.
        """
        prompts = self._grid.make_prompts(points, boxes, self._adapter.labels, self._values)
        places = torch.cat([prompts.points, prompts.boxes.view(-1, 2, 3).mean(1)])
        everything = join_prompts([self._settled, *(step.prompts for step in self._steps), prompts])
        answers = [(w, self._answer(w, everything.inside(w.start, self._size))) for w in self._find_windows(places)]
        if stroke is None:
            clicked = np.array([point[:3] for point in points], np.float64).reshape(-1, 3)
            voxels = np.rint(clicked).astype(np.int64).clip(0, np.array(self._grid.own_shape) - 1)
        else:
            voxels = stroke.voxels
        label = int(prompts.labels[0]) if points else 0
        said, strokes = (voxels, label), [] if stroke is None else [stroke]
        change = None if self._given is None else self._correct(answers, points, boxes, strokes, said)
        step = Step(prompts, voxels, label, [] if change else answers, change)
        self._steps.append(step)  # from here on nothing fails: an interrupted click leaves no trace
        self._undone = []
        self._keep(answers if change is None else [])
        answered = [window for window, _ in answers]
        self._windows += [window for window in answered if window not in self._windows]
        self._encoded = [*(w for w in self._encoded if w not in answered), *answered]
        while len(self._encoded) > ENCODED:
            self._encoded.pop(0).encoded = None
        self._show(step, after=True)
        self._forget()
        return self.mask

    def _find_windows(self, places: torch.Tensor) -> list[Window]:
        """Those that hold at least one of the places (N, 3), and new ones so that each place is held."""
        found = [window for window in self._windows if any(self._holds(window, place) for place in places)]
        missed = [place for place in places if not any(self._holds(window, place) for window in found)]
        while missed:
            middle = (torch.stack(missed).amin(0) + torch.stack(missed).amax(0)) / 2
            window = self._lay_window(middle)
            if not any(self._holds(window, place) for place in missed):
                window = self._lay_window(missed[0])
            found.append(window)
            missed = [place for place in missed if not self._holds(window, place)]
        return found

    def _lay_window(self, centre: torch.Tensor) -> Window:
        """A window about a place, moved into the scan."""
        sides = zip(centre.tolist(), self._size, self._grid.shape, strict=True)
        d, h, w = (min(max(0, round(c) - side // 2), n - side) for c, side, n in sides)
        return Window((d, h, w))

    def _correct(
        self,
        answers: list[tuple[Window, torch.Tensor]],
        points: list[Any],
        boxes: list[Any],
        strokes: list[Stroke],
        said: tuple[np.ndarray, int],
    ) -> tuple[Region, np.ndarray, np.ndarray]:
        """Where the mask changes, and the voxels there before and after."""
        answered = self._mask.copy()
        self._paint(answers, answered)
        merged = correct_mask(self._mask, answered, points, boxes, self._adapter.labels, self._values, strokes)
        self._write_said(merged, [said])
        where = find_box(merged != self._mask)
        return where, self._mask[where].copy(), merged[where].copy()

    def _keep(self, answers: list[tuple[Window, torch.Tensor]]) -> None:
        """The answers stand from now on."""
        for window, logits in answers:
            window.answers.append(logits)
        self._windows += [window for window, _ in answers if window not in self._windows]

    def _show(self, step: Step, after: bool) -> None:
        """The mask after a step, or before it."""
        if step.change is not None:
            self._mask[step.change[0]] = step.change[2 if after else 1]
        else:
            self._mask[:] = 0
            self._paint([(window, window.answers[-1]) for window in self._windows], self._mask)
            self._write_said(self._mask)

    def _write_said(self, mask: np.ndarray, further: Sequence[tuple[np.ndarray, int]] = ()) -> None:
        """Give voxels the class that was said of them; what was said later counts."""
        for voxels, label in [*self._settled_voxels, *((step.voxels, step.label) for step in self._steps), *further]:
            mask[tuple(voxels.T)] = label

    def _forget(self) -> None:
        """Give up undoing the oldest steps where they take too much memory."""
        while len(self._steps) > 1 and sum(step.nbytes for step in self._steps) > HISTORY:
            oldest = self._steps.pop(0)
            self._settled = join_prompts([self._settled, oldest.prompts])
            self._settled_voxels.append((oldest.voxels, oldest.label))
            for window, logits in oldest.answers:
                if window.answers[0] is not logits:  # an answer before it that no undo comes back to
                    window.answers.pop(0)

    def _holds(self, window: Window, centre: torch.Tensor) -> bool:
        sides = zip(centre.tolist(), window.start, self._size, strict=True)
        return all(first - 0.5 <= c <= first + side - 0.5 for c, first, side in sides)

    @torch.inference_mode()
    def _answer(self, window: Window, prompts: ScanPrompts) -> torch.Tensor:
        """Logits for a window; its encoding is kept."""
        model = self._adapter.model
        weight = next(p for p in model.parameters() if p.is_floating_point())
        prompts = prompts.newest(HEARD)
        if self._given is not None:
            prompts = replace(prompts, mask=self._grid.cut_mask(self._mask, window.start, self._size))
        arguments: dict[str, Any] = batch_prompts([prompts], weight.device)
        if window.answers:
            arguments["input_masks"] = window.answers[-1].to(weight)
        if window.encoded is None:
            box = tuple(slice(first, first + side) for first, side in zip(window.start, self._size, strict=True))
            arguments["pixel_values"] = self._grid.image[(slice(None), *box)][None].to(weight)
        else:
            arguments["image_embeddings"] = window.encoded
        output = model(**arguments)
        window.encoded = output.image_embeddings
        return lift_clicked(output.logits.float(), [prompts]).cpu().half()

    def _paint(self, answers: list[tuple[Window, torch.Tensor]], mask: np.ndarray) -> None:
        """Write the answers of windows into a mask."""
        for window, _ in answers:
            paint_mask(self._grid, self._blended(window, answers), window.start, self._rows_of(window), mask)

    def _rows_of(self, window: Window) -> list[slice]:
        """The own voxels in a window, in the order D H W."""
        low = [first - 0.5 for first in window.start]
        return self._grid.find_rows(low, [first + side for first, side in zip(low, self._size, strict=True)])

    def _blended(self, window: Window, answers: list[tuple[Window, torch.Tensor]]) -> torch.Tensor:
        """Probabilities (K+1, d, h, w) in a window, those of the windows that overlap it included."""
        shifts = [(other, [b - a for a, b in zip(window.start, other.start, strict=True)]) for other, _ in answers]
        near = [one for one in shifts if all(abs(by) < side for by, side in zip(one[1], self._size, strict=True))]
        logits = dict(answers)
        total = logits[window][0].float().softmax(0)
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
            values = logits[other][0].float().softmax(0)[(slice(None), *there)]
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
