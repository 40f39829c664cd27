"""Images that are classified one by one: files, or pixels."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from transformers.image_processing_utils import get_size_dict
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.classification import class_probabilities
from inlay.tasks.image_decoding import check_pixels, open_for_processor
from inlay.tasks.images.pixels import Steps, choose_steps
from inlay.tasks.serving import Limits, Reply, Row, Serving, TensorSpec, reply_with_labels


class ImageServing(Serving):
    """A request has an image as a file, as pixels of 8 bits, or as what the processor makes of one."""

    inputs: ClassVar = (
        TensorSpec("image", "BYTES", (), "An image file, such as a PNG or JPEG.", optional=True),
        TensorSpec("pixels", "UINT8", (-1, -1, 3), "An RGB image: height, width, channels.", optional=True),
        TensorSpec("pixel_values", "FP32", (-1, -1, -1), "An image as the processor makes it: C H W.", optional=True),
    )
    outputs: ClassVar = (
        TensorSpec("logits", "FP32", (-1,), "One for each class."),
        TensorSpec("probabilities", "FP32", (-1,), "One for each class."),
        TensorSpec("label", "BYTES", (1,), "The most probable class."),
    )

    @override
    def read(self, values: Mapping[str, Any], processor: Any, limits: Limits) -> Row:
        given = [name for name in ("image", "pixels", "pixel_values") if name in values]
        if len(given) != 1:
            raise BadInput(f"a request has one of image, pixels and pixel_values, got {', '.join(given) or 'none'}.")
        if given == ["pixel_values"]:
            inputs = {"pixel_values": torch.from_numpy(values["pixel_values"])}
        else:
            source = values[given[0]]
            if isinstance(source, np.ndarray):
                source = Image.fromarray(source)
            check_pixels(source, limits.pixels)
            image = open_for_processor(source, processor)
            _check_resized(image, processor, limits.pixels)
            inputs = _steps_of(processor)(image)
        return Row(inputs, tuple(inputs["pixel_values"].shape))

    @override
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return default_collate([row.inputs for row in rows])

    @override
    def take_rows(self, output: Any, count: int) -> list[dict[str, Tensor]]:
        return [{"logits": logits} for logits in output.logits[:count].float().cpu()]

    @override
    def reply(self, found: Mapping[str, Tensor], row: Row, labels: Sequence[str], config: Any) -> Reply:
        logits = found["logits"][: len(labels)]
        probabilities = class_probabilities(logits, config)
        return reply_with_labels(logits, probabilities, labels)


def _check_resized(image: Image.Image, processor: Any, limit: int) -> None:
    """Refuse an image of which the processor would make more pixels than that.

    A processor that scales the shorter side to a length of its own, and the longer one with it, makes gigabytes of a
    line of pixels.
    """
    size: Any = get_size_dict(processor.size) if getattr(processor, "size", None) else {}
    edge = size.get("shortest_edge")
    if edge is None or not getattr(processor, "do_resize", True):
        return
    long = edge * max(image.size) // min(image.size)
    if edge * long > limit:
        raise BadInput(
            f"the image has {image.width} x {image.height} pixels, and the processor of this adapter makes "
            f"{edge} x {long:,} of them; the limit is {limit:,} in all. Send a part of the image."
        )


@lru_cache(maxsize=64)
def _steps_of(processor: Any) -> Steps:
    """Comparing the steps with the processor takes longer than an image."""
    return choose_steps(processor)
