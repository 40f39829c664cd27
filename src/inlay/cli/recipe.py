"""Run a recipe: dataclasses become options, and a user's mistake is printed as one sentence."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from inlay.cli.command_line import parse
from inlay.errors import InlayError, Unreachable, Unsupported
from inlay.files.outputs import check_output_folder

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # the variables that accelerate reads

# A launcher ends all processes when one of them fails. Every process but the first therefore waits before it prints an
# error, so that an error that all processes have is printed once.
_WAIT_FOR_FIRST_S = 2.0


def run_recipe(main: Callable[..., Path | None], *defaults: Any) -> None:
    """Parse the command line into copies of the dataclasses `defaults`, and call `main` with them.

    `main` returns the folder of the adapter or adapters that it saved. With `--push_to` of TrainConfig this folder is
    pushed to the Hub; whether the Hub accepts it is checked before the training.

    Every field is an option (`--learning_rate` or `--learning-rate`) whose default is the value of the instance. A YAML
    or JSON file may be given as the only argument instead. torch is imported after the options have been checked, so
    that a mistake is reported at once. Processes that were launched together are connected before `main` begins.

    An InlayError ends the process with status 2 and one line. `accelerate launch` adds its own traceback (a
    CalledProcessError) to any failure; with one process, `accelerate launch --quiet` leaves it out.
    """
    try:
        settings = parse(defaults, sys.argv[1:])
        _check_output(settings)
        _join_processes()
        repo, private = _check_destination(main, settings)
        folder = main(*settings)
        if repo and _join_processes().is_main_process:
            _push_saved(folder, repo, private)
    except InlayError as error:
        if not _is_first_process():
            time.sleep(_WAIT_FOR_FIRST_S)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _check_output(settings: Sequence[Any]) -> None:
    """Raise InlayError, before torch is imported, where the folder of the run cannot be written."""
    for each in settings:
        folder = getattr(each, "output_dir", None)
        if folder is not None and _is_first_process():
            check_output_folder(folder)


def _check_destination(main: Callable[..., Any], settings: Sequence[Any]) -> tuple[str | None, bool]:
    """Check, before the training, where the saved adapter is to be pushed.

    Returns:
        The repository or None, and whether it is to be private.

    Raises:
        InlayError: The recipe saves no adapter, or the Hub will not accept it.
    """
    asked = {key: value for each in settings for key, value in vars(each).items() if key in ("push_to", "private")}
    repo = asked.get("push_to")
    if repo is not None:  # an empty name, from a shell variable that is not set, is checked and refused too
        if get_type_hints(main).get("return") is not Path:
            raise Unsupported("this recipe saves no adapter, so there is nothing to push; leave --push_to out.")
        if _join_processes().is_main_process:
            from inlay.adapters.hub.repository import check_push

            check_push(repo)
    return repo, asked.get("private", False)


def _push_saved(folder: Any, repo: str, private: bool) -> None:
    from inlay.adapters.hub.repository import push_adapter

    try:
        print(push_adapter(folder, repo, private=private))
    except InlayError as error:
        again = f"inlay push {folder} {repo}{' --private' if private else ''}"
        raise Unreachable(f"{error} The adapter is saved in {folder}; push it with: {again}") from None


def _is_first_process() -> bool:
    """Whether this is the first of the processes that were launched together. Needs no torch."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0) == 0


def _join_processes() -> Any:
    """Connect the processes that were launched together, on the CPU if ACCELERATE_USE_CPU says so.

    Only accelerate's Accelerator reads this variable. A PartialState that is made earlier, to print or to seed, would
    ignore it, and the Accelerator would then use that state.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    atexit.register(state.destroy_process_group)
    return state
