"""Cost of a model: parameters, multiply-accumulates, latency, energy and memory.

Everything except `footprint` is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Imported at once: otherwise an import of the module `footprint` would hide the function of the same name.
from inlay.measure.footprint import Footprint, describe_quantized, footprint

if TYPE_CHECKING:
    from inlay.measure.costs import cost
    from inlay.measure.energy import Energy, measure_energy
    from inlay.measure.macs import count_macs, count_macs_by_module
    from inlay.measure.memory import MemoryPlan, describe_memory, measure_forward_peak, measure_peak, plan_memory
    from inlay.measure.speed import Latency, latency

__all__ = [
    "Energy",
    "Footprint",
    "Latency",
    "MemoryPlan",
    "cost",
    "count_macs",
    "count_macs_by_module",
    "describe_memory",
    "describe_quantized",
    "footprint",
    "latency",
    "measure_energy",
    "measure_forward_peak",
    "measure_peak",
    "plan_memory",
]

_MODULE_OF = {
    "count_macs": "macs",
    "count_macs_by_module": "macs",
    "Latency": "speed",
    "latency": "speed",
    "cost": "costs",
    "Energy": "energy",
    "measure_energy": "energy",
    "MemoryPlan": "memory",
    "describe_memory": "memory",
    "measure_forward_peak": "memory",
    "measure_peak": "memory",
    "plan_memory": "memory",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # replaces a module of the same name, which the import has set here
    return value


def __dir__() -> list[str]:
    return __all__
