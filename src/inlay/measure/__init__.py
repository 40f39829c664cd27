"""What a model holds, computes and takes: parameters, multiply-accumulates, latency, energy, memory.

All but `footprint` is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Not lazy: whoever imported the module of this name first would otherwise find it in place of the function.
from inlay.measure.footprint import Footprint, describe_quantized, footprint

if TYPE_CHECKING:
    from inlay.measure.costs import cost
    from inlay.measure.energy import Energy, measure_energy
    from inlay.measure.macs import count_macs
    from inlay.measure.memory import MemoryPlan, describe_memory, measure_peak, plan_memory
    from inlay.measure.speed import Latency, latency

__all__ = [
    "Energy",
    "Footprint",
    "Latency",
    "MemoryPlan",
    "cost",
    "count_macs",
    "describe_memory",
    "describe_quantized",
    "footprint",
    "latency",
    "measure_energy",
    "measure_peak",
    "plan_memory",
]

_HOME = {
    "count_macs": "macs",
    "Latency": "speed",
    "latency": "speed",
    "cost": "costs",
    "Energy": "energy",
    "measure_energy": "energy",
    "MemoryPlan": "memory",
    "describe_memory": "memory",
    "measure_peak": "memory",
    "plan_memory": "memory",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # over the module `cost`, which the import has put in place of the function
    return value


def __dir__() -> list[str]:
    return __all__
