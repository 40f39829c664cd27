"""What the verbs `predict` and `evaluate` take: an adapter or a model, which may be an exported one."""

from typing import Any

from inlay.errors import BadInput
from inlay.tasks.task import Task


def is_adapter(name: str) -> bool:
    """False for an exported model, an embedded base and the folder of a model; a Hub id is taken for an adapter's."""
    from inlay.compress.exported import is_exported

    return not (is_exported(name) or _is_model(name))


def find_task(name: str) -> Task:
    """What an adapter or a model is for."""
    from inlay.compress.exported import is_exported, read_exported

    if is_exported(name):
        return read_exported(name).task
    if _is_model(name):
        from inlay.tasks.base import read_task

        return read_task(name)
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.adapters.task import find_task_of_file

    return find_task_of_file(read_adapter(fetch(name)))


def load_adapter_or_model(name: str, base: str | None, device: str | None, *, merge: bool = False) -> Any:
    """An adapter on its base, or a model.

    Raises:
        InlayError: What `load_adapter`, `load_source` or `load_exported` says; an option that a model has no use for.
    """
    if is_adapter(name):
        from inlay.adapters.load import load_adapter

        return load_adapter(name, base, device=device)
    asked = {"--base": base is not None, "--merge": merge}
    if named := [option for option, given in asked.items() if given]:
        raise BadInput(f"{name} is a model: it needs no base and has no adapter to merge; leave {named[0]} out.")
    if _is_model(name):
        from inlay.bases.device import choose_device
        from inlay.compress.source import load_source

        source = load_source(name)
        source.model.to(choose_device(device))
        return source
    if device not in (None, "cpu"):
        raise BadInput(f"{name} is an exported model, which computes on the CPU; leave --device out.")
    from inlay.compress.load import load_exported

    return load_exported(name)


def _is_model(name: str) -> bool:
    from inlay.adapters.file import CONFIG, expand_path
    from inlay.compress.exported import is_exported

    folder = expand_path(name)
    whole = (folder / "config.json").is_file() and not (folder / CONFIG).is_file() and not is_exported(name)
    return name.startswith("builtin:") or whole
