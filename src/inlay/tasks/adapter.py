"""What a task asks of an adapter on its base: `LoadedAdapter` of inlay.adapters has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from inlay.errors import BadInput
from inlay.tasks.task import Task


class Adapter(Protocol):
    """A model with an adapter in it, in eval mode, and what it was trained with."""

    model: Any
    task: Task
    processor: Any
    labels: list[str]

    @property
    def name(self) -> str:
        """The folder's, for messages."""

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """Class names of one group of a combination, and which logits stand for them; None: all classes."""


@dataclass
class TaskModel:
    """A model in the place of an adapter.

    Attributes:
        name: For messages.
        model: In eval mode.
        task: A row of TASKS.
        processor: Makes its inputs.
        labels: Class names in the order of the outputs; none for what has no classes.
    """

    name: str
    model: Any
    task: Task
    processor: Any
    labels: list[str]

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """As in `Adapter`; there are no groups."""
        return route_group(self.name, self.labels, {}, group)


def route_group(
    name: str, labels: list[str], groups: Mapping[str, Mapping[str, int]], group: str | None
) -> tuple[list[str], list[int]]:
    """Class names of one group of labels, and which logits stand for them; None: all classes.

    Args:
        name: What has the labels, for the message.
        labels: All, in the order of the logits.
        groups: Of a combination of classifiers, by the adapter that they are from.
        group: Which one.

    Raises:
        InlayError: There is no such group.
    """
    if group is None:
        return labels, list(range(len(labels)))
    if group not in groups:
        has = f"the groups {', '.join(groups)}" if groups else "no groups; leave group out"
        raise BadInput(f"{name} has no group of labels {group!r}, it has {has}.")
    return list(groups[group]), list(groups[group].values())


def check_task(adapter: Adapter, name: str) -> None:
    """Raise InlayError for an adapter of another task, with the function that takes it."""
    if adapter.task.name != name:
        raise BadInput(
            f"adapter {adapter.name!r} is for {adapter.task.name}, not for {name}; use {adapter.task.function}."
        )


def place_inputs(inputs: dict[str, Any], weight: torch.Tensor) -> dict[str, Any]:
    """Inputs on the device of a weight; floats get its type."""
    return {
        key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in inputs.items()
    }
