"""The steps of most image processors, one after the other, without the copies that a processor makes between them."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import get_size_dict

from inlay.tasks.image_decoding import count_channels
from inlay.tasks.images.processing import process_images

IN_CACHE = 2**18  # floats that stay in a CPU's cache from one operation to the next
# How Pillow writes pixels line by line, of each line first all red values, by the mode of an image.
LINES = {"L": "L", "RGB": "RGB;L", "RGBA": "RGBA;L"}
# Height and width of the images on which the steps are compared with the processor: wide, tall, small and square.
PROBES = ((40, 59), (301, 243), (13, 8), (32, 32))


class PixelSteps:
    """Resize, crop the centre, rescale and normalise an image as an image processor does, bit for bit.

    Called with an image in the mode that the processor takes, as `open_for_processor` opens it, it makes `pixel_values`
    (C, H, W), float32, in a quarter of the processor's time. `resize` and `normalise` are its two halves: pixels of 8
    bits are a quarter of what floats are, and a whole batch is normalised at once.

    Args:
        processor: An image processor of transformers for Pillow; `choose_steps` finds out whether these are its steps.

    Source: `transformers.image_processing_backends.PilBackend._preprocess`.
    """

    def __init__(self, processor: PilBackend) -> None:
        size: Any = get_size_dict(processor.size)
        crop: Any = get_size_dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        self.size = (size["width"], size["height"]) if "height" in size else None
        self.shortest_edge = size.get("shortest_edge")
        self.crop = (crop["width"], crop["height"]) if crop else None
        self.resample = processor.resample
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        eight_bits = torch.arange(256, dtype=torch.float64)
        self.rescaled = (eight_bits * factor).float()  # what becomes of each of the 256 values
        divisor = torch.tensor(1 / factor, dtype=torch.float32)  # most factors are 1 / 255
        self.divisor = divisor if torch.equal(eight_bits.float() / divisor, self.rescaled) else None
        self.mean, self.deviation = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) if processor.do_normalize else None
            for values in (processor.image_mean, processor.image_std)
        )

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """The inputs of the model for one image."""
        return {"pixel_values": self.normalise(self.resize(image)[None])[0]}

    def resize(self, image: Image.Image) -> Tensor:
        """An image of the size that the model takes, (C, H, W), uint8."""
        image = image.resize(self.find_size(*image.size), self.resample)
        if self.crop is not None:
            width, height = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        lines = np.frombuffer(image.tobytes("raw", LINES[image.mode]), np.uint8)
        lines = lines.reshape(image.height, -1, image.width)  # H C W
        return torch.from_numpy(lines.transpose(1, 0, 2).copy())

    def normalise(self, pixels: Tensor) -> Tensor:
        """The `pixel_values` (B, C, H, W) of images of 8 bits, on their device."""
        device = pixels.device
        divisor, mean, deviation = (
            None if value is None else value.to(device, non_blocking=True)
            for value in (self.divisor, self.mean, self.deviation)
        )
        values = torch.empty(pixels.shape, dtype=torch.float32, device=device)
        at_once = max(1, IN_CACHE // pixels[0].numel()) if device.type == "cpu" else len(pixels)
        for part, eight_bits in zip(values.split(at_once), pixels.split(at_once), strict=True):
            if divisor is None:
                part.copy_(self.rescaled.to(device)[eight_bits.int()])
            else:
                part.copy_(eight_bits).div_(divisor)
            if mean is not None and deviation is not None:
                part.sub_(mean).div_(deviation)
        return values

    def find_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image is resized before its centre is cropped."""
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return width, height
        long = int(self.shortest_edge * max(width, height) / min(width, height))
        return (self.shortest_edge, long) if width <= height else (long, self.shortest_edge)

    def find_reduction(self, width: int, height: int) -> float:
        """How many times smaller an image becomes, along the side that shrinks less."""
        resized = self.find_size(width, height)
        return min(width / resized[0], height / resized[1])


class ProcessorSteps:
    """What the image processor itself makes of an image.

    Args:
        processor: Any image processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """The inputs of the model for one image."""
        return {key: value[0] for key, value in process_images(self.processor, [image]).items()}

    def find_reduction(self, width: int, height: int) -> float:
        """Unknown: as if an image stayed as large as it is."""
        return 1.0


Steps = PixelSteps | ProcessorSteps


def choose_steps(processor: Any) -> Steps:
    """What makes the inputs of a model of one image: `PixelSteps` where they give the processor's own pixels.

    Both are compared on images of noise; where a bit differs, the processor itself is called for each image.
    """
    own = ProcessorSteps(processor)
    if not isinstance(processor, PilBackend) or not (processor.do_resize and processor.size):
        return own
    steps, rng, channels = PixelSteps(processor), np.random.default_rng(0), count_channels(processor)
    for height, width in PROBES:
        noise = rng.integers(0, 256, (height, width, channels), np.uint8)
        image = Image.fromarray(noise[..., 0] if channels == 1 else noise)
        expected, found = own(image), steps(image)
        if expected.keys() != found.keys() or not torch.equal(expected["pixel_values"], found["pixel_values"]):
            return own
    return steps
