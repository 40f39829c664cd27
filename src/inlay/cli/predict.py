"""The verb `inlay predict`, whose options are those of the adapter's task."""

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from inlay.cli.show import BaseOption, DeviceOption, DtypeOption, JsonOption, ModelArgument
from inlay.errors import BadInput
from inlay.tasks import TASKS
from inlay.tasks.task import Option, Task

DOC = "Run an adapter or a model on inputs of its task."
_FLAGS = ("--merge", "--json", "--help")
_COMMON = (*_FLAGS, "--base", "--device", "--dtype")


def predict(context: typer.Context) -> None:
    """Run an adapter, or a model, on inputs of its task: classify images or texts, continue prompts, find masks,
    segment scans.
    """
    arguments = context.args
    adapter = _find_adapter(arguments)
    if adapter is None:
        _build_command(None)(arguments or ["--help"], prog_name="inlay predict")
        return
    from inlay.cli.models import find_task

    task = find_task(adapter)
    for option in _named_options(arguments):
        if option not in (*_COMMON, *map(_flag_of, task.options)):
            raise BadInput(_explain_option(option, adapter, task))
    _build_command(task)(arguments, prog_name="inlay predict")


def _find_adapter(arguments: list[str]) -> str | None:
    """The first argument that is neither an option nor the value of an option; None if there is none."""
    is_value = False
    for argument in arguments:
        if argument.startswith("-"):
            is_value = argument not in _FLAGS and "=" not in argument
        elif is_value:
            is_value = False
        else:
            return argument
    return None


def _named_options(arguments: list[str]) -> list[str]:
    """The options on a command line. Everything after `--` is an input."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return [argument.partition("=")[0] for argument in options if argument.startswith("--")]


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explain_option(option: str, adapter: str, task: Task) -> str:
    own = ", ".join(map(_flag_of, task.options))
    owners = [other.name for other in TASKS.values() if option in map(_flag_of, other.options)]
    if owners:
        return (
            f"{option} is an option for {' and '.join(owners)}, but adapter {adapter!r} is for {task.name}, which "
            f"takes {own}."
        )
    return f"unknown option {option}; an adapter for {task.name} takes {own}."


def _build_command(task: Task | None) -> Any:
    """The command with the options of one task, or of all tasks to show its help without an adapter."""

    def run(
        adapter: str,
        inputs: list[str],
        base: str | None,
        device: str | None,
        dtype: str | None,
        merge: bool,
        as_json: bool,
        **options: Any,
    ) -> None:
        if task is not None:
            _run_task(task, adapter, inputs, base, device, dtype, merge, as_json, options)

    what = task.inputs if task else "; or ".join(dict.fromkeys(one.inputs for one in TASKS.values()))
    inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help=f"{what[0].upper()}{what[1:]}.")]
    merges = Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base first.")]
    parameters = [
        _make_parameter("adapter", ModelArgument),
        _make_parameter("inputs", inputs),
        _make_parameter("base", BaseOption, None),
        _make_parameter("device", DeviceOption, None),
        _make_parameter("dtype", DtypeOption, None),
        _make_parameter("merge", merges, False),
        _make_parameter("as_json", JsonOption, False),
    ]
    seen: set[str] = set()
    for owner in [task] if task else TASKS.values():
        for name, option in owner.options.items():
            if name not in seen:  # a name that two tasks share has the same meaning in both
                parameters.append(_make_parameter(name, _annotate_option(option, owner.name), option.default))
                seen.add(name)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = f"{DOC} {'This adapter is for ' + task.name if task else 'Its task decides the options'}."
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    return typer.main.get_command(app)


def _make_parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _annotate_option(option: Option, panel: str) -> Any:
    settings = typer.Option(
        help=option.help, metavar=option.metavar, min=option.least, rich_help_panel=f"Options for {panel}"
    )
    return Annotated[option.kind, settings]


def _run_task(
    task: Task,
    adapter: str,
    inputs: list[str],
    base: str | None,
    device: str | None,
    dtype: str | None,
    merge: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    from inlay.cli.models import hide_bitsandbytes, load_adapter_or_model

    hide_bitsandbytes(adapter, base)
    answer = task.prepare(inputs, options)  # checks the inputs before the model is loaded
    result = answer(load_adapter_or_model(adapter, base, device, dtype, merge=merge))
    print(json.dumps(result.facts, indent=2, ensure_ascii=False) if as_json else "\n".join(result.lines))
