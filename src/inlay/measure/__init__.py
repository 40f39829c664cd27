"""What a model holds, computes, takes and gets right: parameters, multiply-accumulates, latency, energy, quality.

All but `footprint` is imported on first use: torch takes a second, evaluate with what it imports several.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Not lazy: whoever imported the module of this name first would otherwise find it in place of the function.
from inlay.measure.footprint import Footprint, footprint

if TYPE_CHECKING:
    from inlay.measure.costs import cost
    from inlay.measure.energy import Energy, measure_energy
    from inlay.measure.macs import count_macs
    from inlay.measure.masks import VolumeDice, overlap, score_case, summarise, write_csv
    from inlay.measure.memory import MemoryPlan, measure_peak, plan_memory
    from inlay.measure.quality import F1, Accuracy, MaskIoU
    from inlay.measure.speed import Latency, latency
    from inlay.measure.text import TextScores, score_texts

__all__ = [
    "F1",
    "Accuracy",
    "Energy",
    "Footprint",
    "Latency",
    "MaskIoU",
    "MemoryPlan",
    "TextScores",
    "VolumeDice",
    "cost",
    "count_macs",
    "footprint",
    "latency",
    "measure_energy",
    "measure_peak",
    "overlap",
    "plan_memory",
    "score_case",
    "score_texts",
    "summarise",
    "write_csv",
]

_HOME = {
    "count_macs": "macs",
    "Latency": "speed",
    "latency": "speed",
    "cost": "costs",
    "Energy": "energy",
    "measure_energy": "energy",
    "Accuracy": "quality",
    "F1": "quality",
    "MaskIoU": "quality",
    "MemoryPlan": "memory",
    "measure_peak": "memory",
    "plan_memory": "memory",
    "TextScores": "text",
    "score_texts": "text",
    "VolumeDice": "masks",
    "overlap": "masks",
    "score_case": "masks",
    "summarise": "masks",
    "write_csv": "masks",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # over the module `cost`, which the import has put in place of the function
    return value


def __dir__() -> list[str]:
    return __all__
