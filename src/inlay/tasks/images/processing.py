"""What an image processor makes for a model, and how it is loaded, kept and described."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inlay.tasks.golden import golden_image
from inlay.tasks.task import Record

if TYPE_CHECKING:
    from torch import Tensor


def load_image_processor(base_name: str, settings: Record | None) -> Any:
    """From its settings, or that of a base."""
    from inlay.bases.processors import build_processor, load_processor

    return build_processor(settings) if settings else load_processor(base_name)


def image_processor_settings(processor: Any) -> Record:
    """As JSON takes them: a processor's `to_dict` holds arrays and enums."""
    return dict(json.loads(processor.to_json_string()))


def process_images(processor: Any, images: Sequence[Any]) -> dict[str, Tensor]:
    """All that a model takes of these images, floats as float32.

    Most take `pixel_values` (B, C, H, W) only. SigLIP 2 NaFlex takes patches, a mask of those that are padding, and the
    rows and columns of patches.

    Args:
        processor: A Hugging Face image processor.
        images: PIL images, as `open_for_processor` opens them.
    """
    made = processor(images=list(images), return_tensors="pt")
    names = getattr(processor, "model_input_names", ["pixel_values"])
    found = {key: made[key] for key in names if key in made}
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def process_golden(processor: Any) -> dict[str, Tensor]:
    """The golden image as a model takes it, a batch of one."""
    from inlay.tasks.image_decoding import open_for_processor

    return process_images(processor, [open_for_processor(golden_image(), processor)])


def random_inputs(processor: Any, rows: int) -> dict[str, Tensor]:
    """A batch of noise of the size that the processor makes; the same at each call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(rows, *value.shape[1:], generator=generator)
        if key == "pixel_values"
        else value.repeat_interleave(rows, 0)
        for key, value in process_golden(processor).items()
    }


def blank_inputs(config: Any, rows: int) -> dict[str, Tensor]:
    """A batch of zeros of the size that a config names; 224 x 224 pixels where it names none."""
    import torch

    config = getattr(config, "vision_config", config)
    channels, patches = getattr(config, "num_channels", 3), getattr(config, "num_patches", None)
    if not hasattr(config, "image_size") and isinstance(patches, int):  # SigLIP 2 NaFlex
        side = math.isqrt(patches)
        return {
            "pixel_values": torch.zeros(rows, patches, channels * config.patch_size**2),
            "pixel_attention_mask": torch.ones(rows, patches, dtype=torch.int64),
            "spatial_shapes": torch.full((rows, 2), side),
        }
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(rows, channels, height, width)}


def describe_labels(labels: Sequence[str]) -> list[str]:
    """The first 50 with their numbers."""
    named = ", ".join(f"{i} = {label}" for i, label in enumerate(labels[:50]))
    return [named + (" ..." if len(labels) > 50 else "")]


def describe_pixels(settings: Record) -> list[str]:
    """What an image processor does, in one sentence; nothing for settings that are no image processor's."""
    size, steps = settings.get("size") or {}, []
    if isinstance(size, dict) and size and settings.get("do_resize"):
        steps.append("resized to " + " x ".join(f"{v}" for v in size.values() if isinstance(v, int)) + " pixels")
    if settings.get("do_rescale"):
        steps.append(f"scaled by {settings.get('rescale_factor', 1):.4g}")
    if settings.get("do_normalize"):
        means, spreads = ([round(x, 4) for x in settings.get(key) or []] for key in ("image_mean", "image_std"))
        steps.append(f"normalised by the means {means} and the deviations {spreads}")
    return [f"Images are {', '.join(steps)}."] if steps else []
