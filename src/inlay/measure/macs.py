"""Count the multiply-accumulates of a forward pass without computing it."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from inlay.errors import Unsupported


def count_macs(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass in eval mode, for the whole batch in `inputs`.

    Matrix products, convolutions (including taps on padding) and both products of attention are counted; of attention
    the whole square, also under a causal mask. Biases, norms, activations, softmax and element-wise products are not
    counted. A quantised linear layer counts as a dense one. An unmerged adapter adds its own.

    The pass runs on a copy on torch's meta device, which works out shapes without computing or allocating. (On a CPU
    torch would not see the products of attention.) The model is not changed.

    Args:
        model: Any module, on any device; not inside a wrapper such as DistributedDataParallel.
        inputs: Keyword arguments of its forward, on any device; only their shapes and types are used. Leave attention
            masks out: transformers reads their values, and they do not change the count.

    Raises:
        InlayError: The forward pass needs the values of its tensors, or the inputs do not fit.

    Source: `torch.utils.flop_counter.FlopCounterMode`, halved, because it counts two operations for each
    multiply-accumulate.
    """
    return sum(count_macs_by_module(model, inputs).values())


def count_macs_by_module(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """The multiply-accumulates of `count_macs`, by the module that computes them.

    Args:
        model: As for `count_macs`, and so the inputs and what is raised.

    Returns:
        Names as in `named_modules`, in its order, "" for the model itself; each with what is computed in its own
        forward and in none of the modules that this calls, so that the numbers add up to the whole.
    """
    on_meta = copy_to_meta(model).eval()
    for module in on_meta.modules():
        # This check of transformers would read the first tokens.
        module.warn_if_padding_and_no_attention_mask = lambda *_: None
    counter = FlopCounterMode(display=False)
    flops = _count_own_flops(on_meta, counter)
    try:
        with counter, torch.no_grad():
            on_meta(**{name: _to_meta(value) for name, value in inputs.items()})
    except (RuntimeError, ValueError) as error:  # models check the shapes of their inputs
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise Unsupported(
            f"the multiply-accumulates of {type(model).__name__} on {shapes} cannot be counted on torch's meta device "
            f"({str(error).splitlines()[0]}). Leave attention masks out and check the shapes; control flow that "
            "depends on values cannot be counted."
        ) from error
    return {name: count // 2 for name, count in flops.items()}


def _count_own_flops(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    """A table that the next forward pass of the model fills: what `counter` sees inside a call of each module.

    What it sees inside the calls that this module makes is theirs.
    """
    own = dict.fromkeys((name for name, _ in model.named_modules()), 0)
    running: list[tuple[int, int]] = []  # of the calls around: the count at their start, and that of their own calls

    def start(*_: object) -> None:
        running.append((counter.get_total_flops(), 0))

    def end(name: str) -> None:
        before, inner = running.pop()
        all_inside = counter.get_total_flops() - before
        own[name] += all_inside - inner
        if running:
            around, others = running.pop()
            running.append((around, others + all_inside))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(start)
        module.register_forward_hook(lambda *_, name=name: end(name))
    return own


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy with all tensors on the meta device; deepcopy finds them in `memo` instead of allocating new ones."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # if it is not imported, no layer is from it
    quantised = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt) if bitsandbytes else ()
    memo: dict[int, object] = {id(parameter): _to_meta(parameter) for parameter in model.parameters()}
    for module in model.modules():
        # Tensors that are plain attributes of a module are neither parameters nor buffers.
        plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
        memo |= {id(tensor): _to_meta(tensor) for tensor in [*module.buffers(recurse=False), *plain]}
        if isinstance(module, quantised):
            assert isinstance(module, nn.Linear)
            memo[id(module)] = nn.Linear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                device="meta",
                dtype=torch.float32,
            )
    return copy.deepcopy(model, memo)


def _to_meta(tensor: Tensor) -> Tensor:
    # One floating-point type for all: bitsandbytes takes any input, the dense layers that replace it do not.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    on_meta = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(on_meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else on_meta
