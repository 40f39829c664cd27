"""What will happen when adapters are combined, before anything is written: where they meet, and how they agree there.

For the updates ΔW_a and ΔW_b of two adapters at one module, weights included:

    cosine          <ΔW_a, ΔW_b> / ‖ΔW_a‖ ‖ΔW_b‖: 1 pull alike, 0 independent, -1 against each other
    read, written   overlap of the spaces of inputs that they read, and of outputs that they write: the share of the
                    smaller one that lies in the other, 0 to 1 (mean squared cosine of the principal angles)
    conflict        share of the entries whose signs differ, of those where both have one
    interference    ‖ΔW_b P_a‖ / ‖ΔW_a‖, P_a the projection on the inputs that a reads, and the same for a in b; the
                    larger: 0 leaves both tasks alone, 1 changes what one reads by as much as it does itself

All but the conflict come from the factors; that is counted by strips of rows. Bottlenecks are compared by W_up W_down.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from inlay.combine.method_sum import Update
from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part, Source
from inlay.combine.read import open_adapters
from inlay.combine.sums import SUM_BY_PEFT_TYPE
from inlay.combine.weights import Weight, describe_weight
from inlay.errors import WrongBase

MEASURES = ("cosine", "read", "written", "conflict", "interference")
_STRIP = 1 << 20  # entries of ΔW at a time


@dataclass(frozen=True)
class Meeting:
    """Two adapters at one module; None where a measure has no meaning, as for updates of zeros."""

    module: str
    first: str
    second: str
    cosine: float | None = None
    read: float | None = None
    written: float | None = None
    conflict: float | None = None
    interference: float | None = None


@dataclass(frozen=True)
class Overlap:
    """The report.

    Attributes:
        adapters: Names and weights.
        alone: Modules that only one adapter changes, by its name.
        meetings: Modules that two of them change.
    """

    adapters: dict[str, Weight]
    alone: dict[str, list[str]]
    meetings: list[Meeting]

    def mean(self, measure: str, first: str, second: str) -> float | None:
        """Of a measure over the modules where these two meet."""
        values = [getattr(m, measure) for m in self.meetings if (m.first, m.second) == (first, second)]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """A line for each pair of adapters, and the modules where it may hurt most."""
        lines = [
            f"{name} x {describe_weight(weight)}: the only one in {len(self.alone[name])} modules"
            for name, weight in self.adapters.items()
        ]
        for first, second in combinations(self.adapters, 2):
            met = [m for m in self.meetings if (m.first, m.second) == (first, second)]
            if not met:
                lines.append(f"{first} and {second}: no module in common")
                continue
            said = [f"{m} {_format_value(self.mean(m, first, second))}" for m in MEASURES]
            lines.append(f"{first} and {second}: {len(met)} modules in common; on average {', '.join(said)}")
            worst = sorted((m for m in met if m.interference is not None), key=lambda m: -(m.interference or 0))
            lines += [f"  most interference: {m.module} {_format_value(m.interference)}" for m in worst[:3]]
        return "\n".join(lines)


def overlap(adapters: Mapping[Any, float | Mapping[str, float]]) -> Overlap:
    """Compare adapters, two at a time, module by module, before combining them.

    Args:
        adapters: Folders or Hub ids, and weights, as `combine` takes them.

    Raises:
        InlayError: As `combine`, for what cannot be read or is of another base.
    """
    with open_adapters(adapters) as sources:
        return compare_sources(sources)


def compare_sources(sources: Sequence[Source]) -> Overlap:
    """The same for adapters that are open."""
    modules = {source.name: [site for part in source.methods.values() for site in part.sites] for source in sources}
    alone = {
        name: [site or "the input" for site in own if not any(site in o for n, o in modules.items() if n != name)]
        for name, own in modules.items()
    }
    meetings = []
    for a, b in combinations(sources, 2):
        for kind in a.methods:
            for own, other in product(a.list_parts(kind), b.list_parts(kind)):
                meetings += [_compare_at(kind, site, own, other) for site in own.sites if site in other.sites]
    return Overlap({source.name: source.weight for source in sources}, alone, meetings)


def _compare_at(kind: str, site: str, a: Part, b: Part) -> Meeting:
    sum_class = SUM_BY_PEFT_TYPE.get(kind)
    pair = [None if sum_class is None else sum_class.update_at(part, site) for part in (a, b)]
    if pair[0] is None or pair[1] is None or pair[0][0].shape[:1] != pair[1][0].shape[:1]:
        return Meeting(site or "the input", a.name, b.name)
    return Meeting(site, a.name, b.name, **measures(pair[0], pair[1]))


def measures(a: Update, b: Update) -> dict[str, float | None]:
    """The five of two updates, each as (B, A), or as (ΔW, None)."""
    if a[1] is None or b[1] is None:
        return _measure_dense(a[0], b[0])
    (up_a, down_a), (up_b, down_b) = (_convert_to_float64(*a), _convert_to_float64(*b))
    inner = float(((up_a.T @ up_b) * (down_a @ down_b.T)).sum())
    size_a, size_b = (
        float(np.sqrt(max(((u.T @ u) * (d @ d.T)).sum(), 0))) for u, d in ((up_a, down_a), (up_b, down_b))
    )
    if size_a == 0 or size_b == 0:
        return dict.fromkeys(MEASURES)
    reads = [_find_basis(down.T) for down in (down_a, down_b)]
    writes = [_find_basis(up) for up in (up_a, up_b)]
    on_a = norm(up_b @ (down_b @ reads[0])) / size_a
    on_b = norm(up_a @ (down_a @ reads[1])) / size_b
    return {
        "cosine": inner / (size_a * size_b),
        "read": _measure_shared_space(*reads),
        "written": _measure_shared_space(*writes),
        "conflict": _measure_conflict(up_a, down_a, up_b, down_b),
        "interference": max(on_a, on_b),
    }


def _convert_to_float64(up: Array, down: Array | None) -> tuple[Any, Any]:
    assert down is not None
    return up.astype(np.float64), down.astype(np.float64)


def _find_basis(columns: Any) -> Any:
    """Orthonormal columns that span these; directions of nothing are left out."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-6 * max(s[0], 1e-300)]


def _measure_shared_space(a: Any, b: Any) -> float | None:
    smaller = min(a.shape[1], b.shape[1])
    return float(((a.T @ b) ** 2).sum() / smaller) if smaller else None


def _measure_conflict(up_a: Any, down_a: Any, up_b: Any, down_b: Any) -> float | None:
    """By strips of rows, so that ΔW is never there as a whole."""
    rows, against, both = max(1, _STRIP // down_a.shape[1]), 0, 0
    down_a, down_b = down_a.astype(np.float32), down_b.astype(np.float32)
    for i in range(0, len(up_a), rows):
        product = (up_a[i : i + rows].astype(np.float32) @ down_a) * (up_b[i : i + rows].astype(np.float32) @ down_b)
        against, both = against + int((product < 0).sum()), both + int((product != 0).sum())
    return against / both if both else None


def _measure_dense(a: Array, b: Array) -> dict[str, float | None]:
    """Differences of weights read all inputs, so that there is no smaller space to share."""
    if a.shape != b.shape:
        raise WrongBase(f"updates of one module have the shapes {a.shape} and {b.shape}; combine those of one base.")
    size_a, size_b = norm(a), norm(b)
    if size_a == 0 or size_b == 0:
        return dict.fromkeys(MEASURES)
    x, y = a.reshape(-1), b.reshape(-1)
    inner = sum(float(x[i : i + _STRIP].astype(np.float64) @ y[i : i + _STRIP]) for i in range(0, len(x), _STRIP))
    product = x * y
    both = int((product != 0).sum())
    return {
        "cosine": inner / (size_a * size_b),
        "read": None,
        "written": None,
        "conflict": int((product < 0).sum()) / both if both else None,
        "interference": max(size_a / size_b, size_b / size_a),
    }


def _format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
