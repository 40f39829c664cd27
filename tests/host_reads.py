"""What a training step reads back from its device, found on a CPU: the batch and the weights are taken to be on one."""

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from inlay.train.loop import _Trainer

READS = (  # operations whose result is a number on the host, or a tensor whose size depends on values
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.nonzero",
    "aten.repeat_interleave.Tensor",
    "aten._unique2",
    "aten.unique_dim",
)


class DeviceTensors(TorchDispatchMode):
    """Notes in `reads` where a tensor is read that is on the device, or was computed of one that is."""

    def __init__(self, reads):
        super().__init__()
        self.reads, self.there = reads, WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        there = any(isinstance(value, torch.nn.Parameter) or value in self.there for value in given)
        if there and (str(func).startswith(READS) or _indexes_by_mask(func, args)):
            places = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.reads.append((str(func), *(f"{frame.filename}:{frame.lineno}" for frame in places[-4:-1])))
        result = func(*args, **kwargs)
        if there:
            self.there |= {value: True for value in tree_iter(result) if isinstance(value, torch.Tensor)}
        return result


def _indexes_by_mask(func, args):
    if not str(func).startswith(("aten.index.", "aten.index_put")):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def watch_steps():
    """Train as on a GPU, and give the list of what the steps read from it: [(operation, places in the source)]."""
    reads = []
    take_step, read_steps = _Trainer._take_step, _Trainer._read_steps
    modes = []

    def send(batch, device, non_blocking=False):
        assert non_blocking == torch.cuda.is_available(), "the host waits for the transfer"
        for value in tree_iter(batch):
            if isinstance(value, torch.Tensor):
                modes[-1].there[value] = True
        return batch

    def step(*args):
        modes.append(DeviceTensors(reads))
        with modes[-1]:
            return take_step(*args)

    def read(*args):
        with _disable_current_modes():
            return read_steps(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("inlay.train.step_reader", "inlay.bases.attention_masks"):
            patch.setattr(f"{module}.is_asynchronous", lambda device: True)
        patch.setattr("inlay.train.loop.send_to_device", send)
        patch.setattr(_Trainer, "_take_step", step)
        patch.setattr(_Trainer, "_read_steps", read)
        yield reads
