"""How images become the input of a promptable mask model: through its image processor, and 16 bits by percentiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlay.errors import BadInput
from inlay.tasks.images.processing import image_processor_settings, load_image_processor
from inlay.tasks.task import Record

if TYPE_CHECKING:
    from PIL import Image

    from inlay.tasks.image_decoding import Intensity, Source

INTENSITY: Intensity = "percentiles"  # of a processor that says nothing else


def load_mask_processor(base_name: str, settings: Record | None) -> Any:
    """From the settings of an adapter, or that of a base. Settings from before there was a choice mean `range`.

    Raises:
        InlayError: As `load_processor`; an unknown `intensity`.
    """
    if not settings:
        return load_image_processor(base_name, None)
    own = {key: value for key, value in settings.items() if key != "intensity"}
    return choose_intensity(load_image_processor(base_name, own), settings.get("intensity", "range"))


def choose_intensity(processor: Any, intensity: Any) -> Any:
    """The processor, which from now on says how greys of 16 bits become 8 bits (`open_image`)."""
    from inlay.tasks.image_decoding import INTENSITIES

    if intensity not in INTENSITIES:
        raise BadInput(f"unknown intensity {intensity!r}; choose one of {', '.join(INTENSITIES)}.")
    processor.intensity = intensity
    return processor


def mask_processor_settings(processor: Any) -> Record:
    """What `load_mask_processor` needs, as JSON takes it."""
    return {**image_processor_settings(processor), "intensity": getattr(processor, "intensity", INTENSITY)}


def find_sides(processor: Any) -> tuple[int, int]:
    """Pixels of a side of the model's image and of its logits: SAM pads up to them, SAM 2 stretches."""
    sizes = (processor.pad_size or processor.size, processor.mask_pad_size or processor.mask_size)
    return sizes[0]["height"], sizes[1]["height"]


def open_for_masks(source: Source, processor: Any) -> Image.Image:
    """An image as the processor takes it, with the scaling of 16 bits that belongs to the processor."""
    from inlay.tasks.image_decoding import open_for_processor

    return open_for_processor(source, processor, getattr(processor, "intensity", INTENSITY))
