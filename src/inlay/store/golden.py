"""One known input and output, by which a loaded adapter shows that it computes what it computed when it was saved."""

from typing import Any

import numpy as np
import torch
from PIL import Image

OUTPUTS = 64  # logits that are kept

# Largest |difference| relative to the largest |logit|, by the coarser of the two precisions (saved, loaded).
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1, "int8": 0.3, "nf4": 1.0}


def picture() -> Image.Image:
    """The golden input: 64 x 64 pixels in RGB, a fixed integer formula with structure at several scales."""
    y, x = np.mgrid[0:64, 0:64]
    channels = [(x * x * a + y * y * b + x * y * c) // 16 % 256 for a, b, c in ((1, 2, 3), (3, 1, 2), (2, 3, 1))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@torch.no_grad()
def output(model: torch.nn.Module, processor: Any) -> list[float]:
    """The first logits of the golden picture, through the whole preprocessing, in eval mode."""
    training = model.training
    weight = next(p for p in model.parameters() if p.is_floating_point())
    pixels = processor(picture(), return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)  # 1 C H W
    try:
        logits = model.eval()(pixel_values=pixels).logits
    finally:
        model.train(training)
    return [float(f"{value:.6g}") for value in logits.flatten()[:OUTPUTS].float().tolist()]


def deviation(stored: list[float], found: list[float]) -> float:
    """Largest difference relative to the largest stored logit; infinite for another size or for NaN."""
    a, b = np.asarray(stored), np.asarray(found)
    if a.shape != b.shape or not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6))
