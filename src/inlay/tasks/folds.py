"""Folds: the parts of data without a split of its own that are held out in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from inlay.errors import BadInput

FOLDS = 5  # parts of data without a split, of which one is held out
PROMPT_FOLDS = 10  # the same of prompts, and of running text

Item = TypeVar("Item")


@dataclass(frozen=True)
class Fold:
    """Which part of the data is held out. Parts are disjoint, and all together are the data.

    Attributes:
        share: Of the data, that a part has, between 0 and 1.
        number: Of the part, from 0; None: no folds were asked for, and the first is held out.

    Raises:
        InlayError: A share or a number that is none.
    """

    share: float = 1 / FOLDS
    number: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadInput(f"validation must be a share between 0 and 1, got {self.share}.")
        if self.number is not None and not 0 <= self.number < self.count:
            raise BadInput(f"fold must be from 0 to {self.count - 1}, got {self.number}.")

    @property
    def count(self) -> int:
        """How many parts there are."""
        return round(1 / self.share)

    @property
    def first(self) -> "Fold":
        """The first part, where no folds are asked for."""
        return Fold(self.share)

    def shares(self) -> Iterator[float]:
        """What each part up to this one takes of what those before it have left; the last one takes all."""
        yield self.share
        for taken in range(1, (self.number or 0) + 1):
            yield 1 / (self.count - taken)

    def take(self, ranked: Sequence[Item]) -> Sequence[Item]:
        """This part of examples in the order in which they are held out; never all of them."""
        begin = end = 0
        for share in self.shares():
            begin, left = end, len(ranked) - end
            most = left if share == 1 and begin else left - 1
            end += max(0, min(max(1, round(left * share)), most))
        return ranked[begin:end]

    def check_count(self, count: int, noun: str) -> None:
        """Raise InlayError where folds are asked for, and there are more of them than examples."""
        if self.number is not None and count < self.count:
            raise BadInput(f"there are {count} {noun}s, too few for {self.count} folds; choose fewer folds.")
