"""What a trained trial costs: to store, to run, next to its base and merged into it, and to train."""

import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from inlay.adapters.load import merge_in_memory
from inlay.measure.costs import cost
from inlay.measure.footprint import footprint
from inlay.measure.memory import collate_largest_batch, measure_peak, step_options
from inlay.methods._peft import PeftModel, adapter_tensors
from inlay.tasks.options import TaskData
from inlay.train.config import TrainConfig

logger = logging.getLogger(__name__)

_OF_A_PASS = ("mmacs", "latency_ms", "energy_j")


def measure_trial(model: nn.Module, data: TaskData, train: TrainConfig) -> dict[str, Any]:
    """The costs of a trained model, as `Row.costs` has them: what cannot be measured is absent.

    The model stays as it is, and so do the random generators of torch. Base, adapter and a merged copy pass one example
    by turns in one run. A plain model (a probe, full fine-tuning) adds nothing to its base: it costs what that costs.

    Args:
        model: A PeftModel as it was trained, or a plain model whose trained parameters require a gradient.
        data: Of the trial: its example is passed, its longest training examples make the step.
        train: Of the trial: batch size, optimiser, precision, checkpointing.

    Returns:
        trainable_parameters; file_bytes of a safetensors file of what was trained, without inlay's record; mmacs,
        latency_ms and energy_j of one example, the same with the prefixes `base_` and `merged_`; latency_spread_ms;
        energy_source; device; threads; peak_bytes of all tensors in a training step.
    """
    found: dict[str, Any] = {"trainable_parameters": footprint(model).trainable}
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else []
    with torch.random.fork_rng(devices=devices):
        _add_figures(found, "file size", lambda: {"file_bytes": _measure_file(model)})
        _add_figures(found, "forward pass", lambda: _measure_pass(model, data))
        _add_figures(found, "training step", lambda: {"peak_bytes": _measure_step(model, data, train)})
    return found


def _add_figures(found: dict[str, Any], what: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Add what could be measured: a figure is not worth a trained trial, whatever its model or machine raises."""
    try:
        found.update(measure())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.info("the %s could not be measured (%s).", what, reason)


def _measure_file(model: nn.Module) -> int:
    """Bytes of a file of the adapter with its head, or of all that is trained."""
    if isinstance(model, PeftModel):
        tensors = adapter_tensors(model)
    else:
        tensors = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        return path.stat().st_size


def _measure_pass(model: nn.Module, data: TaskData) -> dict[str, Any]:
    """Costs of one example in each state."""
    merged = _merge_copy(model) if isinstance(model, PeftModel) else None
    row = cost(model, data.example(), merged=merged)
    kept = (*_OF_A_PASS, "latency_spread_ms", "energy_source", "device", "threads")
    found = {key: value for key, value in row.items() if key.removeprefix("base_").removeprefix("merged_") in kept}
    if not isinstance(model, PeftModel):
        found |= {f"{state}_{key}": row[key] for state in ("base", "merged") for key in _OF_A_PASS if key in row}
    return found


def _merge_copy(model: PeftModel) -> nn.Module | None:
    """A copy of the model with its adapter merged; None where it does not merge, or memory does not suffice."""
    try:
        return merge_in_memory(copy.deepcopy(model))[0]
    except Exception as error:
        logger.info("the merged model could not be measured (%s).", error)
        return None


def _measure_step(model: nn.Module, data: TaskData, train: TrainConfig) -> int:
    batch = collate_largest_batch(data.train, train, data.collate)
    return measure_peak(model, batch, loss=data.loss, **step_options(train))
