"""A fingerprint of a base model's weights that rounding does not change, and other weights do."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from inlay.adapters.sketch_distance import TOLERANCE, distance
from inlay.bases.load import head_of
from inlay.errors import Unsupported
from inlay.methods._peft import base_modules, dequantize_weight

__all__ = ["TOLERANCE", "distance", "precision_of", "sketch"]

TENSORS = 64  # as many weights are sketched, evenly spaced over the depth
SIDE = 4096  # and no more than so many rows and columns of each


def sketch(model: torch.nn.Module) -> dict[str, Any]:
    """Fingerprint of a base, with or without an adapter in it; the head of a classifier does not count.

    Each sketched weight W of shape (n, m) gives uᵀWu / ‖W‖, u a fixed sequence of signs: a random projection that
    any change of direction moves, that costs two matrix-vector products, and that is the same for Wᵀ; and log ‖W‖.

    Returns:
        weights: number of weight matrices; parameters: their elements; values: base64 of float32, two per sketched one.
    """
    weights = list(_weights(model))
    if not weights:
        raise Unsupported(f"{type(model).__name__} has no weight matrix to recognise it by.")
    chosen = sorted({round(i) for i in np.linspace(0, len(weights) - 1, min(TENSORS, len(weights)))})
    values = [_project(_matrix(weights[i][1])) for i in chosen]
    return {
        "weights": len(weights),
        "parameters": sum(_count(module) for _, module in weights),
        "values": base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode(),
    }


def precision_of(model: torch.nn.Module) -> str:
    """The coarsest form in which a weight of the base is held: float32, float16, bfloat16, int8 or nf4."""
    kinds = {_kind(module) for _, module in _weights(model)}
    if not kinds <= TOLERANCE.keys():
        raise Unsupported(f"expected weights in {', '.join(TOLERANCE)}, got {', '.join(kinds - TOLERANCE.keys())}.")
    return max(kinds, key=list(TOLERANCE).index)


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    modules = list(base_modules(model, originals=True))
    heads = tuple(f"{head}." for head in head_of(modules[0][1]))
    for name, module in modules:
        weight = module._parameters.get("weight")
        if not f"{name}.".startswith(heads) and weight is not None and weight.ndim >= 2:
            yield name, module


def _kind(module: Any) -> str:
    kind = {"Linear8bitLt": "int8", "Linear4bit": "nf4"}.get(type(module).__name__)
    return kind or str(module.weight.dtype).removeprefix("torch.").replace("float64", "float32")


def _count(module: Any) -> int:
    return module.in_features * module.out_features if _kind(module) in ("int8", "nf4") else module.weight.numel()


def _matrix(module: Any) -> torch.Tensor:
    weight = dequantize_weight(module) if _kind(module) in ("int8", "nf4") else module.weight
    return weight.detach().flatten(1)[:SIDE, :SIDE].float().cpu()  # (out, in) or (out, in·kh·kw)


def _project(weight: torch.Tensor) -> tuple[float, float]:
    index = torch.arange(max(weight.shape), dtype=torch.int64)
    signs = ((index * 0x9E3779B1 >> 16) & 1).float() * 2 - 1
    norm = weight.norm().clamp_min(1e-12)
    return float(signs[: weight.shape[0]] @ weight @ signs[: weight.shape[1]] / norm), float(norm.log())
