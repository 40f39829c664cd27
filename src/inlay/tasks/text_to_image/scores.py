"""How well painted images show a subject, follow their prompts, and leave everything else as it was."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Values = npt.NDArray[np.float64]


def compare_with_subject(painted: Tensor, own: Tensor) -> Values:
    """Subject fidelity: the mean cosine of each painted image with the subject's own, (N,).

    Args:
        painted: Features of length 1, (N, D).
        own: Of the subject's images, (M, D).

    Source: the metric DINO of Ruiz et al. 2022, arXiv:2208.12242, section 4.2.
    """
    return (painted.double() @ own.double().T).mean(1).numpy()


def compare_own_images(own: Tensor) -> float | None:
    """Mean cosine of different images of the subject, which a painter can hardly exceed; None of one image."""
    cosines = (own.double() @ own.double().T).numpy()
    return float(cosines[~np.eye(len(own), dtype=bool)].mean()) if len(own) > 1 else None


def measure_feature_drift(painted: Tensor, base: Tensor) -> Values:
    """1 - cosine of what adapter and base paint of the same prompts from the same seeds, (N,).

    Source: peft's comparison of methods for image generation (`measure_drift` of method_comparison/image-gen/run.py).
    """
    return 1 - (painted.double() * base.double()).sum(1).numpy()


def measure_pixel_drift(painted: Sequence[Image.Image], base: Sequence[Image.Image]) -> Values:
    """Mean absolute difference of such images, 0 to 1, (N,)."""
    pairs = zip(painted, base, strict=True)
    return np.array([np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean() / 255 for a, b in pairs])
