"""What an adapter is for: one rule for loading, predicting, evaluating, serving and merging."""

from typing import Any

from inlay.adapters.file import AdapterFile
from inlay.bases.load import read_config, resolve_base
from inlay.errors import BadInput
from inlay.tasks import find_task, task_of_base
from inlay.tasks.task import Task


def find_task_of_file(file: AdapterFile, config: Any = None) -> Task:
    """The task in an adapter's record; of one that plain peft has saved, what its base is for.

    Args:
        file: What was read.
        config: Of the base that it goes on; default: that of the base which it names, read from disk or the Hub.

    Raises:
        InlayError: It says neither its task nor its base, or the base is for none of TASKS.
    """
    if file.record.get("task"):
        return find_task(file.record["task"])
    name = file.base_name
    if config is None:
        if not name:
            raise BadInput(f"adapter {file.name!r} names no base; give base=.")
        config = read_config(name, resolve_base(name), None)
    return task_of_base(name or file.name, config, file.config.get("task_type"))
