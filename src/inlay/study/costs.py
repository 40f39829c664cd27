"""What a trained trial costs: to store, to run, next to its base and merged into it, and to train."""

import copy
import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.adapters.load import merge_in_memory
from inlay.errors import Unsupported
from inlay.measure.costs import State, time_by_turns, without_adapter
from inlay.measure.energy import measure_energy
from inlay.measure.footprint import footprint
from inlay.measure.macs import count_macs
from inlay.measure.memory import collate_largest_batch, measure_peak, step_options
from inlay.measure.speed import forward_passes
from inlay.methods._peft import PeftModel, adapter_tensors
from inlay.tasks.options import TaskData
from inlay.train.config import TrainConfig

logger = logging.getLogger(__name__)

_OF_A_PASS = ("mmacs", "latency_ms", "energy_j")


def measure_trial(model: nn.Module, data: TaskData, train: TrainConfig) -> dict[str, Any]:
    """The costs of a trained model, as `Row.costs` has them: what cannot be measured is absent.

    The model stays as it is, and so do the random generators of torch. Model, base and a merged copy pass one example
    by turns in one run. Latencies are those of the fastest passes: other work on the machine only ever slows a pass,
    and makes a median that of a time slice. A plain model (a probe, full fine-tuning) adds nothing to its base: it
    costs what that costs.

    Args:
        model: A PeftModel as it was trained, or a plain model whose trained parameters require a gradient.
        data: Of the trial: its example is passed, its longest training examples make the step.
        train: Of the trial: batch size, optimiser, precision, checkpointing.

    Returns:
        trainable_parameters; file_bytes of a safetensors file of what was trained, without inlay's record; mmacs,
        latency_ms and energy_j of one example, the same with the prefixes `base_` and `merged_`; energy_source; device;
        threads; peak_bytes of all tensors in a training step.
    """
    found: dict[str, Any] = {"trainable_parameters": footprint(model).trainable}
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else []
    with torch.random.fork_rng(devices=devices):
        _add_figures(found, "file size", lambda: {"file_bytes": _measure_file(model)})
        _add_figures(found, "forward pass", lambda: _measure_pass(model, data.example()))
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


def _measure_pass(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Costs of one example in each state: as it was trained, `base_`, `merged_`."""
    states: dict[str, State] = {"": partial(nullcontext, model)}
    if isinstance(model, PeftModel):
        states |= _find_states(model, inputs)
    times = time_by_turns(states, inputs)
    found: dict[str, Any] = {"device": times[""][0].device, "threads": times[""][0].threads}
    for name, state in states.items():
        with state() as each:
            with suppress(Unsupported):
                found[f"{name}mmacs"] = round(count_macs(each, inputs) / 1e6, 3)
            energy = measure_energy(each, inputs, warmup=0)
        found[f"{name}latency_ms"] = round(min(turn.p10_ms for turn in times[name]), 3)
        found.setdefault("energy_source", str(energy))
        if energy.joules is not None:
            found[f"{name}energy_j"] = float(f"{energy.joules:.4g}")
    if not isinstance(model, PeftModel):
        found |= {f"{state}{key}": found[key] for state in ("base_", "merged_") for key in _OF_A_PASS if key in found}
    return found


def _find_states(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, State]:
    """The base without the adapter, and a copy with the adapter merged.

    One that there cannot be is left out: a base that does not take these inputs, a method that does not merge.
    """
    makers: dict[str, Callable[[], State]] = {
        "base_": lambda: _try_base(model, inputs),
        "merged_": lambda: partial(nullcontext, merge_in_memory(copy.deepcopy(model))[0]),
    }
    states = {}
    for name, make in makers.items():
        try:
            states[name] = make()
        except Exception as error:
            logger.info("the state %s could not be measured (%s).", name.rstrip("_"), error)
    return states


def _try_base(model: PeftModel, inputs: dict[str, Tensor]) -> State:
    with without_adapter(model) as base, forward_passes(base, inputs) as run:
        run()
    return partial(without_adapter, model)


def _measure_step(model: nn.Module, data: TaskData, train: TrainConfig) -> int:
    batch = collate_largest_batch(data.train, train, data.collate)
    return measure_peak(model, batch, loss=data.loss, **step_options(train))
