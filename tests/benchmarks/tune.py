"""inlay tune next to random search, one-epoch top-K and peft's defaults, all with the same compute and parameters.

    python tests/benchmarks/tune.py digits mr --seeds 0 1 2                  # 20 minutes on one core
    python tests/benchmarks/tune.py e2e hippocampus flowers --seeds 0        # 20 minutes on one core
    python tests/benchmarks/tune.py digits-long restaurants                  # longer trials; texts of a GPT-2

Each seed is a search of its own, by each strategy, with the steps of 8 or 4 trials of full length in
all; its winner is trained once more with a fresh seed and scored on the test part, which chose nothing. Searches start
at records of other data. The defaults are those of peft's quicktour (https://huggingface.co/docs/peft/quicktour): LoRA
with r = 8 on the query and value projections, alpha 32, dropout 0.1, learning rate 1e-3; once with the steps of one
trial, and once with all the steps that a search takes. Next to them halving has half of the steps, and its winner the
other half in one run. For scans only one method is made, so that the defaults there are its own; a convolutional
network has no such projections, so that LoRA is on its pointwise convolutions. A search may train no more parameters
than the defaults. Trials that several searches have in common are run once, and count for each. Everything is stored as
soon as it is done; the same command goes on.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft import LoraConfig

from inlay import ImageTask, Problem, SequenceTask, TextTask, TrainConfig, Trial, VolumeTask, lora_targets, tune
from inlay.files.atomic import write_json
from inlay.methods import METHODS
from inlay.study.priors import load_priors, start_rate
from inlay.study.statistics import mean_interval, paired_interval
from inlay.study.tune.budget import Budget
from inlay.study.tune.limits import count_adapter_parameters
from inlay.study.tune.search import STRATEGIES

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results" / "tune"
RATE = 1e-3

DEFAULTS = replace(
    METHODS["lora"],
    name="peft-defaults",
    learning_rate=RATE,
    config=lambda model, rank: LoraConfig(
        r=rank, lora_alpha=32, lora_dropout=0.1, target_modules=lora_targets(model, "attention")
    ),
)
METHODS[DEFAULTS.name] = DEFAULTS
QUICKTOUR = Trial(DEFAULTS.name, RATE, 8)


class BlindProblem(Problem):
    """A search on it starts at records of other data: those of this data know its best rates already."""

    def start_rate(self, method: str, width: int) -> float:
        """The rate of the records of other data."""
        others = [record for record in load_priors() if record.data not in str(self.task.dataset)]
        return start_rate(method, self.load_base_skeleton(), width, others, self.row.name)


@dataclass(frozen=True)
class Case:
    """A task, how long a trial of full length is, how many a search has, and the defaults that it is compared with."""

    title: str
    task: Any
    epochs: float
    batch_size: int = 32
    trials: int = 8
    defaults: Trial = QUICKTOUR


CASES = {
    "digits": Case("builtin:digits on builtin:vit-tiny", ImageTask(), 2),
    "digits-long": Case("builtin:digits on builtin:vit-tiny, trials five times as long", ImageTask(), 10),
    "restaurants": Case("builtin:restaurants on builtin:gpt2-tiny", TextTask(max_length=128), 1),
    "mr": Case("builtin:families (classification of texts) on builtin:gpt2-tiny", SequenceTask(), 2, 16, 4),
    "e2e": Case(
        "E2E (the pairs of devset.csv) on stories260K, a Llama",
        TextTask(
            str(SHARED / "lm_stories260K_llama/hf"), str(SHARED / "e2e_nlg/devset.csv"), group="mr", max_length=256
        ),
        0.25,
        8,
    ),
    "hippocampus": Case(
        "hippocampus (MR volumes) on builtin:sam-tiny",
        VolumeTask(dataset=str(SHARED / "hippocampus_msd04/dev"), crop=[32, 48, 32]),
        2,
        2,
        4,
        Trial("spatial", METHODS["spatial"].learning_rate, 8),
    ),
    "flowers": Case(
        "flowers (photos of five kinds) on MobileNetV2",
        ImageTask(str(SHARED / "mobilenet_imagenet/hf/mobilenet_v2_1.0_224"), str(SHARED / "flowers5/dev")),
        1,
        16,
        4,
    ),
}


def run_case(name: str, seeds: list[int], runs: Path) -> None:
    """All searches and defaults of a case, and its tables."""
    case = CASES[name]
    problem = BlindProblem(
        case.task, TrainConfig(epochs=case.epochs, batch_size=case.batch_size, workers=0), runs / name
    )
    defaults = case.defaults
    budget = Budget(params=count_adapter_parameters(problem.skeleton(defaults)), trials=case.trials)
    rows: dict[str, list[dict[str, Any]]] = {}

    def add(label: str, **row: Any) -> None:
        rows.setdefault(label, []).append(row)
        _store(name, problem, budget, rows)

    for seed in seeds:
        for strategy in STRATEGIES:
            found = tune(problem, budget, strategy=strategy, seed=seed, finals=1, tell=print)
            add(
                strategy,
                seed=seed,
                test=found.test_scores[0],
                validation=found.winner.score,
                params=found.winner.params,
                steps=found.steps,
                winner=found.winner.trial.key,
            )
        half = case.trials // 2
        found = tune(problem, replace(budget, trials=half), seed=seed, finals=1, tell=print)
        runs_of_one = {
            "half search, half training": (found.winner.trial, found.winner.params, half),
            "defaults": (defaults, budget.params, 1),
            "defaults, long": (defaults, budget.params, case.trials),
        }
        for label, (adapter, params, times) in runs_of_one.items():
            trial = replace(adapter, steps=times * problem.steps, seed=seed + 1)
            outcome = problem.run(trial, test=True)
            problem.delete_weights(trial)
            add(
                label,
                seed=seed,
                test=(outcome.test or {})[problem.score],
                validation=problem.main_score(outcome),
                params=params,
                steps=trial.steps,
                winner=trial.key,
            )


def _store(name: str, problem: Problem, budget: Budget, rows: dict[str, list[dict[str, Any]]]) -> None:
    facts = {
        "title": CASES[name].title,
        "score": problem.score,
        "larger_is_better": problem.larger_is_better,
        "params": budget.params,
        "steps_of_a_trial": problem.steps,
        "epochs_of_a_trial": CASES[name].epochs,
        "trials": budget.trials,
        "counts": problem.parts.counts,
        "rows": rows,
        "machine": describe_machine(),
    }
    path = RESULTS.with_suffix(".json")
    all_facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    all_facts[name] = facts
    write_json(path, all_facts)
    tables = [f"**{case['title']}**\n\n{_write_table(case)}" for case in all_facts.values()]
    RESULTS.with_suffix(".md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def _write_table(facts: dict[str, Any]) -> str:
    """Means over the seeds with t-intervals, and the difference to halving, seed by seed."""
    lines = [f"| | {facts['score']} on the test part | 95 % | less halving | 95 % | median parameters |"]
    lines.append("|---|---:|---|---:|---|---:|")
    halving = {row["seed"]: row["test"] for row in facts["rows"]["halving"]}
    for label, rows in facts["rows"].items():
        mean, *ends = mean_interval([row["test"] for row in rows])
        cells = [label, f"{mean:.4f}", _write_interval(ends, "")]
        less, *ends = paired_interval([row["test"] - halving[row["seed"]] for row in rows])
        cells += ["", ""] if label == "halving" else [f"{less:+.4f}", _write_interval(ends, "+")]
        cells.append(f"{statistics.median(row['params'] for row in rows):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(facts["rows"]["halving"])
    several = f"{seeds} seed{'s' * (seeds > 1)}"
    same = " A trial is no longer than an epoch, so that topk is random." if facts["epochs_of_a_trial"] <= 1 else ""
    better = "" if facts["larger_is_better"] else " Smaller is better."
    return "\n".join(lines) + (
        f"\n\n{several}; {facts['trials']} trials of {facts['steps_of_a_trial']} steps each; at most "
        f"{facts['params']:,} parameters besides the head.{better}{same}"
    )


def _write_interval(ends: list[float], sign: str) -> str:
    low, high = ends
    return "one seed" if math.isnan(low) else f"{low:{sign}.4f} to {high:{sign}.4f}"


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_tune"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.cases:
        run_case(name, asked.seeds, asked.runs)


if __name__ == "__main__":
    main()
