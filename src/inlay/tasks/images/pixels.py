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

# Height and width of the images on which the steps are compared with the processor: wide, tall, small and square.
PROBES = ((40, 59), (301, 243), (13, 8), (32, 32))


class PixelSteps:
    """Resize, crop the centre, rescale and normalise an image as an image processor does, bit for bit.

    Called with an image in the mode that the processor takes, as `open_for_processor` opens it, it makes `pixel_values`
    (C, H, W), float32, in a third of the processor's time.

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
        table = torch.arange(256, dtype=torch.float64).repeat(count_channels(processor), 1)
        if processor.do_rescale:
            table *= processor.rescale_factor
        table = table.float()  # what becomes of each of the 256 values, by channel
        if processor.do_normalize:
            for values, apply in ((processor.image_mean, table.sub_), (processor.image_std, table.div_)):
                apply(torch.tensor(values, dtype=torch.float32).reshape(-1, 1))
        self.table = table.numpy()

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """The inputs of the model for one image."""
        image = image.resize(self.find_size(*image.size), self.resample)
        if self.crop is not None:
            width, height = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values = np.empty((len(self.table), image.height, image.width), np.float32)  # C H W
        for channel, band, table in zip(values, image.split(), self.table, strict=True):
            table.take(np.asarray(band), out=channel, mode="clip")
        return {"pixel_values": torch.from_numpy(values)}

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
