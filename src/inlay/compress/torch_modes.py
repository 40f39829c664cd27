"""Modes in which torch itself computes a model with fewer bits: bfloat16, and 8 bits by torchao.

They pay on few CPUs: without VNNI torchao was 25 times slower than float32, without AVX512-BF16 bfloat16 19 times.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from inlay.errors import DamagedFile, Unsupported
from inlay.tasks.base import load_base

BFLOAT16 = "bfloat16"
TORCHAO = ("torchao-int8-dynamic", "torchao-int8-weights")
TORCH_MODES = (BFLOAT16, *TORCHAO)


def check_torch_mode(mode: str) -> None:
    """Raise InlayError where a mode needs torchao, and it is not installed."""
    if mode in TORCHAO and find_spec("torchao") is None:
        raise Unsupported(f"{mode} needs torchao, which is not installed; pip install 'inlay[torchao]'.")


def convert_in_torch(model: nn.Module, mode: str) -> nn.Module:
    """Change a model, in place, to a mode of TORCH_MODES.

    Raises:
        InlayError: torchao is missing.
    """
    check_torch_mode(mode)
    if mode == BFLOAT16:
        return model.to(torch.bfloat16)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig() if mode == TORCHAO[0] else Int8WeightOnlyConfig())
    return model


def load_in_torch(folder: str, task: str, mode: str) -> Any:
    """The model of a folder in a mode of TORCH_MODES. With torchao the file holds float32, which is quantised here."""
    if mode not in TORCH_MODES:
        raise DamagedFile(f"{folder} says that torch computes it as {mode!r}, which inlay does not know.")
    check_torch_mode(mode)
    base = load_base(folder, task=task, dtype="bfloat16" if mode == BFLOAT16 else "float32", device="cpu")
    return convert_in_torch(base, mode)
