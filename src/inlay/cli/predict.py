"""The verb `inlay predict`: it has the options of the adapter's own task, and of no other."""

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from inlay.cli.show import AdapterArgument, BaseOption, DeviceOption, JsonOption
from inlay.errors import BadInput
from inlay.tasks import TASKS
from inlay.tasks.task import Option, Task

DOC = "Use an adapter for what it was trained for."
_FLAGS = ("--merge", "--json", "--help")
_COMMON = (*_FLAGS, "--base", "--device")


def predict(context: typer.Context) -> None:
    """Use an adapter: classify images or texts, continue prompts, find masks, segment scans; it knows which."""
    arguments = context.args
    adapter = _find_adapter(arguments)
    if adapter is None:
        _build_command(None)(arguments or ["--help"], prog_name="inlay predict")
        return
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.adapters.task import task_of_file

    task = task_of_file(read_adapter(fetch(adapter)))
    for option in _named_options(arguments):
        if option not in (*_COMMON, *map(_as_typed, task.options)):
            raise BadInput(_explain_option(option, adapter, task))
    _build_command(task)(arguments, prog_name="inlay predict")


def _find_adapter(arguments: list[str]) -> str | None:
    """The first argument that is no option and no option's value; None where there is none."""
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
    """The options on a command line; behind -- everything is an input."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return [argument.partition("=")[0] for argument in own if argument.startswith("--")]


def _as_typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explain_option(option: str, adapter: str, task: Task) -> str:
    own = ", ".join(map(_as_typed, task.options))
    owners = [other.name for other in TASKS.values() if option in map(_as_typed, other.options)]
    if owners:
        return (
            f"{option} is an option for {' and '.join(owners)}, but adapter {adapter!r} is for {task.name}, which "
            f"takes {own}."
        )
    return f"unknown option {option}; an adapter for {task.name} takes {own}."


def _build_command(task: Task | None) -> Any:
    """The command with the options of one task; without a task with those of all, to read adapter and help from."""

    def run(
        adapter: str,
        inputs: list[str],
        base: str | None,
        device: str | None,
        merge: bool,
        as_json: bool,
        **options: Any,
    ) -> None:
        if task is not None:
            _answer(task, adapter, inputs, base, device, merge, as_json, options)

    what = task.inputs if task else "; or ".join(dict.fromkeys(one.inputs for one in TASKS.values()))
    inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help=f"{what[0].upper()}{what[1:]}.")]
    merges = Annotated[bool, typer.Option("--merge", help="Fold the adapter into its base first.")]
    parameters = [
        _parameter("adapter", AdapterArgument),
        _parameter("inputs", inputs),
        _parameter("base", BaseOption, None),
        _parameter("device", DeviceOption, None),
        _parameter("merge", merges, False),
        _parameter("as_json", JsonOption, False),
    ]
    seen: set[str] = set()
    for owner in [task] if task else TASKS.values():
        for name, option in owner.options.items():
            if name not in seen:  # a name that two tasks share means the same in both
                parameters.append(_parameter(name, _annotation(option, owner.name), option.default))
                seen.add(name)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = f"{DOC} {'This one is for ' + task.name if task else 'It takes the options of its task'}."
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    return typer.main.get_command(app)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _annotation(option: Option, panel: str) -> Any:
    settings = typer.Option(
        help=option.help, metavar=option.metavar, min=option.least, rich_help_panel=f"Options for {panel}"
    )
    return Annotated[option.kind, settings]


def _answer(
    task: Task,
    adapter: str,
    inputs: list[str],
    base: str | None,
    device: str | None,
    merge: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    answer = task.prepare(inputs, options)  # what is wrong with the inputs is found before the model is loaded
    from inlay.adapters.load import load_adapter

    loaded = load_adapter(adapter, base, device=device)
    said = answer(loaded.merge() if merge else loaded)
    print(json.dumps(said.facts, indent=2, ensure_ascii=False) if as_json else "\n".join(said.lines))
