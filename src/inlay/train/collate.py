"""Batches that are made in two steps: workers send what is small, and the rest is done on the device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

Batch = dict[str, Any]


class TwoStepCollate(ABC):
    """A collate function of which `fit` has the second step done where a batch is used.

    It reads the data that `shrink_items` gives. Its workers call `stack`, and it calls `finish` once a batch, or a
    piece of one, is on the device. Who calls the object itself, as any other collate function, gets finished batches.
    """

    def shrink_items(self, data: Any) -> Any:
        """The same data with the small items that `finish` completes; other data as it is."""
        return data

    @abstractmethod
    def stack(self, items: list[Any]) -> Batch:
        """A batch of items, as small as it can be."""

    @abstractmethod
    def finish(self, batch: Batch) -> Batch:
        """The batch as a model takes it; each row depends on the same row of `batch` only."""

    def __call__(self, items: list[Any]) -> Batch:
        """Both steps."""
        return self.finish(self.stack(items))


def split_collate(collate: Callable[[list[Any]], Batch] | None) -> tuple[Any, Callable[[Batch], Batch]]:
    """What workers call with a list of items (None: torch's default), and what finishes a batch."""
    return (collate.stack, collate.finish) if isinstance(collate, TwoStepCollate) else (collate, _return_unchanged)


class FinishedBatches:
    """The batches of a loader, finished.

    Args:
        loader: Of unfinished batches on the device, prepared by accelerate.
        finish: Of `split_collate`.
    """

    def __init__(self, loader: Any, finish: Callable[[Batch], Batch]) -> None:
        self.loader, self.finish = loader, finish

    def __iter__(self) -> Iterator[Batch]:
        return map(self.finish, self.loader)

    def end_workers(self) -> None:
        """End the workers that the loader keeps for the next pass, also where an error still refers to the loader.

        A process that multiprocessing has started sends each worker one SIGTERM at its exit and waits for it without
        limit, but workers ignore the first one (`_leave_signals_to_main`).
        """
        self.loader.base_dataloader._iterator = None


def _return_unchanged(batch: Batch) -> Batch:
    return batch
