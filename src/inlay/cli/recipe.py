"""The command line of a recipe: dataclasses become options, mistakes become one sentence."""

import atexit
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from inlay.errors import InlayError


def run_recipe(main: Callable[..., Path | None], *defaults: Any) -> None:
    """Parse the command line into copies of the dataclasses `defaults` and call `main` with them.

    What `main` returns is the folder of the adapter, or of the adapters, that it saved. With `--push_to` of TrainConfig
    it is sent to the Hub; whether it can be is checked before the training.

    Every field is an option (`--learning_rate` or `--learning-rate`); its default is the instance's value.
    A YAML or JSON file as the only argument gives the options instead. Processes that were launched together know of
    each other before `main` begins. An InlayError ends the process with status 2 and one line.
    """
    try:
        settings = _parse(defaults, sys.argv[1:])
        _join()
        repo, private = _destination(main, settings)
        folder = main(*settings)
        if repo and _join().is_main_process:
            _push(folder, repo, private)
    except InlayError as error:
        if _join().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(defaults: Sequence[Any], arguments: list[str]) -> list[Any]:
    """The dataclasses as a command line sets them.

    Raises:
        InlayError: An unknown option, a value of another kind, a settings file that is none.
    """
    from transformers import HfArgumentParser

    script, module = Path(sys.argv[0]), sys.modules["__main__"]
    parser = HfArgumentParser([type(d) for d in defaults], prog=script.name, description=_first_line(module.__doc__))
    values = {key: value for default in defaults for key, value in asdict(default).items()}
    parser.set_defaults(**values)
    parser.error = _refuse  # argparse would print all options with it
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
        arguments = _from_file(Path(arguments[0]), values)
    *settings, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise InlayError(f"there is no option {unknown[0]}. {_meant(unknown[0], values)}")
    return settings


def _meant(option: str, values: Iterable[str]) -> str:
    near = get_close_matches(option.split("=")[0].lstrip("-").replace("-", "_"), values, 1)
    return f"Did you mean --{near[0]}?" if near else "--help lists all."


def _from_file(file: Path, values: dict[str, Any]) -> list[str]:
    """The command line that a YAML or JSON file of settings stands for, so that its values are checked alike."""
    import yaml  # type: ignore[import-untyped]

    if not file.is_file():
        raise InlayError(f"there is no settings file {file}.")
    try:
        text = file.read_text(encoding="utf-8")
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        raise InlayError(f"expected {file.suffix[1:].upper()} in {file}, but got: {got}. Mend it.") from error
    if not isinstance(settings, dict):
        raise InlayError(f"expected names with values in {file}, but got {type(settings).__name__}. Write name: value.")
    unknown = [str(key) for key in settings if key not in values]
    if unknown:
        raise InlayError(f"{file} sets {unknown[0]}, but there is no such option. {_meant(unknown[0], values)}")
    found: list[str] = []
    for key, value in settings.items():
        if value == values[key] and type(value) is type(values[key]):
            continue
        if value is None or isinstance(value, dict) or value == []:
            raise InlayError(f"expected a value for {key} in {file}, but got {value!r}. Give one, or leave it out.")
        found += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return found


def _destination(main: Callable[..., Any], settings: Sequence[Any]) -> tuple[str | None, bool]:
    """Where to push what `main` will have saved.

    Raises:
        InlayError: Now, rather than after hours: it saves none, or the Hub will not take it.
    """
    asked = {key: value for each in settings for key, value in vars(each).items() if key in ("push_to", "private")}
    repo = asked.get("push_to")
    if repo is not None:  # an empty name is a bad one: of a variable that was not set
        if get_type_hints(main).get("return") is not Path:
            raise InlayError("this recipe saves no adapter of its own, so there is nothing for --push_to to send.")
        if _join().is_main_process:
            from inlay.adapters.hub.repository import check_push

            check_push(repo)
    return repo, asked.get("private", False)


def _push(folder: Any, repo: str, private: bool) -> None:
    from inlay.adapters.hub.repository import push_adapter

    try:
        print(push_adapter(folder, repo, private=private))
    except InlayError as error:
        again = f"inlay push {folder} {repo}{' --private' if private else ''}"
        raise InlayError(f"{error} The adapter is saved in {folder}; send it with: {again}") from None


def _refuse(message: str) -> NoReturn:
    raise InlayError(f"{message}.")


def _join() -> Any:
    """This process among those that were launched with it, on the CPU where ACCELERATE_USE_CPU asks for it.

    That variable is read by accelerate's Accelerator alone; a PartialState made before it by anyone (to print, to seed)
    would take no notice, and be what the Accelerator then finds.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    atexit.register(state.destroy_process_group)
    return state


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]
