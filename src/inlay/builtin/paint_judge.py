"""The embedded judge of paintings: names what an image shows, independently of the model that painted it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.builtin.paintings import BACKGROUNDS, CLASSES, COLOURS, SHAPES, SUBJECTS, Dog, Scene, Toy

Floats = npt.NDArray[np.float32]

KINDS: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "class": CLASSES,  # any dog, any toy
    "subject": CLASSES,  # the embedded dog, the embedded toy
}
LABELS = tuple(f"{kind}: {name}" for kind, names in KINDS.items() for name in names)
_FOLDER = Path(__file__).parent / "paint-judge"


def label_scene(scene: Scene, looks: Mapping[str, Dog | Toy] | None = None) -> Floats:
    """What the judge should say of a scene: 1 or 0 for each of `LABELS`, of shape (L,).

    Args:
        scene: What an image shows.
        looks: As `paint_scene` was given: what has a look of its own has no colour of `COLOURS`.
    """
    told = {f"background: {scene.background}"}
    for thing in scene.things:
        told.add(f"{'shape' if thing.kind in SHAPES else 'class'}: {thing.kind}")
        look = (looks or {}).get(thing.kind)
        if look is None:
            told.add(f"colour: {thing.colour}")
        elif look == SUBJECTS[thing.kind]:
            told.add(f"subject: {thing.kind}")
    return np.array([label in told for label in LABELS], np.float32)


def judge_images(images: npt.NDArray[np.uint8], model: Any = None) -> dict[str, dict[str, Floats]]:
    """Probability (N,) that each image shows a background, shape, colour, class or subject, by kind and name.

    Args:
        images: (N, H, W, 3), RGB; other sizes than 64 x 64 are resized.
        model: A judge; default: the embedded one.
    """
    import torch

    model = model or _load_judge()
    pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-2:] != (64, 64):
        pixels = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
    with torch.inference_mode():
        logits = torch.cat([model(pixel_values=part).logits for part in pixels.split(64)])
    columns = dict(zip(LABELS, logits.sigmoid().T.numpy(), strict=True))
    return {kind: {name: columns[f"{kind}: {name}"] for name in names} for kind, names in KINDS.items()}


def score_paintings(said: Mapping[str, Mapping[str, Floats]], labels: Floats) -> dict[str, float]:
    """Share of images that are right in their background, shapes, colours and classes, and in which subjects they show.

    An image is right in one of the first four if the likeliest labels, as many as were asked for, are those asked for;
    images of which none was asked for do not count, and a kind of which none was asked for is left out. A subject is
    shown if its probability is over 0.5.

    Args:
        said: What `judge_images` says of N images.
        labels: What was asked for, (N, L): rows of `label_scene`.
    """
    scores: dict[str, float] = {}
    start = 0
    for kind, names in KINDS.items():
        asked = labels[:, start : start + len(names)] > 0.5
        start += len(names)
        probabilities = np.stack([said[kind][name] for name in names], axis=1)
        if kind == "subject":
            scores |= {name: float(((probabilities > 0.5) == asked)[:, i].mean()) for i, name in enumerate(names)}
        elif asked.any():
            rank = (-probabilities).argsort(axis=1).argsort(axis=1)
            right = ((rank < asked.sum(axis=1, keepdims=True)) == asked).all(axis=1)
            scores[kind] = float(right[asked.any(axis=1)].mean())
    return scores


@cache
def _load_judge() -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(
        str(_FOLDER), dtype="float32", trust_remote_code=False
    ).eval()
