"""What a model or an adapter costs: size, work, time, memory and energy, in all and by module."""

import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapters.hub.fetch import fetch_if_adapter
from inlay.adapters.load import LoadedAdapter, load_adapter
from inlay.bases.device import Device, choose_device
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.measure.costs import State, find_adapter_parameters, time_by_turns, without_adapter
from inlay.measure.energy import measure_energy
from inlay.measure.footprint import footprint, true_size
from inlay.measure.macs import count_macs_by_module
from inlay.measure.memory import measure_forward_peak
from inlay.methods._peft import PeftModel, base_with_own_head
from inlay.tasks.base import load_base, load_skeleton, read_task

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Cost:
    """What one state of a model costs. None stands for what is unknown; `Measurement.remarks` says why.

    Attributes:
        parameters: How many it holds.
        weights_bytes: In memory, with buffers.
        macs: Multiply-accumulates of one forward pass over the batch, as `count_macs` counts them.
        latency_ms: Of one pass: the median.
        latency_spread_ms: Largest difference between the turns of the measurement.
        examples_per_s: The batch, divided by the latency.
        peak_bytes: Of all tensors at one time in a pass, with the weights.
        energy_j: Of one pass.
    """

    parameters: int
    weights_bytes: int
    macs: int | None = None
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    examples_per_s: float | None = None
    peak_bytes: int | None = None
    energy_j: float | None = None

    @property
    def flops(self) -> int | None:
        """Two operations for each multiply-accumulate."""
        return None if self.macs is None else 2 * self.macs


@dataclass(frozen=True)
class ModuleCost:
    """What one module computes and holds. `itself`: what is in none of its modules that have a row of their own."""

    name: str
    itself: bool
    parameters: int
    macs: int | None


@dataclass(frozen=True)
class Measurement:
    """The costs of a model, or of an adapter on its base.

    Attributes:
        name: What was measured.
        network: Class of the model.
        task: What it is for.
        inputs: Shapes of one pass, by name.
        states: `model` of a model; `base`, `unmerged` and `merged` of an adapter. A state that there is not is missing.
        modules: The parts of the model (of an adapter: unmerged). Their numbers add up to those of the whole.
        device: Where it was measured; `meta` where it was only counted.
        threads: Of the CPU.
        energy_source: How energy was measured, or why not.
        remarks: Why something is missing.
    """

    name: str
    network: str
    task: str
    inputs: dict[str, list[int]]
    states: dict[str, Cost]
    modules: list[ModuleCost]
    device: str
    threads: int
    energy_source: str
    remarks: list[str]

    def as_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        states = {state: {**asdict(cost), "flops": cost.flops} for state, cost in self.states.items()}
        return {**asdict(self), "states": states}


def measure_costs(
    name: str | Path,
    *,
    base: str | Path | None = None,
    batch_size: int = 1,
    length: int = 128,
    size: int | None = None,
    depth: int = 3,
    weights: bool = True,
    device: Device | None = None,
) -> Measurement:
    """Measure one forward pass of a model, or of an adapter: its base, the adapter in it, and merged into it.

    Latencies of an adapter's states are measured by turns in one run, so that their ratios hold on a busy machine too.

    Args:
        name: A model as for `load_base`, or an adapter as for `load_adapter`.
        base: Of an adapter, instead of the one that it names.
        batch_size: Examples of the pass.
        length: Tokens of a text.
        size: Pixels or voxels a side; default: what the config of the base says.
        depth: Levels of module names by which parts are told apart.
        weights: False: only the config of a model is read, and what needs no weights is counted.
        device: Default: the best that this machine has.

    Raises:
        InlayError: No such model or adapter, a number below 1, a size that the model does not take, an adapter without
            weights.
    """
    for what, value in (("batch_size", batch_size), ("length", length), ("size", size), ("depth", depth)):
        if value is not None and value < 1:
            raise BadInput(f"{what} must be at least 1, not {value}.")
    name, remarks = str(name), list[str]()
    adapted: LoadedAdapter | None = None
    if folder := fetch_if_adapter(name):
        if not weights:
            raise BadInput(f"{name} is an adapter, which is measured with its weights; measure its base without.")
        adapted = load_adapter(folder, base, device=device)
        model, task = adapted.model, adapted.task
    elif base is not None:
        raise BadInput(f"{name} is a model, and --base belongs to an adapter; leave it out.")
    else:
        model = load_base(name, device=choose_device(device)) if weights else load_skeleton(name)
        task = read_task(name)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = task.forward_inputs(inner, batch_size, length, size)
    states: dict[str, State] = {"model": partial(nullcontext, model)}
    if adapted is not None:
        states = _find_states(adapted, inputs, remarks)
    counts: dict[str, dict[str, int]] = {}
    for state, enter in states.items():
        with enter() as current, _remark(remarks):
            counts[state] = _count(current, inputs)
    shown = counts.get("unmerged" if adapted is not None else "model")
    if shown is None and not weights:
        raise Unsupported(remarks[0])  # there is nothing else to say
    modules = list_modules(model, shown, depth)
    energy_source = ""
    if weights:
        try:
            costs, energy_source = _measure_states(model, states, inputs, counts)
        except (RuntimeError, ValueError) as error:  # models check their inputs, or fail on them
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())
            raise Unsupported(
                f"{name} does not take {shapes} ({str(error).splitlines()[0]}); give another size."
            ) from error
    else:
        held = footprint(model)
        costs = {"model": Cost(held.parameters, held.bytes_total, sum((shown or {}).values()))}
    where = next(model.parameters()).device
    return Measurement(
        name=name,
        network=type(inner).__name__,
        task=task.name,
        inputs={key: list(value.shape) for key, value in inputs.items()},
        states=costs,
        modules=modules,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else str(where),
        threads=torch.get_num_threads(),
        energy_source=energy_source,
        remarks=list(dict.fromkeys(remarks)),
    )


def _count(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Without the mask, which does not change the count, and whose values transformers would read."""
    return count_macs_by_module(model, {name: value for name, value in inputs.items() if name != "attention_mask"})


@contextmanager
def _remark(remarks: list[str]) -> Iterator[None]:
    """Note why a count is missing, instead of failing."""
    try:
        yield
    except Unsupported as error:
        remarks.append(str(error))


def _find_states(adapted: LoadedAdapter, inputs: dict[str, Tensor], remarks: list[str]) -> dict[str, State]:
    """The states of an adapter that can compute these inputs, with a remark for each that there is not."""
    model = adapted.model
    assert isinstance(model, PeftModel)
    states: dict[str, State] = {"unmerged": partial(nullcontext, model)}
    try:
        with base_with_own_head(model):
            _count(model, inputs)
        states = {"base": partial(without_adapter, model), **states}
    except InlayError:
        remarks.append("the base cannot compute these inputs without the adapter.")
    try:
        adapted.merge().unmerge()
        states["merged"] = partial(_merged, adapted)
    except InlayError as error:
        remarks.append(f"not merged: {error}")
    return states


@contextmanager
def _merged(adapted: LoadedAdapter) -> Iterator[nn.Module]:
    adapted.merge()
    try:
        yield adapted.model
    finally:
        adapted.unmerge()


def _measure_states(
    model: nn.Module, states: Mapping[str, State], inputs: dict[str, Tensor], counts: Mapping[str, dict[str, int]]
) -> tuple[dict[str, Cost], str]:
    """Costs by state, and how energy was measured."""
    added = {id(each) for each in find_adapter_parameters(model)} if isinstance(model, PeftModel) else set()
    rows = len(next(iter(inputs.values())))
    costs, source = {}, ""
    times = time_by_turns(states, inputs)
    for state, enter in states.items():
        medians = [turn.median_ms for turn in times[state]]
        latency_ms = statistics.median(medians)
        with enter() as current:
            held, peak = footprint(current), measure_forward_peak(current, inputs)
            energy = measure_energy(current, inputs, warmup=0)
            # a new head next to the base's own: there, but not used
            aside = [each for each in current.parameters() if state == "base" and id(each) in added]
        bytes_aside = sum(parameter.nbytes for parameter in aside)
        source = str(energy)
        costs[state] = Cost(
            parameters=held.parameters - sum(map(true_size, aside)),
            weights_bytes=held.bytes_total - bytes_aside,
            macs=sum(counts[state].values()) if state in counts else None,
            latency_ms=latency_ms,
            latency_spread_ms=max(medians) - min(medians),
            examples_per_s=1000 * rows / latency_ms,
            peak_bytes=peak - bytes_aside,
            energy_j=energy.joules,
        )
    return costs, source


def list_modules(model: nn.Module, macs: Mapping[str, int] | None, depth: int) -> list[ModuleCost]:
    """The parts of a model that names of `depth` levels stand for, in their order; those without any cost are left out.

    Args:
        model: With or without an adapter of peft, whose own names are taken out: a wrapped layer and what is added to
            it are one part.
        macs: From `count_macs_by_module`; None where they are not known.
        depth: At least 1.
    """
    names = {name: ".".join(_plain_name(name).split(".")[:depth]) for name, _ in model.named_modules()}
    parameters, work = dict.fromkeys(names.values(), 0), dict.fromkeys(names.values(), 0)
    for name, parameter in model.named_parameters():
        parameters[names[name.rpartition(".")[0]]] += true_size(parameter)
    for name, count in (macs or {}).items():
        work[names[name]] += count
    parts = [name for name in parameters if parameters[name] or work[name]]
    return [
        ModuleCost(
            name=name,
            itself=any(other.startswith(f"{name}." if name else "") for other in parts if other != name),
            parameters=parameters[name],
            macs=None if macs is None else work[name],
        )
        for name in parts
    ]


def _plain_name(name: str) -> str:
    """A module's name without the levels that peft adds."""
    if name in ("base_model", "base_model.model"):
        return ""
    name = re.sub(r"\.modules_to_save\.[^.]+|\.(original_module|base_layer)(?=\.|$)", "", name)
    return name.removeprefix(_PEFT_PREFIX)
