"""One known input and output, by which a loaded adapter shows that it computes what it computed when it was saved."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from inlay.bases.load import makes_masks
from inlay.tasks.text.processor import TextProcessor
from inlay.tasks.volumes.scan import VolumeProcessor

OUTPUTS = 64  # logits that are kept

# Largest |difference| relative to the largest |logit|, by the coarser of the two precisions (saved, loaded). Measured
# on three ViTs and a pre-trained MobileNetV2, with and without LoRA: fp32 0, fp16 at most 0.002, bf16 0.10, int8 0.05,
# NF4 0.27. A base changed by 2 % gives 0.02 to 0.9, another one 0.5 and more: this check is sharp in fp32 and fp16; in
# the coarser forms it finds what is grossly wrong, and the sketch tells bases apart.
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.3, "int8": 0.3, "nf4": 0.8}


def picture() -> Image.Image:
    """The golden input: 64 x 64 pixels in RGB, a fixed integer formula with structure at several scales."""
    y, x = np.mgrid[0:64, 0:64]
    channels = [(x * x * a + y * y * b + x * y * c) // 16 % 256 for a, b, c in ((1, 2, 3), (3, 1, 2), (2, 3, 1))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def tokens(vocabulary: int) -> torch.Tensor:
    """The golden text (1, 16): token ids by a fixed integer formula, below the size of the vocabulary."""
    return (torch.arange(1, 17) ** 3 * 7919 % vocabulary)[None]


def scan() -> np.ndarray:
    """The golden scan: 24 x 32 x 28 voxels (D, H, W) by a fixed integer formula, in HU as they occur."""
    z, y, x = np.mgrid[0:24, 0:32, 0:28]
    return ((x * x * 3 + y * y * 2 + z * z * 5 + x * y * z) // 8 % 512 - 200).astype(np.float32)


@torch.no_grad()
def output(model: torch.nn.Module, processor: Any) -> list[float]:
    """What the model, in eval mode, makes of its golden input.

    The first logits of the golden picture, through the whole preprocessing; those of SAM's first mask there, evenly
    spaced, asked for by a point and a box; those of the golden scan, evenly spaced, without a prompt; or those of as
    many tokens, evenly spaced over the vocabulary, to follow the golden text.
    """
    modes = [(module, module.training) for module in model.modules()]
    weight = next(p for p in model.parameters() if p.is_floating_point())
    inputs = _inputs(model, processor, weight)
    # accelerate leaves the autocast of mixed precision around a trained model, a loaded one is without
    autocast = vars(model).pop("forward") if "_original_forward" in vars(model) else None
    try:
        output = model.eval()(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
        if autocast is not None:
            model.forward = autocast
    if isinstance(processor, TextProcessor):
        logits = output.logits[:, -1, :: max(1, output.logits.shape[-1] // OUTPUTS)]
    elif isinstance(processor, VolumeProcessor):
        logits = output.logits.flatten()[:: output.logits.numel() // OUTPUTS]
    elif "pred_masks" in output:
        mask = output.pred_masks[0, 0, 0]  # h w
        logits = mask[mask.shape[0] // 16 :: mask.shape[0] // 8, mask.shape[1] // 16 :: mask.shape[1] // 8]
    else:
        logits = output.logits
    return [float(f"{value:.6g}") for value in logits.flatten()[:OUTPUTS].float().tolist()]


def _inputs(model: torch.nn.Module, processor: Any, weight: torch.Tensor) -> dict[str, Any]:
    """The golden input as the model takes it, on the device and in the type of `weight`."""
    if isinstance(processor, TextProcessor):
        ids = tokens(len(processor.tokenizer)).to(weight.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if isinstance(processor, VolumeProcessor):
        volume = torch.from_numpy(processor.normalise(scan()))[None, None]  # 1 1 D H W
        return {"pixel_values": volume.to(weight.device, weight.dtype)}
    pixels = processor(picture(), return_tensors="pt")["pixel_values"]  # 1 C H W
    inputs = {"pixel_values": pixels.to(weight.device, weight.dtype)}
    if makes_masks(model.config):
        side = pixels.shape[-1]
        point, box = torch.tensor([0.4, 0.55]) * side, torch.tensor([0.2, 0.3, 0.7, 0.9]) * side  # x y, x0 y0 x1 y1
        asked = {"input_points": point[None, None, None], "input_boxes": box[None, None]}
        inputs |= {key: value.to(weight.device, weight.dtype) for key, value in asked.items()}
    return inputs


def deviation(stored: list[float], found: list[float]) -> float:
    """Largest difference relative to the largest stored logit; infinite for another size or for NaN."""
    a, b = np.asarray(stored), np.asarray(found)
    if a.shape != b.shape or not np.isfinite([a, b]).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6))
