"""What an adapter costs before it is trained: counted on the meta device, or measured on untrained weights."""

import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from inlay.adapters.save import save_adapter
from inlay.adapters.weight_file import find_weights
from inlay.measure import count_macs
from inlay.measure.costs import State, time_by_turns, without_adapter
from inlay.measure.footprint import true_size
from inlay.measure.memory import collate_largest_batch, plan_memory, step_options
from inlay.methods import METHODS
from inlay.study.problem import Problem
from inlay.study.trial import Trial
from inlay.study.tune.budget import Budget


@dataclass(frozen=True)
class AdapterCosts:
    """What an adapter costs, as far as it is limited; None: it was not asked for.

    Attributes:
        params: Numbers that are trained, without the head.
        macs: Of one input, and those of the base.
        latency_ms: Of one input, and that of the base, measured by turns.
        file: Bytes.
        memory: Bytes of a training step.
    """

    params: int
    macs: tuple[float, float] | None = None
    latency_ms: tuple[float, float] | None = None
    file: int | None = None
    memory: int | None = None


@dataclass
class Limits:
    """Whether an adapter keeps to a budget, found out before it is trained.

    Attributes:
        problem: Has the base and the data.
        budget: The limits.
        merged: A method that folds into the base's weights adds no multiply-accumulates and no latency, as it is merged
            before it is served. False: adapters are served unmerged, several on one base.
    """

    problem: Problem
    budget: Budget
    merged: bool = True
    _known: dict[Trial, AdapterCosts] = field(default_factory=dict)
    _params: dict[Trial, int] = field(default_factory=dict)

    def count_params(self, trial: Trial) -> int:
        """Numbers that a trial trains, without the head.

        Raises:
            InlayError: The method does not fit the base, or these places.
        """
        adapter = _without_training(trial)
        if adapter not in self._params:
            self._params[adapter] = count_adapter_parameters(self.problem.skeleton(adapter))
        return self._params[adapter]

    def find_costs(self, trial: Trial) -> AdapterCosts:
        """All that the budget limits.

        Raises:
            InlayError: The method does not fit the base, or these places.
        """
        adapter = _without_training(trial)
        if adapter not in self._known:
            asked, merges = self.budget, self.merged and METHODS[trial.method].merges
            self._known[adapter] = AdapterCosts(
                self.count_params(trial),
                macs=None if asked.macs is None else self._count_macs(adapter, merges),
                latency_ms=None if asked.latency is None or merges else self._measure_latency(adapter),
                file=None if asked.file is None else self._measure_file(adapter),
                memory=None if asked.memory is None else self._plan_memory(adapter),
            )
        return self._known[adapter]

    def explain_excess(self, trial: Trial) -> str | None:
        """Why a trial does not keep to the budget, in a few words; None if it does.

        Raises:
            InlayError: The method does not fit the base, or these places.
        """
        budget = self.budget
        if budget.params is not None and (params := self.count_params(trial)) > budget.params:
            return f"{params:,} parameters, {budget.params:,} allowed"
        costs = self.find_costs(trial)
        pairs = {"macs": (costs.macs, budget.macs), "latency": (costs.latency_ms, budget.latency)}
        for name, (found, limit) in pairs.items():
            if found is not None and limit is not None and found[0] > limit.of(found[1]):
                return f"{name} {found[0]:.4g}, {limit.of(found[1]):.4g} allowed"
        for name, size, most in (("file", costs.file, budget.file), ("memory", costs.memory, budget.memory)):
            if size is not None and most is not None and size > most:
                return f"{name} {size:,} bytes, {most:,} allowed"
        return None

    def _count_macs(self, adapter: Trial, merges: bool) -> tuple[float, float]:
        """Of the adapted model and of the base; of a limit in numbers the second says nothing."""
        inputs, limit = self.problem.data.example(), self.budget.macs
        bare = merges or (limit is not None and limit.relative)
        base = float(count_macs(self.problem.load_base_skeleton(), inputs)) if bare else 0.0
        return (base if merges else float(count_macs(self.problem.skeleton(adapter), inputs))), base

    def _measure_latency(self, adapter: Trial) -> tuple[float, float]:
        """Of the adapter before its training, and of the base; kept in the records, as it differs from time to time."""
        records = self.problem.records
        if adapter.key not in records.latency_ms:
            model = self.problem.adapt(adapter).eval()
            states: dict[str, State] = {"adapted": partial(nullcontext, model), "base": partial(without_adapter, model)}
            found = time_by_turns(states, self.problem.data.example())
            turns = [(a.median_ms, b.median_ms) for a, b in zip(found["adapted"], found["base"], strict=True)]
            # The ratio within a turn, where both ran under the same load.
            ratio, base = statistics.median(a / b for a, b in turns), statistics.median(b for _, b in turns)
            records.add_latency(adapter.key, [ratio * base, base])
        adapted, base = records.latency_ms[adapter.key]
        return adapted, base

    def _measure_file(self, adapter: Trial) -> int:
        with tempfile.TemporaryDirectory() as folder:
            model = self.problem.adapt(adapter).eval()
            saved = save_adapter(model, Path(folder) / "adapter", processor=self.problem.data.processor)
            return find_weights(saved).stat().st_size

    def _plan_memory(self, adapter: Trial) -> int:
        data, train = self.problem.data, self.problem.train
        batch = collate_largest_batch(data.train, train, data.collate)
        return plan_memory(self.problem.skeleton(adapter), batch, loss=data.loss, **step_options(train)).peak


def count_adapter_parameters(model: nn.Module) -> int:
    """Numbers that are trained, without those of a head that is new for the task."""
    return sum(
        true_size(p) for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name
    )


def _without_training(trial: Trial) -> Trial:
    """What of a trial decides its costs."""
    return Trial(trial.method, 0.0, trial.width, trial.blocks, trial.modules)
