"""What a task does in the course of a run besides the steps."""

from pathlib import Path
from typing import Protocol


class Callback(Protocol):
    """Called on the main process, while the others wait; nothing that it draws at random changes the run."""

    def begin(self, folder: Path) -> None:
        """The run in this folder is about to take its first step, or to go on: what the data needs can be made now."""

    def evaluated(self, step: int) -> None:
        """The model, in eval mode, has taken `step` steps and been evaluated."""
