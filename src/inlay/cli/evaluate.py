"""The verb `inlay evaluate`, some of whose options are those of the adapter's task."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.models import is_adapter, load_adapter_or_model
from inlay.cli.show import BaseOption, DeviceOption, DtypeOption, JsonOption, ModelArgument, show_scores
from inlay.cli.task_command import TaskCommand
from inlay.errors import Unsupported
from inlay.files.outputs import check_output_file
from inlay.tasks.task import Task


def evaluate(context: typer.Context) -> None:
    """Score an adapter and its base, or a model, on labelled data: all scores, with 95 % intervals."""
    COMMAND(context.args)


def _score(
    task: Task,
    options: Mapping[str, Any],
    *,
    adapter: ModelArgument,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Labelled data, in a form that the recipes of the task take.")
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="validation, test, train or all; default: the split that a recipe scores, or all of unsplit data."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score at most this many images, prompts or scans; paint from so many seeds.")
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Do not score the base as well: half of the work.")
    ] = False,
    group: Annotated[
        str | None, typer.Option(help="Choose only among the classes of this group of a combined adapter.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare painted images by the features of this image model, such as a DINO or CLIP."
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one row per image, prompt, object, seed, or scan and class."),
    ] = None,
    matrix: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the confusion matrix of a classifier.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the scores to the adapter's metrics.json and README.md.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    for path in (csv, matrix):
        if path is not None:
            check_output_file(path)
    from inlay.adapters.evaluate import evaluate as score

    if matrix is not None and not task.classifies:
        raise Unsupported(f"an adapter for {task.name} has no confusion matrix; leave --matrix out.")
    read_here = dtype is not None or not is_adapter(adapter)
    loaded = load_adapter_or_model(adapter, base, device, dtype) if read_here else None
    found = score(
        loaded or adapter,
        data,
        base=None if loaded else base,
        split=split,  # type: ignore[arg-type]
        limit=limit,
        compare=not adapter_only,
        group=group,
        encoder=encoder,
        write=write,
        device=None if loaded else device,
        options=options,
    )
    show_scores(found, as_json)
    if csv is not None:
        found.write_csv(csv)
    if matrix is not None:
        found.draw_confusion(matrix)


COMMAND = TaskCommand(
    "evaluate",
    _score,
    lambda _: list(inspect.signature(_score).parameters.values())[2:],
    lambda task: task.score_options,
    "Score an adapter and its base, or a model, on labelled data: all scores, with 95 % intervals.",
)
