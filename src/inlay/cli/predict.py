"""The verb `inlay predict`, whose options are those of the adapter's task."""

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from inlay.cli.show import BaseOption, DeviceOption, DtypeOption, JsonOption, ModelArgument
from inlay.cli.task_command import TaskCommand, make_parameter
from inlay.tasks import TASKS
from inlay.tasks.task import Task


def predict(context: typer.Context) -> None:
    """Run an adapter, or a model, on inputs of its task: classify images or texts, continue prompts, find masks,
    segment scans.
    """
    COMMAND(context.args)


def _make_parameters(task: Task | None) -> list[inspect.Parameter]:
    what = task.inputs if task else "; or ".join(dict.fromkeys(one.inputs for one in TASKS.values()))
    inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help=f"{what[0].upper()}{what[1:]}.")]
    merges = Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base first.")]
    return [
        make_parameter("adapter", ModelArgument),
        make_parameter("inputs", inputs),
        make_parameter("base", BaseOption, None),
        make_parameter("device", DeviceOption, None),
        make_parameter("dtype", DtypeOption, None),
        make_parameter("merge", merges, False),
        make_parameter("as_json", JsonOption, False),
    ]


def _run_task(
    task: Task,
    options: Mapping[str, Any],
    *,
    adapter: str,
    inputs: list[str],
    base: str | None,
    device: str | None,
    dtype: str | None,
    merge: bool,
    as_json: bool,
) -> None:
    from inlay.cli.models import hide_bitsandbytes, load_adapter_or_model

    hide_bitsandbytes(adapter, base)
    answer = task.prepare(inputs, options)  # checks the inputs before the model is loaded
    result = answer(load_adapter_or_model(adapter, base, device, dtype, merge=merge))
    print(json.dumps(result.facts, indent=2, ensure_ascii=False) if as_json else "\n".join(result.lines))


COMMAND = TaskCommand(
    "predict",
    _run_task,
    _make_parameters,
    lambda task: task.options,
    "Run an adapter or a model on inputs of its task.",
)
