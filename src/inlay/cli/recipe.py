"""Run a recipe: dataclasses become options, mistakes become one sentence."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from inlay.cli.command_line import parse
from inlay.errors import InlayError, Unreachable, Unsupported

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # where accelerate looks for it

# A launcher ends all processes when one of them has failed. Those that are not the first wait for so long, so that the
# first one has said what they would say too; what only one of them has met is said by it.
_PATIENCE_S = 2.0


def run_recipe(main: Callable[..., Path | None], *defaults: Any) -> None:
    """Parse the command line into copies of the dataclasses `defaults` and call `main` with them.

    What `main` returns is the folder of the adapter, or of the adapters, that it saved. With `--push_to` of TrainConfig
    it is sent to the Hub; whether it can be is checked before the training.

    Every field is an option (`--learning_rate` or `--learning-rate`); its default is the instance's value. A YAML or
    JSON file as the only argument gives the options instead. torch is imported once they have been read and checked, so
    a mistake in them is answered at once. Processes that were launched together know of each other before `main`
    begins.

    An InlayError ends the process with status 2 and one line. `accelerate launch` adds a traceback of its own (a
    CalledProcessError) to any failure of what it started; with one process, `accelerate launch --quiet` leaves it out.
    """
    try:
        settings = parse(defaults, sys.argv[1:])
        _join()
        repo, private = _destination(main, settings)
        folder = main(*settings)
        if repo and _join().is_main_process:
            _push(folder, repo, private)
    except InlayError as error:
        if not _is_first():
            time.sleep(_PATIENCE_S)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _destination(main: Callable[..., Any], settings: Sequence[Any]) -> tuple[str | None, bool]:
    """Where to push what `main` will have saved.

    Raises:
        InlayError: Now, rather than after hours: it saves none, or the Hub will not take it.
    """
    asked = {key: value for each in settings for key, value in vars(each).items() if key in ("push_to", "private")}
    repo = asked.get("push_to")
    if repo is not None:  # an empty name is a bad one: of a variable that was not set
        if get_type_hints(main).get("return") is not Path:
            raise Unsupported("this recipe saves no adapter of its own, so there is nothing for --push_to to send.")
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
        raise Unreachable(f"{error} The adapter is saved in {folder}; send it with: {again}") from None


def _is_first() -> bool:
    """Whether this is the process that speaks for all that were launched with it; needs no torch."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0) == 0


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
