"""What a mode costs and keeps, measured on this machine and this model before anything is chosen."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inlay.measure.speed import forward_passes
from inlay.tasks.adapter import place_inputs
from inlay.tasks.task import Task

TURNS, PASSES = 9, 5  # turns, the first of which is a warm-up, and passes of each mode in a turn
BUDGET_S = 0.5  # of a mode in a turn; one pass is always taken


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one forward pass: the median, the range of the middle 80 % of the runs, and the CPU time.

    Attributes:
        median_ms: On the clock.
        p10_ms: The same.
        p90_ms: The same.
        cpu_ms: The median that all threads together computed, which other load on the machine lengthens little.
        repeats: How many runs.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    cpu_ms: float
    repeats: int

    @property
    def cost_ms(self) -> float:
        """By what modes are compared: with one thread the CPU time, else the clock, as threads work side by side."""
        return self.cpu_ms if torch.get_num_threads() == 1 else self.median_ms


@dataclass(frozen=True)
class Answers:
    """What a model says of held-out examples: predicted and true classes, (N,)."""

    predicted: Tensor
    true: Tensor

    @property
    def accuracy(self) -> float:
        """Share of true ones."""
        return float((self.predicted == self.true).float().mean())

    def agree(self, other: "Answers") -> float:
        """Share of equal answers."""
        return float((self.predicted == other.predicted).float().mean())


@dataclass
class Row:
    """One mode in the table of a probe; latency is None where it could not be made.

    Attributes:
        mode: Its name.
        latency_ms: Median of one input.
        p10_ms: Of the same runs.
        p90_ms: Of the same runs.
        cpu_ms: Median of their CPU time.
        cost_ms: One of the two, by which modes are compared.
        speedup: How many times as fast as float32 in torch.
        agreement: Share of answers that are those of float32 in torch.
        accuracy: Share of right answers.
        bytes: Of the files.
        verdict: What became of it.
    """

    mode: str
    latency_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    cpu_ms: float | None = None
    cost_ms: float | None = None
    speedup: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    bytes: int = 0
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(self).items()}


def time_by_turns(models: Mapping[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Speed]:
    """The speed of each model on the same inputs, with the threads that torch uses now.

    The models take turns, so that other load on the machine affects all of them.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], float]] = {
            name: stack.enter_context(forward_passes(model, _place(inputs, model))) for name, model in models.items()
        }
        for turn in range(TURNS):
            for name, run in runs.items():
                run()  # what the other models have left in the caches is not timed
                spent = 0.0
                for _ in range(PASSES):
                    begun = time.process_time()
                    took = run()
                    spent += took
                    if turn:
                        seconds[name].append((took, time.process_time() - begun))
                    if spent > BUDGET_S:
                        break
    return {name: _summarise(times) for name, times in seconds.items()}


def _summarise(seconds: Sequence[tuple[float, float]]) -> Speed:
    clock, cpu = np.array(seconds).T * 1e3
    p10, median, p90 = np.quantile(clock, [0.1, 0.5, 0.9]).tolist()
    return Speed(median, p10, p90, float(np.median(cpu)), len(seconds))


@torch.inference_mode()
def collect_answers(task: Task, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Answers:
    """Predicted and true classes of all batches."""
    found = [task.classify_batch(model, _place(batch, model)) for batch in batches]
    return Answers(torch.cat([said for said, _ in found]), torch.cat([true for _, true in found]))


def _place(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return place_inputs(inputs, next(p for p in model.parameters() if p.is_floating_point()))
