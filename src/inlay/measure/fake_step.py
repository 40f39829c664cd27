"""A model of fake tensors, without values, and the memory that its operations would hold."""

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
    """A copy of the model with fake tensors on `device`; deepcopy finds them in `memo` instead of allocating new ones.

    Layers of bitsandbytes are copied as quantised, even if they have not been quantised yet, as on the meta device.
    Call this function, and use its result, under one FakeTensorMode.
    """
    memo: dict[int, Any] = {
        id(tensor): fake_tensor(tensor, device) for tensor in [*model.parameters(), *model.buffers()]
    }
    bitsandbytes = sys.modules.get("bitsandbytes")  # if it is not imported, no layer is from it
    for module in model.modules():
        if bitsandbytes and isinstance(module, bitsandbytes.nn.Linear4bit):
            memo[id(module.weight)] = _fake_four_bit(module, device)
        elif bitsandbytes and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            memo[id(module.weight)], memo[id(module.state)] = _fake_eight_bit(module, device)
    with _FakeCopies(device):
        return copy.deepcopy(model, memo)


class _FakeCopies(TorchFunctionMode):
    """Makes fake copies of tensors that are neither parameters nor buffers, wherever the model stores them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), fake_tensor(tensor, self.device))
        return func(*args, **(kwargs or {}))


def fake_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor or parameter of the same shape and type, without values."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _fake_eight_bit(module: Any, device: torch.device) -> tuple[Tensor, Any]:
    """Fake weight and state of an 8-bit layer, quantised or not yet.

    The threshold is off, because outliers depend on values.
    """
    weight, state = module.weight, copy.copy(module.state)
    dtype = torch.float16 if state.has_fp16_weights else torch.int8
    fake: Any = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), requires_grad=False)
    fake.CB = fake.SCB = None
    if not state.has_fp16_weights:
        state.CB, state.SCB = fake.data, torch.empty(len(weight), device=device)
    state.threshold = 0.0
    return fake, state


def _fake_four_bit(module: Any, device: torch.device) -> Tensor:
    """Fake weight of a 4-bit layer with its scales, quantised or not yet."""
    weight = module.weight
    if weight.quant_state is None:
        state, size = _make_quant_state(weight), (-(-weight.numel() // 2), 1)
    else:
        state, size = weight.quant_state, weight.shape
    fake: Any = nn.Parameter(torch.empty(size, dtype=weight.quant_storage, device=device), requires_grad=False)
    fake.quant_state = _fake_quant_state(state, device)
    return fake


def _make_quant_state(weight: Any) -> Any:
    """The state that quantising the weight will give (bitsandbytes.functional.quantize_4bit), on the meta device."""
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


def _fake_quant_state(state: Any, device: torch.device) -> Any:
    fake = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(fake, name, fake_tensor(value, device))
        elif type(value) is type(state):
            setattr(fake, name, _fake_quant_state(value, device))
    return fake


@contextmanager
def assume_one_text_per_row() -> Iterator[None]:
    """Tell transformers that each row holds one text. It cannot see this in fake positions, and would build a mask."""
    whole = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = whole


@contextmanager
def silence_fake_tensor_log() -> Iterator[None]:
    """Silence the stack trace that torch logs, and also raises, when fake tensors cannot do an operation."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate under a FakeTensorMode: `alive` bytes now, and their `peak`.

    A storage counts from the operation that returns it until nothing refers to it. A storage from outside (weights,
    batch) does not count. Integers whose real `values` are known keep them, because a step may read its labels. A
    random number between 0 and 1 that a step draws to choose a branch is taken to be almost 1.

    Args:
        block: The allocator rounds sizes up to multiples of this many bytes.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.alive, self.peak = block, 0, 0
        self.known: set[int] = set()
        self.values = WeakTensorKeyDictionary()  # fake tensor: the real one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most of the calls, and they allocate nothing
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in tensors:
            self._track_storage(tensor, new=False)
        real = self._compute_real(func, tensors, args, kwargs)
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
                self._track_storage(value, new=True)
        self.peak = max(self.peak, self.alive + _count_hidden_bytes(func, args))
        return result

    def _compute_real(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Tensor | float | None:
        """Compute the operation on the real values.

        Returns None if a value is not known, or the result is neither a number, nor integers, nor a scalar tensor.
        """
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

    def _track_storage(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = math.ceil(storage.nbytes() / self.block) * self.block if new else 0
        self.alive += size
        weakref.finalize(storage, self._forget_storage, key, size).atexit = False

    def _forget_storage(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _count_hidden_bytes(func: Any, args: Any) -> int:
    """Bytes that an operation allocates and frees itself.

    The 4-bit product of bitsandbytes unpacks a whole weight on a CPU. Where torch computes a small 3D convolution there
    without oneDNN (one row, few channels), it copies the voxels that each output sees.
    """
    if str(func) == "bitsandbytes.gemm_4bit.default" and args[0].device.type == "cpu":
        return math.prod(args[2]) * args[0].element_size()
    if func is torch.ops.aten.convolution.default:
        return _count_column_bytes(args[0], args[1], args[3:])
    if func is torch.ops.aten.convolution_backward.default:
        return _count_column_bytes(args[1], args[2], args[4:10])
    return 0


def _count_column_bytes(volume: Tensor, weight: Tensor, settings: Any) -> int:
    """Bytes of the copies that torch's own 3D convolution multiplies; 0 where another one is chosen."""
    if volume.ndim != 5 or volume.device.type != "cpu":
        return 0
    if torch._C._select_conv_backend(volume, weight, None, *settings, None) != torch._C._ConvBackend.Slow3d:
        return 0
    stride, padding, dilation = settings[:3]
    places = [
        (size + 2 * pad - step * (edge - 1) - 1) // move + 1
        for size, pad, step, edge, move in zip(
            volume.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return len(volume) * math.prod(weight.shape[1:]) * math.prod(places) * volume.element_size()
