"""A split of labelled images as a model wants it."""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from typing_extensions import override

from inlay.errors import BadInput, Unsupported
from inlay.tasks.image_decoding import Box, count_channels, open_crop, open_for_processor
from inlay.tasks.images.augment import STRONGEST, rand_augment
from inlay.tasks.images.pixels import PixelSteps, Steps, choose_steps
from inlay.train.collate import TwoStepCollate
from inlay.train.stream import Stream

Augment = Literal["none", "crop", "crop-flip"]


class ImageView(torch.utils.data.Dataset):
    """One split as a model wants it: item i is what the processor makes of its image, and `labels` (int).

    Decoding, augmentation and the processor run when an item is asked for, so in a DataLoader's workers. All
    chance comes from Python's `random`: seeded alike, an item is the same in any process.

    Args:
        rows: A split of `ImageData`, a datasets.Dataset.
        processor: The base model's own Hugging Face image processor.
        augment: `crop` takes 0.7 to 1 of the area at a ratio of 3/4 to 4/3; `crop-flip` also mirrors half.
        randaugment: Magnitude of `rand_augment`, 0 to 30; 0: not used.
        mixup: Both parameters of the Beta distribution of `share`, which `mix_images` reads; 0: items have none.
    """

    def __init__(
        self,
        rows: Any,
        processor: Any,
        augment: Augment = "none",
        *,
        randaugment: int = 0,
        mixup: float = 0.0,
    ) -> None:
        if augment not in ("none", "crop", "crop-flip"):
            raise BadInput(f"augment must be none, crop or crop-flip, got {augment!r}.")
        if not 0 <= randaugment <= STRONGEST or mixup < 0:
            raise BadInput(f"randaugment must be 0 to {STRONGEST} and mixup at least 0, got {randaugment} and {mixup}.")
        if randaugment and count_channels(processor) == 4:
            raise Unsupported("randaugment changes grey and RGB images only, and this base takes RGBA; leave it out.")
        self.rows, self.processor, self.augment = rows, processor, augment
        self.randaugment, self.mixup = randaugment, mixup
        self.steps = choose_steps(processor)
        self._eight_bits = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prepare(self.rows[int(index)])

    def in_eight_bits(self) -> "ImageView":
        """The same with `pixel_values` of 8 bits where the processor's steps are known, for `NormalisedBatches`."""
        view = copy.copy(self)
        view._eight_bits = True
        return view

    def read_rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of which `prepare` makes items; one by one they take four times as long."""
        columns = self.rows[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """The item of a row that has an `image`, {"bytes", "path"}, and a `label`."""
        image = self._open_augmented(row["image"])
        if self.randaugment:
            image = rand_augment(image, self.randaugment)
        if self._eight_bits and isinstance(self.steps, PixelSteps):
            inputs = {"pixel_values": self.steps.resize(image)}
        else:
            inputs = self.steps(image)
        item = {**inputs, "labels": row["label"]}
        if self.mixup:
            item["share"] = random.betavariate(self.mixup, self.mixup)
        return item

    def _open_augmented(self, source: dict[str, Any]) -> Image.Image:
        if self.augment == "none":
            return open_for_processor(source, self.processor)
        image = open_crop(source, draw_box, self.steps.find_reduction, channels=count_channels(self.processor))
        if self.augment == "crop-flip" and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return image


class NormalisedBatches(TwoStepCollate):
    """Batches of images that workers send in 8 bits, and that are normalised where they are used.

    Args:
        steps: Of the view.
    """

    @override
    def shrink_items(self, data: Any) -> Any:
        if isinstance(data, Stream) and hasattr(data.prepare, "in_eight_bits"):
            return replace(data, prepare=data.prepare.in_eight_bits())
        return data.in_eight_bits() if isinstance(data, ImageView) else data

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    @override
    def stack(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(default_collate(items))

    @override
    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same with `pixel_values` as floats; what a processor with steps of its own has made stays."""
        if batch["pixel_values"].dtype != torch.uint8 or not isinstance(self.steps, PixelSteps):
            return batch
        return {**batch, "pixel_values": self.steps.normalise(batch["pixel_values"])}


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
