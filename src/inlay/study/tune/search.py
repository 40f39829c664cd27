"""Successive halving, random search and one-epoch top-K: one loop over rungs, at equal compute.

A rung trains some candidates for some steps, and the best of them go into the next one:

    halving     many for a third of the steps, a third of these for all of them     (eta = 3)
    topk        as many as possible for one epoch, the best of these for all steps
    random      as many as possible for all steps

Each rung is a run of its own, from the first step. A run under a cosine schedule is worth what its last steps make of
it, at small learning rates: one that is stopped at a third of a longer schedule is still at almost its highest rate,
and says little of where it would end. One that goes on from the end of a short schedule has to raise the rate again,
and is then not the run that the full steps would have been. So a rung has its own schedule, down to its own end, and
the survivors pay for their first steps twice, which is counted.

Jamieson & Talwalkar 2016, arXiv:1502.07943, with a first rung of no less than a third: shorter ones order candidates
badly.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Literal

from inlay.errors import BadInput
from inlay.study.trial import Trial

Strategy = Literal["halving", "random", "topk"]
STRATEGIES: tuple[Strategy, ...] = ("halving", "random", "topk")
ETA = 3


@dataclass(frozen=True)
class Rung:
    """So many candidates, each trained for so many steps."""

    count: int
    steps: int


@dataclass(frozen=True)
class Scored:
    """A trial, and its score: the larger, the better; NaN if it failed."""

    trial: Trial
    score: float

    @property
    def failed(self) -> bool:
        """Whether there is no score."""
        return math.isnan(self.score)


def plan_rungs(strategy: Strategy, total: int, steps: int, epoch: int) -> list[Rung]:
    """The rungs of a search that take `total` steps together, or less by no more than one run of the first rung.

    Args:
        strategy: One of STRATEGIES.
        total: Steps of all runs together.
        steps: Of a whole trial.
        epoch: Steps of one epoch, for `topk`, whose last rung gets half of all steps.

    Raises:
        BadInput: An unknown strategy, or fewer steps than one whole trial takes.
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if total < steps:
        raise BadInput(f"{total} steps are too few for one trial of {steps}; allow more minutes or trials.")
    if strategy == "random":
        return [Rung(total // steps, steps)]
    if strategy == "topk":
        short, last = min(epoch, steps), max(1, total // (2 * steps))
        first = (total - last * steps) // short
        return [Rung(first, short), Rung(last, steps)] if first > last else [Rung(total // steps, steps)]
    short = math.ceil(steps / ETA)  # the first rung is never less than a third, so that there are two
    bracket = ETA * short + steps
    if short == steps or total < bracket:  # too few to choose among
        return [Rung(total // steps, steps)]
    last = total // bracket
    return [Rung((total - last * steps) // short, short), Rung(last, steps)]


def count_steps(rungs: Iterable[Rung]) -> int:
    """Steps of all runs of a search."""
    return sum(rung.count * rung.steps for rung in rungs)


def run_rungs(
    rungs: Sequence[Rung],
    candidates: Iterator[Trial],
    score: Callable[[Sequence[Trial]], Sequence[float]],
    may_start: Callable[[Trial, int], bool] = lambda trial, after: True,
    at_once: int = 1,
) -> list[list[Scored]]:
    """Run a search: the best of each rung go into the next, in the order of their scores.

    Args:
        rungs: Of `plan_rungs`.
        candidates: What the first rung trains; the steps of a trial are those of its rung.
        score: Trains some trials and gives their scores, NaN for one that failed.
        may_start: Asked before each run, with the steps of the rungs after this one; the first no ends the rung.
        at_once: Trials that are scored in one call.

    Returns:
        What was run, by rung; fewer than planned where the candidates or the time run out.
    """
    found: list[list[Scored]] = []
    for number, rung in enumerate(rungs):
        after = count_steps(rungs[number + 1 :])
        chosen = candidates if not found else iter([each.trial for each in sort_by_score(found[-1]) if not each.failed])
        runs: list[Scored] = []
        while len(runs) < rung.count:
            next_ones = [replace(t, steps=rung.steps) for t in islice(chosen, min(at_once, rung.count - len(runs)))]
            trials = _take_while(may_start, next_ones, after)
            runs += [Scored(trial, value) for trial, value in zip(trials, score(trials), strict=True)] if trials else []
            if not trials or len(trials) < len(next_ones):
                break
        found.append(runs)
    return found


def _take_while(may_start: Callable[[Trial, int], bool], trials: Iterable[Trial], after: int) -> list[Trial]:
    return list(takewhile(lambda trial: may_start(trial, after), trials))


def sort_by_score(runs: Iterable[Scored]) -> list[Scored]:
    """The best first, those that failed last; equal ones stay in their order."""
    return sorted(runs, key=lambda each: -math.inf if each.failed else each.score, reverse=True)


def find_best(rungs: Sequence[Sequence[Scored]]) -> Scored | None:
    """The best of the last rung in which a run did not fail; None where all did."""
    for runs in reversed(rungs):
        for each in sort_by_score(runs):
            if not each.failed:
                return each
    return None
