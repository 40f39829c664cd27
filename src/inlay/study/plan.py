"""Will it fit: the memory of a training step before training starts, of a run or of a base that is not here."""

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor, nn

from inlay.bases.load import Dtype, read_config, resolve_base
from inlay.bases.quantize import Quantize
from inlay.errors import BadInput
from inlay.measure.memory import MemoryPlan, Optimizer, Precision, measure_peak, plan_memory
from inlay.methods import METHODS
from inlay.methods._peft import PeftModel, count_virtual_tokens
from inlay.tasks import TASKS, task_of_base
from inlay.tasks.base import load_base, load_skeleton
from inlay.tasks.task import PlannedData, Task
from inlay.train.losses import Loss

Batch = dict[str, Tensor]


def plan_base(
    name: str,
    method: str,
    *,
    width: int = 8,
    batch_size: int = 8,
    length: int = 128,
    labels: int | None = None,
    crop: Sequence[int] | None = None,
    channels: int | None = None,
    spacing_mm: Sequence[float] | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    optimizer: Optimizer = "adamw",
    precision: Precision = "no",
    gradient_checkpointing: bool = False,
    accumulate: int = 1,
    ema: float | None = None,
    device: str | None = None,
    measure: bool = False,
) -> tuple[MemoryPlan, int | None]:
    """Plan the training of a base by a method of METHODS; only the base's config is read, no weight.

    Args:
        name: As for `load_base`.
        method: Name in METHODS.
        width: Of the adapter.
        batch_size: Rows of a step.
        length: Tokens of a text; of an image classifier the config names the size of an image.
        labels: Classes of a classifier, default 10; or of scans without the background, default 1.
        crop: Voxels (D, H, W) of a scan that the model sees at a time; default: those of the recipe.
        channels: Channels of a scan; default: 1.
        spacing_mm: Between the voxels of a scan, (D, H, W): where slices are thick, a token has fewer of them.
        dtype: Of the weights.
        quantize: As in `load_base`.
        optimizer: As in TrainConfig, and so the next three.
        precision: Mixed precision.
        gradient_checkpointing: Blocks are recomputed.
        accumulate: Pieces of a step.
        ema: As in TrainConfig; any decay costs a copy of the trained weights.
        device: `cuda` or `cpu`, of those that this machine has; default: the GPU if there is one.
        measure: Load the weights, take steps of this size here, and give their true peak as well, in bytes.

    Raises:
        InlayError: An unknown method or base, one that they do not fit, a size that is no number over 0.
    """
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    sizes = {"width": width, "batch_size": batch_size, "accumulate": accumulate}
    for what, size, least in (*((*item, 1) for item in sizes.items()), ("length", length, 2)):
        if size < least:
            raise BadInput(f"{what} must be at least {least}, not {size}.")
    if ema is not None and not 0 < ema < 1:
        raise BadInput(f"ema must be above 0 and below 1, not {ema:g}.")
    choices = (("dtype", dtype, Dtype), ("optimizer", optimizer, Optimizer), ("precision", precision, Precision))
    for what, value, allowed in choices:
        if value not in get_args(allowed):
            raise BadInput(f"unknown {what} {value!r}; choose one of {', '.join(get_args(allowed))}.")
    task = _task_for(name, method)
    if task.classifies and labels is not None and labels < 2:
        raise BadInput(f"labels must be at least 2, not {labels}.")
    names = [str(i) for i in range(labels or 10)] if task.classifies else None
    data = PlannedData(labels, crop, channels, spacing_mm)

    def adapt(base: Any) -> tuple[nn.Module, Batch, Loss | None]:
        config = task.fit_planned(METHODS[method].make_config(base, width), base, data)
        model = METHODS[method].attach(base, config)
        added = count_virtual_tokens(model.active_peft_config) if isinstance(model, PeftModel) else 0
        return model, *task.planned_batch(base, batch_size, length, added, crop)

    def options(loss: Loss | None) -> dict[str, Any]:
        step = {"optimizer": optimizer, "accumulate": accumulate, "precision": precision, "loss": loss}
        return {**step, "gradient_checkpointing": gradient_checkpointing, "ema": ema is not None}

    model, batch, loss = adapt(load_skeleton(name, task=task.name, labels=names, dtype=dtype, quantize=quantize))
    plan = plan_memory(model, batch, device=device, **options(loss))
    if not measure:
        return plan, None
    model, batch, loss = adapt(load_base(name, task=task.name, labels=names, dtype=dtype, quantize=quantize))
    return plan, measure_peak(model.to(plan.device), batch, **options(loss))


def _task_for(name: str, method: str) -> Task:
    """What the base is for, or what the method makes of it: the spatial adapter takes SAM to volumes."""
    config = read_config(name, resolve_base(name), None)
    own = task_of_base(name, config)
    made = [t for t in TASKS.values() if t.could_take_base(config) and {*t.base_kinds} & {*METHODS[method].bases}]
    return own if own in made or not made else made[0]
