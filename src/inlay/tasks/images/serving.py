"""Images that are classified one by one: files, or pixels."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from transformers.image_processing_utils import get_size_dict
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.adapter import place_inputs
from inlay.tasks.classifier_serving import ClassifierServing, read_choice
from inlay.tasks.image_decoding import MODES, check_pixels, count_channels, open_for_processor
from inlay.tasks.images.pixels import Steps, choose_steps
from inlay.tasks.serving import Limits, Row, ServedAdapter, TensorSpec

PROBES = ((48, 64), (64, 48))  # of images that show whether a processor makes one size of all


class ImageServing(ClassifierServing):
    """A request has an image as a file, as pixels of 8 bits, or as what the processor makes of one."""

    inputs: ClassVar = (
        TensorSpec("image", "BYTES", (), "An image file, such as a PNG or JPEG.", optional=True),
        TensorSpec("pixels", "UINT8", (-1, -1, 3), "An RGB image: height, width, channels.", optional=True),
        TensorSpec("pixel_values", "FP32", (-1, -1, -1), "An image as the processor makes it: C H W.", optional=True),
        *ClassifierServing.choices,
    )

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Row:
        given = [name for name in ("image", "pixels", "pixel_values") if name in values]
        if len(given) != 1:
            raise BadInput(f"a request has one of image, pixels and pixel_values, got {', '.join(given) or 'none'}.")
        choice, source = read_choice(values, adapter), values[given[0]]
        if given == ["pixel_values"]:
            inputs = {"pixel_values": torch.from_numpy(source)}
            _check_shape(inputs["pixel_values"], adapter.processor, limits)
        else:
            image = open_for_processor(read_pixels(source, limits), adapter.processor)
            _check_resized(image, adapter.processor, limits.pixels)
            inputs = _steps_of(adapter.processor)(image)
        return Row(inputs, tuple(tuple(value.shape) for value in inputs.values()), choice)

    @override
    def collate(self, rows: Sequence[Row], weight: Tensor) -> dict[str, Tensor]:
        return place_inputs(default_collate([row.inputs for row in rows]), weight)


def read_pixels(source: Any, limits: Limits) -> Any:
    """A file's bytes, or H W 3 pixels as an image, that are within the limit.

    Raises:
        InlayError: They are not, or are no image.
    """
    if not isinstance(source, bytes):
        if not source.size:
            raise BadInput(f"pixels of shape {source.shape} are no image; give height, width and 3 channels.")
        source = Image.fromarray(source)
    check_pixels(source, limits.pixels)
    return source


def _check_shape(values: Tensor, processor: Any, limits: Limits) -> None:
    """Refuse what the processor cannot have made: another size, or another number of channels."""
    shape = _shape_of(processor)
    if shape is None:
        raise BadInput("this adapter's processor makes more than pixel_values; give an image or pixels instead.")
    fits = all(own in (size, None) for own, size in zip(shape, values.shape, strict=True)) and values.numel() > 0
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        got = " x ".join(map(str, values.shape))
        raise BadInput(f"pixel_values must be {wanted} (C H W), as the adapter's processor makes them, got {got}.")
    if values[0].numel() > limits.pixels:
        raise BadInput(f"pixel_values have {values[0].numel():,} pixels; the limit is {limits.pixels:,}.")


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


@lru_cache(maxsize=64)
def _shape_of(processor: Any) -> tuple[int | None, ...] | None:
    """C H W of what a processor makes, None for what depends on the image; None where it makes more than pixels."""
    steps, mode = _steps_of(processor), MODES[count_channels(processor)]
    made = [steps(Image.new(mode, size)) for size in PROBES]
    if any(set(each) != {"pixel_values"} for each in made):
        return None
    first, second = (each["pixel_values"].shape for each in made)
    return tuple(a if a == b else None for a, b in zip(first, second, strict=True))
