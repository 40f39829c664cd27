"""Trials in several processes, of this machine or of others: joblib starts them, and one process writes the records."""

import gc
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.parallel import get_active_backend

from inlay.errors import BadInput, Unsupported
from inlay.study.problem import Problem
from inlay.study.trial import Outcome, Trial
from inlay.tasks.options import TaskOptions
from inlay.train.config import TrainConfig

Engine = Literal["processes", "ray", "dask"]
_BACKENDS = {"processes": "loky", "ray": "ray", "dask": "dask"}  # joblib's names


def check_engine(engine: str, jobs: int) -> None:
    """Raise InlayError for an engine that there is not or that is not installed, and for fewer than one job."""
    if engine not in get_args(Engine):
        raise BadInput(f"unknown engine {engine!r}; choose one of {', '.join(get_args(Engine))}.")
    if jobs < 1:
        raise BadInput(f"jobs must be at least 1, not {jobs}.")
    if jobs > 1:
        _register(engine)


def run_trials(
    problem: Problem,
    trials: Sequence[Trial],
    *,
    measured: frozenset[str] = frozenset(),
    jobs: int = 1,
    engine: Engine = "processes",
    done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run trials, or read them back, and give their outcomes in their order.

    Every worker loads data and base for itself, once, and computes with its share of the threads. On other machines
    the base and the data must be found under the same names, and the folder of the study too.

    Args:
        problem: Whose records they are added to, by this process.
        trials: What to train.
        measured: What of test, costs and forgetting is measured.
        jobs: Trials at a time.
        engine: What starts the workers where there are several: processes of this machine, or a cluster of Ray or Dask.
        done: Is told of each outcome as it comes.

    Raises:
        InlayError: The engine is not installed; what `Problem.run` says.
    """
    check_engine(engine, jobs)
    trials = [problem.complete(trial) for trial in trials]
    pending = {trial: problem.list_missing(trial, measured) for trial in trials}
    for trial in (trial for trial, missing in pending.items() if missing is None):
        if done:
            done(problem.records.read(trial))
    missing = [(trial, parts) for trial, parts in pending.items() if parts is not None]
    computed = _compute_here(problem, missing) if jobs == 1 else _compute_elsewhere(problem, missing, jobs, engine)
    for outcome in computed:
        outcome = problem.record(outcome, pending[outcome.trial] or ())
        if done:
            done(outcome)
    return [problem.records.read(trial) for trial in trials]


def _compute_here(problem: Problem, missing: Sequence[tuple[Trial, frozenset[str]]]) -> Iterator[Outcome]:
    with old_objects_frozen() if len(missing) > 1 else nullcontext():  # a single run would gain nothing
        for trial, measured in missing:
            yield problem.compute(trial, measured)


@contextmanager
def old_objects_frozen() -> Iterator[None]:
    """Let the search for garbage, with which each run ends, leave out modules and data: 0.2 s a run instead of 0.5.

    Objects that are frozen already stay so.
    """
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _compute_elsewhere(
    problem: Problem, missing: Sequence[tuple[Trial, frozenset[str]]], jobs: int, engine: Engine
) -> Iterator[Outcome]:
    """Outcomes in the order in which they are done."""
    threads = max(1, torch.get_num_threads() // jobs) if engine == "processes" else None
    plan = _Plan(problem.task, problem.train, str(problem.folder), problem.split_seed, problem.base_data, threads)
    calls = [delayed(_compute_in_worker)(plan, trial, measured) for trial, measured in missing]
    with parallel_config(_BACKENDS[engine], n_jobs=jobs):
        if get_active_backend()[0].supports_return_generator:
            yield from Parallel(return_as="generator_unordered", pre_dispatch=jobs)(calls)
            return
        for begin in range(0, len(calls), jobs):  # of such an engine nothing is known before all are done
            yield from Parallel()(calls[begin : begin + jobs])


@dataclass
class _Plan:
    """What makes a Problem, and the threads of a worker; None: as they are."""

    task: TaskOptions
    train: TrainConfig
    folder: str
    split_seed: int
    base_data: str | None
    threads: int | None


_of_this_worker: tuple[_Plan, Problem] | None = None


def _compute_in_worker(plan: _Plan, trial: Trial, measured: frozenset[str]) -> Outcome:
    """Compute a trial on the Problem of this worker process, which stays for the next trial."""
    global _of_this_worker
    if plan.threads:
        torch.set_num_threads(plan.threads)
    with redirect_stderr(io.StringIO()):  # the bars of several runs would write over each other
        if _of_this_worker is None or _of_this_worker[0] != plan:
            problem = Problem(plan.task, plan.train, plan.folder, plan.split_seed, base_data=plan.base_data)
            problem.parts  # noqa: B018 - loaded now, to be left out too
            gc.collect()
            gc.freeze()  # as `old_objects_frozen`, for as long as the worker lives
            _of_this_worker = plan, problem
        return _of_this_worker[1].compute(trial, measured)


def _register(engine: str) -> None:
    """Make an engine known to joblib."""
    try:
        if engine == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        elif engine == "dask":
            _connect_dask()
    except ImportError as error:
        package = {"ray": "ray", "dask": "'dask[distributed]'"}[engine]
        raise Unsupported(f"the engine {engine} is not installed ({error}): pip install {package}.") from None


def _connect_dask() -> Any:
    """The client of this process; a new one goes to the scheduler that Dask's settings name, or starts one here."""
    from distributed import Client, get_client

    try:
        return get_client()
    except ValueError:
        return Client()
