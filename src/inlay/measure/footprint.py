"""How many parameters a model has, how many of them train, and the bytes they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a model to count brings torch with it
    from torch import Tensor, nn


@dataclass(frozen=True)
class Footprint:
    """Size of a model in memory, without gradients, optimiser states or activations."""

    parameters: int
    trainable: int
    bytes_total: int
    bytes_trainable: int


def footprint(model: nn.Module) -> Footprint:
    """Count what a model holds now, every tensor once however many modules share it.

    Parameters are counted by the shape they stand for: two per byte of a 4-bit weight of bitsandbytes. All
    that is attached counts: each adapter that peft holds, active or not, and for one in `modules_to_save` the
    original (frozen) as well as its copy, as both stay in memory. Trainable is what requires a gradient.

    `bytes_total` includes the buffers and the scales of 8-bit and 4-bit weights: what the idle model takes.
    """
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    held = [*parameters, *model.buffers(), *_scales(model, parameters)]
    return Footprint(
        parameters=sum(map(true_size, parameters)),
        trainable=sum(map(true_size, trainable)),
        bytes_total=sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in held}.values()),
        bytes_trainable=sum(tensor.nbytes for tensor in trainable),
    )


def true_size(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: two per byte of a 4-bit weight of bitsandbytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _scales(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    """Tensors that bitsandbytes keeps beside its weights, neither parameters nor buffers."""
    for parameter in parameters:
        yield from _inside(getattr(parameter, "quant_state", None))
        yield from _inside({"SCB": getattr(parameter, "SCB", None)})
    for module in model.modules():
        # The first forward moves the scales of an 8-bit weight to its layer.
        yield from _inside({"SCB": getattr(vars(module).get("state"), "SCB", None)})


def _inside(state: object) -> Iterator[Tensor]:
    """Tensors of a quantisation state; with double quantisation a second state lies within it."""
    if state is None:
        return
    from torch import Tensor

    for value in (state if isinstance(state, dict) else vars(state)).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from _inside(value)


def describe_quantized(model: nn.Module) -> str:
    """One sentence on what of a base is held in few bits, what stays whole, and the bytes of both.

    Such as `16 linear layers (attn.c_attn, mlp.c_fc ...) hold 786,432 weights in 8 bits: 0.80 MB, 0.26 of float32;
    transformer.wte, ln_1 ... stay float32: 1.56 MB`.
    """
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")}
    bits = 8 if any(type(m).__name__ == "Linear8bitLt" for m in layers.values()) else 4
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    held = sum(footprint(layer).bytes_total for layer in layers.values())
    biases = sum(layer.bias.nbytes for layer in layers.values() if layer.bias is not None)
    whole = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in whole.values()})
    return (
        f"{len(layers)} linear layers ({_leaves(layers)}) hold {weights:,} weights in {bits} bits: "
        f"{(held - biases) / 1e6:.2f} MB, {(held - biases) / (4 * weights):.2f} of float32; {_leaves(whole)} stay "
        f"{' and '.join(kinds)}: {sum(p.nbytes for p in whole.values()) / 1e6:.2f} MB"
    )


def _leaves(names: Iterable[str]) -> str:
    """The last parts of module names, each once, without `weight` and `bias`."""
    plain = (name.removesuffix(".weight").removesuffix(".bias") for name in names)
    short = [name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2] for name in plain]
    return ", ".join(dict.fromkeys(name.lstrip(".0123456789") for name in short))
