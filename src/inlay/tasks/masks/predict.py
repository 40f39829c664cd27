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
    asked = make_mask_inputs(open_for_masks(image, adapter.processor), adapter.processor, points, negatives, boxes)
    weight = next(p for p in adapter.model.parameters() if p.is_floating_point())
    with torch.inference_mode():
        output = adapter.model(**place_mask_inputs(asked.inputs, weight))
    logits, scores = choose_masks(output, 0)
    source = str(image) if isinstance(image, str | os.PathLike) else "image"
    return MaskPrediction(source, enlarge_masks(logits, asked, adapter.processor), scores.tolist())


@dataclass(frozen=True)
class MaskInputs:
    """Prompts in one image as a model takes them.

    Attributes:
        inputs: pixel_values (1, C, H, W), and of the prompts input_points (1, 1, N, 2), input_labels (1, 1, N) and
            input_boxes (1, P, 4), in pixels of the model's image; those that there are.
        size: Height and width of the image.
        resized: Height and width that it has in the model's image.
    """

    inputs: dict[str, torch.Tensor]
    size: tuple[int, int]
    resized: tuple[int, int]


def make_mask_inputs(
    image: Image.Image, processor: Any, points: Sequence[Point], negatives: Sequence[Point], boxes: Sequence[Box]
) -> MaskInputs:
    """What a model takes of an image from `open_for_masks` and of prompts in it; what they are says `predict_masks`.

    Raises:
        InlayError: What `predict_masks` says of prompts.
    """
    _check_prompts(points, negatives, boxes, image)
    made = processor(images=image, return_tensors="pt")
    height, width = (int(length) for length in made["reshaped_input_sizes"][0])
    scale = torch.tensor([width / image.width, height / image.height])

    # Centres of pixels stay centres: x y, or x0 y0 x1 y1.
    def placed(values: Any) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.float32)
        return (tensor + 0.5) * scale.repeat(tensor.shape[-1] // 2) - 0.5

    inputs: dict[str, torch.Tensor] = {"pixel_values": made["pixel_values"]}
    if points or negatives:
        inputs["input_points"] = placed([*points, *negatives])[None, None]  # 1 1 N 2
        inputs["input_labels"] = torch.tensor([[[1] * len(points) + [0] * len(negatives)]])
    if boxes:
        inputs["input_boxes"] = placed(boxes)[None]  # 1 P 4
    return MaskInputs(inputs, (image.height, image.width), (height, width))


def place_mask_inputs(inputs: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs on the device of a weight, pixels in its type.

    Places stay float32 whatever the model's type: bfloat16 has no odd number over 256.
    """
    placed = {name: value.to(weight.device) for name, value in inputs.items()}
    placed["pixel_values"] = placed["pixel_values"].to(weight.dtype)
    return placed


def choose_masks(output: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the three masks for each prompt in a row the logits of the one that SAM thinks best, (P, h, w), and the IoU
    that it predicts, (P,); on the CPU, in float32."""
    scores, best = output.iou_scores[row].float().max(-1)  # P
    logits = output.pred_masks[row][torch.arange(len(best), device=best.device), best]
    return logits.float().cpu(), scores.cpu()


def enlarge_masks(logits: torch.Tensor, asked: MaskInputs, processor: Any) -> np.ndarray:
    """Boolean masks (P, H, W) of the image's own size, one at a time: their logits there take four times as much."""
    sizes = [asked.size], [asked.resized]
    return np.concatenate([processor.post_process_masks([each[None, None]], *sizes)[0][0].numpy() for each in logits])


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
