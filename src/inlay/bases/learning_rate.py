"""How far a learning rate has to fall for a base that is wider than those on which it was found."""

import statistics

from peft import PeftModel
from torch import nn

from inlay.bases.sites import base_modules_of, is_linear, linear_shape, sites
from inlay.errors import InlayError

# The exponent with which the best rate falls with the hidden size, of LoRA and of all weights alike: 0.775 on Qwen,
# 0.781 on Llama (Schulman and Thinking Machines Lab 2025, LoRA Without Regret).
EXPONENT = 0.78
# Widths of the embedded bases, on which the rates of METHODS were found.
TRANSFORMER, CONVOLUTIONAL = 128, 48


def scale_rate(rate: float, model: nn.Module) -> float:
    """The rate for a base of this width, where `rate` suits the embedded bases; never more than that.

    The width of a transformer is its hidden size. Of a convolutional network it is the median number of channels that
    its layers give; the law was not found on these, but agrees with what they want: the best rates on MobileNetV2 are
    0.1 to 0.3 of those on the embedded networks (docs/benchmarks/images.md), and this gives 0.34.

    Args:
        rate: Of a method, on a base as wide as the embedded ones.
        model: The base, with an adapter or without, on any device; where `sites` finds no blocks, its rate is `rate`.
    """
    try:
        width, reference = measure_width(model)
    except InlayError:
        return rate
    return rate * min(1.0, (reference / width) ** EXPONENT)


def measure_width(model: nn.Module) -> tuple[int, int]:
    """The width of a base, and that of the embedded bases of its kind.

    Raises:
        InlayError: It has no blocks that `sites` finds.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base_modules_of(base))
    queries = sites(base).q
    if queries:
        return linear_shape(modules[queries[0]])[0], TRANSFORMER
    outputs = [linear_shape(module)[1] for module in modules.values() if is_linear(module)]
    outputs += [module.out_channels for module in modules.values() if isinstance(module, nn.Conv2d)]
    return statistics.median_low(outputs), CONVOLUTIONAL
