"""How narrow a model has to be to cost a given share: counted on its structure, or measured."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inlay.bases.pruned import even_widths
from inlay.bases.widths import Group, narrowed
from inlay.errors import BadInput
from inlay.measure import count_macs, footprint
from inlay.measure.speed import Latency, latency

Quantity = Literal["macs", "params", "latency"]
Scope = Literal["global", "local"]
_TURNS = 5  # in which latencies are measured


@dataclass(frozen=True)
class Target:
    """What the pruned model may cost at most, as a share of what the model costs now: `macs=0.5`."""

    quantity: Quantity
    share: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From `macs=0.5`, `params=0.4` or `latency=0.7`.

        Raises:
            InlayError: Another text.
        """
        quantity, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if quantity not in get_args(Quantity) or not 0 < share < 1:
            raise BadInput(
                f"target {text!r} must be macs=SHARE, params=SHARE or latency=SHARE with a share over 0 and below 1, "
                "such as macs=0.5."
            )
        return cls(quantity, share)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.quantity}={self.share:g}"


class Counter:
    """Costs of the model at any widths, counted on torch's meta device, where nothing is computed."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        # `inputs` are of one example, without attention masks
        self.skeleton = copy.deepcopy(model).to("meta")
        self.skeleton.tie_weights()  # which each became a tensor of its own
        self.inputs = dict(inputs)

    def count(self, keep: Mapping[str, Tensor], quantity: Quantity = "macs") -> int:
        """Multiply-accumulates or parameters with these units; a latency is not counted, and macs stand for it."""
        made = narrowed(self.skeleton, keep) if keep else self.skeleton
        return footprint(made).parameters if quantity == "params" else count_macs(made, self.inputs)


def choose_units(
    model: PreTrainedModel,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    target: Target,
    scope: Scope,
    counter: Counter,
    allowed: float,
    priced: bool,
) -> dict[str, Tensor]:
    """The units to keep: the best, and as many as the target allows; one more would cost more than it.

    Args:
        model: As it is now.
        groups: Whose units may be left out.
        scores: Of `score_units`.
        target: What is counted or measured.
        scope: `global`: units of all layers are compared. `local`: each layer keeps the same share.
        counter: Of this model.
        allowed: Cost that the pruned model may have: multiply-accumulates, parameters or ms.
        priced: Under `global`, weigh a score against what the unit costs.

    Raises:
        InlayError: A target that cannot be met with one unit of each group.
    """

    def cost(keep: Mapping[str, Tensor]) -> float:
        if target.quantity == "latency":
            return measure_latency(narrowed(model, keep), counter.inputs)
        return counter.count(keep, target.quantity)

    if scope == "global":
        ranking = _rank(groups, scores, counter, target, priced)
        keep = _search(ranking.candidates(), cost, allowed, target)
        return keep if target.quantity == "latency" else ranking.fill(keep, allowed - cost(keep))
    keep = _search(_even(model, groups, scores, {}), cost, allowed, target)
    kinds = {group.kind: group.units for group in groups}
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):  # where heads are few, the MLP takes what is left
        of_kind = [group for group in groups if group.kind == kind]
        keep = _search(_even(model, of_kind, scores, keep), cost, allowed, target)
    return keep


@dataclass(frozen=True)
class _Candidates:
    """Sets of units to keep, by number; more units, and so higher cost, as the number rises."""

    count: int
    make: Callable[[int], dict[str, Tensor]]


def _search(
    candidates: _Candidates, cost: Callable[[Mapping[str, Tensor]], float], allowed: float, target: Target
) -> dict[str, Tensor]:
    """The last candidate that costs no more than allowed, by bisection."""
    low, high = 0, candidates.count - 1
    least = cost(candidates.make(low))
    if least > allowed:
        raise BadInput(
            f"target {target} cannot be met: with one unit in each layer the model still costs {_round(least)} "
            f"{_UNITS[target.quantity]}, and {_round(allowed)} are allowed. Raise the target, or prune more kinds."
        )
    while low < high:
        middle = (low + high + 1) // 2
        if cost(candidates.make(middle)) <= allowed:
            low = middle
        else:
            high = middle - 1
    return candidates.make(low)


def _round(value: float) -> str:
    return f"{value:,.0f}" if value > 100 else f"{value:.3g}"


_UNITS = {"macs": "multiply-accumulates", "params": "parameters", "latency": "ms"}


def _even(
    model: PreTrainedModel,
    chosen: Sequence[Group],
    scores: Mapping[str, Tensor],
    least: Mapping[str, Tensor],
) -> _Candidates:
    """The same share of each of the chosen groups, from what `least` has of them on; the others are as there."""
    steps = max(group.units for group in chosen)

    def widths(step: int) -> dict[str, int]:
        return even_widths(model, chosen, (step + 1) / steps)

    first = next(
        step for step in range(steps) if all(widths(step)[g.name] >= len(least.get(g.name, ())) for g in chosen)
    )

    def make(step: int) -> dict[str, Tensor]:
        made = {name: keep_best(scores[name], count) for name, count in widths(first + step).items()}
        return {**least, **made}

    return _Candidates(steps - first, make)


@dataclass(frozen=True)
class _Ranking:
    """All units of all groups, the most valuable first, and the best one of each group before them.

    Attributes:
        groups: Whose units.
        owner: The number of each unit's group.
        unit: Which unit of its group.
        prices: Of a unit of each group, at the widths of now; where others are narrower it costs no more.
    """

    groups: Sequence[Group]
    owner: Tensor
    unit: Tensor
    prices: Sequence[float]

    def candidates(self) -> _Candidates:
        """The first of the ranking, more and more."""

        def make(step: int) -> dict[str, Tensor]:
            first = slice(0, len(self.groups) + step)
            owner, unit = self.owner[first], self.unit[first]
            return {group.name: unit[owner == i].sort().values for i, group in enumerate(self.groups)}

        return _Candidates(len(self.owner) - len(self.groups) + 1, make)

    def fill(self, keep: Mapping[str, Tensor], left: float) -> dict[str, Tensor]:
        """Units further down that what is left still pays for: where the next one is a whole head, a few of an MLP."""
        kept = {name: set(units.tolist()) for name, units in keep.items()}
        for number, unit in zip(self.owner.tolist(), self.unit.tolist(), strict=True):
            name = self.groups[number].name
            if unit not in kept[name] and self.prices[number] <= left:
                kept[name].add(unit)
                left -= self.prices[number]
        return {name: torch.tensor(sorted(units)) for name, units in kept.items()}


def _rank(
    groups: Sequence[Group], scores: Mapping[str, Tensor], counter: Counter, target: Target, priced: bool
) -> _Ranking:
    """All units by their score, or by what it is for their price."""
    whole = counter.count({}, target.quantity)
    values, owners, units, prices = [], [], [], []
    for number, group in enumerate(groups):
        fewer = {group.name: torch.arange(group.units - 1)}
        price = whole - counter.count(fewer, target.quantity) if group.units > 1 else 0
        value = scores[group.name] / (max(price, 1) if priced else 1)
        value[int(value.argmax())] = torch.inf
        values.append(value)
        owners.append(torch.full((group.units,), number))
        units.append(torch.arange(group.units))
        prices.append(price)
    order = torch.cat(values).argsort(descending=True, stable=True)
    return _Ranking(groups, torch.cat(owners)[order], torch.cat(units)[order], prices)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """The units with the highest scores, in rising order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def measure_latency(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """ms of a forward pass: the least tenth percentile of a few turns, as other load on the machine only adds."""
    return min(turn.p10_ms for turn in _take_turns([model], inputs)[0])


def compare_latencies(models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Latency of models by turns: the least, as in `measure_latency`, and the range of the medians of the turns."""
    found = []
    for turns in _take_turns(models, inputs):
        medians = [turn.median_ms for turn in turns]
        row = {"least_ms": min(turn.p10_ms for turn in turns), "medians_ms": [min(medians), max(medians)]}
        found.append({**row, "device": turns[0].device, "threads": turns[0].threads})
    return found


def _take_turns(models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor]) -> list[list[Latency]]:
    rows: list[list[Latency]] = [[] for _ in models]
    for _ in range(_TURNS):
        for row, model in zip(rows, models, strict=True):
            row.append(latency(model, dict(inputs), repeats=9, warmup=2, budget_s=1.0))
    return rows


def inputs_of_one(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """One example of `Task.random_inputs`, without masks, which are not counted."""
    return {name: value[:1] for name, value in inputs.items() if isinstance(value, Tensor) and "mask" not in name}
