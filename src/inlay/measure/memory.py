"""Will it fit: the memory that one training step takes, worked out beforehand, and measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate

from inlay.bases.device import choose_device
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.measure.fake_step import LiveBytes, fake_model, fake_tensor, no_traces, one_text_a_row
from inlay.measure.footprint import footprint
from inlay.methods._peft import fills_cache
from inlay.train.config import TrainConfig
from inlay.train.launch import disable_checkpointing, enable_checkpointing

Optimizer = Literal["adamw", "adamw8bit"]
Precision = Literal["no", "bf16", "fp16"]
Loss = Callable[[nn.Module, dict[str, Tensor]], Any]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training step at its peak; `peak` is the sum of the five parts.

    Attributes:
        base: Frozen weights and buffers, with the scales of quantised ones.
        adapter: Weights that train, with a new head.
        gradients: One for each of them.
        optimizer: Its two moments.
        activations: The rest of the peak: the batch, what the forward keeps for the backward, what is transient.
        peak: The most that is alive at one time.
        available: Memory of the device; None if it is not in this machine.
        device: Where the step runs.
        batch: Rows that one forward sees.
        optimizer_name: Which optimiser.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    available: int | None
    device: str
    batch: int
    optimizer_name: Optimizer = "adamw"

    @property
    def fits(self) -> bool | None:
        """True if the device holds the peak; None where its memory is not known."""
        return None if self.available is None else self.peak <= self.available

    def __str__(self) -> str:
        name = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW"}[self.optimizer_name]
        parts = {"base": self.base, "adapter": self.adapter, "gradients": self.gradients, name: self.optimizer}
        text = " + ".join(f"{part} {_readable(size)}" for part, size in parts.items())
        text += f" + activations {_readable(self.activations)} (batch {self.batch}) = {_readable(self.peak)}"
        if self.available is None:
            return f"memory: {text} on {self.device}"
        return f"memory: {text} of {_readable(self.available)}: {'fits' if self.fits else 'does not fit'}"


def _readable(size: int) -> str:
    """1,234,567 as 1.23 MB."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= 0.9995 * s or u == "kB")
    return f"{size / scale:.3g} {unit}"


def plan_memory(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    optimizer: Optimizer = "adamw",
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    precision: Precision = "no",
    loss: Loss | None = None,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Predict the peak memory of a training step as `fit` takes it, without computing or allocating anything.

    Forward and backward run on a copy of fake tensors (torch's FakeTensorMode): each operation yields shape and type
    only, on the kernels of the device. What is alive is summed over all storages, so that transient buffers, tied
    weights, views and checkpointing count as they are. The model is not touched; it may be on the meta device, its
    8-bit and 4-bit layers of bitsandbytes then count as quantised.

    Left out: workspaces of cuBLAS and cuDNN, CUDA's context (some 0.5 GB), what an allocator keeps of what is freed (a
    tenth of large steps on a CPU, more of small ones), Python and its libraries, data loaders. The outlier columns of
    LLM.int8() are not counted, as they depend on values. `cache_frozen` is not considered: it takes less.

    Args:
        model: As it goes into `fit`: what requires a gradient trains. Not inside DistributedDataParallel.
        batch: What one optimiser step sees, with labels. Shapes and types are used, and of integers the values, where
            a step looks at them (`NextToken` at its labels); if none does, meta tensors will do.
        optimizer: As in TrainConfig, and so the next three.
        accumulate: Pieces in which the batch is computed; the first two stand for all.
        gradient_checkpointing: Blocks are recomputed in the backward.
        precision: Mixed precision.
        loss: As given to `fit`; default: the model's own.
        device: Where it will train; default: where the model is, or for a model on meta a GPU if there is one.

    Raises:
        InlayError: Nothing trains, no loss, no checkpointing in this model or under peft's prefix tuning, fp16 on a
            CPU, a forward that depends on values.
    """
    where = _device(model, device)
    _check(model, precision, gradient_checkpointing, where)
    live = LiveBytes(block=512 if where.type == "cuda" else 1)
    read = {name: value for name, value in batch.items() if not _masks_nothing(name, value)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        shadow = fake_model(model, where)
        inputs = {name: fake_tensor(value, where) for name, value in read.items()}
        live.values.update({inputs[n]: v.cpu() for n, v in read.items() if not (v.is_meta or v.is_floating_point())})
        size = footprint(shadow)
        try:
            with one_text_a_row(), no_traces(), _training(shadow, gradient_checkpointing, precision, where), live:
                rows = _forward_backward(shadow, inputs, accumulate, loss, pieces=2)
        except RuntimeError as error:
            raise _explained(model, batch, error) from error
        trained = [parameter for parameter in shadow.parameters() if parameter.grad is not None]
        gradients = sum(parameter.nbytes for parameter in trained)
        states = sum(_states(parameter, optimizer) for parameter in trained)
        update = max((_update(parameter, optimizer) for parameter in trained), default=0)
    held = size.bytes_total + states
    peak = held + sum(value.nbytes for value in batch.values()) + max(live.peak, gradients + update)
    return MemoryPlan(
        base=size.bytes_total - size.bytes_trainable,
        adapter=size.bytes_trainable,
        gradients=gradients,
        optimizer=states,
        activations=peak - held - gradients,
        peak=peak,
        available=_memory_of(where),
        device=str(where),
        batch=rows,
        optimizer_name=optimizer,
    )


def _explained(model: nn.Module, batch: dict[str, Tensor], error: RuntimeError) -> InlayError:
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
    return Unsupported(
        f"expected a training step that tensors without values can take, but {type(model).__name__} on {shapes} "
        f"answered: {str(error).splitlines()[0]!r}. Check the shapes; a step that looks at values must be measured."
    )


def measure_peak(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    optimizer: Optimizer = "adamw",
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    precision: Precision = "no",
    loss: Loss | None = None,
    steps: int = 2,
) -> int:
    """Peak bytes of all tensors in a training step, by taking `steps` of them at a learning rate of zero.

    On a GPU what `torch.cuda.max_memory_allocated` says of the last step; on a CPU what is alive before it (model,
    moments, batch) and the peak of the profiler's allocations in it. The weights stay as they are.

    Args:
        model: On the device where it trains; the rest as in `plan_memory`.
        steps: At least 2: the moments exist from the second step on.
    """
    device = _device(model, None)
    _check(model, precision, gradient_checkpointing, device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = {name: value.to(device) for name, value in batch.items()}
    step_optimizer = _optimizer(trainable, optimizer)

    def step() -> None:
        _forward_backward(model, inputs, accumulate, loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizer.step()
        step_optimizer.zero_grad()

    with _training(model, gradient_checkpointing, precision, device):
        for _ in range(max(steps, 2) - 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            return torch.cuda.max_memory_allocated(device)
        states = [v for state in step_optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        moments = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in states}
        held = footprint(model).bytes_total + sum(moments.values()) + sum(v.nbytes for v in inputs.values())
        return held + _allocated(step)


def _allocated(step: Callable[[], None]) -> int:
    """Bytes of tensors alive at the peak of a step on a CPU, above those alive before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _forward_backward(
    model: nn.Module, batch: dict[str, Tensor], accumulate: int, loss: Loss | None, pieces: int | None = None
) -> int:
    """The gradient of the mean loss, piece by piece as in `fit`, or of the first pieces; gives the rows of a piece."""
    rows = len(next(iter(batch.values())))
    size = -(-rows // accumulate)
    for begin in range(0, rows, size)[:pieces]:
        piece = batch if size >= rows else {name: value[begin : begin + size] for name, value in batch.items()}
        value = (loss(model, piece) if loss else model(**piece)).loss
        if value is None:
            raise BadInput(f"expected a loss, but {type(model).__name__} gives none for {sorted(batch)}: add labels.")
        (value * (min(size, rows - begin) / rows)).backward()
        del value
    return size


@contextmanager
def _training(model: Any, checkpointing: bool, precision: Precision, device: torch.device) -> Iterator[None]:
    """Train mode as `fit` and accelerate set it (batch norms keep their statistics); afterwards all is as before."""
    with ExitStack() as after:
        if checkpointing and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            after.enter_context(_checkpointing(model))
        if precision != "no":
            after.enter_context(_mixed(model, torch.bfloat16 if precision == "bf16" else torch.float16, device))
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        yield


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    enable_checkpointing(model)
    try:
        yield
    finally:
        disable_checkpointing(model)


@contextmanager
def _mixed(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast around the forward, as accelerate does it: what it returns is in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    own = {name: value for name, value in vars(model).items() if name == "forward"}
    model.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype)(model.forward))
    try:
        yield
    finally:
        del model.forward
        vars(model).update(own)


def _masks_nothing(name: str, value: Tensor) -> bool:
    """True for an attention mask of ones: transformers looks for that, and without values it could not."""
    return name == "attention_mask" and not value.is_meta and bool(value.all())


def _states(parameter: Tensor, optimizer: Optimizer) -> int:
    """Bytes that the optimiser keeps for a parameter: two moments.

    bitsandbytes keeps a byte per number and a scale per 256, but 32 bits where there are fewer than 4,096 numbers.
    """
    numbers = parameter.numel()
    if optimizer == "adamw":
        return 2 * parameter.nbytes + 4  # a counter of steps
    return 8 * numbers if numbers < 4096 else 2 * numbers + 8 * -(-numbers // 256)


def _update(parameter: Tensor, optimizer: Optimizer) -> int:
    """Bytes that are transient while a parameter is updated: 8-bit moments are unpacked on a CPU, in five copies."""
    return 20 * parameter.numel() if optimizer == "adamw8bit" and parameter.device.type == "cpu" else 0


def _optimizer(trainable: list[nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    if optimizer == "adamw":
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
        return torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0, fused=fused)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trainable, lr=0.0, weight_decay=0.0)


def _check(model: nn.Module, precision: Precision, checkpointing: bool, device: torch.device) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("expected a model with something to train, but no parameter requires a gradient.")
    if precision == "fp16" and device.type == "cpu":
        raise Unsupported("fp16 training needs a GPU; on a CPU take bf16 or no mixed precision.")
    if checkpointing and fills_cache(model):
        raise Unsupported(
            "peft's prefix tuning hands its prefix over in the cache, which gradient checkpointing leaves out; take "
            "the attention prefix, or no checkpointing."
        )


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        here = next(model.parameters()).device
        return here if here.type != "meta" else choose_device()
    return choose_device(device)


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU, or of main memory as far as this container may use it."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):  # not on Windows
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def describe_memory(
    model: nn.Module,
    train_data: Any,
    config: TrainConfig,
    *,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    loss: Loss | None = None,
) -> str:
    """One line on what a step of `fit` with these arguments will take, at its largest batch; or on why that is unknown.

    The batch is that of one process, of the longest examples where the data has `lengths`, else of the first ones.
    """
    rows = min(len(train_data), -(-config.batch_size // PartialState().num_processes))
    lengths = getattr(train_data, "lengths", None)
    chosen = range(rows) if lengths is None else sorted(range(len(lengths)), key=lambda i: -lengths[i])[:rows]
    batch = (collate or default_collate)([train_data[i] for i in chosen])
    precision: Precision = "bf16" if config.precision == "bf16" else "fp16" if config.precision == "fp16" else "no"
    try:
        return str(
            plan_memory(
                model,
                batch,
                optimizer=config.optimizer,
                accumulate=config.accumulate,
                gradient_checkpointing=config.gradient_checkpointing,
                precision=precision,
                loss=loss,
            )
        )
    except InlayError as error:
        return f"memory: not known before training ({error})"
