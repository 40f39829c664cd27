"""A split of labelled images as a model wants it."""

import math
import random
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

from inlay.errors import BadInput
from inlay.tasks.image_decoding import Box, count_channels, open_crop, open_for_processor
from inlay.tasks.images.pixels import choose_steps

Augment = Literal["none", "crop", "crop-flip"]


class ImageView(torch.utils.data.Dataset):
    """One split as a model wants it: item i is what the processor makes of its image, and `labels` (int).

    Decoding, augmentation and the processor run when an item is asked for, so in a DataLoader's workers. All
    chance comes from Python's `random`: seeded alike, an item is the same in any process.

    Args:
        rows: A split of `ImageData`, a datasets.Dataset.
        processor: The base model's own Hugging Face image processor.
        augment: `crop` takes 0.7 to 1 of the area at a ratio of 3/4 to 4/3; `crop-flip` also mirrors half.
    """

    def __init__(self, rows: Any, processor: Any, augment: Augment = "none") -> None:
        if augment not in ("none", "crop", "crop-flip"):
            raise BadInput(f"augment must be none, crop or crop-flip, got {augment!r}.")
        self.rows, self.processor, self.augment = rows, processor, augment
        self.steps = choose_steps(processor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make_item(self.rows[int(index)])

    def make_item(self, row: dict[str, Any]) -> dict[str, Any]:
        """The item of a row with `image` and `label`."""
        image = self._open_augmented(row["image"])
        return {**self.steps(image), "labels": row["label"]}

    def _open_augmented(self, source: dict[str, Any]) -> Image.Image:
        if self.augment == "none":
            return open_for_processor(source, self.processor)
        image = open_crop(source, draw_box, self.steps.find_reduction, channels=count_channels(self.processor))
        if self.augment == "crop-flip" and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return image


def draw_box(width: int, height: int) -> Box:
    """Random part of an image, drawn as torchvision's RandomResizedCrop draws it; the processor resizes."""
    for _ in range(10):
        area = width * height * random.uniform(0.7, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return x, y, x + w, y + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2
