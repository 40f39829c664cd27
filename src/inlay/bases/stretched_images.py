"""SAM 2's image processor in Pillow: transformers has it for torchvision only."""

from typing import Any, ClassVar

import numpy as np
from transformers import SamImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from typing_extensions import override

STRETCHED = ("sam2", "sam2_video")  # model types that take images so, where no settings say otherwise


def asks_for_stretching(name: str, revision: str | None) -> bool:
    """True for a base whose preprocessing settings name this processor, or one of transformers' for SAM 2."""
    settings, _ = SamImageProcessorPil.get_image_processor_dict(name, revision=revision)
    return str(settings.get("image_processor_type", "")).startswith("Sam2ImageProcessor")


class Sam2ImageProcessorPil(SamImageProcessorPil):
    """SAM's processor, but an image of any form is stretched to the model's square, and nothing is padded.

    Source: Sam2ImageProcessor of transformers, whose pixels differ by rounding (Pillow resizes 8 bits).
    """

    size: ClassVar[Any] = {"height": 1024, "width": 1024}
    mask_size: ClassVar[Any] = {"height": 256, "width": 256}
    do_pad: Any = False
    pad_size: Any = None
    mask_pad_size: Any = None

    @override
    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> np.ndarray:
        """To `size["height"]` x `size["width"]`."""
        return PilBackend.resize(self, image, size, resample, **kwargs)

    @override
    def post_process_masks(
        self,
        masks: Any,
        original_sizes: Any,
        reshaped_input_sizes: Any = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        pad_size: Any = None,
    ) -> Any:
        """Masks at the sizes of the images, from logits in one step, as nothing was padded."""
        square = {"height": masks[0].shape[-2], "width": masks[0].shape[-1]}  # their own: the first step does nothing
        whole = [(square["height"], square["width"])] * len(masks)
        return super().post_process_masks(masks, original_sizes, whole, mask_threshold, binarize, square)
