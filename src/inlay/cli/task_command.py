"""A verb whose options are its own and those of the adapter's task, so that it parses its command line itself."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from inlay.errors import BadInput
from inlay.tasks import TASKS
from inlay.tasks.task import Option, Task


class TaskCommand:
    """A verb for adapters of all tasks.

    Args:
        verb: Its name.
        run: Does the work: gets the task, the values of the task's options by name, and those of the own parameters.
        parameters_of: The own parameters, with typer's annotations, for a task, or for the help without an adapter.
        options_of: Those of a task.
        doc: What the verb does.
    """

    def __init__(
        self,
        verb: str,
        run: Callable[..., None],
        parameters_of: Callable[[Task | None], list[inspect.Parameter]],
        options_of: Callable[[Task], Mapping[str, Option]],
        doc: str,
    ) -> None:
        self.verb, self.run, self.parameters_of, self.options_of, self.doc = (
            verb, run, parameters_of, options_of, doc,
        )  # fmt: skip

    def __call__(self, arguments: list[str]) -> None:
        """Parse a command line, and run it.

        Raises:
            InlayError: An option of another task, or of none; what `find_task` and the work say.
        """
        adapter = self.find_adapter(arguments)
        if adapter is None:
            self.build(None)(arguments or ["--help"], prog_name=f"inlay {self.verb}")
            return
        from inlay.cli.models import find_task

        task = find_task(adapter)
        command = self.build(task)
        known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
        for option in _named_options(arguments):
            if option not in known:
                raise BadInput(self._explain_option(option, adapter, task, known))
        command(arguments, prog_name=f"inlay {self.verb}")

    def find_adapter(self, arguments: Sequence[str]) -> str | None:
        """The first argument that is neither an option nor the value of an option; None if there is none."""
        options = [parameter for parameter in self.build(None).params if parameter.param_type_name == "option"]
        flags = {"--help", *(flag for option in options if option.is_flag for flag in option.opts)}
        is_value = False
        for argument in arguments:
            if argument.startswith("-"):
                is_value = argument not in flags and "=" not in argument
            elif is_value:
                is_value = False
            else:
                return argument
        return None

    def build(self, task: Task | None) -> Any:
        """The command with the options of one task, or of all tasks to show its help without an adapter."""
        own = self.parameters_of(task)
        names = {parameter.name for parameter in own}

        def run(**values: Any) -> None:
            if task is not None:
                options = {name: value for name, value in values.items() if name not in names}
                self.run(task, options, **{name: values[name] for name in names})

        parameters = list(own)
        seen: set[str] = set()
        for owner in [task] if task else TASKS.values():
            for name, option in self.options_of(owner).items():
                if name not in seen:  # a name that two tasks share has the same meaning in both
                    parameters.append(make_parameter(name, _annotate_option(option, owner.name), option.default))
                    seen.add(name)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = f"{self.doc} {'This adapter is for ' + task.name if task else 'Its task decides the options'}."
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(run)
        return typer.main.get_command(app)

    def _explain_option(self, option: str, adapter: str, task: Task, known: set[str]) -> str:
        own = ", ".join(map(_flag_of, self.options_of(task)))
        takes = f"takes {own}" if own else f"has none of its own for {self.verb}"
        owners = [other.name for other in TASKS.values() if option in map(_flag_of, self.options_of(other))]
        if owners:
            return (
                f"{option} is an option for {' and '.join(owners)}, but adapter {adapter!r} is for {task.name}, which "
                f"{takes}."
            )
        if similar := get_close_matches(option, sorted(known), 1):
            return f"unknown option {option}; did you mean {similar[0]}?"
        return f"unknown option {option}; an adapter for {task.name} {takes}."


def make_parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter of a command, with typer's annotation."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _named_options(arguments: list[str]) -> list[str]:
    """The options on a command line. Everything after `--` is an input."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return [argument.partition("=")[0] for argument in options if argument.startswith("--")]


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _annotate_option(option: Option, panel: str) -> Any:
    settings = typer.Option(
        help=option.help, metavar=option.metavar, min=option.least, rich_help_panel=f"Options for {panel}"
    )
    return Annotated[option.kind, settings]
