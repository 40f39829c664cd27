"""The parts of golden inputs that tasks share: an image and a text by fixed integer formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor


def golden_image() -> Image.Image:
    """64 x 64 pixels in RGB, with structure at several scales."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:64, 0:64]
    channels = [(x * x * a + y * y * b + x * y * c) // 16 % 256 for a, b, c in ((1, 2, 3), (3, 1, 2), (2, 3, 1))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def golden_tokens(tokens: int, rows: int) -> Tensor:
    """Token ids (1, 16) that a tokenizer has and the base too, whose embedding can have fewer rows."""
    import torch

    ids = torch.arange(1, 17) ** 3 * 7919
    within = ids % tokens
    return (within if int(within.max()) < rows else ids % rows)[None]


def golden_scan() -> np.ndarray:
    """24 x 32 x 28 voxels (D, H, W), in HU as they occur."""
    import numpy as np

    z, y, x = np.mgrid[0:24, 0:32, 0:28]
    return ((x * x * 3 + y * y * 2 + z * z * 5 + x * y * z) // 8 % 512 - 200).astype(np.float32)
