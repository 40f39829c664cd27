"""One known input and output, by which a loaded adapter shows that it computes what it computed when it was saved."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from inlay.data.tokens import TextProcessor

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


@torch.no_grad()
def output(model: torch.nn.Module, processor: Any) -> list[float]:
    """What the model, in eval mode, makes of its golden input.

    The first logits of the golden picture, through the whole preprocessing; or those of as many tokens, evenly spaced
    over the vocabulary, to follow the golden text.
    """
    modes = [(module, module.training) for module in model.modules()]
    weight = next(p for p in model.parameters() if p.is_floating_point())
    inputs: dict[str, Any]
    if isinstance(processor, TextProcessor):
        ids = tokens(len(processor.tokenizer)).to(weight.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    else:
        pixels = processor(picture(), return_tensors="pt")["pixel_values"]  # 1 C H W
        inputs = {"pixel_values": pixels.to(weight.device, weight.dtype)}
    # accelerate leaves the autocast of mixed precision around a trained model, a loaded one is without
    autocast = vars(model).pop("forward") if "_original_forward" in vars(model) else None
    try:
        logits = model.eval()(**inputs).logits
    finally:
        for module, mode in modes:
            module.training = mode
        if autocast is not None:
            model.forward = autocast
    if isinstance(processor, TextProcessor):
        logits = logits[:, -1, :: max(1, logits.shape[-1] // OUTPUTS)]
    return [float(f"{value:.6g}") for value in logits.flatten()[:OUTPUTS].float().tolist()]


def deviation(stored: list[float], found: list[float]) -> float:
    """Largest difference relative to the largest stored logit; infinite for another size or for NaN."""
    a, b = np.asarray(stored), np.asarray(found)
    if a.shape != b.shape or not np.isfinite([a, b]).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6))
