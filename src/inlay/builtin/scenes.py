"""Procedural scenes with the outline of every object in them, to learn promptable segmentation from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Floats = npt.NDArray[np.float32]
Kind = Literal["mixed", "cells"]
FIGURES = ("blob", "box", "polygon", "tube", "crescent")
MOST = 40  # objects of a scene
_LEAST = 20  # pixels: what shows less than that is no object


@dataclass(frozen=True)
class Scenes:
    """Images and what is in them.

    Attributes:
        images: (N, H, W, 3) uint8, RGB; a grey image has three equal channels.
        instances: (N, H, W) uint8: 0 = background, k = the k-th object where it shows.
        parents: (N, MOST + 1) uint8: the object that holds object k inside its outline (a cell its nucleus), or 0.
    """

    images: npt.NDArray[np.uint8]
    instances: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]


def generate_scenes(count: int, *, seed: int, size: int = 128, kind: Kind = "mixed") -> Scenes:
    """Scenes that are the same for the same seed; scene i does not depend on `count`.

    A `mixed` scene holds blobs, boxes, polygons, tubes and crescents in any number, size and contrast, inside, over and
    next to each other, or many that are alike; half the scenes are grey. `cells` are crowded, drawn by their walls and
    nuclei only: what they have inside looks as the ground does.

    Args:
        count: Number of scenes, at least 0.
        seed: Chooses the scenes; other seeds give independent ones.
        size: Height and width in pixels, at least 32.
        kind: mixed or cells.

    Raises:
        ValueError: count is negative, size is under 32, or there is no such kind.
    """
    if count < 0 or size < 32 or kind not in ("mixed", "cells"):
        raise ValueError(f"expected count >= 0, size >= 32, kind mixed or cells; got {count}, {size}, {kind!r}")
    drawn = [_Scene(np.random.default_rng((seed, i)), size).draw(kind) for i in range(count)]
    images, instances, parents = zip(*drawn, strict=True) if drawn else ((), (), ())
    return Scenes(
        np.array(images, np.uint8).reshape(count, size, size, 3),
        np.array(instances, np.uint8).reshape(count, size, size),
        np.array(parents, np.uint8).reshape(count, MOST + 1),
    )


@dataclass(frozen=True)
class _Place:
    """Centre and reach (from the centre to the farthest point) of an object, in pixels."""

    x: float
    y: float
    reach: float


@dataclass(frozen=True)
class _Look:
    """What objects of one sort look like: relative to what is under them, per channel, of values from 0 to 1."""

    figure: int
    colour: Floats  # added to what is under the object; (C,)
    texture: Floats  # amplitude; (C,)
    period: float  # of the texture, in pixels
    striped: bool
    wall: Floats  # added along the outline; (C,)
    opacity: float
    soft: float  # width of the edge, in pixels


class _Scene:
    """One scene while it is drawn: canvas (C, H, W), instances (H, W) and parents."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.channels = 1 if rng.random() < 0.5 else 3
        self.axis = np.arange(size, dtype=np.float32)
        self.instances = np.zeros((size, size), np.uint8)
        self.parents = np.zeros(MOST + 1, np.uint8)
        self.count = 0
        self.canvas = self._ground()

    def draw(self, kind: Kind) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Image (H, W, 3), instances (H, W) and parents (MOST + 1)."""
        if kind == "cells":
            self._cells()
        elif self.rng.random() < 0.4:
            self._population()
        else:
            self._gathering()
        image = self._camera()
        return image, *self._visible()

    def _ground(self) -> Floats:
        """A colour, a slope of it and a slow unevenness; in half the scenes a finer texture; (C, H, W)."""
        rng, c = self.rng, self.channels
        base = rng.uniform(0.1, 0.9, c).astype(np.float32)
        if rng.random() < 0.25:
            base[:] = rng.uniform(0.0, 0.15)  # a dark field, as in fluorescence
        slope = rng.normal(0, 0.12, (2, c, 1)).astype(np.float32) / self.size
        centred = self.axis - self.size / 2
        canvas = base[:, None, None] + slope[0][:, :, None] * centred + slope[1][:, None] * centred[:, None]
        canvas = canvas + self._clouds(rng.uniform(20, 60), self.size, self.size) * rng.uniform(0, 0.1)
        if rng.random() < 0.4:
            canvas = canvas + self._clouds(rng.uniform(2, 12), self.size, self.size) * rng.uniform(0, 0.09)
        return canvas.astype(np.float32)

    def _clouds(self, period: float, height: int, width: int) -> Floats:
        """Smooth noise of about unit variance with features of `period` pixels; (H, W)."""
        cells = (int(height / period) + 3, int(width / period) + 3)
        coarse = self.rng.standard_normal(cells, np.float32) * 1.5
        x, y = self.rng.random(2)
        box = (x, y, x + width / period, y + height / period)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR, box=box))

    def _look(self) -> _Look:
        rng, c = self.rng, self.channels
        contrast = np.exp(rng.uniform(np.log(0.09), np.log(0.6)))
        signs = np.where(rng.random() < 0.5, 1, -1) if rng.random() < 0.5 else np.where(rng.random(c) < 0.5, 1, -1)
        colour = signs * contrast * rng.uniform(0.3, 1.2, c)
        amplitude = rng.uniform(0, 0.25) if rng.random() < 0.5 else rng.uniform(0, 0.04)
        if contrast < 0.13:
            amplitude = rng.uniform(0.1, 0.25)  # told by its texture
        walled = rng.random() < 0.3
        return _Look(
            figure=int(rng.choice(5, p=(0.45, 0.1, 0.15, 0.2, 0.1))),
            colour=colour.astype(np.float32),
            texture=(amplitude * rng.uniform(0.5, 1.0, c)).astype(np.float32),
            period=float(np.exp(rng.uniform(np.log(2), np.log(14)))),
            striped=bool(rng.random() < 0.3),
            wall=(walled * rng.uniform(-0.4, 0.4, c)).astype(np.float32),
            opacity=float(rng.uniform(0.6, 1.0)),
            soft=float(rng.uniform(0.7, 3.0)),
        )

    def _place(self, low: float, high: float) -> _Place:
        """Anywhere, with a reach of low to high pixels in an image of 128."""
        reach = float(np.exp(self.rng.uniform(np.log(low), np.log(high)))) * self.size / 128
        x, y = self.rng.uniform(0.02, 0.98, 2) * self.size
        return _Place(float(x), float(y), reach)

    def _gathering(self) -> None:
        """A few objects that differ, some with others inside."""
        for _ in range(self.rng.integers(2, 9)):
            self._nest(self._place(8, 56), depth=0)

    def _nest(self, place: _Place, depth: int, parent: int = 0) -> None:
        number = self._put(place, self._look(), parent)
        if not number or depth == 2 or place.reach < 14 or self.rng.random() > 0.45:
            return
        for _ in range(self.rng.integers(1, 4)):
            x, y = self.rng.uniform(-0.5, 0.5, 2) * place.reach
            reach = place.reach * self.rng.uniform(0.2, 0.6)
            self._nest(_Place(place.x + x, place.y + y, reach), depth + 1, number)

    def _population(self) -> None:
        """Many objects of one or two sorts, as under a microscope; they touch and overlap."""
        looks = [self._look() for _ in range(self.rng.integers(1, 3))]
        inner = self._look() if self.rng.random() < 0.4 else None
        reach = self.rng.uniform(5, 18)
        for _ in range(self.rng.integers(5, 24 if inner is None else 16)):
            place = self._place(reach * 0.7, reach * 1.4)
            number = self._put(place, looks[self.rng.integers(len(looks))], 0)
            if inner is not None and number:
                shift = self.rng.uniform(-0.25, 0.25, 2) * place.reach
                within = _Place(place.x + shift[0], place.y + shift[1], place.reach * self.rng.uniform(0.35, 0.6))
                self._put(within, inner, number)

    def _cells(self) -> None:
        """Crowded round cells without a filling of their own: a wall, and mostly a nucleus, which belongs to it."""
        rng, c = self.rng, self.channels
        sign = 1 if self.canvas.mean() < 0.5 else -1
        none = np.zeros(c, np.float32)
        wall = (sign * rng.uniform(0.15, 0.5) * rng.uniform(0.5, 1, c)).astype(np.float32)
        nucleus = (sign * rng.uniform(0.1, 0.5) * rng.uniform(0.5, 1, c)).astype(np.float32)
        cell = _Look(0, none, none, 5.0, False, wall, 1.0, 1.0)
        inner = _Look(0, nucleus, (0.3 * np.abs(nucleus)).astype(np.float32), 3.0, False, none, 1.0, 1.5)
        reach, tries = rng.uniform(12, 22), int(rng.integers(30, 60))
        taken: list[_Place] = []
        for _ in range(tries):
            place = self._place(reach * 0.75, reach * 1.3)
            if self.count >= MOST // 2 or any(
                np.hypot(place.x - p.x, place.y - p.y) < 0.75 * (place.reach + p.reach) for p in taken
            ):
                continue
            taken.append(place)
            number = self._put(place, cell, 0, plump=True)
            if number and rng.random() < 0.8:
                shift = rng.uniform(-0.25, 0.25, 2) * place.reach
                within = _Place(place.x + shift[0], place.y + shift[1], place.reach * rng.uniform(0.3, 0.5))
                self._put(within, inner, number, plump=True, part=True)

    def _put(self, place: _Place, look: _Look, parent: int, *, plump: bool = False, part: bool = False) -> int:
        """Draw one object over what is there, or inside of `parent`; gives its number, 0 if it does not show.

        Args:
            place: Where, and how large.
            look: What it is like.
            parent: The object that it is inside of, 0 for none.
            plump: Nearly round.
            part: It is drawn, but no object of its own: it stays part of its parent.
        """
        margin = place.reach * 1.25 + 3
        x0, x1 = max(0, int(place.x - margin)), min(self.size, int(place.x + margin) + 1)
        y0, y1 = max(0, int(place.y - margin)), min(self.size, int(place.y + margin) + 1)
        if x1 - x0 < 3 or y1 - y0 < 3 or self.count == MOST:
            return 0
        window = (slice(y0, y1), slice(x0, x1))
        u, v = self.axis[x0:x1] - np.float32(place.x), self.axis[y0:y1, None] - np.float32(place.y)
        level = self._outline(u / np.float32(place.reach), v / np.float32(place.reach), look.figure, plump)
        level *= np.float32(place.reach)  # about pixels from the outline, negative inside
        within = level < 0
        if parent:
            inside = self.instances[window] == parent
            within &= inside
        if np.count_nonzero(within) < _LEAST:
            return 0
        cover = np.clip(0.5 - level / np.float32(look.soft), 0, 1) * np.float32(look.opacity)
        if parent:
            cover *= inside
        self._paint(window, level, cover, look)
        if part:
            return 0
        self.count += 1
        self.instances[window][within] = self.count
        self.parents[self.count] = parent
        return self.count

    def _paint(self, window: tuple[slice, slice], level: Floats, cover: Floats, look: _Look) -> None:
        height, width = level.shape
        canvas = self.canvas[:, window[0], window[1]]  # C h w, a view
        # what an opaque object adds is its colour over that under its middle, so that the ground does not shine through
        under = canvas[:, height // 2, width // 2, None, None]
        fill = under + look.colour[:, None, None]
        fill = np.where((fill < 0) | (fill > 1), under - look.colour[:, None, None], fill)
        if look.texture.max() > 0.01:
            fill = fill + self._grain(height, width, look) * look.texture[:, None, None]
        opaque = bool(np.any(look.colour)) or bool(np.any(look.texture))
        if opaque:
            canvas += (fill - canvas) * cover
        if np.any(look.wall):
            canvas += look.wall[:, None, None] * np.clip(1.6 - np.abs(level + 1), 0, 1)

    def _grain(self, height: int, width: int, look: _Look) -> Floats:
        if not look.striped:
            return self._clouds(look.period, height, width)
        angle, phase = self.rng.uniform(0, 2 * np.pi, 2)
        rate = 2 * np.pi / (look.period + 2)
        along = np.cos(angle) * rate * self.axis[:width] + np.sin(angle) * rate * self.axis[:height, None] + phase
        return np.sin(along, dtype=np.float32) * 1.3

    def _outline(self, u: Floats, v: Floats, figure: int, plump: bool) -> Floats:
        """Level (h, w) of a figure of reach 1 at a random angle, negative inside; u (w,), v (h, 1)."""
        rng = self.rng
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        p, q = u * cos + v * sin, v * cos - u * sin
        name = FIGURES[figure]
        bend = rng.uniform(0, 0.06 if plump else 0.2 if name == "blob" else 0.1, 4).astype(np.float32)
        rate, phase = rng.uniform(1.5, 5.0, 4).astype(np.float32), rng.uniform(0, 6.3, 4).astype(np.float32)
        if name != "box" or rng.random() < 0.3:  # bent space makes shapes organic
            p, q = (
                p + bend[0] * np.sin(rate[0] * q + phase[0]) + bend[1] * np.sin(rate[1] * p + phase[1]),
                q + bend[2] * np.sin(rate[2] * p + phase[2]) + bend[3] * np.sin(rate[3] * q + phase[3]),
            )
        slim = np.float32(rng.uniform(0.75, 1.0) if plump else rng.uniform(0.35, 1.0))
        if name == "blob":
            return np.float32(slim) * (np.sqrt(p * p + (q / slim) ** 2) - np.float32(0.85))
        if name == "box":
            return np.maximum(np.abs(p) - np.float32(0.8), np.abs(q) - np.float32(0.65) * slim)
        if name == "polygon":
            sides = int(rng.integers(3, 8))
            angles = (np.arange(sides) + rng.uniform(-0.25, 0.25, sides)) * (2 * np.pi / sides)
            level = np.full_like(p, -1)
            for a, r in zip(angles, rng.uniform(0.4, 0.7, sides), strict=True):
                level = np.maximum(level, np.float32(np.cos(a)) * p + np.float32(np.sin(a)) * q - np.float32(r))
            return level
        if name == "tube":
            thick = np.float32(rng.uniform(0.06, 0.25))
            wave = np.float32(rng.uniform(0, 0.45)) * np.sin(np.float32(rng.uniform(1.5, 5)) * p + phase[0])
            return np.maximum(np.abs(q - wave) * np.float32(0.8) - thick, np.abs(p) - np.float32(0.95))
        bite = np.float32(rng.uniform(0, 0.5))  # crescent or, with a small bite in the middle, ring
        hole = np.float32(rng.uniform(0.45, 0.75))
        return np.maximum(np.hypot(p, q) - np.float32(0.9), hole - np.hypot(p - bite, q))

    def _camera(self) -> npt.NDArray[np.uint8]:
        """What a camera makes of it: blur, noise, speckle, and a range of values; (H, W, 3)."""
        rng, canvas = self.rng, self.canvas
        noise = rng.uniform(0, 0.08) if rng.random() < 0.7 else 0.0
        if noise:
            grain = rng.standard_normal(canvas.shape, np.float32)
            if rng.random() < 0.3:
                grain = grain * np.clip(canvas, 0.05, 1) * 2  # speckle: more where it is bright
            canvas = canvas + grain * np.float32(noise)
        if rng.random() < 0.3:  # little of the range is used
            low, span = rng.uniform(0, 0.5), rng.uniform(0.3, 0.6)
            canvas = np.float32(low) + canvas * np.float32(span)
        pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)  # C H W
        image = Image.fromarray(pixels[0] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.4)))
        return np.asarray(image.convert("RGB"))

    def _visible(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Instances and parents, numbered anew without those that hardly show."""
        shows = np.bincount(self.instances.ravel(), minlength=MOST + 1) >= _LEAST
        shows[0] = False
        number = (np.cumsum(shows) * shows).astype(np.uint8)
        parents = np.zeros_like(self.parents)
        for old in np.flatnonzero(shows):
            holder = int(self.parents[old])
            while holder and not shows[holder]:
                holder = int(self.parents[holder])
            parents[number[old]] = number[holder]
        return number[self.instances], parents
