"""How far a learning rate has to fall for a base that is wider than those on which it was found."""

import statistics
from typing import Any

from peft import PeftModel
from torch import nn

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.sites import base_modules_of, is_linear, linear_shape, sites
from inlay.errors import InlayError

# Widths of the embedded bases, on which the rates of METHODS were found, and the exponents with which rates fall.
TRANSFORMER, CONVOLUTIONAL = 128, 48
TRANSFORMER_EXPONENT, CONVOLUTIONAL_EXPONENT = 0.78, 1.0


def scale_rate(rate: float, model: nn.Module) -> float:
    """The rate for a base of this width, where `rate` suits the embedded bases; never more than that.

    The best rate of a transformer falls with its hidden size to the power of 0.78, for LoRA and for all weights alike,
    as Schulman and Thinking Machines Lab 2025 (LoRA Without Regret) found on Llama: 0.781. On Qwen their code has
    0.0775, with which it hardly falls (tinker-cookbook, hyperparam_utils.py); the steeper law is the careful one. The
    width is that of the median block where blocks differ, and of a convolutional network the median number of channels
    that its layers give; there the rate of Adam falls with 1 / width (Yang et al. 2022, arXiv:2203.03466), which gives
    a quarter for MobileNetV2. Measured on it, 0.1 to 0.3 of the rates of METHODS are best (docs/benchmarks/images.md).

    Args:
        rate: Of a method, on a base as wide as the embedded ones.
        model: The base, with an adapter or without, on any device; where `sites` finds no blocks, its rate is `rate`.
    """
    try:
        width, transformer = measure_width(model)
    except InlayError:
        return rate
    reference = TRANSFORMER if transformer else CONVOLUTIONAL
    exponent = TRANSFORMER_EXPONENT if transformer else CONVOLUTIONAL_EXPONENT
    return rate * min(1.0, (reference / width) ** exponent)


def measure_width(model: nn.Module) -> tuple[int, bool]:
    """The width of a base, and whether it is a transformer; a denoiser is one, as its blocks attend.

    Raises:
        InlayError: It has no blocks that `sites` finds.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = getattr(base, "config", None)
    if is_diffusion(config) and config.hidden_size:
        return int(config.hidden_size), True
    modules = dict(base_modules_of(base))
    queries = sites(base).q
    if queries:  # the stages of SAM 2 and Swin differ in width
        return statistics.median_low(linear_shape(modules[name])[0] for name in queries), True
    outputs = [linear_shape(module)[1] for module in modules.values() if is_linear(module)]
    outputs += [module.out_channels for module in modules.values() if isinstance(module, nn.Conv2d)]
    return statistics.median_low(outputs), False
