"""Methods on one base and task: each at its best learning rate, over several seeds, at an equal budget.

    comparison = compare(ImageTask(), TrainConfig(epochs=5), methods=["probe", "lora", "full"])

The learning rate of each method is chosen with the first seed on the part of the data that chooses. Then the method is
trained with every seed at that rate, and scored on the test part, which chose nothing.
"""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from inlay.adapters.save import read_versions
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.files.atomic import lock_folder
from inlay.methods import METHODS
from inlay.study.attach import save_best
from inlay.study.comparison import Comparison, Row
from inlay.study.parallel import Engine, check_engine, run_trials
from inlay.study.problem import Problem
from inlay.study.trial import Outcome, Trial
from inlay.tasks.options import TaskOptions
from inlay.train.config import TrainConfig

_HALF_DECADE = math.sqrt(10)
FACTORS = (0.1, 0.316, 1.0, 3.16)  # of the rate where the search starts
_EXTENSIONS = 2  # half-decades that a grid grows where its best rate is at an edge
_MANY_SEEDS, _FEW_SEEDS, _SHORT_RUN_S = 5, 3, 60.0

Rates = Sequence[float] | Mapping[str, Sequence[float]]
Tell = Callable[[str], None]
Run = Callable[..., list[Outcome]]  # `_run` of a comparison


def compare(
    task: TaskOptions,
    train: TrainConfig,
    *,
    methods: Sequence[str] | Literal["all"] = "all",
    width: int = 8,
    learning_rates: Rates | None = None,
    factors: Sequence[float] = FACTORS,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    costs: bool = True,
    forgetting: bool = True,
    base_data: str | None = None,
    jobs: int = 1,
    engine: Engine = "processes",
    tell: Tell | None = print,
) -> Comparison:
    """Compare methods, each at its best learning rate, on data that chose nothing.

    Every method is tried at the same multiples of the rate where its search starts; a grid whose best rate is at an
    edge grows that way by up to two half-decades. All runs have the same budget: the epochs of `train`, `steps`, or
    `seconds` of training steps on this machine. A run that diverges is told of in its row. `train.output_dir` holds the
    finished runs: a comparison that is interrupted goes on where it was. In the end `best/adapter` in it is the adapter
    of the best method that makes one, of the run with the first seed, with what was found on its card.

    Args:
        task: Options of a task: base and data.
        train: How all runs are trained; its learning rate and seed are not used.
        methods: Names in METHODS; all: every one that fits the base.
        width: Rank or other width of the adapters.
        learning_rates: The rates to try, of all methods or by method; such a grid does not grow.
        factors: The rates to try, as multiples of the rate where the search starts.
        seeds: Of the runs at the best rate; the first one is that of the search. Default: 0 to 4 where a run takes
            less than a minute, else 0 to 2.
        steps: Of the optimiser, of every run.
        seconds: Of training, of every run. Its steps follow from the time of one, measured while no other run is next
            to it; evaluations are not counted.
        costs: Measure what each method costs, of its run with the first seed.
        forgetting: Measure what the base has lost.
        base_data: Data of what the base was pre-trained for, to measure that on: labelled as its own head is, or a text
            file. Embedded bases have their own.
        jobs: Runs at a time.
        engine: As in `run_trials`.
        tell: Is given a line about each run; None: nobody is.

    Raises:
        InlayError: An unknown method, a number out of its range, a base that fits no method, a folder that holds
            another study or is in use, data or a base that cannot be loaded.
    """
    _check_numbers(width, learning_rates, factors, seeds, steps, seconds)
    check_engine(engine, jobs)
    problem = Problem(task, train, train.output_dir, base_data=base_data)
    run = partial(_run, problem, jobs, engine, tell)
    with lock_folder(problem.folder, wait_s=0):
        names, refused = problem.fits(None if methods == "all" else methods, width)
        if not names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "none is named."
            raise Unsupported(f"no method to compare on {task.model}: {reasons}")
        seed = seeds[0] if seeds else 0
        remarks = problem.remembered.remarks if forgetting else []
        if tell is not None:
            for remark in remarks:
                tell(f"not measured: {remark}")
        starts = [Trial(name, problem.start_rate(name, width), width, steps=steps or 0, seed=seed) for name in names]
        if seconds is not None:
            starts = [replace(start, steps=max(1, int(seconds / problem.measure_step(start)))) for start in starts]
        searches = [_Search.plan(problem, start, learning_rates, factors) for start in starts]
        _search_rates(searches, run)
        if seeds is None:
            seeds = range(_choose_seed_count(searches))
        rows = _retrain(searches, seeds, run, costs=costs, forgetting=forgetting)
        _delete_weights(searches, seeds)
        budget = {"steps": float(searches[0].start.steps)} if seconds is None else {"seconds": seconds}
        comparison = Comparison(
            base=task.model,
            data=task.dataset,
            task=problem.row.name,
            score=problem.score,
            larger_is_better=problem.larger_is_better,
            seeds=list(seeds),
            counts=problem.parts.counts,
            budget={**budget, "batch_size": problem.batch_size},
            rows=sort_rows(rows, problem.score, problem.larger_is_better),
            refused=refused,
            search_seconds=sum(search.seconds_of_losers() for search in searches),
            seconds=sum(row.seconds for row in rows),
            about=_describe(problem, jobs),
        )
        _save_best(problem, comparison, tell)
    return comparison


def _save_best(problem: Problem, comparison: Comparison, tell: Tell | None) -> None:
    """Save the best adapter; one that cannot be saved is told of, and costs nobody the comparison."""
    try:
        saved = save_best(problem, comparison)
        said = "" if saved is None else f"the best adapter is in {saved}"
    except InlayError as error:
        said = f"the best adapter is not saved: {error}"
    if said and tell is not None:
        tell(said)


def sort_rows(rows: Sequence[Row], score: str, larger_is_better: bool) -> list[Row]:
    """The best mean score first, over the seeds that have one; rows without any last."""

    def place(row: Row) -> float:
        values = [value for value in row.scores.get(score, []) if math.isfinite(value)]
        if not values:
            return math.inf
        return -statistics.fmean(values) if larger_is_better else statistics.fmean(values)

    return sorted(rows, key=place)


@dataclass
class _Search:
    """The search for the learning rate of one method.

    Attributes:
        problem: On which it is tried.
        start: The trial with which it starts.
        rates: To try.
        most: Rates that the grid may have in the end.
        tried: What came of each rate.
    """

    problem: Problem
    start: Trial
    rates: list[float]
    most: int
    tried: dict[float, Outcome] = field(default_factory=dict)

    @classmethod
    def plan(cls, problem: Problem, start: Trial, given: Rates | None, factors: Sequence[float]) -> "_Search":
        """The rates that are given for the method of `start`, or multiples of its rate, which may become more."""
        if isinstance(given, Mapping):
            given = given.get(start.method)
        rates = sorted({*(given or [_round(factor * start.learning_rate) for factor in factors])})
        return cls(problem, problem.complete(start), rates, len(rates) + (0 if given else _EXTENSIONS))

    @property
    def missing(self) -> list[Trial]:
        """Trials of the rates that have not been tried."""
        return [replace(self.start, learning_rate=rate) for rate in self.rates if rate not in self.tried]

    @property
    def best(self) -> float | None:
        """The rate of the best main score on the part that chooses, among equals that of the smallest loss."""
        scores = {rate: self.problem.main_score(outcome) for rate, outcome in self.tried.items()}
        sign = 1 if self.problem.larger_is_better else -1
        return max(
            (rate for rate, score in scores.items() if math.isfinite(score)),
            key=lambda rate: (sign * scores[rate], -self.tried[rate].validation["loss"]),
            default=None,
        )

    @property
    def edge(self) -> bool:
        """Whether the best rate is the smallest or largest that was tried."""
        return self.best in (min(self.tried), max(self.tried))

    def list_finals(self, seeds: Sequence[int]) -> list[Trial]:
        """A trial of each seed at the best rate; none where no rate gave a score."""
        rate = self.best
        return [] if rate is None else [replace(self.start, learning_rate=rate, seed=seed) for seed in seeds]

    def grow(self) -> None:
        """Add the next half-decade where the best rate is at an edge, or below all rates where none gave a score."""
        best, low, high = self.best, min(self.tried), max(self.tried)
        if len(self.rates) < self.most and best in (None, low, high):
            self.rates.append(_round(high * _HALF_DECADE if best == high else low / _HALF_DECADE))

    def seconds_of_losers(self) -> float:
        """Of the runs at all rates but the best, whose run is one of the comparison too."""
        return sum(outcome.seconds for rate, outcome in self.tried.items() if rate != self.best)


def _round(rate: float) -> float:
    """To two digits, as a person would write it."""
    return float(f"{rate:.2g}")


def _search_rates(searches: Sequence[_Search], run: Run) -> None:
    """Try all rates, then those by which grids grow; those of all methods together, so that no worker waits."""
    what = "rates"
    while trials := [trial for search in searches for trial in search.missing]:
        outcomes = {outcome.trial: outcome for outcome in run(what, trials)}
        what = "more rates"
        for search in searches:
            search.tried |= {trial.learning_rate: outcomes[trial] for trial in search.missing}
            search.grow()


def _choose_seed_count(searches: Sequence[_Search]) -> int:
    """More seeds where a run of half of the methods takes less than a minute.

    The shortest run of each counts: it was not scored on the test part, whose time is added to that of a run later.
    """
    taken = statistics.median(min(outcome.seconds for outcome in search.tried.values()) for search in searches)
    return _MANY_SEEDS if taken < _SHORT_RUN_S else _FEW_SEEDS


def _retrain(
    searches: Sequence[_Search], seeds: Sequence[int], run: Run, *, costs: bool, forgetting: bool
) -> list[Row]:
    """Train every method at its best rate with every seed, and score it on the test part; a row each."""
    finals = [search.list_finals(seeds) for search in searches]
    by_seed = [trials[i] for i in range(len(seeds)) for trials in finals if trials]  # a base is loaded once for a seed
    outcomes = run("test", by_seed, {"test", *(["forgetting"] if forgetting else [])})
    if costs:  # not next to another run, which would make latencies those of a busy machine
        outcomes += run("costs", [trials[0] for trials in finals if trials], {"costs"}, jobs=1)
    found = {outcome.trial: outcome for outcome in outcomes}
    return [
        _make_row(search, [found[trial] for trial in trials]) for search, trials in zip(searches, finals, strict=True)
    ]


def _make_row(search: _Search, outcomes: Sequence[Outcome]) -> Row:
    start, best = search.start, search.best
    every = {outcome.trial: outcome for outcome in (*search.tried.values(), *outcomes)}
    return Row(
        method=start.method,
        learning_rate=start.learning_rate if best is None else best,
        width=start.width,
        steps=start.steps,
        curve={rate: search.problem.main_score(search.tried[rate]) for rate in sorted(search.tried)},
        edge=search.edge,
        scores=_collect([outcome.test or {} for outcome in outcomes]),
        validation=[search.problem.main_score(outcome) for outcome in outcomes],
        forgetting=_collect([outcome.forgetting for outcome in outcomes]),
        costs=outcomes[0].costs if outcomes else {},
        merges=METHODS[start.method].merges,
        seconds=sum(outcome.seconds for outcome in every.values()),
        failed=[
            f"learning rate {trial.learning_rate:g}, seed {trial.seed}: {outcome.failed}"
            for trial, outcome in every.items()
            if outcome.failed
        ],
    )


def _collect(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """From scores of each seed to each score over the seeds; NaN where a run gave none."""
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: [scores.get(name, math.nan) for scores in found] for name in names}


def _delete_weights(searches: Sequence[_Search], seeds: Sequence[int]) -> None:
    """Of all runs but that of each method at its best rate with the first seed."""
    for search in searches:
        finals = search.list_finals(seeds)
        for trial in {*(outcome.trial for outcome in search.tried.values()), *finals} - {*finals[:1]}:
            search.problem.delete_weights(trial)


def _run(
    problem: Problem,
    jobs_asked: int,
    engine: Engine,
    tell: Tell | None,
    what: str,
    trials: Sequence[Trial],
    measured: Collection[str] = (),
    *,
    jobs: int | None = None,
) -> list[Outcome]:
    """Run trials, and tell of each."""
    numbers = iter(range(1, len(trials) + 1))

    def done(outcome: Outcome) -> None:
        if tell is not None:
            tell(f"{what} {next(numbers)}/{len(trials)}: {describe_outcome(problem, outcome)}")

    return run_trials(problem, trials, measured=frozenset(measured), jobs=jobs or jobs_asked, engine=engine, done=done)


def describe_outcome(problem: Problem, outcome: Outcome) -> str:
    """What came of a trial, in a line."""
    trial = outcome.trial
    name = f"{trial.method}, width {trial.width}, learning rate {trial.learning_rate:g}, seed {trial.seed}"
    if outcome.failed:
        return f"{name}: {outcome.failed}"
    score = f"{problem.score} {problem.main_score(outcome):.4f}"
    if outcome.test is not None:
        score += f", test {outcome.test[problem.score]:.4f}"
    return f"{name}: {score} in {outcome.seconds:.1f} s"


def _describe(problem: Problem, jobs: int) -> dict[str, Any]:
    """Where and how a comparison was made."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "versions": read_versions(),
        "settings": problem.settings(),
    }


def _check_numbers(
    width: int,
    learning_rates: Rates | None,
    factors: Sequence[float],
    seeds: Sequence[int] | None,
    steps: int | None,
    seconds: float | None,
) -> None:
    lists = {"factors": factors}
    if learning_rates is not None:
        by_method = learning_rates if isinstance(learning_rates, Mapping) else {"": learning_rates}
        lists |= {f"learning_rates {method}".strip(): rates for method, rates in by_method.items()}
    for name, values in lists.items():
        if not len(values) or not all(value > 0 and math.isfinite(value) for value in values):
            raise BadInput(f"{name} must be one number over 0 or more, got {list(values)}.")
    if seeds is not None and (not len(seeds) or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise BadInput(f"seeds must be different whole numbers from 0, at least one, got {list(seeds)}.")
    for name, value in (("width", width), ("steps", steps), ("seconds", seconds)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BadInput(f"{name} must be over 0, got {value}.")
    if steps is not None and seconds is not None:
        raise BadInput("the budget is in steps or in seconds; give one of them.")
