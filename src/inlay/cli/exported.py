"""An adapter, or an exported model in its place, as the verbs `predict` and `evaluate` take both."""

from typing import Any

from inlay.errors import BadInput
from inlay.tasks.task import Task


def find_task(name: str) -> Task:
    """What an adapter or an exported model is for."""
    from inlay.compress.exported import is_exported, read_exported

    if is_exported(name):
        return read_exported(name).task
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.adapters.task import find_task_of_file

    return find_task_of_file(read_adapter(fetch(name)))


def load_any(name: str, base: str | None, device: str | None, *, merge: bool = False) -> Any:
    """An adapter on its base, or an exported model.

    Raises:
        InlayError: What `load_adapter` or `load_exported` says; an option that an exported model has no use for.
    """
    from inlay.compress.exported import is_exported

    if not is_exported(name):
        from inlay.adapters.load import load_adapter

        return load_adapter(name, base, device=device)
    asked = {"--base": base is not None, "--merge": merge, "--device": device not in (None, "cpu")}
    if named := [option for option, given in asked.items() if given]:
        raise BadInput(
            f"{name} is an exported model: it needs no base, has no adapter to merge, and computes on the CPU; leave "
            f"{named[0]} out."
        )
    from inlay.compress.load import load_exported

    return load_exported(name)
