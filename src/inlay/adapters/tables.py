"""Tables in Markdown: of cards, of what an adapter costs, and of the index."""

from collections.abc import Sequence
from typing import Any

_COSTS = {
    "parameters": "parameters",
    "trainable_parameters": "parameters that were trained, head included",
    "weights_mb": "weights in memory, MB",
    "trainable_mb": "weights that were trained, MB",
    "mmacs": "multiply-accumulates of one input, millions",
    "latency_ms": "latency of one input, ms, median",
    "energy_j": "energy of one input, J",
}
_ASIDE = ("device", "threads", "latency_spread_ms", "energy_source")  # said below the table of costs


def make_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; nothing without rows."""
    if not rows:
        return ""
    return "\n".join(make_row(*cells) for cells in (header, ["---"] * len(header), *rows))


def make_row(*cells: Any) -> str:
    """A line of a Markdown table, whatever stands in its cells."""
    told = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(told)} |"


def describe_cost(cost: dict[str, Any]) -> list[str]:
    """A table of what was measured, compared with the base without it where that was measured too, and how it was."""
    if not cost:
        return ["Not measured."]
    told = [key for key in cost if not key.startswith("base_") and key not in _ASIDE]
    names = [(key, _COSTS.get(key, key.replace("_", " "))) for key in told]
    header: tuple[str, ...] = ("measure", "value")
    rows: list[tuple[str, ...]] = [(name, _number(cost[key])) for key, name in names]
    if compared := any(key.startswith("base_") for key in cost):
        header = ("measure", "base only", "with the adapter", "the adapter adds")
        rows = [(name, *_compare(cost.get(f"base_{key}"), cost[key])) for key, name in names]
    threads = cost.get("threads", "unknown")
    where = f"Measured on {cost['device']}, threads: {threads}." if "device" in cost else ""
    apart = cost.get("latency_spread_ms")
    spread = "" if apart is None else f", between which a median varied by {_number(apart)} ms"
    turns = f"Latencies were taken by turns{spread}." if "base_latency_ms" in cost else ""
    lacks = "The base itself has no use for this input." if compared and "base_mmacs" not in cost else ""
    source = cost.get("energy_source", "measured" if "energy_j" in cost else "was not measured")
    return [make_table(header, rows), " ".join(filter(None, (where, turns, lacks, f"Energy {source}.")))]


def _compare(base: Any, value: Any) -> tuple[str, str, str]:
    """The base's value, that with the adapter, and the difference, absolute and in per cent."""
    if not isinstance(base, int | float):
        return "", _number(value), ""
    share = f" ({value / base - 1:+.1%})" if base else ""
    return _number(base), _number(value), f"{_number(value - base)}{share}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
