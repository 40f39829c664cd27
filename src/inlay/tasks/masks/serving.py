"""Masks that points and boxes in an image ask for."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.images.serving import read_pixels
from inlay.tasks.masks.predict import choose_masks, enlarge_masks, make_mask_inputs, place_mask_inputs
from inlay.tasks.masks.processing import open_for_masks
from inlay.tasks.serving import Limits, Reply, Row, ServedAdapter, Serving, TensorSpec

PROMPTS = 64  # points, or boxes, of a request at most: each box is decoded by itself
LARGEST_SIDE = 1024  # of the images of a SAM whose config names none
PIXELS = (
    4 * LARGEST_SIDE**2
)  # of a batch at most: attention over the whole of an image of 1024 pixels a side takes 0.8 GB


class MaskServing(Serving):
    """A request has an image, and points or boxes in it; requests with equally many of them share a batch."""

    action = "segment"
    makes_files = True
    inputs: ClassVar = (
        TensorSpec("image", "BYTES", (), "An image file, such as a PNG or JPEG.", optional=True),
        TensorSpec("pixels", "UINT8", (-1, -1, 3), "An RGB image: height, width, channels.", optional=True),
        TensorSpec("points", "FP32", (-1, 2), "Pixels x, y; all together mean one object.", optional=True),
        TensorSpec("labels", "INT32", (-1,), "Of each point: 1 inside (default), 0 outside.", optional=True),
        TensorSpec("boxes", "FP32", (-1, 4), "x0, y0, x1, y1 around an object each.", optional=True),
    )
    outputs: ClassVar = (
        TensorSpec("masks", "UINT8", (-1, -1, -1), "1 inside, at the image's size: prompts, height, width."),
        TensorSpec("predicted_iou", "FP32", (-1,), "What the model thinks of each mask, about 0 to 1."),
    )

    @override
    def largest_batch(self, config: Any) -> int:
        side = config.prompt_encoder_config.image_size or LARGEST_SIDE
        return max(1, PIXELS // side**2)

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Row:
        given = [name for name in ("image", "pixels") if name in values]
        if len(given) != 1:
            raise BadInput(f"a request has either image or pixels, got {' and '.join(given) or 'none'}.")
        points, negatives = _split_points(values)
        boxes = values.get("boxes", np.zeros((0, 4))).tolist()
        if max(len(points) + len(negatives), len(boxes)) > PROMPTS:
            raise BadInput(f"a request has {PROMPTS} points or boxes at most, got more.")
        image = open_for_masks(read_pixels(values[given[0]], limits), adapter.processor)
        size = max(1, len(boxes)) * image.width * image.height
        if size > limits.voxels:
            raise BadInput(
                f"masks of {len(boxes)} boxes in {image.width} x {image.height} pixels are {size:,} pixels in all; "
                f"the limit is {limits.voxels:,}."
            )
        asked = make_mask_inputs(image, adapter.processor, points, negatives, boxes)
        shapes = tuple((name, tuple(value.shape)) for name, value in asked.inputs.items())
        return Row(asked.inputs, shapes, asked)

    @override
    def collate(self, rows: Sequence[Row], weight: Tensor) -> dict[str, Tensor]:
        batch = {name: torch.cat([row.inputs[name] for row in rows]) for name in rows[0].inputs}
        return place_mask_inputs(batch, weight)

    @override
    def take_rows(self, output: Any, count: int) -> list[dict[str, Tensor]]:
        return [dict(zip(("logits", "scores"), choose_masks(output, row), strict=True)) for row in range(count)]

    @override
    def reply(
        self, found: Mapping[str, Any], row: Row, adapter: ServedAdapter, tensors: Collection[str] | None
    ) -> Reply:
        """For people each mask is a PNG of one bit, in base64."""
        scores = found["scores"]
        if tensors is not None and "masks" not in tensors:
            return Reply(tensors={name: scores.numpy() for name in tensors})
        masks = enlarge_masks(found["logits"], row.source, adapter.processor)
        if tensors is not None:
            made = {"masks": masks.view(np.uint8), "predicted_iou": scores.numpy()}
            return Reply(tensors={name: made[name] for name in tensors})
        height, width = row.source.size
        facts = [
            {"pixels": int(mask.sum()), "predicted_iou": score, "png": encode_png(mask)}
            for mask, score in zip(masks, scores.tolist(), strict=True)
        ]
        return Reply({"width": width, "height": height, "masks": facts})


def encode_png(mask: np.ndarray) -> str:
    """A boolean mask (H, W) as a PNG of one bit, in base64."""
    written = io.BytesIO()
    Image.fromarray(mask).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _split_points(values: Mapping[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Points inside of the object, and those outside of it."""
    points = values.get("points", np.zeros((0, 2), np.float32))
    labels = values.get("labels", np.ones(len(points), np.int32))
    if len(labels) != len(points):
        raise BadInput(f"there are {len(points)} points and {len(labels)} labels; give one for each point.")
    if not np.isin(labels, (0, 1)).all():
        raise BadInput(f"a point's label is 1 inside of the object and 0 outside, got {labels.tolist()}.")
    return points[labels == 1].tolist(), points[labels == 0].tolist()
