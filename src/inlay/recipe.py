"""The command line of a recipe: dataclasses become options, mistakes become one sentence."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inlay.errors import InlayError


def run_recipe(main: Callable[..., Any], *defaults: Any) -> None:
    """Parse the command line into copies of the dataclasses `defaults` and call `main` with them.

    Every field is an option (`--learning_rate` or `--learning-rate`); its default is the instance's value.
    A YAML or JSON file as the only argument gives the options instead. An InlayError ends the process with status 2 and
    one line.
    """
    from transformers import HfArgumentParser

    script = Path(sys.argv[0])
    module = sys.modules["__main__"]
    parser = HfArgumentParser([type(d) for d in defaults], prog=script.name, description=_first_line(module.__doc__))
    parser.set_defaults(**{key: value for default in defaults for key, value in asdict(default).items()})
    try:
        arguments = sys.argv[1:]
        if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
            parse = parser.parse_json_file if arguments[0].endswith(".json") else parser.parse_yaml_file
            if not Path(arguments[0]).is_file():
                raise InlayError(f"there is no settings file {arguments[0]}.")
            main(*parse(arguments[0]))
        else:
            main(*parser.parse_args_into_dataclasses(look_for_args_file=False))
    except InlayError as error:
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]
