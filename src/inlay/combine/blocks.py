"""Matrices in blocks of rows, and the largest entries of one: nothing of the size of the matrix has to be in memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.combine.parts import Array

BLOCK = 1 << 18  # entries of a block, which stay in the processor's cache
HELD = 1 << 22  # entries of a matrix that is held in memory (16 MB); a larger one is made again for each pass over it
_BITS = 16  # of 32 that a count of sizes goes by at once


class Blocks:
    """A matrix, block of rows by block of rows, as often as it is asked for."""

    def __init__(self, make: Callable[[], Iterator[Array]], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._make = make
        self._held = list(make()) if shape[0] * shape[1] <= HELD else None

    def __iter__(self) -> Iterator[Array]:
        return self._make() if self._held is None else iter(self._held)


def split_rows(dense: Array) -> Blocks:
    """A matrix that is in memory."""
    return Blocks(lambda: (dense[rows] for rows in _list_rows(*dense.shape)), dense.shape)


def multiply_factors(up: Array, down: Array) -> Blocks:
    """B A of B (n, r) and A (r, m)."""
    shape = (len(up), down.shape[1])
    return Blocks(lambda: (up[rows] @ down for rows in _list_rows(*shape)), shape)


def _list_rows(count: int, width: int) -> list[slice]:
    step = max(1, BLOCK // max(width, 1))
    return [slice(at, at + step) for at in range(0, count, step)]


@dataclass(frozen=True)
class Cut:
    """Which entries are the largest ones.

    Attributes:
        size: The bits of the smallest absolute value among them.
        equal: How many entries of just that size are among them: the first ones.
    """

    size: int
    equal: int


def find_cut(blocks: Iterable[Array], count: int) -> Cut:
    """The `count` largest entries of float32, at least one, by absolute value; NaN counts as larger than all numbers.

    Bits of absolute values have their order, so that counts of the upper and of the lower half of the bits find the
    smallest of these entries, in two passes.
    """
    upper, lower = np.zeros(1 << _BITS, np.int64), np.zeros(1 << _BITS, np.int64)
    for block in blocks:
        upper += np.bincount(_sizes(block) >> _BITS, minlength=1 << _BITS)
    high, count = _find_place(upper, count)
    for block in blocks:
        sizes = _sizes(block)
        lower += np.bincount(sizes[sizes >> _BITS == high] & ((1 << _BITS) - 1), minlength=1 << _BITS)
    low, count = _find_place(lower, count)
    return Cut(high << _BITS | low, count)


def _sizes(block: Array) -> npt.NDArray[np.int32]:
    """The bits of the absolute values."""
    bits: npt.NDArray[np.int32] = np.ascontiguousarray(block).reshape(-1).view(np.int32) & 0x7FFFFFFF
    return bits


def _find_place(counts: npt.NDArray[np.int64], count: int) -> tuple[int, int]:
    """Where the entry stands of which `count` are at least as large, and its place among those that stand there."""
    larger = np.cumsum(counts[::-1])
    at = int(np.searchsorted(larger, count))
    return len(counts) - 1 - at, count - (int(larger[at - 1]) if at else 0)


def keep_largest(blocks: Iterable[Array], cut: Cut) -> Iterator[Array]:
    """The blocks with zeros in place of the entries that are not among the largest."""
    left = cut.equal
    for block in blocks:
        sizes = _sizes(block)
        kept = sizes > cut.size
        if left:
            equal = np.flatnonzero(sizes == cut.size)[:left]
            kept[equal] = True
            left -= len(equal)
        yield np.where(kept.reshape(block.shape), block, np.float32(0))
