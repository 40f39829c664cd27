"""The verbs `inlay compare` and `inlay tune`."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.command_line import parse
from inlay.cli.show import JsonOption
from inlay.errors import BadInput

BaseOption = Annotated[str, typer.Option(help="Embedded base, local folder or Hub id.")]
KindOption = Annotated[
    str | None, typer.Option(help="What the base is to do, such as text-classification; default: what it is for.")
]
BatchSizeOption = Annotated[int | None, typer.Option(help="Examples per step; default 32.")]
GroupOption = Annotated[
    str | None, typer.Option(help="Column, or pattern in paths, of what is kept together: a patient, a slide.")
]
JobsOption = Annotated[int, typer.Option(help="Runs at a time.")]
EngineOption = Annotated[str, typer.Option(help="What starts them: processes, or a cluster: ray, dask.")]


def compare(
    context: typer.Context,
    data: Annotated[
        str, typer.Option("--task", metavar="DATA", help="Labelled data, as the recipes of its task take it.")
    ],
    base: BaseOption,
    kind: KindOption = None,
    methods: Annotated[str, typer.Option(help="Names in inlay.METHODS, comma-separated, or all that fit.")] = "all",
    width: Annotated[int, typer.Option(help="Rank or other width of the adapters.")] = 8,
    rates: Annotated[
        str | None,
        typer.Option(help="Learning rates to try, comma-separated; default: four around the one of each method."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Comma-separated; default: 0 to 4 where a run takes less than a minute, else 0 to 2."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget of each run: passes over the data; default 10.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget of each run: steps of the optimiser.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget of each run: seconds of training.")] = None,
    batch_size: BatchSizeOption = None,
    group: GroupOption = None,
    costs: Annotated[bool, typer.Option(help="Measure what each method costs.")] = True,
    forgetting: Annotated[bool, typer.Option(help="Measure what the base loses.")] = True,
    base_data: Annotated[
        str | None,
        typer.Option(help="Data of what the base was pre-trained for, to measure that on; embedded bases have theirs."),
    ] = None,
    jobs: JobsOption = 1,
    engine: EngineOption = "processes",
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the runs and the report.")] = "runs/compare",
    as_json: JsonOption = False,
) -> None:
    """Compare methods on your data, each at its best learning rate, and write a report.

    Further options are those of the task's recipes, such as --augment none, --max-length 128 or --precision bf16. The
    same command goes on where it was interrupted.
    """
    if sum(budget is not None for budget in (epochs, steps, seconds)) > 1:
        raise BadInput("the budget of a run is in epochs, steps or seconds; give one of --epochs, --steps, --seconds.")
    numbers = {"rates": read_numbers("--rates", rates, float), "seeds": read_numbers("--seeds", seeds, int)}

    from inlay.study.compare import compare as compare_methods
    from inlay.study.report import save_comparison, write_terminal_table

    task, train = read_settings(context, base, data, kind, group, output, epochs=epochs, batch_size=batch_size)
    with redirect_stdout(sys.stderr):  # what is said meanwhile is no part of the result
        found = compare_methods(
            task,
            train,
            methods="all" if methods == "all" else [name.strip() for name in methods.split(",")],
            width=width,
            learning_rates=numbers["rates"],
            seeds=numbers["seeds"],
            steps=steps,
            seconds=seconds,
            costs=costs,
            forgetting=forgetting,
            base_data=base_data,
            jobs=jobs,
            engine=engine,  # type: ignore[arg-type]
        )
    page = save_comparison(found, output)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(f"{write_terminal_table(found)}\n\nreport: {page}")


def tune(
    context: typer.Context,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled data, as the recipes of its task take it.")],
    base: BaseOption,
    budget: Annotated[
        str,
        typer.Option(
            help="Limits of the adapter (params=200k, latency=+5%, macs=+1%, file=500kB, memory=2GB) and of the search "
            "(minutes=20, or trials=16 of full length)."
        ),
    ] = "trials=16",
    kind: KindOption = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names in inlay.METHODS, comma-separated; default: one of each kind that fits the base."),
    ] = None,
    strategy: Annotated[str, typer.Option(help="halving, random or topk.")] = "halving",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    finals: Annotated[int, typer.Option(help="Fresh seeds with which the winner is trained and scored.")] = 3,
    final_epochs: Annotated[
        float | None, typer.Option(help="Passes over the data for which the winner is trained; default: as a trial.")
    ] = None,
    unmerged: Annotated[
        bool, typer.Option("--unmerged", help="Count work and latency unmerged, as when adapters share a base.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="Of a trial of full length: passes over the data; default 10.")
    ] = None,
    batch_size: BatchSizeOption = None,
    group: GroupOption = None,
    jobs: JobsOption = 1,
    engine: EngineOption = "processes",
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the runs and the winner.")] = "runs/tune",
    as_json: JsonOption = False,
) -> None:
    """Search the method, its places, width and learning rate for your data within a budget, and save the winner.

    Further options are those of the task's recipes, such as --augment none, --max-length 128 or --precision bf16. The
    same command goes on where it was interrupted.
    """
    from inlay.study.tune.budget import parse_budget

    started, limits = time.monotonic(), parse_budget(budget)

    from inlay.study.problem import Problem
    from inlay.study.tune.run import tune as search
    from inlay.study.tune.winner import suggest_longer_training, write_results

    task, train = read_settings(context, base, data, kind, group, output, epochs=epochs, batch_size=batch_size)
    problem = Problem(task, train, output)
    longer = None if final_epochs is None else replace(train, epochs=final_epochs, steps=None)
    found = search(
        problem,
        limits,
        methods=[name.strip() for name in methods.split(",")] if methods else (),
        strategy=strategy,  # type: ignore[arg-type]
        seed=seed,
        finals=finals,
        final_steps=None if longer is None else longer.count_steps(len(problem.data.train)),
        merged=not unmerged,
        jobs=jobs,
        engine=engine,  # type: ignore[arg-type]
        started=started,
        tell=lambda line: print(line, file=sys.stderr),
    )
    best = write_results(found, problem, output)
    if as_json:
        print((Path(output) / "search.json").read_text(encoding="utf-8"), end="")
    else:
        print(f"{found}\n\nthe adapter: {best / 'adapter'}; trained again by {best / 'recipe.sh'}")
        if longer := suggest_longer_training(found, problem, best):
            print(f"trained longer by: {longer}")
        print(f"the places as an image: {Path(output) / 'placement.png'}")


def read_settings(
    context: typer.Context, base: str, data: str, kind: str | None, group: str | None, output: str, **given: Any
) -> tuple[Any, Any]:
    """The options of the task and of the training, from those of the verb and from what is left on the command line."""
    from inlay.tasks.base import make_task_options
    from inlay.train.config import TrainConfig

    defaults = [make_task_options(base, data, kind), TrainConfig(output_dir=output, workers=0)]
    task, train = parse(defaults, context.args)
    train = replace(train, **{name: value for name, value in given.items() if value is not None})
    return task if group is None else replace(task, group=group), train


def read_numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any] | None:
    """The numbers of an option, which commas separate; None where it is left out.

    Raises:
        InlayError: Something else than numbers.
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise BadInput(f"{option} must be {what} with commas between them, got {text!r}.") from None
