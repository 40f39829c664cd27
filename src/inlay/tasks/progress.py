"""The bar of work that takes longer than a moment."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def show_progress(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """The items, with a bar on standard error that comes after a second and goes with the last of them.

    There is none where standard error is no terminal.

    Args:
        items: What is worked through.
        total: Their number.
        what: The work, such as "score".
        unit: What an item is, such as "image".
    """
    from tqdm.auto import tqdm

    yield from tqdm(items, total=total, desc=what, unit=unit, delay=1, disable=None, leave=False)
