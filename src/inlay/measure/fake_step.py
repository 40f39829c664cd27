"""A model without values, and how much memory its operations would hold."""

from __future__ import annotations

import copy
import logging
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils


def fake_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose tensors are fake, on `device`: deepcopy takes from `memo` what it would allocate.

    Layers of bitsandbytes are as after their quantisation, also where it has not taken place, as on the meta device.
    To be called, and its result used, under one FakeTensorMode.
    """
    memo: dict[int, Any] = {
        id(tensor): fake_tensor(tensor, device) for tensor in [*model.parameters(), *model.buffers()]
    }
    bitsandbytes = sys.modules.get("bitsandbytes")  # not imported: then no layer can be of it
    for module in model.modules():
        if bitsandbytes and isinstance(module, bitsandbytes.nn.Linear4bit):
            memo[id(module.weight)] = _four_bit(module, device)
        elif bitsandbytes and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            memo[id(module.weight)], memo[id(module.state)] = _eight_bit(module, device)
    with _FakeCopies(device):
        return copy.deepcopy(model, memo)


class _FakeCopies(TorchFunctionMode):
    """Fake copies of the tensors that are neither parameters nor buffers, wherever the model keeps them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), fake_tensor(tensor, self.device))
        return func(*args, **(kwargs or {}))


def fake_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor, or a parameter, of the same shape and type without values."""
    shadow = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(shadow, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow


def _eight_bit(module: Any, device: torch.device) -> tuple[Tensor, Any]:
    """Weight and state of an 8-bit layer, quantised or still to be; without a threshold, as outliers are values."""
    weight, state = module.weight, copy.copy(module.state)
    kept = torch.float16 if state.has_fp16_weights else torch.int8
    shadow: Any = nn.Parameter(torch.empty(weight.shape, dtype=kept, device=device), requires_grad=False)
    shadow.CB = shadow.SCB = None
    if not state.has_fp16_weights:
        state.CB, state.SCB = shadow.data, torch.empty(len(weight), device=device)
    state.threshold = 0.0
    return shadow, state


def _four_bit(module: Any, device: torch.device) -> Tensor:
    """Weight of a 4-bit layer with its scales, quantised or still to be."""
    weight = module.weight
    if weight.quant_state is None:
        state, size = _new_state(weight), (-(-weight.numel() // 2), 1)
    else:
        state, size = weight.quant_state, weight.shape
    shadow: Any = nn.Parameter(torch.empty(size, dtype=weight.quant_storage, device=device), requires_grad=False)
    shadow.quant_state = _fake_state(state, device)
    return shadow


def _new_state(weight: Any) -> Any:
    """What quantising the weight will yield beside it (bitsandbytes.functional.quantize_4bit), on meta."""
    from bitsandbytes.functional import QuantState

    blocks = -(-weight.numel() // weight.blocksize)
    empty = {"device": "meta", "dtype": torch.float32}
    absmax, inner = torch.empty(blocks, **empty), None
    if weight.compress_statistics:
        inner = QuantState(
            torch.empty(-(-blocks // 256), **empty),
            torch.Size([blocks]),
            torch.empty(256, **empty),
            256,
            None,
            torch.float32,
        )
        absmax = absmax.to(torch.uint8)
    offset = torch.empty((), **empty) if inner else None
    kind, code = weight.quant_type, torch.empty(16, **empty)
    return QuantState(absmax, weight.shape, code, weight.blocksize, kind, weight.dtype, offset, inner)


def _fake_state(state: Any, device: torch.device) -> Any:
    shadow = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(shadow, name, fake_tensor(value, device))
        elif type(value) is type(state):
            setattr(shadow, name, _fake_state(value, device))
    return shadow


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Positions without values do not tell transformers that no row holds several texts; then it builds a mask."""
    whole = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = whole


@contextmanager
def no_traces() -> Iterator[None]:
    """Of what fake tensors cannot do: torch logs a stack trace, and raises the same."""
    speaker = logging.getLogger("torch._subclasses.fake_tensor")
    level = speaker.level
    speaker.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        speaker.setLevel(level)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make under a FakeTensorMode: `alive` bytes now, `peak` at most.

    A storage counts from the operation that yields it until nothing refers to it. One that comes in from outside
    (weights, batch) does not count. Integers whose `values` are known keep them, as a step may look at labels. A number
    that a step draws from 0 to 1, to choose its way, is next to 1.

    Args:
        block: What the allocator rounds up to, in bytes.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.alive, self.peak = block, 0, 0
        self.known: set[int] = set()
        self.values = WeakTensorKeyDictionary()  # fake tensor: the real one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in tensors:
            self._see(tensor, new=False)
        real = self._compute(func, tensors, args, kwargs)
        if isinstance(real, int | float):  # a bool is one too
            return real
        if real is not None and torch.Tag.dynamic_output_shape in func.tags:
            result = fake_tensor(real, tensors[0].device)
        else:
            result = func(*args, **kwargs)
        if real is not None:
            self.values[result] = real
        if func._schema.is_mutable and tensors:
            self.values.pop(tensors[0], None)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, new=True)
        self.peak = max(self.peak, self.alive + _inside(func, args))
        return result

    def _compute(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Tensor | float | None:
        """The operation on the numbers themselves; None if one is not known, or the result is something else."""
        if func is torch.ops.aten.rand.default and not args[0]:
            with unset_fake_temporarily():
                return torch.tensor(1 - 1e-6)
        if not tensors or func._schema.is_mutable or any(tensor not in self.values for tensor in tensors):
            return None
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(Tensor, self.values.__getitem__, (args, kwargs))
            real = func(*args, **kwargs)
        exact = isinstance(real, Tensor) and (real.ndim == 0 or not real.is_floating_point())
        return real if exact or isinstance(real, int | float) else None

    def _see(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = math.ceil(storage.nbytes() / self.block) * self.block if new else 0
        self.alive += size
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _inside(func: Any, args: Any) -> int:
    """Bytes that an operation makes and frees inside: bitsandbytes' 4-bit product holds one whole weight."""
    if str(func) != "bitsandbytes.gemm_4bit.default" or args[0].device.type != "cpu":
        return 0
    return math.prod(args[2]) * args[0].element_size()
