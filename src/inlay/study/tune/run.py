"""A search on a task: candidates by rungs, the winner with fresh seeds on a test part, and what was learned."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import lock_folder
from inlay.methods import METHODS
from inlay.study.parallel import Engine, check_engine, old_objects_frozen, run_trials
from inlay.study.problem import Problem
from inlay.study.report.plots import find_front
from inlay.study.statistics import mean_interval
from inlay.study.trial import Outcome, Trial
from inlay.study.tune.budget import Budget
from inlay.study.tune.length import Length, compare_lengths
from inlay.study.tune.limits import Limits
from inlay.study.tune.placement import Placement, compare_places, find_adapted_places
from inlay.study.tune.search import Rung, Scored, Strategy, find_best, plan_rungs, run_rungs, sort_by_score
from inlay.study.tune.space import Space, list_places

# One of each kind. Their near relatives (rslora, dora, bottleneck-mlp ...) are within 1 to 2 % of them once the rate is
# searched (arXiv:2602.04998), and each costs as many trials.
USUAL = (
    "lora",
    "ssf",
    "bottleneck",
    "bottleneck-parallel",
    "adapter-plus",
    "convpass",
    "conv-adapter",
    "attention-prefix",
    "spatial",
)
TRIALS = 16  # of full length, where the budget says neither trials nor minutes
_UNKNOWN_WIDTH = 128  # stands for that of a base whose blocks differ in it: a convolutional network
_SPARE = 0.9  # of the seconds is for runs; the rest for drawing, counting and saving


@dataclass(frozen=True)
class Candidate:
    """A trial of the last rung.

    Attributes:
        trial: Of full length.
        score: The main score of the part that chooses.
        params: Numbers that are trained, without the head.
        latency_ms: Where the budget limits it; None: not measured, or merged.
    """

    trial: Trial
    score: float
    params: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        data: Its name.
        base: Its name.
        score: The main score.
        larger_is_better: Of the main score.
        budget: What was allowed.
        strategy: How candidates were chosen.
        seed: Of the search.
        rungs: All that was run, by rung, in that order; scores in the unit of the task, NaN where a run failed.
        planned: The rungs as they were planned; fewer runs are in `rungs` where the time ran out.
        candidates: Of the last rung, without those that failed; the best first.
        winner: The best of them.
        finals: The winner, trained with fresh seeds and scored on the test part.
        fresh_scores: The main score of each of them on the part that chooses, NaN where it failed. Where they are far
            below that of the winner, it was the best by its seed.
        placement: What the first rung says about places.
        length: What more steps brought; None where no trial was run at two lengths.
        failed: By trial, why it gave no score.
        seconds: Of all runs.
    """

    data: str
    base: str
    score: str
    larger_is_better: bool
    budget: Budget
    strategy: Strategy
    seed: int
    rungs: list[list[Scored]]
    planned: list[Rung]
    candidates: list[Candidate]
    winner: Candidate
    finals: list[Outcome]
    fresh_scores: list[float]
    placement: Placement
    length: Length | None
    failed: dict[str, str]
    seconds: float

    @property
    def test_scores(self) -> list[float]:
        """The main score of the test part, one for each fresh seed."""
        return [final.test[self.score] for final in self.finals if final.test]

    @property
    def steps(self) -> int:
        """Of all runs of the search, without the final ones."""
        return sum(each.trial.steps for rung in self.rungs for each in rung)

    def find_front(self) -> list[Candidate]:
        """Candidates than which no other one is as good at fewer parameters; the smallest first."""
        points = [(float(each.params), each.score) for each in self.candidates]
        return [self.candidates[i] for i in find_front(points, larger_is_better=self.larger_is_better)]

    def __str__(self) -> str:
        runs = " + ".join(f"{len(rung)} x {rung[0].trial.steps}" for rung in self.rungs if rung)
        mean, low, high = mean_interval(self.test_scores)
        interval = "" if math.isnan(low) else f" (95 % {low:.4f} to {high:.4f})"
        count, last = len(self.finals), len(self.candidates)
        fresh = ", ".join(f"{score:.4f}" for score in self.fresh_scores)
        steps = self.finals[0].trial.steps
        longer = f" and {steps} steps" if steps != self.winner.trial.steps else ""
        lines = [
            f"{self.data} on {self.base}, {self.strategy}, seed {self.seed}: {runs} = {self.steps:,} steps",
            "",
            f"front of the {last} candidate{'s' * (last > 1)} of the last rung: {self.score} on the part that chooses",
            *_write_table(self.find_front()),
            "",
            f"winner: {describe(self.winner.trial)}, {self.winner.params:,} parameters",
            f"{self.score} on the part that chooses: {self.winner.score:.4f} in the search, then {fresh}",
            f"{self.score} on the test part with {count} fresh seed{'s' * (count > 1)}{longer}: {mean:.4f}{interval}",
            f"places: {self.placement}",
        ]
        if self.length is not None:
            lines.append(f"length: {self.length}")
        if self.failed:
            first = next(iter(self.failed.values()))
            lines.append(f"{len(self.failed)} trials gave no score: {first}")
        return "\n".join(lines)


def describe(trial: Trial) -> str:
    """Method, width, places and rate in words."""
    width = "" if METHODS[trial.method].width.startswith("none") else f" of width {trial.width}"
    where = "all blocks" if trial.blocks is None else f"blocks {', '.join(map(str, trial.blocks))}"
    layers = "" if trial.modules == "all" else f", {trial.modules} only"
    return f"{trial.method}{width} in {where}{layers}, learning rate {trial.learning_rate:g}"


def _write_table(candidates: Sequence[Candidate]) -> list[str]:
    timed = any(each.latency_ms is not None for each in candidates)
    rows = [["parameters", "score", *["ms"] * timed, "adapter"]]
    for each in candidates:
        latency = "merged" if each.latency_ms is None else f"{each.latency_ms:.2f}"
        rows.append([f"{each.params:,}", f"{each.score:.4f}", *[latency] * timed, describe(each.trial)])
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.rjust(size) for cell, size in zip(row, wide, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def tune(
    problem: Problem,
    budget: Budget,
    *,
    methods: Sequence[str] = (),
    strategy: Strategy = "halving",
    seed: int = 0,
    finals: int = 3,
    final_steps: int | None = None,
    merged: bool = True,
    jobs: int = 1,
    engine: Engine = "processes",
    started: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Search method, places, width and learning rate; then train the winner with fresh seeds, and score it.

    Every trial keeps to the budget before it is trained. The part of the data that chooses is not the test part, on
    which only the winner is scored. Finished trials are read back from the records of the problem: a search that was
    killed goes on where it was, and ends as it would have. Under a budget in seconds this holds for the plan, which the
    first run decides; the clock may end it earlier.

    Args:
        problem: The task; the steps of a whole trial are those of its training.
        budget: Limits of the adapter and of the search.
        methods: Names in METHODS that make an adapter; none: those of USUAL that fit the base.
        strategy: One of STRATEGIES.
        seed: Of what is drawn; all trials of the search have the seed 0.
        finals: Fresh seeds, from 1.
        final_steps: Of the winner's runs with them; None: as many as a whole trial has.
        merged: As in `Limits`.
        jobs: Trials at a time.
        engine: As in `run_trials`.
        started: When the time of the budget began, by `time.monotonic`; None: now.
        tell: Told of each run.

    Raises:
        InlayError: No method fits the base, or nothing keeps to the budget; too few steps or seconds for one trial;
            another process is writing the folder; all trials failed.
    """
    if finals < 1:
        raise BadInput(f"finals must be at least 1, got {finals}: the winner is scored on the test part.")
    if final_steps is not None and final_steps < 1:
        raise BadInput(f"final_steps must be at least 1, got {final_steps}.")
    check_engine(engine, jobs)
    begun = time.monotonic() if started is None else started
    whole, epoch = problem.steps, max(1, round(len(problem.data.train) / problem.batch_size))
    final_steps = whole if final_steps is None else final_steps
    runner = _Runner(problem, budget, finals, final_steps, jobs, engine, begun, tell)
    planned = plan_rungs(strategy, whole * (budget.trials or TRIALS), whole, epoch)
    limits = Limits(problem, budget, merged)
    space = Space(
        choose_methods(problem, methods),
        list_places(problem.load_base_skeleton()),
        limits,
        lambda trial: problem.start_rate(trial.method, trial.width),
        widest=max(8, (problem.base["width"] or _UNKNOWN_WIDTH) // 2),
        seed=seed,
    )
    candidates: Iterator[Trial] = space.draw()
    with lock_folder(problem.folder, wait_s=0), old_objects_frozen():
        first = next(candidates)
        if budget.seconds is not None:  # the first run tells how long the others take
            runner.score([replace(first, steps=planned[0].steps)])
            known, name = problem.records.steps_of_search, f"{strategy}, seed {seed}, {budget}"
            name += "" if final_steps == whole else f", {final_steps} steps in the end"
            if name not in known:
                problem.records.add_steps_of_search(name, runner.count_affordable_steps(whole))
            planned = plan_rungs(strategy, known[name], whole, epoch)
        rungs = run_rungs(planned, chain([first], candidates), runner.score, runner.may_start, jobs)
        best = find_best(rungs)
        if best is None and not runner.failed:
            raise BadInput(runner.explain_lack_of_time())
        if best is None:
            raise ComputationFailed(f"all trials failed; the first: {next(iter(runner.failed.values()))}")
        outcomes = runner.finish(replace(best.trial, steps=final_steps))
    last = [each for each in sort_by_score(_last_rung(rungs)) if not each.failed]
    listed = [_make_candidate(each, limits, runner.sign) for each in last]
    return Tuned(
        data=problem.task.dataset,
        base=problem.task.model,
        score=problem.score,
        larger_is_better=problem.larger_is_better,
        budget=budget,
        strategy=strategy,
        seed=seed,
        rungs=[[replace(each, score=runner.sign * each.score) for each in rung] for rung in rungs],
        planned=planned,
        candidates=listed,
        winner=listed[0],
        finals=outcomes,
        fresh_scores=[problem.main_score(outcome) for outcome in outcomes],
        placement=_learn_placement(problem, rungs[0]),
        length=compare_lengths(rungs, problem.score),
        failed=runner.failed,
        seconds=runner.seconds_of_runs,
    )


def choose_methods(problem: Problem, names: Sequence[str] = ()) -> list[str]:
    """The methods of a search.

    Raises:
        InlayError: An unknown name, a method that makes no adapter, or one that does not fit the base.
    """
    makes_none = [
        n for n in names if n in METHODS and (METHODS[n].trains != "adapter" or METHODS[n].starts_from_weights)
    ]
    if makes_none:
        raise BadInput(f"{makes_none[0]} makes no adapter that can be saved; leave it out, or use inlay compare.")
    fitting, refused = problem.fits(names or USUAL, 1)
    wrong = [name for name in names if name in refused]
    if wrong or not fitting:
        name = wrong[0] if wrong else next(iter(refused))
        raise BadInput(f"{name} does not fit {problem.task.model}: {refused[name]}")
    return fitting


class _Runner:
    """Runs trials, keeps the time that they took, and says whether another one may start.

    Attributes:
        failed: By trial, why it gave no score.
        sign: -1 where a smaller score is better.
        seconds_of_runs: As recorded, of all trials that were asked for.
    """

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        finals: int,
        final_steps: int,
        jobs: int,
        engine: Engine,
        started: float,
        tell: Callable[[str], None],
    ) -> None:
        self.problem, self.budget, self.finals, self.final_steps = problem, budget, finals, final_steps
        self.jobs, self.engine, self.started, self.tell = jobs, engine, started, tell
        self.sign = 1 if problem.larger_is_better else -1
        self.failed: dict[str, str] = {}
        self.seconds_of_runs = 0.0
        self._steps_of_runs = 0
        self._earlier = 0.0  # seconds of trials that an earlier start has run
        self._done: dict[Trial, Outcome] = {}

    def run(self, trials: Sequence[Trial], *, test: bool = False) -> list[Outcome]:
        """Outcomes in the order of the trials; those that are recorded are read back."""
        measured = frozenset({"test"} if test else ())
        new = [trial for trial in trials if trial not in self._done]
        read = {trial for trial in new if self.problem.list_missing(trial, measured) is None}
        for outcome in run_trials(self.problem, new, measured=measured, jobs=self.jobs, engine=self.engine):
            trial = outcome.trial
            self._done[trial] = outcome
            self.seconds_of_runs += outcome.seconds
            self._steps_of_runs += trial.steps
            self._earlier += outcome.seconds / self.jobs if trial in read else 0.0
            if outcome.failed:
                self.failed[trial.key] = outcome.failed
            told = outcome.failed or f"{self.problem.score} {self.problem.main_score(outcome):.4f}"
            self.tell(f"{trial.steps} steps, {f'seed {trial.seed}, ' if test else ''}{describe(trial)}: {told}")
        return [self._done[trial] for trial in trials]

    def score(self, trials: Sequence[Trial]) -> list[float]:
        """The larger, the better; NaN for one that failed."""
        scores = [self.sign * self.problem.main_score(outcome) for outcome in self.run(trials)]
        for trial in trials:
            self.problem.delete_weights(trial)
        return scores

    def may_start(self, trial: Trial, after: int) -> bool:
        """Whether there is time for a trial, for the steps of the rungs after it, and for the final trials."""
        if self.budget.seconds is None or trial in self._done or not self._steps_of_runs:
            return True
        steps = trial.steps + after / self.jobs + math.ceil(self.finals / self.jobs) * self.final_steps
        return self._elapsed() + steps * self._seconds_per_step <= _SPARE * self.budget.seconds

    def count_affordable_steps(self, whole: int) -> int:
        """Steps of a search for which there is time, without the final trials; at least one whole trial's."""
        assert self.budget.seconds is not None
        left = self.jobs * (_SPARE * self.budget.seconds - self._elapsed())
        affordable = self._steps_of_runs + math.floor(left / self._seconds_per_step) - self.finals * self.final_steps
        return max(whole, affordable)

    def explain_lack_of_time(self) -> str:
        """Why no trial was started after the first one, which told how long a step takes."""
        assert self.budget.seconds is not None
        whole = self.problem.steps
        needed = (whole + math.ceil(self.finals / self.jobs) * self.final_steps) * self._seconds_per_step
        several = f"{self.finals} final run{'s' * (self.finals > 1)}"
        return (
            f"{self.budget.seconds:.0f} s are too few: after {self._elapsed():.0f} s a trial of {whole} steps and "
            f"{several} of {self.final_steps} need about {needed:.0f} s more; allow more minutes, or fewer epochs or "
            "finals."
        )

    def finish(self, winner: Trial) -> list[Outcome]:
        """The winner with fresh seeds, scored on the test part: at least one, and no more than there is time for."""
        found: list[Outcome] = []
        trials = [replace(winner, seed=seed) for seed in range(1, self.finals + 1)]
        while trials and (not found or self._has_time_for(winner)):
            found += self.run(trials[: self.jobs], test=True)
            trials = trials[self.jobs :]
        if not any(final.test for final in found):
            raise ComputationFailed(f"the winner failed with every fresh seed: {found[0].failed}")
        return found

    @property
    def _seconds_per_step(self) -> float:
        return self.seconds_of_runs / self._steps_of_runs

    def _has_time_for(self, trial: Trial) -> bool:
        needed = trial.steps * self._seconds_per_step
        return self.budget.seconds is None or self._elapsed() + needed <= self.budget.seconds

    def _elapsed(self) -> float:
        return time.monotonic() - self.started + self._earlier


def _last_rung(rungs: Sequence[Sequence[Scored]]) -> Sequence[Scored]:
    """The last in which a run did not fail."""
    return next(rung for rung in reversed(rungs) if any(not each.failed for each in rung))


def _make_candidate(each: Scored, limits: Limits, sign: int) -> Candidate:
    costs = limits.find_costs(each.trial)
    latency = None if costs.latency_ms is None else costs.latency_ms[0]
    return Candidate(each.trial, sign * each.score, costs.params, latency)


def _learn_placement(problem: Problem, runs: Sequence[Scored]) -> Placement:
    scored = {number: each for number, each in enumerate(runs) if not each.failed}
    places = {number: find_adapted_places(problem.skeleton(each.trial)) for number, each in scored.items()}
    cells = compare_places({number: each.score for number, each in scored.items()}, places)
    steps = runs[0].trial.steps if runs else 0
    return Placement(Path(problem.task.dataset).name, problem.score, len(scored), steps, cells)
