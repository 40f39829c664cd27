"""What a search leaves behind: the winner as an adapter and as a recipe, its facts, and the image of places."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from inlay.files.atomic import replacing, write_json
from inlay.methods import METHODS
from inlay.study.attach import describe_estimate, save_trial
from inlay.study.problem import Problem
from inlay.study.report.standing import Estimate
from inlay.study.statistics import mean_interval
from inlay.study.trial import Outcome, Trial
from inlay.study.tune import recipe
from inlay.study.tune.run import Tuned, describe

_NOT_IN_A_RECIPE = ("output_dir", "overwrite", "push_to", "private", "embedded_rate")


def write_results(found: Tuned, problem: Problem, folder: str | Path) -> Path:
    """Write best/ (adapter, recipe, settings), placement.png and search.json into a folder.

    best/recipe.sh trains the adapter of best/adapter again; options behind it replace those of best/config.yaml, which
    holds what the search found. best/train.py is a recipe like those of the repository, with the method, its width and
    its places as options.

    Args:
        found: What `tune` gave.
        problem: Of that search; the weights of the final trials are in its folder, or are trained again.
        folder: Where.

    Returns:
        The folder best.
    """
    folder = Path(folder)
    best = folder / "best"
    best.mkdir(parents=True, exist_ok=True)
    chosen = _choose_final(found, problem)
    save_trial(problem, chosen.trial, best / "adapter", chosen.test, _describe_winner(found, problem))
    _write_recipe(best, problem, chosen.trial)
    for final in found.finals:
        problem.delete_weights(final.trial)
    found.placement.draw(folder / "placement.png")
    write_json(folder / "search.json", {**_describe_search(found), **_list_runs(found)})
    return best


def suggest_longer_training(found: Tuned, problem: Problem, best: Path) -> str:
    """The command that trains the winner as many times longer as the search compared; none where that did not pay.

    Args:
        found: What `tune` gave.
        problem: Of that search.
        best: The folder that `write_results` gave.
    """
    length, trained = found.length, found.finals[0].trial.steps
    if length is None or not length.longer_is_better:
        return ""
    steps = trained * length.long / length.short
    epochs = steps * problem.batch_size / len(problem.data.train)
    return f"{best / 'recipe.sh'} --epochs {epochs:.3g} --output_dir longer"


def _choose_final(found: Tuned, problem: Problem) -> Outcome:
    """Of the final trials the best on the part that chooses, whose weights are saved."""
    sign = 1 if found.larger_is_better else -1
    return max((final for final in found.finals if final.test), key=lambda final: sign * problem.main_score(final))


def _write_recipe(folder: Path, problem: Problem, trial: Trial) -> None:
    kind = type(problem.task).__name__
    code = Path(recipe.__file__).read_text(encoding="utf-8").replace("ImageTask", kind)
    settings = make_settings(problem, trial)
    told = f"# {describe(trial)}: {METHODS[trial.method].paper}\n"
    texts = {
        "train.py": code,
        "config.yaml": told + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        "recipe.sh": f'#!/bin/sh\n{told}cd "$(dirname "$0")" && accelerate launch train.py config.yaml "$@"\n',
    }
    for name, text in texts.items():
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    (folder / "recipe.sh").chmod(0o755)


def make_settings(problem: Problem, trial: Trial) -> dict[str, Any]:
    """The options of the recipe under which it trains what the trial did."""
    trained = problem.make_train_config(trial)
    dataset = Path(problem.task.dataset)  # the recipe runs in a folder of its own
    task = {**asdict(problem.task), "dataset": str(dataset.resolve()) if dataset.exists() else problem.task.dataset}
    base = Path(problem.task.model)
    task["model"] = str(base.resolve()) if base.exists() else problem.task.model
    settings = {
        "method": trial.method,
        "width": trial.width,
        "blocks": list(trial.blocks or ()),
        "modules": trial.modules,
        "split_seed": problem.split_seed,
        **task,
        **{key: value for key, value in asdict(trained).items() if key not in _NOT_IN_A_RECIPE},
    }
    return {key: value for key, value in settings.items() if value is not None and value != []}


def _describe_winner(found: Tuned, problem: Problem) -> dict[str, Any]:
    """What stands with the saved adapter, as `read_study` reads it."""
    trial = found.finals[0].trial
    tested = [final for final in found.finals if final.test]
    values = {name: [final.test[name] for final in tested if final.test] for name in (tested[0].test or {})}
    return {
        "made_by": "tune",
        "strategy": found.strategy,
        "trials": sum(len(rung) for rung in found.rungs),
        "base": found.base,
        "data": found.data,
        "task": problem.row.name,
        "score": found.score,
        "larger_is_better": found.larger_is_better,
        "method": trial.method,
        "width": trial.width,
        "steps": trial.steps,
        "learning_rate": trial.learning_rate,
        "blocks": list(trial.blocks or ()),
        "modules": trial.modules,
        "params": found.winner.params,
        "seeds": [final.trial.seed for final in tested],
        "counts": problem.parts.counts,
        "budget": asdict(found.budget),
        "test": {name: describe_estimate(Estimate(*mean_interval(each))) for name, each in values.items()},
        "placement": str(found.placement),
        "seconds": found.seconds,
    }


def _describe_search(found: Tuned) -> dict[str, Any]:
    """The search without its runs."""
    return {
        "data": found.data,
        "base": found.base,
        "score": found.score,
        "strategy": found.strategy,
        "seed": found.seed,
        "budget": asdict(found.budget),
        "steps": found.steps,
        "trials": sum(len(rung) for rung in found.rungs),
        "winner": asdict(found.winner.trial),
        "params": found.winner.params,
        "final_steps": found.finals[0].trial.steps,
        "fresh": [_finite(score) for score in found.fresh_scores],
        "test": found.test_scores,
    }


def _list_runs(found: Tuned) -> dict[str, Any]:
    return {
        "seconds": round(found.seconds, 1),
        "planned": [asdict(rung) for rung in found.planned],
        "rungs": [[{**asdict(each.trial), "score": _finite(each.score)} for each in rung] for rung in found.rungs],
        "front": [asdict(each) for each in found.find_front()],
        "length": None if found.length is None else asdict(found.length),
        "places": [{**asdict(cell), "error": _finite(cell.error)} for cell in found.placement.cells],
        "failed": found.failed,
    }


def _finite(value: float) -> float | None:
    return value if value == value else None  # NaN is no JSON
