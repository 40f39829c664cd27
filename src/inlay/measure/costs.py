"""The cost of a model and of its adapter, in one row that is stored in every saved adapter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial

from torch import Tensor, nn

from inlay.errors import InlayError, Unsupported
from inlay.measure.energy import measure_energy
from inlay.measure.footprint import footprint, true_size
from inlay.measure.macs import count_macs
from inlay.measure.speed import Latency, latency
from inlay.methods._peft import PeftModel, acts_as_saved, base_modules, base_with_own_head, layers_taken_out

State = Callable[[], AbstractContextManager[nn.Module]]  # yields the model as it is in that state
# Turns, the first of which is a warm-up, and passes per turn: 25 passes are counted in each state.
_TURNS, _PASSES = 6, 5
_BUDGET_S = 2.0  # for all turns; one turn is always taken


def cost(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int | float | str]:
    """Parameters, multiply-accumulates, latency and energy of one forward pass of `inputs`, for `model` as it is now.

    For a model with an adapter, the row also has the cost of its base without the adapter, under the same names with
    the prefix `base_`. The difference is the cost of the adapter. Latencies of both are measured by turns, so that
    other load on the machine affects both.

    Returns:
        parameters and trainable_parameters (counts); weights_mb and trainable_mb (10^6 bytes in memory); mmacs (10^6
        multiply-accumulates, if they can be counted); latency_ms (median of single passes); latency_spread_ms (largest
        difference between the turns of a state, if there was more than one); energy_j if it is known; energy_source
        (how it was measured, or why not); the device and threads of the measurement. If the base without the adapter
        cannot compute these inputs, such as a volume, base_mmacs, base_latency_ms and base_energy_j are missing.
    """
    size = footprint(model)
    rows: dict[str, int | float | str] = {
        "parameters": size.parameters,
        "trainable_parameters": size.trainable,
        "weights_mb": round(size.bytes_total / 1e6, 4),
        "trainable_mb": round(size.bytes_trainable / 1e6, 4),
    }
    states: dict[str, State] = {"": partial(nullcontext, model)}
    macs: dict[str, int] = {}
    with suppress(Unsupported):  # control flow that depends on values, such as the sizes that SigLIP 2 NaFlex takes
        macs[""] = count_macs(model, inputs)
    if macs and isinstance(model, PeftModel) and acts_as_saved(model):
        own = find_adapter_parameters(model)
        rows["base_parameters"] = size.parameters - sum(map(true_size, own))
        rows["base_weights_mb"] = round((size.bytes_total - sum(parameter.nbytes for parameter in own)) / 1e6, 4)
        try:
            with base_with_own_head(model):
                macs["base_"] = count_macs(model, inputs)
            states["base_"] = partial(without_adapter, model)
        except InlayError:  # the base cannot compute such inputs without its adapter
            pass
    times = time_by_turns(states, inputs)
    medians = {name: [time.median_ms for time in turns] for name, turns in times.items()}
    for name, state in states.items():
        if name in macs:
            rows[f"{name}mmacs"] = round(macs[name] / 1e6, 3)
        rows[f"{name}latency_ms"] = round(statistics.median(medians[name]), 3)
        with state() as current:
            energy = measure_energy(current, inputs, warmup=0)
        if energy.joules is not None:
            rows[f"{name}energy_j"] = float(f"{energy.joules:.4g}")
        rows.setdefault("energy_source", str(energy))
    if len(medians[""]) > 1:
        rows["latency_spread_ms"] = round(max(max(turns) - min(turns) for turns in medians.values()), 3)
    return {**rows, "device": times[""][0].device, "threads": times[""][0].threads}


def find_adapter_parameters(model: PeftModel) -> list[nn.Parameter]:
    """All parameters that do not belong to the base, including those of inactive adapters."""
    base = {id(p) for _, module in base_modules(model, originals=True) for p in module._parameters.values()}
    return [parameter for parameter in model.parameters() if id(parameter) not in base]


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[nn.Module]:
    """The State of a base with its own head, and without the adapter's layers: switched off they take time, too."""
    with base_with_own_head(model), layers_taken_out(model.get_base_model()):
        yield model.get_base_model()


def time_by_turns(states: Mapping[str, State], inputs: dict[str, Tensor]) -> dict[str, list[Latency]]:
    """Latencies of a model in several states, measured by turns, so that other load on the machine affects all.

    The first turn is a warm-up, unless there is no second one.
    """
    found: dict[str, list[Latency]] = {name: [] for name in states}
    deadline, share = time.perf_counter() + _BUDGET_S, _BUDGET_S / (_TURNS * len(states))
    for _ in range(_TURNS):
        for name, state in states.items():
            with state() as model:
                found[name].append(latency(model, inputs, repeats=_PASSES, warmup=1, budget_s=share))
        if time.perf_counter() > deadline:
            break
    return {name: turns[1:] or turns for name, turns in found.items()}
