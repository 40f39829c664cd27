"""The memory of one training step: predicted before training, and measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from inlay.measure.fake_step import LiveBytes, assume_one_text_per_row, fake_model, fake_tensor, silence_fake_tensor_log
from inlay.measure.footprint import footprint
from inlay.measure.speed import forward_passes
from inlay.methods._peft import fills_cache
from inlay.train.config import TrainConfig
from inlay.train.evaluation import set_train_mode
from inlay.train.launch import disable_checkpointing, enable_checkpointing

Optimizer = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
Precision = Literal["no", "bf16", "fp16"]
Loss = Callable[[nn.Module, dict[str, Tensor]], Any]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training step at its peak; `peak` is the sum of the five parts before it.

    Attributes:
        base: Frozen weights and buffers, including the scales of quantised weights.
        adapter: Trainable weights, including a new head.
        gradients: Gradients of the trainable weights.
        optimizer: The two moments of the optimiser, and the moving average of the weights where there is one.
        activations: The rest of the peak: the batch, tensors kept for the backward pass, and temporary tensors.
        peak: The largest number of bytes alive at one time.
        available: Memory of the device; None if this machine does not have it.
        device: Device of the step.
        batch: Rows of one forward pass.
        optimizer_name: Name of the optimiser.
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
        """True if the peak fits in the device; None if the memory of the device is not known."""
        return None if self.available is None else self.peak <= self.available

    def __str__(self) -> str:
        name = ("paged " if "paged" in self.optimizer_name else "") + (
            "8-bit " if "8bit" in self.optimizer_name else ""
        )
        name += "AdamW"
        parts = {"base": self.base, "adapter": self.adapter, "gradients": self.gradients, name: self.optimizer}
        text = " + ".join(f"{part} {format_bytes(size)}" for part, size in parts.items())
        text += f" + activations {format_bytes(self.activations)} (batch {self.batch}) = {format_bytes(self.peak)}"
        if self.available is None:
            return f"memory: {text} on {self.device}"
        return f"memory: {text} of {format_bytes(self.available)}: {'fits' if self.fits else 'does not fit'}"


def format_bytes(size: int) -> str:
    """A size in words: 1,234,567 is 1.23 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.9995 * scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def plan_memory(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    optimizer: Optimizer = "adamw",
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    precision: Precision = "no",
    ema: bool = False,
    loss: Loss | None = None,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Predict the peak memory of a training step as `fit` takes it, without computing or allocating anything.

    Forward and backward run on a copy of the model with fake tensors (torch's FakeTensorMode): each operation returns
    shape and type only, as the kernels of the device would. The bytes alive are summed over all storages, so that
    temporary buffers, tied weights, views and checkpointing count correctly. The model is not changed. It may be on the
    meta device; its 8-bit and 4-bit layers of bitsandbytes then count as quantised.

    Not included: workspaces of cuBLAS and cuDNN, the CUDA context (about 0.5 GB), freed memory that an allocator keeps
    (a tenth of a large step on a CPU, more of a small one), Python and its libraries, and data loaders. The outlier
    columns of LLM.int8() are not counted, because they depend on values. `cache_frozen` is not considered; it takes
    less.

    Args:
        model: The model as passed to `fit`: parameters that require a gradient are trained. Not inside
            DistributedDataParallel.
        batch: The batch of one optimiser step, with labels. Shapes and types are used, and the values of integers if a
            step reads them (`NextToken` reads its labels). If none are read, meta tensors suffice.
        optimizer: As in TrainConfig, like the next three. The moments of a paged one count, though they may move out.
        accumulate: Pieces in which the batch is computed. Only the first two are followed, as the others repeat them.
        gradient_checkpointing: Recompute blocks in the backward pass.
        precision: Mixed precision.
        ema: The run has a moving average of the trained weights.
        loss: As passed to `fit`; default: the loss that the model returns.
        device: Device of the training; default: that of the model, or for a model on meta a GPU if there is one.

    Raises:
        InlayError: Nothing is trainable; there is no loss; this model or peft's prefix tuning has no gradient
            checkpointing; fp16 on a CPU; the forward depends on values.
    """
    where = _choose_device(model, device)
    _check_request(model, precision, gradient_checkpointing, where)
    live = LiveBytes(block=512 if where.type == "cuda" else 1)
    read = {name: value for name, value in batch.items() if not _is_mask_of_ones(name, value)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake_model(model, where)
        inputs = {name: fake_tensor(value, where) for name, value in read.items()}
        live.values.update({inputs[n]: v.cpu() for n, v in read.items() if not (v.is_meta or v.is_floating_point())})
        size = footprint(fake)
        try:
            with (
                nullcontext() if "position_ids" in batch else assume_one_text_per_row(),
                silence_fake_tensor_log(),
                _train_mode(fake, gradient_checkpointing, precision, where),
                live,
            ):
                rows = _forward_backward(fake, inputs, accumulate, loss, pieces=2)
        except RuntimeError as error:
            raise _explain_failure(model, batch, error) from error
        trained = [parameter for parameter in fake.parameters() if parameter.grad is not None]
        gradients = sum(parameter.nbytes for parameter in trained)
        states = sum(_count_optimizer_bytes(parameter, optimizer) for parameter in trained)
        states += size.bytes_trainable if ema else 0
        update = max((_count_update_bytes(parameter, optimizer) for parameter in trained), default=0)
    held = size.bytes_total + states
    peak = held + sum(value.nbytes for value in batch.values()) + max(live.peak, gradients + update)
    return MemoryPlan(
        base=size.bytes_total - size.bytes_trainable,
        adapter=size.bytes_trainable,
        gradients=gradients,
        optimizer=states,
        activations=peak - held - gradients,
        peak=peak,
        available=_read_device_memory(where),
        device=str(where),
        batch=rows,
        optimizer_name=optimizer,
    )


def _explain_failure(model: nn.Module, batch: dict[str, Tensor], error: RuntimeError) -> InlayError:
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
    return Unsupported(
        f"the memory of a training step of {type(model).__name__} on {shapes} cannot be predicted "
        f"({str(error).splitlines()[0]}). Check the shapes; a step that looks at values must be measured."
    )


def measure_peak(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    optimizer: Optimizer = "adamw",
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    precision: Precision = "no",
    ema: bool = False,
    loss: Loss | None = None,
    steps: int = 2,
) -> int:
    """Measure the peak bytes of all tensors in a training step, by taking `steps` steps with a learning rate of zero.

    On a GPU the result is `torch.cuda.max_memory_allocated` of the last step. On a CPU it is the bytes alive before the
    last step (model, moments, batch) plus the peak of the profiler's allocations in it. The weights do not change.

    Args:
        model: The model, on the device of the training. The other arguments are those of `plan_memory`.
        steps: At least 2, because the moments exist from the second step on.
    """
    device = _choose_device(model, None)
    _check_request(model, precision, gradient_checkpointing, device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in trainable] if ema else []
    inputs = {name: value.to(device) for name, value in batch.items()}
    step_optimizer = _build_optimizer(trainable, optimizer)

    def step() -> None:
        _forward_backward(model, inputs, accumulate, loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizer.step()
        step_optimizer.zero_grad()

    with _train_mode(model, gradient_checkpointing, precision, device):
        for _ in range(max(steps, 2) - 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            return torch.cuda.max_memory_allocated(device)
        states = [v for state in step_optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        moments = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in states}
        held = footprint(model).bytes_total + sum(moments.values())
        held += sum(v.nbytes for v in (*inputs.values(), *average))
        return held + _measure_allocations(step)


def measure_forward_peak(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Measure the peak bytes of all tensors in a forward pass in eval and inference mode, as `measure_peak` does."""
    device = _choose_device(model, None)
    with forward_passes(model, inputs) as run:
        run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            run()
            return torch.cuda.max_memory_allocated(device)
        held = footprint(model).bytes_total + sum(value.nbytes for value in inputs.values())
        return held + _measure_allocations(run)


def _measure_allocations(step: Callable[[], object]) -> int:
    """Peak bytes of the tensors that a step on a CPU allocates, in addition to those alive before it."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library would write that it starts and stops
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
    """Compute the gradient of the mean loss piece by piece as in `fit`, or of the first `pieces` only.

    Returns:
        Rows of a piece.
    """
    rows = len(next(iter(batch.values())))
    size = -(-rows // accumulate)
    for begin in range(0, rows, size)[:pieces]:
        piece = batch if size >= rows else {name: value[begin : begin + size] for name, value in batch.items()}
        value = (loss(model, piece) if loss else model(**piece)).loss
        if value is None:
            raise BadInput(
                f"{type(model).__name__} returns no loss for {', '.join(sorted(batch))}; add labels to the batch."
            )
        (value * (min(size, rows - begin) / rows)).backward()
        del value
    return size


@contextmanager
def _train_mode(model: Any, checkpointing: bool, precision: Precision, device: torch.device) -> Iterator[None]:
    """Train mode as `fit` and accelerate set it; undone at the end."""
    with ExitStack() as after:
        if checkpointing and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            after.enter_context(_gradient_checkpointing(model))
        if precision != "no":
            dtype = torch.bfloat16 if precision == "bf16" else torch.float16
            after.enter_context(_autocast_forward(model, dtype, device))
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
        set_train_mode(model)
        yield


@contextmanager
def _gradient_checkpointing(model: Any) -> Iterator[None]:
    enable_checkpointing(model)
    try:
        yield
    finally:
        disable_checkpointing(model)


@contextmanager
def _autocast_forward(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast around the forward with outputs in float32, as accelerate does it."""
    from accelerate.utils import convert_outputs_to_fp32

    previous = {name: value for name, value in vars(model).items() if name == "forward"}
    model.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype)(model.forward))
    try:
        yield
    finally:
        del model.forward
        vars(model).update(previous)


def _is_mask_of_ones(name: str, value: Tensor) -> bool:
    """True for an attention mask of ones. transformers checks for it, which it cannot do without values."""
    return name == "attention_mask" and not value.is_meta and bool(value.all())


def _count_optimizer_bytes(parameter: Tensor, optimizer: Optimizer) -> int:
    """Bytes of the two moments that the optimiser stores for a parameter.

    bitsandbytes stores one byte per value and a scale per 256 values, but 32 bits for parameters below 4,096 values.
    """
    numbers = parameter.numel()
    if optimizer == "adamw":
        return 2 * parameter.nbytes + 4  # a counter of steps
    if optimizer == "paged_adamw":
        return 8 * numbers
    return 8 * numbers if numbers < 4096 else 2 * numbers + 8 * -(-numbers // 256)


def _count_update_bytes(parameter: Tensor, optimizer: Optimizer) -> int:
    """Temporary bytes while a parameter is updated: on a CPU, 8-bit moments are unpacked into five copies."""
    return 20 * parameter.numel() if "8bit" in optimizer and parameter.device.type == "cpu" else 0


def _build_optimizer(trainable: list[nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    if optimizer == "adamw":
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
        return torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0, fused=fused)
    from bitsandbytes import optim

    kinds = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}
    return kinds[optimizer](trainable, lr=0.0, weight_decay=0.0)


def _check_request(model: nn.Module, precision: Precision, checkpointing: bool, device: torch.device) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("nothing to train: no parameter requires a gradient.")
    if precision == "fp16" and device.type == "cpu":
        raise Unsupported("fp16 training needs a GPU; on a CPU use bf16 or no mixed precision.")
    if checkpointing and fills_cache(model):
        raise Unsupported(
            "peft's prefix tuning puts its prefix into the cache, which gradient checkpointing does not use; use the "
            "attention prefix, or no checkpointing."
        )


def _choose_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        here = next(model.parameters()).device
        return here if here.type != "meta" else choose_device()
    return choose_device(device)


def _read_device_memory(device: torch.device) -> int | None:
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
    """One line on the memory of a step of `fit` with these arguments at its largest batch, or why it is not known."""
    batch = collate_largest_batch(train_data, config, collate)
    try:
        return str(plan_memory(model, batch, loss=loss, **step_options(config)))
    except InlayError as error:
        return f"memory: not known before training ({error})"


def collate_largest_batch(
    train_data: Any, config: TrainConfig, collate: Callable[[list[Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The batch of one process in a step of `fit` that takes most memory.

    It holds the longest examples if the data has `lengths`, else the first ones; some twice where the data has fewer
    than a batch, as batches of `fit` are always full.
    """
    rows = -(-config.batch_size // PartialState().num_processes)
    lengths = getattr(train_data, "lengths", None)
    order = range(len(train_data)) if lengths is None else sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (collate or default_collate)([train_data[order[i % len(order)]] for i in range(rows)])


def step_options(config: TrainConfig) -> dict[str, Any]:
    """What `plan_memory` and `measure_peak` need to know of a step of `fit`."""
    return {
        "optimizer": config.optimizer,
        "ema": config.ema is not None,
        "accumulate": config.accumulate,
        "gradient_checkpointing": config.gradient_checkpointing,
        "precision": "no" if config.precision == "auto" else config.precision,
    }
