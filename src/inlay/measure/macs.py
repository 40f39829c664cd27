"""Multiply-accumulates of a forward pass, counted without computing it."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from inlay.errors import Unsupported


def count_macs(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass in eval mode, for the whole batch in `inputs`.

    Counts matrix products, convolutions (taps on padding too) and both products of attention, of the whole
    square also where a mask is causal. Biases, norms, activations, softmax and element-wise products are not
    counted. A quantised linear layer counts as the dense one it stands for; an unmerged adapter adds its own.

    The pass runs on a copy on torch's meta device: shapes are worked out, nothing is computed or allocated.
    The model is not touched. On a CPU torch would not see the products of attention.

    Args:
        model: Any module, on any device; not inside a wrapper such as DistributedDataParallel.
        inputs: Keyword arguments of its forward, on any device; only shape and type are used. Leave attention
            masks out: transformers asks them for values, and they change no count.

    Raises:
        InlayError: the forward pass needs the values of its tensors, or the inputs do not fit.

    Source: `torch.utils.flop_counter.FlopCounterMode`, halved: it counts two operations for each.
    """
    shadow = _on_meta(model).eval()
    for module in shadow.modules():
        module.warn_if_padding_and_no_attention_mask = lambda *_: None  # transformers', which looks at the first tokens
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            shadow(**{name: _meta(value) for name, value in inputs.items()})
    except RuntimeError as error:  # and its subclass NotImplementedError
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise Unsupported(
            f"expected a forward pass that needs no values (torch's meta device), but {type(model).__name__} "
            f"on {shapes} answered: {str(error).splitlines()[0]!r}. Leave attention masks out and check the "
            "shapes; control flow that depends on values cannot be counted."
        ) from error
    return counter.get_total_flops() // 2


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy whose tensors are all on the meta device: deepcopy takes from `memo` what it would allocate."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # not imported: then no layer can be of it
    quantised = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt) if bitsandbytes else ()
    memo: dict[int, object] = {id(parameter): _meta(parameter) for parameter in model.parameters()}
    for module in model.modules():
        # Tensors that a module keeps as plain attributes are known neither as parameters nor as buffers.
        plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
        memo |= {id(tensor): _meta(tensor) for tensor in [*module.buffers(recurse=False), *plain]}
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


def _meta(tensor: Tensor) -> Tensor:
    # One floating type for all: bitsandbytes takes any as input, the dense layers that stand in do not.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    shadow = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(shadow, requires_grad=False) if isinstance(tensor, nn.Parameter) else shadow
