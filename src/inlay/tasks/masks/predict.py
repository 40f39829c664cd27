"""Masks of what points and boxes in an image mean, and a drawing of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from inlay.bases.device import Device, move_model
from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.colours import colour
from inlay.tasks.image_decoding import open_image
from inlay.tasks.masks.processing import open_for_masks

Point = Sequence[float]  # x, y in pixels of the image
Box = Sequence[float]  # x0, y0, x1, y1, corners inclusive


@dataclass(frozen=True)
class MaskPrediction:
    """What an adapter says of prompts in one image.

    Attributes:
        source: The file's path, or `image` for what has none.
        masks: Boolean (P, H, W) at the image's own size, one for each prompt.
        scores: The IoU that the model itself predicts for each, about 0 to 1.
    """

    source: str
    masks: np.ndarray
    scores: list[float]

    @property
    def areas(self) -> list[int]:
        """Pixels of each mask."""
        return [int(mask.sum()) for mask in self.masks]


def predict_masks(
    adapter: Adapter,
    image: Any,
    *,
    points: Sequence[Point] = (),
    negatives: Sequence[Point] = (),
    boxes: Sequence[Box] = (),
    device: Device | None = None,
) -> MaskPrediction:
    """Masks of what is meant: of the three that SAM answers to a prompt the one that it thinks best.

    All points together mean one object, within the box if there is one; several boxes mean an object each, without
    points. A pixel's centre is at whole numbers.

    Args:
        adapter: From `load_adapter`, of a SAM on images.
        image: A path, file content as bytes, or a PIL image.
        points: Inside of the object.
        negatives: Outside of it.
        boxes: Around an object each.
        device: Move the adapter there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: Another kind of adapter, no prompt, points with several boxes, places outside of the image,
            boxes without an inside, an image that cannot be read.
    """
    check_task(adapter, "mask-generation")
    move_model(adapter.model, device)
    opened = open_for_masks(image, adapter.processor)
    _check_prompts(points, negatives, boxes, opened)
    made = adapter.processor(images=opened, return_tensors="pt")
    height, width = (int(length) for length in made["reshaped_input_sizes"][0])
    scale = torch.tensor([width / opened.width, height / opened.height])

    # Centres of pixels stay centres: x y, or x0 y0 x1 y1. In float32 whatever the model's type: bfloat16 has no odd
    # number over 256.
    def placed(values: Any) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.float32)
        return (tensor + 0.5) * scale.repeat(tensor.shape[-1] // 2) - 0.5

    weight = next(p for p in adapter.model.parameters() if p.is_floating_point())
    inputs: dict[str, torch.Tensor] = {"pixel_values": made["pixel_values"].to(weight.device, weight.dtype)}
    if points or negatives:
        inputs["input_points"] = placed([*points, *negatives])[None, None].to(weight.device)  # 1 1 N 2
        inputs["input_labels"] = torch.tensor([[[1] * len(points) + [0] * len(negatives)]], device=weight.device)
    if boxes:
        inputs["input_boxes"] = placed(boxes)[None].to(weight.device)  # 1 P 4
    with torch.inference_mode():
        output = adapter.model(**inputs)
    scores, best = output.iou_scores[0].float().cpu().max(-1)  # P
    logits = output.pred_masks[0].float().cpu()[torch.arange(len(best)), best]  # P h w
    sizes = [(opened.height, opened.width)], [(height, width)]
    masks = adapter.processor.post_process_masks([logits[None]], *sizes)[0][0]  # P H W
    source = str(image) if isinstance(image, str | os.PathLike) else "image"
    return MaskPrediction(source, masks.numpy(), [float(score) for score in scores])


def _check_prompts(
    points: Sequence[Point], negatives: Sequence[Point], boxes: Sequence[Box], image: Image.Image
) -> None:
    if not (points or boxes):
        raise BadInput("nothing is asked for: give points inside of an object, or boxes around objects.")
    if len(boxes) > 1 and (points or negatives):
        raise BadInput(
            f"points belong to one object, but there are {len(boxes)} boxes; give one box with points, or boxes "
            "without points."
        )
    for what, size, prompts in (("point", 2, [*points, *negatives]), ("box", 4, boxes)):
        for place in prompts:
            inside = len(place) == size and all(
                -0.5 <= value <= (image.width, image.height)[i % 2] - 0.5 for i, value in enumerate(place)
            )
            if not inside:
                numbers = "x, y" if size == 2 else "x0, y0, x1, y1"
                raise BadInput(
                    f"{tuple(place)} is no {what} {numbers} within {image.width} x {image.height} pixels; correct it."
                )
    for x0, y0, x1, y1 in boxes:
        if x1 <= x0 or y1 <= y0:
            raise BadInput(f"the box {x0, y0, x1, y1} holds nothing; give x0 < x1 and y0 < y1.")


def parse_coordinates(texts: Sequence[str] | None, size: int) -> list[tuple[float, ...]]:
    """Points `x,y` (size 2) or boxes `x0,y0,x1,y1` (size 4), as they are typed.

    Raises:
        InlayError: Not so many numbers.
    """
    try:
        found = [tuple(float(part) for part in text.split(",")) for text in texts or []]
    except ValueError:
        found = [()]
    if any(len(place) != size for place in found):
        raise BadInput(f"{', '.join(texts or [])} must be {size} numbers with commas between them.")
    return found


def draw_masks(
    prediction: MaskPrediction,
    image: Any,
    path: str | Path,
    *,
    points: Sequence[Point] = (),
    negatives: Sequence[Point] = (),
    boxes: Sequence[Box] = (),
    side: int = 512,
) -> Path:
    """Save the image with its masks tinted and outlined, and the prompts over them.

    Args:
        prediction: From `predict_masks`.
        image: As given to it.
        path: Of the drawing; its suffix chooses the format.
        points: Drawn as filled discs.
        negatives: Drawn as crosses.
        boxes: Drawn as frames.
        side: Small images are enlarged to this longer edge at least, in whole steps.
    """
    opened = open_image(image, intensity="percentiles")
    step = max(1, round(side / max(opened.size)))
    pixels = np.asarray(
        opened.resize((opened.width * step, opened.height * step), Image.Resampling.NEAREST), np.float32
    )
    for k, mask in enumerate(prediction.masks, 1):
        large = np.kron(mask, np.ones((step, step), bool))
        tint = np.array(colour(k), np.float32)
        pixels = np.where(large[..., None], 0.65 * pixels + 0.35 * tint, pixels)
        padded = np.pad(large, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels = np.where((large & ~core)[..., None], tint, pixels)
    drawing = Image.fromarray(pixels.round().astype(np.uint8))
    draw, r = ImageDraw.Draw(drawing), max(3, side // 128)
    for k, box in enumerate(boxes, 1):
        draw.rectangle([(value + 0.5) * step for value in box], outline=colour(k), width=max(1, r // 2))
    for x, y in ([(v + 0.5) * step for v in point] for point in points):
        draw.ellipse((x - r, y - r, x + r, y + r), fill="white", outline="black")
    for x, y in ([(v + 0.5) * step for v in point] for point in negatives):
        for way in (-1, 1):
            draw.line((x - r, y - way * r, x + r, y + way * r), fill="red", width=max(1, r // 2))
    drawing.save(path)
    return Path(path)
