"""What a model costs, and what of it is the adapter's, in one row: it goes into every saved adapter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor, nn

from inlay.errors import InlayError
from inlay.measure.energy import measure_energy
from inlay.measure.footprint import footprint, true_size
from inlay.measure.macs import count_macs
from inlay.measure.speed import Latency, latency
from inlay.methods._peft import PeftModel, acts_as_saved, base_modules, base_with_own_head

State = Callable[[], AbstractContextManager[None]]
_TURNS, _PASSES = 6, 5  # after a first turn to warm up: 25 passes in each state
_BUDGET_S = 2.0  # of all turns; one is always taken


def cost(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int | float | str]:
    """Parameters, multiply-accumulates, latency and energy of one forward pass of `inputs`, as `model` is now.

    Of a model with an adapter also those of its base alone, under the same names with `base_` in front: what the
    adapter costs is the difference. Latencies are taken by turns, so that whatever else the machine does hits both.

    Returns:
        parameters and trainable_parameters (counts), weights_mb and trainable_mb (10^6 bytes held in memory), mmacs
        (10^6 multiply-accumulates), latency_ms (median of single passes), latency_spread_ms (largest difference of a
        state's turns, where there was more than one), energy_j where it is known, energy_source (how, or why not),
        device and threads it was measured on. No base_mmacs, base_latency_ms and base_energy_j where the base alone
        cannot compute these inputs, such as a volume.
    """
    size = footprint(model)
    rows: dict[str, int | float | str] = {
        "parameters": size.parameters,
        "trainable_parameters": size.trainable,
        "weights_mb": round(size.bytes_total / 1e6, 4),
        "trainable_mb": round(size.bytes_trainable / 1e6, 4),
    }
    states: dict[str, State] = {"": nullcontext}
    macs = {"": count_macs(model, inputs)}
    if isinstance(model, PeftModel) and acts_as_saved(model):
        own = _adapters_own(model)
        rows["base_parameters"] = size.parameters - sum(map(true_size, own))
        rows["base_weights_mb"] = round((size.bytes_total - sum(parameter.nbytes for parameter in own)) / 1e6, 4)
        try:
            with base_with_own_head(model):
                macs["base_"] = count_macs(model, inputs)
            states["base_"] = partial(base_with_own_head, model)
        except InlayError:  # it has no use for such inputs without its adapter
            pass
    times = _latencies(model, inputs, states)
    medians = {name: [time.median_ms for time in turns] for name, turns in times.items()}
    for name, state in states.items():
        rows[f"{name}mmacs"] = round(macs[name] / 1e6, 3)
        rows[f"{name}latency_ms"] = round(statistics.median(medians[name]), 3)
        with state():
            energy = measure_energy(model, inputs, warmup=0)
        if energy.joules is not None:
            rows[f"{name}energy_j"] = float(f"{energy.joules:.4g}")
        rows.setdefault("energy_source", str(energy))
    if len(medians[""]) > 1:
        rows["latency_spread_ms"] = round(max(max(turns) - min(turns) for turns in medians.values()), 3)
    return {**rows, "device": times[""][0].device, "threads": times[""][0].threads}


def _adapters_own(model: PeftModel) -> list[nn.Parameter]:
    """All parameters that are not the base's, those of adapters that are not active among them."""
    base = {id(p) for _, module in base_modules(model, originals=True) for p in module._parameters.values()}
    return [parameter for parameter in model.parameters() if id(parameter) not in base]


def _latencies(model: nn.Module, inputs: dict[str, Tensor], states: dict[str, State]) -> dict[str, list[Latency]]:
    """Some passes in one state after the other, round about; the first turn counts if there is no second."""
    found: dict[str, list[Latency]] = {name: [] for name in states}
    deadline, share = time.perf_counter() + _BUDGET_S, _BUDGET_S / (_TURNS * len(states))
    for _ in range(_TURNS):
        for name, state in states.items():
            with state():
                found[name].append(latency(model, inputs, repeats=_PASSES, warmup=1, budget_s=share))
        if time.perf_counter() > deadline:
            break
    return {name: turns[1:] or turns for name, turns in found.items()}
