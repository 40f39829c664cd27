"""Weights of a combination, fitted on a few labelled examples through the model.

What a sum of adapters computes depends on its weights through tensors that are linear in them, T(w) = T_0 + Σ w_i T_i:
so the weights have a gradient, and nothing else is trained. The examples are few and the weights fewer: no adapter is
made worse than another by it, only louder or quieter.

Source: Huang et al. 2023 (LoraHub), arXiv:2307.13269, whose loss is this one, with a penalty on Σ |w|; it searches
without gradients.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from inlay.adapters.load import load_adapter
from inlay.adapters.weight_file import PREFIX
from inlay.combine.examples import load_examples
from inlay.combine.heads import Heads
from inlay.combine.method_sum import Sum, SumOptions
from inlay.combine.parts import Source
from inlay.combine.weights import Weight, list_numbers, replace_numbers, weight_at
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import adapter_parameters
from inlay.tasks.evaluation import Training

RATE = 0.05  # of Adam, for weights of about 1


@dataclass(frozen=True)
class Fitted:
    """Fitted weights.

    Attributes:
        weights: By adapter, and by part of the base where they were given so.
        before: Loss on the examples with the weights that were given.
        after: With the fitted ones.
        examples: How many.
    """

    weights: dict[str, Weight]
    before: float
    after: float
    examples: int


def fit_weights(
    sources: list[Source],
    sums: Callable[[list[Source], SumOptions], Mapping[str, Sum]],
    write: Callable[[list[Source], Mapping[str, Sum], Path], Any],
    heads: Heads,
    options: SumOptions,
    data: str,
    *,
    examples: int = 32,
    steps: int = 60,
    penalty: float = 0.01,
    seed: int = 0,
) -> Fitted:
    """Fit the weights of a sum, starting from those that are given.

    Args:
        sources: The adapters.
        sums: Makes sums of them.
        write: Writes such sums as an adapter.
        heads: What it has in place of the heads, which are means by the weights.
        options: Without a width, which comes afterwards.
        data: Name of labelled data, as the loader of the adapters' task takes it.
        examples: How many to use, evenly over the classes.
        steps: Of Adam.
        penalty: On the mean of |w|, for weights no larger than they have to be.
        seed: Chooses the examples.

    Raises:
        InlayError: Weights that have no gradient, such as those of prefixes; data of other labels; a base that cannot
            be loaded.
    """
    if not options.rule.linear:
        raise Unsupported("weights are fitted for add, average and task_arithmetic, which are linear in them.")
    if examples < 1 or steps < 1:
        raise BadInput(f"examples and steps must be at least 1; they are {examples} and {steps}.")
    given = [source.weight for source in sources]
    parts, start = map(list, zip(*list_numbers(given), strict=True))
    fixed = replace(options, width=None, zeros=True)

    def weight_sources(numbers: list[float]) -> list[Source]:
        weights = replace_numbers(given, numbers)
        return [source.with_weight(weight) for source, weight in zip(sources, weights, strict=True)]

    ones = weight_sources([1.0] * len(start))
    with tempfile.TemporaryDirectory() as folder:
        write(ones, sums(ones, fixed), Path(folder) / "sum")
        loaded = load_adapter(Path(folder) / "sum", device="cpu")
    trainings = [Training.from_metrics(source.file.metrics) for source in sources]
    training = next((each for each in trainings if each.used(data)), None)  # none has seen what it held out
    labelled = load_examples(loaded, data, examples, seed, training=training)
    corners = [weight_sources([float(i == k) for i in range(len(start))]) for k in range(-1, len(start))]
    base, *slopes = _find_slopes([sums(corner, fixed) for corner in corners])
    names = adapter_parameters(loaded.model)
    means = _HeadMeans(heads, sources)
    same_part = torch.tensor([[float(one == other) for other in parts] for one in parts])

    def as_used(weights: torch.Tensor) -> torch.Tensor:
        return weights / (same_part @ weights) if options.rule.normal else weights

    def values_at(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        used = as_used(weights)
        values = {
            key: value + sum(w * slope[key] for w, slope in zip(used, slopes, strict=True))
            for key, value in base.items()
        }
        return {names[key]: value for key, value in (values | means.values_at(used)).items()}

    def loss(weights: torch.Tensor, backward: bool) -> float:
        return labelled.mean(_ModelAtWeights(loaded.model, lambda: values_at(weights)), backward=backward).item()

    weights = torch.tensor(start, requires_grad=True)
    with torch.no_grad():
        before = loss(weights, backward=False)
    best = (before, start)
    optimizer = torch.optim.Adam([weights], RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        (penalty * weights.abs().mean()).backward()
        now = loss(weights, backward=True)
        if now < best[0] and means.exist_at(as_used(weights)):
            best = (now, as_used(weights).tolist())
        optimizer.step()
    found = replace_numbers(given, [round(number, 6) for number in best[1]])
    fitted = {source.name: weight for source, weight in zip(sources, found, strict=True)}
    return Fitted(fitted, before, best[0], labelled.count)


class _HeadMeans:
    """The rows of heads that are means by the weights, as functions of these: `Heads.make` with a gradient."""

    def __init__(self, heads: Heads, sources: list[Source]) -> None:
        order = replace_numbers([source.weight for source in sources], count())  # where each number stands among all
        number_of = {source.name: numbers for source, numbers in zip(sources, order, strict=True)}
        self.parts: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        self.counts: dict[str, torch.Tensor] = {}
        for key, rows in heads.rows.items():
            plain = key.removeprefix(PREFIX)
            places = [torch.from_numpy(part.places) for part in rows]
            holders = torch.bincount(torch.cat(places))
            if (holders > 1).any():
                self.counts[key] = holders
                self.parts[key] = [
                    (int(weight_at(number_of[part.adapter], plain)), place, torch.from_numpy(part.read()))
                    for part, place in zip(rows, places, strict=True)
                ]

    def values_at(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors, by key."""
        found = {}
        for key, parts in self.parts.items():
            total, shared = self._totals(key, weights)
            value = torch.zeros(len(total), *parts[0][2].shape[1:])
            for i, places, rows in parts:
                share = torch.where(shared, weights[i] / torch.where(total == 0, 1, total), 1 / self.counts[key])
                value = value.index_add(0, places, share[places].view(-1, *[1] * (rows.ndim - 1)) * rows)
            found[key] = value
        return found

    def exist_at(self, weights: torch.Tensor) -> bool:
        """False where the weights of a row add up to 0 or less."""
        totals = [self._totals(key, weights) for key in self.parts]
        return all(bool((total[shared] > 0).all()) for total, shared in totals)

    def _totals(self, key: str, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the weights of those that have a row, and which rows are means by the weights."""
        total = any_weight = torch.zeros(len(self.counts[key]))
        for i, places, _ in self.parts[key]:
            each = weights[i].expand(len(places))
            total, any_weight = total.index_add(0, places, each), any_weight.index_add(0, places, each.detach().abs())
        return total, (self.counts[key] > 1) & (any_weight > 0)


class _ModelAtWeights(nn.Module):
    """A model with other values in the place of its adapter's; for a loss it looks as if it were wrapped by DDP."""

    def __init__(self, module: nn.Module, values: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.module, self.values = module, values
        self.train(module.training)

    def forward(self, **inputs: Any) -> Any:
        """What the model gives; the values are made anew, as each backward frees what leads to them."""
        return functional_call(self.module, self.values(), kwargs=inputs)


def _find_slopes(corners: list[Mapping[str, Sum]]) -> list[dict[str, torch.Tensor]]:
    """T_0, and T_i - T_0 for each adapter, of the tensors that depend on the weights."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in corners]
    for kind, first in corners[0].items():
        for site, leaves in first.shapes.items():
            made = [corner[kind].make(site) for corner in corners]
            for leaf in leaves:
                zero = made[0][leaf]
                if any(not np.array_equal(zero, other[leaf]) for other in made[1:]):
                    key = f"{PREFIX}{site}.{leaf}"
                    found[0][key] = torch.from_numpy(zero.copy())  # the next site may take its memory
                    for slope, other in zip(found[1:], made[1:], strict=True):
                        slope[key] = torch.from_numpy(other[leaf] - zero)
    return found
