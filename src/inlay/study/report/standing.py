"""What a comparison says of each method in numbers: means with intervals, how far behind the best, costs in percent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inlay.study.comparison import Comparison, Row
from inlay.study.statistics import mean_interval, paired_interval

_NOISE = 0.2  # of a latency


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the ends of its 95 % interval, which are NaN for fewer than two seeds."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Standing:
    """One method in its comparison. None is what was not measured.

    Attributes:
        row: Of the comparison.
        scores: Of the test part, by name.
        difference: Its main score minus that of the best method, seed by seed; None for the best itself.
        ties: The interval of the difference includes 0; None where one seed only tells nothing.
        forgetting: As `Row.forgetting`.
        added_macs: Percent of the base's multiply-accumulates, unmerged.
        added_latency: Percent of the base's time for a forward pass, unmerged.
        merged_latency: The same after merging.
        noisy: The latencies of its turns lie apart by more than a fifth, as on a busy machine.
        trainable: Parameters.
        peak_mb: Of a training step, in 10⁶ bytes.
        energy_mj: Of a forward pass, in 10⁻³ joules.
        file_kb: What is stored, in 10³ bytes.
    """

    row: Row
    scores: dict[str, Estimate]
    difference: Estimate | None
    ties: bool | None
    forgetting: dict[str, Estimate]
    added_macs: float | None
    added_latency: float | None
    merged_latency: float | None
    noisy: bool
    trainable: float | None
    peak_mb: float | None
    energy_mj: float | None
    file_kb: float | None

    @property
    def method(self) -> str:
        """Name in METHODS."""
        return self.row.method


def find_standings(comparison: Comparison) -> list[Standing]:
    """One for each row, in their order.

    A seed without a score (NaN) is left out: of the mean, and of the differences to the best of those that both have.
    """
    best = find_best(comparison)
    return [_stand(row, comparison.score, best) for row in comparison.rows]


def find_best(comparison: Comparison) -> Row | None:
    """The row with the best mean of the main score; None where no run has one."""
    scored = [row for row in comparison.rows if _finite(row.scores.get(comparison.score, []))]
    sign = 1 if comparison.larger_is_better else -1
    return max(scored, key=lambda row: sign * _estimate(row.scores[comparison.score]).mean, default=None)


def _stand(row: Row, score: str, best: Row | None) -> Standing:
    difference, ties = None, None
    if best is not None and row is not best:
        own, top = row.scores.get(score, []), best.scores[score]
        apart = _finite([a - b for a, b in zip(own, top, strict=True)]) if len(own) == len(top) else []
        difference = Estimate(*paired_interval(apart)) if apart else None
        if difference and math.isfinite(difference.half):
            ties = difference.low <= 0 <= difference.high
    costs = row.costs
    return Standing(
        row=row,
        scores={name: _estimate(values) for name, values in row.scores.items() if _finite(values)},
        difference=difference,
        ties=ties,
        forgetting={name: _estimate(values) for name, values in row.forgetting.items() if _finite(values)},
        added_macs=_percent_over(costs.get("mmacs"), costs.get("base_mmacs")),
        added_latency=_percent_over(costs.get("latency_ms"), costs.get("base_latency_ms")),
        merged_latency=_percent_over(costs.get("merged_latency_ms"), costs.get("base_latency_ms")),
        noisy=costs.get("latency_spread_ms", 0.0) > _NOISE * costs.get("latency_ms", math.inf),
        trainable=costs.get("trainable_parameters"),
        peak_mb=_scale(costs.get("peak_bytes"), 1e-6),
        energy_mj=_scale(costs.get("energy_j"), 1e3),
        file_kb=_scale(costs.get("file_bytes"), 1e-3),
    )


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(*mean_interval(_finite(values)))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _percent_over(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else 100 * (value / base - 1)


def _scale(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
