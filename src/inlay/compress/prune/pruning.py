"""Leave out the units of a model that matter least, until it costs what the target allows."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inlay.bases.pruned import adopt_config, read_widths
from inlay.bases.widths import Group, find_groups, narrowed
from inlay.combine.examples import load_examples
from inlay.compress.prune.compensate import compensate as fit_readers
from inlay.compress.prune.criteria import find_criterion, score_units
from inlay.compress.prune.statistics import Evidence, Need, Seen, observe
from inlay.compress.prune.target import (
    Counter,
    Scope,
    Target,
    choose_units,
    inputs_of_one,
    measure_latency,
)
from inlay.compress.prune.trained import TrainedModel, load_trained
from inlay.errors import BadInput


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
        trained: The model, with what its task needs of it.
        kept: By group, the units of the model before that it has, in rising order.
        facts: What was done, with the costs before and after, as JSON takes it.
    """

    trained: TrainedModel
    kept: dict[str, list[int]]
    facts: dict[str, Any] = field(default_factory=dict)


def prune(
    model: TrainedModel | str | Path,
    data: str | os.PathLike[str],
    *,
    target: str | Target = "macs=0.5",
    criterion: str = "taylor",
    scope: Scope = "global",
    kinds: Sequence[str] = (),
    compensate: bool = False,
    steps: int = 1,
    examples: int = 256,
    seed: int = 0,
) -> Pruned:
    """Leave out units of a model until it costs the share that the target allows, and no unit more than that takes.

    Args:
        model: From `load_trained`, or what that takes: a model, or an adapter, which is folded into its base. It is
            left as it is.
        data: Labelled data of the model's task. Its training part shows what matters; nothing of it is learned.
        target: `macs`, `params` or `latency`, as a share of what the model has: macs=0.5. Latency is measured here.
        criterion: A row of CRITERIA.
        scope: `global`: the layers compete for units. `local`: each keeps the same share, so that the config of
            transformers can say it and its classes load the model.
        kinds: Of units: mlp, heads, expansion, squeeze, expand, branch; none: all that the model has.
        compensate: Fit what reads the units that stay, by least squares on the examples.
        steps: In which the target is reached, in equal ratios; after each the criterion looks again.
        examples: How many are looked at.
        seed: Of the criterion `random`.

    Raises:
        InlayError: A model whose widths are not known, a criterion that does not suit it, a target that cannot be met.
    """
    data = os.fspath(data)
    target = Target.parse(target) if isinstance(target, str) else target
    row = find_criterion(criterion)
    if scope not in ("global", "local"):
        raise BadInput(f"unknown scope {scope!r}; choose one of global, local.")
    for what, value in (("steps", steps), ("examples", examples)):
        if value < 1:
            raise BadInput(f"{what} must be at least 1, not {value}.")
    trained = model if isinstance(model, TrainedModel) else load_trained(model)
    groups = find_groups(trained.model, kinds)
    needs: set[Need] = set(row.needs) | ({"activations"} if compensate else set())
    known = load_examples(trained, data, examples, trained.seed, training=trained.training) if needs else None
    inputs = inputs_of_one(trained.task.random_inputs(trained.model, trained.processor))
    counter = Counter(trained.model, inputs)
    before: dict[str, float] = {"macs": counter.count({}), "params": counter.count({}, "params")}
    if target.quantity == "latency":
        before["latency"] = measure_latency(trained.model, inputs)
    generator = torch.Generator().manual_seed(seed)
    current = trained.model
    kept = {group.name: torch.arange(group.units) for group in groups}
    for step in range(1, steps + 1):
        allowed = before[target.quantity] * target.share ** (step / steps)
        groups, counter = find_groups(current, kinds), Counter(current, inputs)
        evidence = observe(current, groups, known.batches, known.loss, needs) if known else Evidence()
        scores = score_units(criterion, current, groups, evidence, generator)
        keep = choose_units(current, groups, scores, target, scope, counter, allowed, row.comparable)
        current = leave_out(current, groups, keep, evidence.seen if compensate else None)
        kept = {name: units[keep[name]] for name, units in kept.items()}
    counter = Counter(current, inputs)
    after: dict[str, float] = {"macs": counter.count({}), "params": counter.count({}, "params")}
    if target.quantity == "latency":
        after["latency"] = measure_latency(current, inputs)
    facts = {
        "task": trained.task.name,
        "source": trained.origin,
        "data": data,
        "target": str(target),
        "criterion": criterion,
        "paper": row.paper,
        "scope": scope,
        "compensate": compensate,
        "steps": steps,
        "examples": known.count if known else 0,
        "before": before,
        "after": after,
        "widths_before": read_widths(trained.model),
        "widths": read_widths(current),
    }
    return Pruned(trained.with_model(current), {name: units.tolist() for name, units in kept.items()}, facts)


def leave_out(
    model: PreTrainedModel,
    groups: Sequence[Group],
    keep: Mapping[str, Tensor],
    seen: Mapping[str, Seen] | None = None,
) -> PreTrainedModel:
    """A model with these units only, of the class that its widths take; the other is left as it is.

    Args:
        model: Without an adapter in it.
        groups: Of `find_groups`.
        keep: By group, the units that stay, in rising order.
        seen: Of `observe`: fit what reads the units to what the whole of them gave. None: leave its weights.
    """
    if seen is not None:
        model = copy.deepcopy(model)
        fit_readers(model, groups, seen, keep)
    return adopt_config(narrowed(model, keep))
