"""Procedural paintings with captions, to learn text to image from, and two subjects that no such painting holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Floats = npt.NDArray[np.float32]
Colour = tuple[int, ...]  # red, green and blue, from 0 to 255

BACKGROUNDS = ("grass", "sand", "water", "night", "snow", "brick")
SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")
COLOURS: dict[str, Colour] = {
    "red": (222, 36, 36),
    "yellow": (250, 214, 30),
    "green": (44, 196, 84),
    "blue": (36, 84, 232),
    "purple": (158, 44, 190),
    "white": (250, 250, 250),
}
TEXTURES = ("plain", "striped", "dotted")
CLASSES = ("dog", "toy")
PLACES = ("left of", "right of", "above", "below")
RARE_TOKENS = ("sks", "zwx", "ohwx")  # words of the vocabulary that no caption holds

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_INK = (24, 20, 28)  # outlines and eyes
_FINE = 4  # an object is drawn this many times larger, then reduced


@dataclass(frozen=True)
class Thing:
    """One object of a scene: a shape, or any dog or toy of that colour."""

    kind: str  # of SHAPES or CLASSES
    colour: str  # of COLOURS
    texture: str = "plain"  # of TEXTURES; dogs and toys are plain


@dataclass(frozen=True)
class Scene:
    """What a painting shows: one thing, or two of which the first is at `place` of the second."""

    background: str  # of BACKGROUNDS
    things: tuple[Thing, ...]
    place: str | None = None  # of PLACES, if there are two


@dataclass(frozen=True)
class Paintings:
    """Images (N, H, W, 3) uint8, RGB, where things are in them (N, H, W), and the caption and scene of each."""

    images: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    captions: list[str]
    scenes: list[Scene]


def generate_paintings(count: int, *, seed: int, size: int = 64, held_out: bool = False) -> Paintings:
    """Captioned paintings, the same for the same seed; painting i does not depend on `count`.

    Half hold two things. Half the captions begin with "a photo of" or the like; some leave out a colour, the place or
    the background. One in six triples of colour, shape and background is kept apart (`is_held_out`).

    Args:
        count: Number of paintings, at least 0.
        seed: Chooses the paintings; other seeds give independent ones.
        size: Height and width in pixels, at least 32.
        held_out: Whether the first thing of every painting is of a triple that is kept apart; otherwise none is.

    Raises:
        ValueError: count is negative, or size is under 32.
    """
    if count < 0 or size < 32:
        raise ValueError(f"expected count >= 0 and size >= 32, but got count={count} and size={size}")
    images, masks = np.empty((count, size, size, 3), np.uint8), np.empty((count, size, size), np.bool_)
    captions, scenes = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i, held_out))
        scene = draw_scene(rng, held_out)
        images[i], masks[i] = _paint_with_mask(scene, rng, size)
        captions.append(describe_scene(scene, rng))
        scenes.append(scene)
    return Paintings(images, masks, captions, scenes)


def is_held_out(thing: Thing, background: str) -> bool:
    """Whether no training painting shows a shape of this kind and colour on this background.

    Each pair of colour and shape is seen on five of the six backgrounds.
    """
    if thing.kind not in SHAPES:
        return False
    total = SHAPES.index(thing.kind) + list(COLOURS).index(thing.colour) + BACKGROUNDS.index(background)
    return total % len(BACKGROUNDS) == 0


def draw_scene(rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """Any scene; or one whose first thing is a held-out shape (True), or with no such shape (False)."""
    background = _choose(rng, BACKGROUNDS)
    kinds = [_choose(rng, CLASSES if rng.random() < 0.25 else SHAPES) for _ in range(1 if rng.random() < 0.5 else 2)]
    if len(kinds) == 2 and rng.random() < 0.1:
        kinds = list(rng.permutation(CLASSES))
    if held_out and kinds[0] in CLASSES:
        kinds[0] = _choose(rng, SHAPES)
    things: list[Thing] = []
    for kind in kinds:
        texture = _choose(rng, TEXTURES) if kind in SHAPES and rng.random() < 0.6 else "plain"
        every = [Thing(kind, colour, texture) for colour in COLOURS if all(colour != t.colour for t in things)]
        if held_out is not None:
            wanted = held_out and not things
            every = [thing for thing in every if is_held_out(thing, background) == wanted]
        things.append(every[int(rng.integers(len(every)))])
    return Scene(background, tuple(things), _choose(rng, PLACES) if len(things) == 2 else None)


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# ---- captions ----


def describe_scene(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The caption of a scene: its full and plain wording, or with a generator one of many."""
    free = rng is not None
    rng = rng or np.random.default_rng(0)
    words = [_name_thing(thing, whole=not free or rng.random() < 0.85) for thing in scene.things]
    text = words[0]
    if scene.place is not None:
        wording = rng.random() if free else 0.0
        if wording < 0.4:
            text = f"{words[0]} {scene.place} {words[1]}"
        elif wording < 0.7:
            text = f"{words[1]} {_OPPOSITE[scene.place]} {words[0]}"
        else:
            first, second = rng.permutation(words)
            text = f"{first} and {second}"
    if not free:
        return f"{text} on {scene.background}"
    opening = _choose(rng, ("", "", "", "a photo of ", "a painting of ", "an image of "))
    ending = rng.random()
    if ending < 0.85:
        text = f"{text} {_choose(rng, _WHERE[scene.background])}"
    return opening + text


_WHERE = {
    "grass": ("on grass", "on grass", "on the grass"),
    "sand": ("on sand", "on sand", "on the sand"),
    "water": ("on water", "on water", "in the water"),
    "night": ("on night", "at night", "in the night"),
    "snow": ("on snow", "on snow", "in the snow"),
    "brick": ("on brick", "on brick", "on a brick wall"),
}


def _name_thing(thing: Thing, whole: bool) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    colour = f"{thing.colour} " if whole else ""
    return f"a {texture}{colour}{thing.kind}"


# ---- scenes ----


def paint_scene(
    scene: Scene, rng: np.random.Generator, *, size: int = 64, looks: Mapping[str, Dog | Toy] | None = None
) -> npt.NDArray[np.uint8]:
    """An image (H, W, 3) of a scene; where things lie and how they are turned is drawn from the generator.

    `looks` says what dogs or toys look like, whatever their colour: with `SUBJECTS`, they are the embedded subjects.
    """
    return _paint_with_mask(scene, rng, size, looks)[0]


def _paint_with_mask(
    scene: Scene, rng: np.random.Generator, size: int, looks: Mapping[str, Dog | Toy] | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """An image (H, W, 3) and where things are in it (H, W)."""
    image, mask = Image.fromarray(_paint_background(scene.background, rng, size)), Image.new("L", (size, size))
    for thing, (x, y, reach) in zip(scene.things, _draw_places(scene, rng), strict=True):
        side = round(2 * reach * size / 64)
        sprite = _paint_thing(thing, (looks or {}).get(thing.kind), rng, side)
        corner = round((x - reach) * size / 64), round((y - reach) * size / 64)
        image.paste(sprite, corner, sprite)
        mask.paste(255, (*corner, corner[0] + side, corner[1] + side), sprite)
    grain = rng.normal(0, 2, (size, size, 1))
    return np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8), np.asarray(mask) > 127


def _draw_places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and reach of each thing, in pixels of a 64 x 64 image."""
    if scene.place is None:
        reach = rng.uniform(15, 22)
        x, y = rng.uniform(reach + 1, 63 - reach, 2)
        return [(x, y, reach)]
    reaches = rng.uniform(12.5, 15, 2)
    along = np.array([15.5, 48.5]) + rng.uniform(-0.5, 0.5, 2)
    across = rng.uniform(22, 42, 2)
    if scene.place in ("right of", "below"):
        along = along[::-1]
    x, y = (along, across) if scene.place in ("left of", "right of") else (across, along)
    return [(float(x[i]), float(y[i]), float(reaches[i])) for i in range(2)]


def _paint_background(name: str, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """A textured ground (H, W, 3)."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (64 / size)
    tint = rng.uniform(-8, 8, 3)
    if name == "grass":
        blades = np.sin(x * 1.2 + 1.3 * np.sin(y * 0.45 + rng.uniform(0, 6)) + rng.uniform(0, 6))
        level, base, span = blades, (84, 140, 52), (20, 24, 14)
    elif name == "sand":
        ripples = np.sin(y * 0.55 + 1.6 * np.sin(x * rng.uniform(0.05, 0.12) + rng.uniform(0, 6)) + rng.uniform(0, 6))
        level, base, span = ripples, (214, 180, 122), (12, 13, 14)
    elif name == "water":
        waves = np.sin(y * 0.9 + 1.2 * np.sin(x * 0.35 + rng.uniform(0, 6)) + rng.uniform(0, 6))
        level, base, span = waves, (44, 128, 184), (24, 30, 26)
    elif name == "night":
        level, base, span = np.zeros_like(x), (18, 20, 52), (190, 190, 150)
        for _ in range(int(rng.integers(8, 15))):
            star = np.hypot(x - rng.uniform(0, 64), y - rng.uniform(0, 64))
            level = np.maximum(level, np.clip(rng.uniform(1.2, 2.2) - star, 0, 1))
    elif name == "snow":
        drifts = np.sin(x * 0.11 + rng.uniform(0, 6)) * np.sin(y * 0.16 + rng.uniform(0, 6))
        level, base, span = drifts, (218, 230, 240), (14, 10, 6)
    else:
        row = (y + rng.integers(8)) // 8
        across = (x + rng.uniform(0, 16) + row % 2 * 8) % 16
        mortar = (np.diff(row, axis=0, prepend=row[:1] - 1) > 0) | (across < 1.6)
        level, base, span = mortar.astype(np.float32), (158, 82, 62), (48, 84, 88)
    ground = np.array(base) + tint + level[..., None] * np.array(span)
    return np.clip(ground, 0, 255).astype(np.uint8)


# ---- things ----


def _paint_thing(thing: Thing, look: Dog | Toy | None, rng: np.random.Generator, side: int) -> Image.Image:
    """A thing on a transparent square of `side` pixels, outlined in ink."""
    brush = _Brush(side * _FINE)
    if thing.kind in SHAPES:
        _paint_shape(brush, thing)
        turn = rng.uniform(-15, 15)
    else:
        look = look or draw_look(thing, rng)
        if isinstance(look, Dog):
            _paint_dog(brush, look, rng)
        else:
            _paint_toy(brush, look, rng)
        turn = rng.uniform(-12, 12)
    fine = brush.image.rotate(turn, Image.Resampling.BILINEAR)
    if thing.kind in CLASSES and rng.random() < 0.5:
        fine = fine.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = fine.resize((side, side), Image.Resampling.BOX)
    outlined = Image.new("RGBA", sprite.size, _INK)
    outlined.putalpha(sprite.getchannel("A").filter(ImageFilter.MaxFilter(3)))
    outlined.alpha_composite(sprite)
    return outlined


class _Brush:
    """Draws on a transparent square whose corners are (-1, -1), top left, and (1, 1)."""

    def __init__(self, side: int) -> None:
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.half = side / 2

    def place(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        """Points in pixels, with room for the outline."""
        return [(self.half * (1 + 0.92 * x), self.half * (1 + 0.92 * y)) for x, y in points]

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour | None) -> None:
        """An ellipse about (x, y); with no colour it is cut out."""
        self.draw.ellipse(self.place((x - rx, y - ry), (x + rx, y + ry)), fill=fill or (0, 0, 0, 0))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        """The inside of a closed path."""
        self.draw.polygon(self.place(*points), fill=fill)

    def line(self, points: Sequence[tuple[float, float]], width: float, fill: Colour) -> None:
        """A path of that width, with round joints and ends."""
        radius = width / 2
        self.draw.line(self.place(*points), fill=fill, width=round(self.half * 0.92 * width))
        for x, y in points:
            self.ellipse(x, y, radius, radius, fill)


def _polar(radii: Sequence[float], degrees: Sequence[float]) -> list[tuple[float, float]]:
    return [
        (r * float(np.cos(np.radians(a))), r * float(np.sin(np.radians(a))))
        for r, a in zip(radii, degrees, strict=True)
    ]


_CORNERS = {
    "square": _polar([1.12] * 4, [45, 135, 225, 315]),
    "triangle": [(x, y + 0.2) for x, y in _polar([1.1] * 3, [30, 150, 270])],
    "star": _polar([1.0, 0.44] * 5, range(-90, 270, 36)),
    "cross": _polar([1.0, 1.0, 0.42] * 4, [a + b for a in range(0, 360, 90) for b in (-18, 18, 45)]),
}


def _paint_shape(brush: _Brush, thing: Thing) -> None:
    """A shape in its colour; stripes and dots are of a lighter tint of it, or grey on white."""
    colour = COLOURS[thing.colour]
    if thing.kind in _CORNERS:
        brush.polygon(_CORNERS[thing.kind], colour)
    else:
        brush.ellipse(0, 0, 0.95, 0.95, colour)
    if thing.texture != "plain":
        shape = brush.image.getchannel("A")
        tint = (150, 150, 150) if thing.colour == "white" else tuple((c + 2 * 255) // 3 for c in colour)
        if thing.texture == "striped":
            for x in np.arange(-0.8, 1, 0.53):
                brush.polygon([(x - 0.13, -1.1), (x + 0.13, -1.1), (x + 0.13, 1.1), (x - 0.13, 1.1)], tint)
        else:
            for x in (-0.6, 0, 0.6):
                for y in (-0.6, 0, 0.6):
                    brush.ellipse(x, y, 0.16, 0.16, tint)
        brush.image.putalpha(shape)
    if thing.kind == "ring":
        brush.ellipse(0, 0, 0.48, 0.48, None)


# ---- dogs and toys ----


@dataclass(frozen=True)
class Dog:
    """How a dog is built; lengths are shares of half its picture's side."""

    coat: Colour
    length: float = 0.5  # half of the body's
    legs: float = 0.45
    ears: Literal["floppy", "pointed"] = "floppy"
    ear: Colour | None = None  # as the coat, if None; so for what follows
    patch: Colour | None = None  # on the back
    collar: Colour | None = None
    tip: Colour | None = None  # of the tail


@dataclass(frozen=True)
class Toy:
    """How a toy robot is built; lengths are shares of half its picture's side."""

    body: Colour
    width: float = 0.45  # half of the body's
    limbs: Colour = (150, 150, 158)
    round_head: bool = False
    antennas: int = 1
    eyes: int = 2
    belly: Colour | None = None


# The two that DreamBooth is to learn: no painting that is generated holds them.
SUBJECTS: dict[str, Dog | Toy] = {
    "dog": Dog((206, 122, 44), 0.6, 0.3, "floppy", (70, 36, 24), (255, 244, 222), (0, 208, 208), (255, 244, 222)),
    "toy": Toy((24, 152, 148), 0.58, (248, 150, 40), True, 3, 1, (255, 120, 170)),
}


def generate_subject(name: str, count: int = 6, *, seed: int = 0, size: int = 64) -> npt.NDArray[np.uint8]:
    """Images (N, H, W, 3) of one embedded subject, "dog" or "toy": its pose, place, size and background differ."""
    images = []
    for i in range(count):
        rng = np.random.default_rng((seed, i, CLASSES.index(name), 2))
        scene = Scene(BACKGROUNDS[i % len(BACKGROUNDS)], (Thing(name, "white"),))
        images.append(paint_scene(scene, rng, size=size, looks=SUBJECTS))
    return np.stack(images)


def draw_look(thing: Thing, rng: np.random.Generator) -> Dog | Toy:
    """A dog or toy of the thing's colour and of any build."""
    colour = COLOURS[thing.colour]
    if thing.kind == "dog":
        return Dog(
            colour,
            length=rng.uniform(0.4, 0.6),
            legs=rng.uniform(0.3, 0.55),
            ears="floppy" if rng.random() < 0.5 else "pointed",
            collar=_INK if rng.random() < 0.3 else None,
        )
    grey = int(rng.integers(90, 200))
    return Toy(
        colour,
        width=rng.uniform(0.35, 0.6),
        limbs=(grey, grey, grey),
        round_head=bool(rng.random() < 0.5),
        antennas=int(rng.integers(0, 3)),
        eyes=int(rng.integers(1, 3)),
    )


def _paint_dog(brush: _Brush, dog: Dog, rng: np.random.Generator) -> None:
    """A dog that looks to the right, with its legs and tail in some pose."""
    ground, belly = 0.95, 0.95 - dog.legs
    back, thick = belly - 0.24, 0.27
    stride, wag = rng.uniform(-0.16, 0.16), rng.uniform(-0.1, 0.35)
    middle = -0.15
    rear, front = middle - dog.length + 0.14, middle + dog.length - 0.14
    for x, sign in ((rear, 1), (rear + 0.2, -1), (front - 0.2, 1), (front, -1)):
        brush.line([(x, back), (x + sign * stride, ground - 0.08)], 0.15, dog.coat)
    tail = [(rear - 0.02, back - 0.08), (rear - 0.12 - wag * 0.3, back - 0.35 - wag)]
    tail[1] = (max(tail[1][0], -0.95), tail[1][1])
    brush.line(tail, 0.13, dog.coat)
    if dog.tip:
        brush.ellipse(*tail[1], 0.11, 0.11, dog.tip)
    brush.ellipse(middle, back, dog.length, thick, dog.coat)
    if dog.patch:
        brush.ellipse(middle - 0.08, back - 0.06, dog.length * 0.42, thick * 0.6, dog.patch)
    x, y = min(front + 0.22, 0.62), back - 0.38 + rng.uniform(-0.08, 0.08)
    brush.line([(front - 0.06, back - 0.05), (x - 0.06, y)], 0.3, dog.coat)
    if dog.collar:
        brush.line([(x - 0.32, y + 0.14), (x - 0.02, y + 0.3)], 0.13, dog.collar)
    brush.ellipse(x + 0.2, y + 0.08, 0.2, 0.12, dog.coat)
    brush.ellipse(x, y, 0.25, 0.23, dog.coat)
    ear = dog.ear or tuple(c * 3 // 4 for c in dog.coat)
    if dog.ears == "floppy":
        brush.ellipse(x - 0.16, y + 0.06, 0.11, 0.24, ear)
    else:
        brush.polygon([(x - 0.24, y - 0.06), (x - 0.16, y - 0.5), (x + 0.04, y - 0.16)], ear)
    brush.ellipse(x + 0.08, y - 0.05, 0.055, 0.055, _INK)
    brush.ellipse(x + 0.36, y + 0.04, 0.07, 0.06, _INK)


def _paint_toy(brush: _Brush, toy: Toy, rng: np.random.Generator) -> None:
    """A toy robot from the front, with its arms in some pose."""
    top, bottom, head = -0.12, 0.62, -0.45
    for sign in (-1, 1):
        brush.line([(sign * toy.width * 0.55, bottom), (sign * toy.width * 0.55, 0.86)], 0.22, toy.limbs)
        lift = rng.uniform(-0.35, 0.45)
        brush.line([(sign * toy.width, 0.1), (sign * min(toy.width + 0.3, 0.88), 0.1 + lift)], 0.16, toy.limbs)
    for i in range(toy.antennas):
        x = (i - (toy.antennas - 1) / 2) * 0.3
        brush.line([(x * 0.6, head), (x, -0.9)], 0.08, toy.limbs)
    corners = [(-toy.width, top), (toy.width, top), (toy.width, bottom), (-toy.width, bottom)]
    brush.polygon(corners, toy.body)
    if toy.belly:
        brush.ellipse(0, 0.25, 0.26, 0.26, toy.belly)
    if toy.round_head:
        brush.ellipse(0, head, 0.36, 0.33, toy.body)
    else:
        brush.polygon([(-0.34, head - 0.28), (0.34, head - 0.28), (0.34, head + 0.28), (-0.34, head + 0.28)], toy.body)
    for x in (0.0,) if toy.eyes == 1 else (-0.15, 0.15):
        width = 0.17 if toy.eyes == 1 else 0.1
        brush.ellipse(x, head, width, width, (255, 255, 255))
        brush.ellipse(x, head, width / 2, width / 2, _INK)
