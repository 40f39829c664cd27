"""A fingerprint of a base model's weights that rounding does not change, and other weights do."""

import base64
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from inlay.adapters.sketch_distance import ENTRY, FLOOR, PROJECTIONS, STEP, TOLERANCE
from inlay.bases.load import find_head
from inlay.errors import Unsupported
from inlay.methods._peft import PeftModel, adapter_parameters, base_modules, dequantize_weight

__all__ = ["find_precision", "sketch"]

TENSORS = 64  # as many weights are sketched, evenly spaced over the depth
SIDE = 4096  # and no more than so many rows and columns of each
MOST_STEPS = 2**15 - 1  # of a value in an `ENTRY`
PIECE = 1 << 24  # numbers of a tensor that are in float32 at a time


def sketch(model: torch.nn.Module) -> dict[str, Any]:
    """Fingerprint of a base, with or without an adapter in it; the head of a classifier does not count.

    Each sketched weight W of shape (n, m) gives uᵀWu / ‖W‖, u a fixed sequence of signs: a random projection that
    any change of direction moves, that costs two matrix-vector products, and that is the same for Wᵀ; and log ‖W‖.
    What these weights leave out (biases, norms, tokens, positions, running statistics, matrices between the sketched
    ones) is sketched by itself, under its name.

    Returns:
        weights: number of weight matrices; parameters: their elements; values: base64 of float32, two per sketched one;
        rest: base64 of one `ENTRY` for each other tensor that the forward reads.
    """
    weights = list(_weights(model))
    if not weights:
        raise Unsupported(f"{type(model).__name__} has no weight matrix to recognise it by.")
    chosen = sorted({round(i) for i in np.linspace(0, len(weights) - 1, min(TENSORS, len(weights)))})
    values = [_project(_matrix(weights[i][1])) for i in chosen]
    whole = {id(module.weight) for _, module in (weights[i] for i in chosen) if max(_sides(module)) <= SIDE}
    return {
        "weights": len(weights),
        "parameters": sum(_count(module) for _, module in weights),
        "values": base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode(),
        "rest": base64.b64encode(np.asarray(_sketch_rest(model, whole), dtype=ENTRY).tobytes()).decode(),
    }


def find_precision(model: torch.nn.Module) -> str:
    """The coarsest form in which a weight of the base is held: float32, float16, bfloat16, int8 or nf4."""
    kinds = {_kind(module) for _, module in _weights(model)}
    if not kinds <= TOLERANCE.keys():
        raise Unsupported(
            f"the base is held in {', '.join(kinds - TOLERANCE.keys())}; load it in one of {', '.join(TOLERANCE)}."
        )
    return max(kinds, key=list(TOLERANCE).index)


def _sketch_rest(model: torch.nn.Module, done: set[int]) -> list[tuple[int, int, list[int]]]:
    """One `ENTRY` for each tensor that the forward of the base reads, but for those that are done or in the adapter.

    Names are those of the base without an adapter. A module that an adapter holds a whole copy of (a head) does not
    count, nor a parameter that the adapter's file holds (biases, under bias="all").
    """
    trained = set(adapter_parameters(model).values()) if isinstance(model, PeftModel) else set()
    own = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    done, kinds, entries = done | own, list(TOLERANCE), []
    for name, module in base_modules(model):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            # a rotary embedding that depends on the length of the last text keeps its own frequencies under that name
            moving = f"original_{leaf}" in module._buffers
            if tensor is None or id(tensor) in done or not tensor.numel() or moving:
                continue
            few = _kind(module) if leaf == "weight" and type(module).__name__ in _FEW_BITS else ""
            kind = few or _kind_of(tensor)
            if kind not in kinds or (leaf in module._buffers and not tensor.is_floating_point()):
                continue
            done.add(id(tensor))  # a tied one counts once
            values = _project_in_pieces(dequantize_weight(module) if few else tensor)
            if np.isfinite(values).all():
                steps = np.clip(np.rint(np.asarray(values) / STEP), -MOST_STEPS, MOST_STEPS).astype(int).tolist()
                entries.append((zlib.crc32(f"{name}.{leaf}".encode()), kinds.index(kind), steps))
    return entries


_FEW_BITS = {"Linear8bitLt": "int8", "Linear4bit": "nf4"}


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    modules = list(base_modules(model, originals=True))
    heads = tuple(f"{head}." for head in find_head(modules[0][1]))
    for name, module in modules:
        weight = module._parameters.get("weight")
        if not f"{name}.".startswith(heads) and weight is not None and weight.ndim >= 2:
            yield name, module


def _kind(module: Any) -> str:
    return _FEW_BITS.get(type(module).__name__) or _kind_of(module.weight)


def _kind_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.").replace("float64", "float32")


def _sides(module: Any) -> tuple[int, int]:
    weight = module.weight
    few = _kind(module) in ("int8", "nf4")
    return (module.out_features, module.in_features) if few else (len(weight), weight[0].numel())


def _count(module: Any) -> int:
    return module.in_features * module.out_features if _kind(module) in ("int8", "nf4") else module.weight.numel()


def _matrix(module: Any) -> torch.Tensor:
    weight = dequantize_weight(module) if _kind(module) in ("int8", "nf4") else module.weight
    return weight.detach().flatten(1)[:SIDE, :SIDE].float().cpu()  # (out, in) or (out, in·kh·kw)


def _project(weight: torch.Tensor) -> tuple[float, float]:
    signs = _signs(max(weight.shape), weight.device)
    norm = weight.norm().clamp_min(1e-12)
    return float(signs[: weight.shape[0]] @ weight @ signs[: weight.shape[1]] / norm), float(norm.log())


def _project_in_pieces(tensor: torch.Tensor) -> list[float]:
    """Projections and the logarithm of the size of any tensor, taken over pieces of it."""
    matrix = tensor.detach()
    matrix = matrix.flatten(1) if matrix.ndim > 1 else matrix.reshape(1, -1)
    signs = _independent_signs(max(matrix.shape), matrix.device)
    projections, squares = torch.zeros(PROJECTIONS, dtype=torch.float64), 0.0
    rows = max(1, PIECE // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        piece = matrix[first : first + rows].float()
        projected = (signs[:, first : first + len(piece)] @ piece) * signs[:, : matrix.shape[1]]
        projections += projected.sum(1, dtype=torch.float64).cpu()
        squares += float(piece.square().sum(dtype=torch.float64))
    size = (squares / matrix.numel()) ** 0.5 + FLOOR
    return [*(projections / (size * matrix.numel() ** 0.5)).tolist(), float(np.log(size))]


def _signs(count: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(count, dtype=torch.int64, device=device)
    return ((index * 0x9E3779B1 >> 16) & 1).float() * 2 - 1


@functools.lru_cache(maxsize=8)  # a base has tensors of few sizes
def _independent_signs(count: int, device: torch.device) -> torch.Tensor:
    """`PROJECTIONS` fixed sequences of signs (P, count): bits of the mixed index, as in MurmurHash3's finaliser."""
    mixed = (torch.arange(1, count + 1, dtype=torch.int64, device=device) * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 13)
    return torch.stack([((mixed >> bit) & 1).float() * 2 - 1 for bit in range(16, 16 + PROJECTIONS)])
