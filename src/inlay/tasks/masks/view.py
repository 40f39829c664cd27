"""Images with maps as a promptable model wants them: pixels, prompts, and the masks that answer them."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from inlay.errors import BadInput
from inlay.tasks.masks.data import Masked, read_map, split_classes
from inlay.tasks.masks.processing import find_sides, open_for_masks
from inlay.tasks.masks.prompts import boxes_around, draw_points

Prompts = Literal["any", "point", "points", "box"]
OBJECTS = 8  # that are asked for in an image, where nothing else is said
SCORED_OBJECTS = 16  # of an image, at most
_KINDS = ("any", "point", "points", "box")


class MaskView(Dataset[dict[str, Any]]):
    """One split, each image with P prompts; points and boxes are in pixels of what the processor makes.

    An item has `pixel_values` (3, S, S), `labels` (P, s, s) int8 of the size of SAM's logits (1 in the mask, 0 outside;
    -1 everywhere where there is no further object), and, as `prompts` says, `input_points` (P, N, 2), `input_labels`
    (P, N) and `input_boxes` (P, 4). Points are drawn from the whole object or, negative ones, from around it; -1 marks
    what is no point. Batches are made by `collate_masks`.

    Args:
        rows: A split of `MaskData`.
        processor: The base's image processor.
        prompts: `point`: one inside; `points`: two inside, one outside; `box`; `any`: for each batch points, boxes or
            both, with 1 to 3 points inside and up to 2 outside.
        count: P, prompts of an image; objects are drawn anew for each item, with repetition where there are fewer.
        seed: For validation: objects and prompts of each item are fixed by this and none is repeated.
        turn: Turn and mirror at random; for images without an up and down.
        crop: Take parts of so many pixels, each with an object near its middle; for small objects in large images.
        meaning: As in `MaskData`.
    """

    def __init__(
        self,
        rows: Sequence[Masked],
        processor: Any,
        prompts: Prompts = "any",
        *,
        count: int = OBJECTS,
        seed: int | None = None,
        turn: bool = False,
        crop: int | None = None,
        meaning: Literal["instances", "classes"] = "instances",
    ) -> None:
        if prompts not in _KINDS or count < 1 or (crop is not None and crop < 16):
            raise BadInput(
                f"prompts must be one of {', '.join(_KINDS)}, count at least 1 and crop at least 16 pixels, got "
                f"{prompts!r}, {count} and {crop}."
            )
        self.rows, self.processor, self.prompts = rows, processor, prompts
        self.count, self.seed, self.turn, self.crop, self.meaning = count, seed, turn, crop, meaning
        self.side, self.small = find_sides(processor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        if self.seed is None:
            return self._make_item(row)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + int(index))
            return self._make_item(row)

    def _make_item(self, row: Masked) -> dict[str, Any]:
        source = Image.fromarray(row.image) if isinstance(row.image, np.ndarray) else row.image
        image = open_for_masks(source, self.processor)
        objects = read_map(row.objects)
        if self.meaning == "classes":
            objects = split_classes(objects)
        if self.crop is not None:
            image, objects = _crop_pair(image, objects, self.crop)
        if self.turn:
            image, objects = _turn_pair(image, objects, int(torch.randint(8, ())))
        made = self.processor(images=image, return_tensors="pt")
        numbers = self._resize_map(objects, tuple(made["reshaped_input_sizes"][0]))  # S S
        masks, asked = self._choose_masks(numbers)  # P S S, P
        small = _shrink_masks(masks, self.small).to(torch.int8)
        small[~asked] = -1
        return {"pixel_values": made["pixel_values"][0].float(), "labels": small, **self._draw_prompts(masks)}

    def _resize_map(self, objects: np.ndarray, size: tuple[int, int]) -> Tensor:
        """The map at the size of the resized image (h, w), padded with background to (S, S)."""
        height, width = (int(length) for length in size)
        rows = ((np.arange(height) + 0.5) * objects.shape[0] / height).astype(int)
        columns = ((np.arange(width) + 0.5) * objects.shape[1] / width).astype(int)
        padded = np.zeros((self.side, self.side), np.int64)
        padded[:height, :width] = objects[rows[:, None], columns]
        return torch.from_numpy(padded)

    def _choose_masks(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """P masks (P, S, S) of objects of the map, and which of them are asked for (P,)."""
        found = numbers[numbers > 0].unique()
        if self.seed is None and len(found):
            chosen = found[torch.randperm(len(found))[: self.count]]
            more = found[torch.randint(len(found), (self.count - len(chosen),))]
            chosen = torch.cat([chosen, more])
        else:
            chosen = found[torch.randperm(len(found))[: self.count]]
        missing = self.count - len(chosen)
        asked = torch.arange(self.count) < len(chosen)
        chosen = torch.cat([chosen, chosen.new_full((missing,), -1)])
        return numbers == chosen[:, None, None], asked

    def _draw_prompts(self, masks: Tensor) -> dict[str, Tensor]:
        boxes = boxes_around(masks, jitter=0.05)  # P 4
        if self.prompts == "box":
            return {"input_boxes": boxes}
        inside, outside = {"any": (3, 2), "point": (1, 0), "points": (2, 1)}[self.prompts]
        points, there = draw_points(masks, inside)
        labels = there.long() * 2 - 1
        if outside:
            others, around = draw_points(_find_surroundings(masks, boxes), outside)
            points, labels = torch.cat([points, others], 1), torch.cat([labels, around.long() - 1], 1)
        if self.prompts == "any":
            kept = torch.tensor([torch.randint(1, 4, ()), torch.randint(3, ())])  # so many of either count
            unused = torch.cat([torch.arange(inside) >= kept[0], torch.arange(outside) >= kept[1]])
            labels = labels.masked_fill(unused, -1)
            return {"input_points": points, "input_labels": labels, "input_boxes": boxes, "kind": torch.randint(3, ())}
        return {"input_points": points, "input_labels": labels}


def scoring_view(
    rows: Sequence[Masked],
    processor: Any,
    prompts: Prompts,
    *,
    crop: int | None,
    meaning: Literal["instances", "classes"],
) -> MaskView:
    """Up to 16 objects of each image by one kind of prompt, the same each time: recipes and `evaluate` use it."""
    return MaskView(rows, processor, prompts, count=SCORED_OBJECTS, seed=0, crop=crop, meaning=meaning)


def collate_masks(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; of items for `any` prompts with points, boxes or both for all, as the first item has drawn."""
    batch = default_collate(items)
    kind = batch.pop("kind", None)
    if kind is not None and int(kind[0]) == 0:
        del batch["input_boxes"]
    elif kind is not None and int(kind[0]) == 1:
        del batch["input_points"], batch["input_labels"]
    return batch


def _shrink_masks(masks: Tensor, side: int) -> Tensor:
    """Masks (P, S, S) at side x side: what is half covered, or if nothing is so, all that is touched."""
    step = masks.shape[-1] // side
    cover = masks.float().unflatten(-1, (side, step)).unflatten(-3, (side, step)).mean((-1, -3))  # P s s
    small = cover >= 0.5
    return torch.where(small.flatten(1).any(1)[:, None, None], small, cover > 0)


def _find_surroundings(masks: Tensor, boxes: Tensor) -> Tensor:
    """What surrounds each object: its box, larger by a quarter to each side, without it; (P, S, S)."""
    axis = torch.arange(masks.shape[-1])
    size = (boxes[:, 2:] - boxes[:, :2] + 8) / 4
    low, high = boxes[:, :2] - size, boxes[:, 2:] + size  # P 2, x y
    x = (axis >= low[:, :1]) & (axis <= high[:, :1])  # P S
    y = (axis >= low[:, 1:]) & (axis <= high[:, 1:])
    return x[:, None] & y[:, :, None] & ~masks


def _crop_pair(image: Image.Image, objects: np.ndarray, side: int) -> tuple[Image.Image, np.ndarray]:
    """A part of side x side pixels, or less where there are no more, with some object within its middle half."""
    (point,), _ = draw_points(torch.from_numpy(objects > 0), 1)
    shift = (torch.rand(2) - 0.5) * side / 2 - side / 2
    x, y = (point + shift).round().int().tolist()
    x, y = max(0, min(x, image.width - side)), max(0, min(y, image.height - side))
    box = (x, y, min(image.width, x + side), min(image.height, y + side))
    return image.crop(box), objects[box[1] : box[3], box[0] : box[2]]


def _turn_pair(image: Image.Image, objects: np.ndarray, way: int) -> tuple[Image.Image, np.ndarray]:
    """One of the eight turned and mirrored forms."""
    pixels = np.rot90(np.asarray(image), way % 4)
    objects = np.rot90(objects, way % 4)
    if way >= 4:
        pixels, objects = pixels[:, ::-1], objects[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(pixels)), np.ascontiguousarray(objects)
