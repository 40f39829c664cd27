"""The number of parameters of a model, how many of them are trainable, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a caller with a model has imported torch already
    from torch import Tensor, nn


@dataclass(frozen=True)
class Footprint:
    """Size of a model in memory, without gradients, optimiser states or activations."""

    parameters: int
    trainable: int
    bytes_total: int
    bytes_trainable: int


def footprint(model: nn.Module) -> Footprint:
    """Count the parameters and bytes of a model as it is now, each tensor once even if several modules share it.

    Parameters are counted by the shape they represent: two per byte of a 4-bit weight of bitsandbytes. Everything
    attached counts: each adapter that peft holds, active or not, and for a module in `modules_to_save` the frozen
    original and its copy, as both stay in memory. Trainable parameters are those that require a gradient.

    `bytes_total` also includes buffers and the scales of 8-bit and 4-bit weights: the memory of the idle model.
    """
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    held = [*parameters, *model.buffers(), *_find_scales(model, parameters)]
    return Footprint(
        parameters=sum(map(true_size, parameters)),
        trainable=sum(map(true_size, trainable)),
        bytes_total=sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in held}.values()),
        bytes_trainable=sum(tensor.nbytes for tensor in trainable),
    )


def true_size(parameter: nn.Parameter) -> int:
    """Number of values that a parameter represents: two per byte of a 4-bit weight of bitsandbytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _find_scales(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    """Tensors that bitsandbytes stores next to its weights, which are neither parameters nor buffers."""
    for parameter in parameters:
        yield from _find_state_tensors(getattr(parameter, "quant_state", None))
        yield from _find_state_tensors({"SCB": getattr(parameter, "SCB", None)})
    for module in model.modules():
        # The first forward moves the scales of an 8-bit weight to its layer.
        yield from _find_state_tensors({"SCB": getattr(vars(module).get("state"), "SCB", None)})


def _find_state_tensors(state: object) -> Iterator[Tensor]:
    """Tensors of a quantisation state; with double quantisation it contains a second state."""
    if state is None:
        return
    from torch import Tensor

    for value in (state if isinstance(state, dict) else vars(state)).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from _find_state_tensors(value)


def describe_quantized(model: nn.Module) -> str:
    """One sentence on which layers of a base are quantised, which stay unquantised, and the bytes of both.

    Example: `16 linear layers (attn.c_attn, mlp.c_fc ...) hold 786,432 weights in 8 bits: 0.80 MB, 0.26 of float32;
    transformer.wte, ln_1 ... stay float32: 1.56 MB`.
    """
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")}
    bits = 8 if any(type(m).__name__ == "Linear8bitLt" for m in layers.values()) else 4
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    held = sum(footprint(layer).bytes_total for layer in layers.values())
    biases = sum(layer.bias.nbytes for layer in layers.values() if layer.bias is not None)
    whole = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in whole.values()})
    quantised_bytes, whole_bytes = held - biases, sum(p.nbytes for p in whole.values())
    return (
        f"{len(layers)} linear layers ({_list_short_names(layers)}) hold {weights:,} weights in {bits} bits: "
        f"{quantised_bytes / 1e6:.2f} MB, {quantised_bytes / (4 * weights):.2f} of float32; "
        f"{_list_short_names(whole)} stay {' and '.join(kinds)}: {whole_bytes / 1e6:.2f} MB"
    )


def _list_short_names(names: Iterable[str]) -> str:
    """The last two parts of module names, each pair once, without `weight` and `bias`."""
    plain = (name.removesuffix(".weight").removesuffix(".bias") for name in names)
    short = [name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2] for name in plain]
    return ", ".join(dict.fromkeys(name.lstrip(".0123456789") for name in short))
