"""Loss and gradient norm of the latest steps, which stay on the device until they are read together."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from inlay.bases.device import is_asynchronous


@dataclass(frozen=True)
class StepValues:
    """What a step reports.

    Attributes:
        step: Its number, from 1.
        loss: Mean over all processes.
        gradient_norm: L2 norm before clipping.
        learning_rate: That of the update.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float

    @property
    def finite(self) -> bool:
        """False if the loss or the gradient norm is NaN or Inf."""
        return self.loss - self.loss == 0.0 and self.gradient_norm - self.gradient_norm == 0.0


class StepReader:
    """Collects the values of each step on the device, and reads those of `every` steps at once.

    Reading a value waits until the device has computed it. A host that never waits prepares the next steps meanwhile.

    On a CPU every step is read before its update. Elsewhere a step that breaks is found late, so its update must not
    spoil the weights: `guard` has the optimiser leave out that update and all later ones, without reading anything.
    An optimiser that cannot do this is read at every step, too.

    Args:
        accelerator: Of the run; all of its processes read together.
        optimizer: As it came from torch, before `accelerator.prepare`.
        every: Steps between two reads.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.accelerator = accelerator
        self.every = every if can_read_late(accelerator, optimizer) else 1
        self._broken = torch.zeros((), device=accelerator.device)  # 1 from the first step that breaks
        self._steps: list[tuple[int, float]] = []  # number and learning rate
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        if self.every > 1:
            optimizer.register_step_pre_hook(self._hand_over_flag)

    def add(self, step: int, learning_rate: float, loss: torch.Tensor, norm: torch.Tensor | float | None) -> None:
        """Keep the values of a step, which has not been applied to the weights yet."""
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        elif not isinstance(norm, torch.Tensor):  # DeepSpeed clips by itself
            norm = loss.new_full((), norm or 0.0)
        self._steps.append((step, learning_rate))
        self._losses.append(loss)
        self._norms.append(norm)
        if self.every > 1:
            # NaN - NaN and Inf - Inf are NaN, and NaN != 0. An fp16 gradient may overflow: its scaler skips that step.
            watched = loss - loss if self.accelerator.mixed_precision == "fp16" else loss - loss + (norm - norm)
            self._broken = torch.maximum(self._broken, (watched != 0).to(self._broken.dtype))

    @property
    def full(self) -> bool:
        """True if `every` steps have not been read."""
        return len(self._steps) >= self.every

    def __len__(self) -> int:
        return len(self._steps)

    def read(self, signal: int) -> tuple[list[StepValues], int]:
        """The values of all steps since the last read, and the stop signal: the largest of all processes."""
        losses, norms = torch.stack(self._losses), torch.stack(self._norms)
        if self.accelerator.num_processes > 1:  # all must stop after the same step
            mine = torch.cat([losses, losses.new_full((1,), signal)])
            each = self.accelerator.gather(mine[None])  # a row per process
            losses, signal = torch.stack([column.mean() for column in each[:, :-1].unbind(1)]), int(each[:, -1].max())
        values = [
            StepValues(step, loss, norm, rate)
            for (step, rate), loss, norm in zip(self._steps, losses.tolist(), norms.tolist(), strict=True)
        ]
        self._steps, self._losses, self._norms = [], [], []
        return values, signal

    def _hand_over_flag(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Before each update: the flag by which a GradScaler has the fused kernel leave the weights as they are."""
        optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", self._broken), self._broken)


_KERNELS_WITH_FLAG = ("cpu", "cuda")  # of torch's fused AdamW


def can_read_late(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> bool:
    """True if a read would wait, and the optimiser leaves out an update by a flag: fused AdamW on plain tensors.

    FSDP2 makes shards of them afterwards. DeepSpeed updates the weights before the values of the step are there.
    """
    return (
        is_asynchronous(accelerator.device)
        and accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        and accelerator.device.type in _KERNELS_WITH_FLAG
        and isinstance(optimizer, torch.optim.AdamW)
        and all(group["fused"] for group in optimizer.param_groups)
        and not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    )
