"""What a task asks of an adapter on its base: `LoadedAdapter` of inlay.adapters has it."""

from typing import Any, Protocol


class Adapter(Protocol):
    """A model with an adapter in it, in eval mode, and what it was trained with."""

    model: Any
    processor: Any
    labels: list[str]

    @property
    def name(self) -> str:
        """The folder's, for messages."""

    def route(self, task: str | None) -> tuple[list[str], list[int]]:
        """Class names of one task of a combination, and which logits stand for them; None: all classes."""
