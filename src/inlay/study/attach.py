"""What a study found, next to the adapter that it found it of: in metrics.json, on the card, in `inlay info`."""

import math
from pathlib import Path
from typing import Any

from inlay.adapters.file import read_adapter
from inlay.adapters.notes import write_note
from inlay.adapters.save import save_adapter
from inlay.adapters.study import KEY, SECTION, write_study_section
from inlay.errors import BadInput, WrongBase
from inlay.methods import METHODS
from inlay.study.comparison import Comparison, Row
from inlay.study.problem import Problem
from inlay.study.report.standing import Estimate, find_standings
from inlay.study.statistics import paired_interval
from inlay.study.trial import Trial
from inlay.tasks.options import describe_run


def attach_study(
    folder: str | Path, comparison: Comparison, method: str, *, placement: str | None = None, made_by: str = "compare"
) -> Path:
    """Write what a comparison says of a method into metrics.json and the card of an adapter that was trained by it.

    An earlier study there is replaced. The folder is replaced whole or stays as it was.

    Args:
        folder: Of the adapter, on this machine.
        comparison: In which the method has a row.
        method: Name in METHODS.
        placement: What a search found of where the method belongs, in a sentence.
        made_by: `compare` or `tune`.

    Raises:
        InlayError: No adapter, or one of another base; a method that was not compared.
    """
    file = read_adapter(folder)
    if file.base_name and file.base_name != comparison.base:
        raise WrongBase(
            f"adapter {file.name!r} is of {file.base_name}, and the comparison of {comparison.base}; give an adapter "
            "of that base."
        )
    study = describe_row(comparison, method, placement=placement, made_by=made_by)
    write_note(file, KEY, study, SECTION, write_study_section({KEY: study}))
    return file.folder


def save_best(problem: Problem, comparison: Comparison) -> Path | None:
    """Save the adapter of the best method that makes one, of its run with the first seed, with the study on its card.

    Returns:
        `best/adapter` in the folder of the problem; None where no method gives an adapter that can be saved.
    """
    makes_adapter = {name for name, row in METHODS.items() if row.trains == "adapter" and not row.starts_from_weights}
    scored = [row for row in comparison.rows if row.scores.get(comparison.score) and row.method in makes_adapter]
    if not scored:
        return None
    row = scored[0]
    trial = Trial(row.method, row.learning_rate, row.width, steps=row.steps, seed=comparison.seeds[0])
    folder = problem.folder / "best" / "adapter"
    return save_trial(problem, trial, folder, problem.records.read(trial).test, describe_row(comparison, row.method))


def save_trial(
    problem: Problem, trial: Trial, folder: Path, test: dict[str, float] | None, study: dict[str, Any]
) -> Path:
    """Save the adapter of a trial with its scores of the test part, and with what a study found on its card.

    Args:
        problem: Of which the weights of the trial are in its folder, or are trained again.
        trial: Whose method makes an adapter.
        folder: Of the adapter.
        test: Scores by name.
        study: As `describe_row` makes it.
    """
    trained, result = problem.load_trained(trial)
    metrics = describe_run(trained.model, problem.data, result)
    metrics["training"] |= problem.parts.training.settings  # by which `evaluate` finds the same test part
    metrics |= {"test": test, KEY: study}
    return save_adapter(trained.model, folder, processor=trained.processor, metrics=metrics)


def describe_row(
    comparison: Comparison, method: str, *, placement: str | None = None, made_by: str = "compare"
) -> dict[str, Any]:
    """What a comparison says of a method, as metrics.json holds it under `study` and `read_study` reads it.

    Its difference is to the best of the other methods: the winner's to the second, and that of every other to the
    winner, over the seeds that both have.

    Raises:
        InlayError: The method was not compared.
    """
    standings = find_standings(comparison)
    place = next((i for i, standing in enumerate(standings) if standing.method == method), None)
    if place is None:
        compared = ", ".join(row.method for row in comparison.rows)
        raise BadInput(f"{method!r} was not compared; choose one of {compared}.")
    standing = standings[place]
    row = standing.row
    others = [each.row for each in standings if each.row is not row and comparison.score in each.scores]
    study: dict[str, Any] = {
        "made_by": made_by,
        "base": comparison.base,
        "data": comparison.data,
        "task": comparison.task,
        "score": comparison.score,
        "larger_is_better": comparison.larger_is_better,
        "method": method,
        "width": row.width,
        "steps": row.steps,
        "learning_rate": row.learning_rate,
        "edge": row.edge,
        "curve": [[rate, _find_finite(score)] for rate, score in row.curve.items()],
        "seeds": comparison.seeds,
        "counts": comparison.counts,
        "budget": comparison.budget,
        "rank": place + 1,
        "methods": len(standings),
        "test": {name: describe_estimate(each) for name, each in standing.scores.items()},
        "forgetting": {name: describe_estimate(each) for name, each in standing.forgetting.items()},
        "search_seconds": comparison.search_seconds,
        "seconds": comparison.seconds,
    }
    if others and (difference := _describe_difference(row, others[0], comparison.score)):
        study["difference"] = difference
    if placement is not None:
        study["placement"] = placement
    return study


def _describe_difference(row: Row, other: Row, score: str) -> dict[str, Any] | None:
    """Seed by seed; None where no seed has a score of both."""
    pairs = zip(row.scores.get(score, []), other.scores[score], strict=False)
    apart = [own - theirs for own, theirs in pairs if math.isfinite(own) and math.isfinite(theirs)]
    if not apart:
        return None
    estimate = Estimate(*paired_interval(apart))
    return {"to": other.method, **describe_estimate(estimate), "tie": estimate.low <= 0 <= estimate.high}


def describe_estimate(estimate: Estimate) -> dict[str, float | None]:
    """As `read_study` reads it."""
    return {"mean": estimate.mean, "low": _find_finite(estimate.low), "high": _find_finite(estimate.high)}


def _find_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
