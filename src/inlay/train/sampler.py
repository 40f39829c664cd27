"""Which example is seen when, as a pure function of the seed: what makes a resumed run equal to the whole one."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

GROUP = 32  # steps whose examples are sorted by length together: padding of about 1 %, and batches that differ

SeededIndex = tuple[int, int]  # (index of the example, number of the draw since the run began)


class SeededSampler(Sampler[list[SeededIndex]]):
    """Batches from an endless stream of shuffled epochs, each step's a function of (seed, step) alone.

    All batches are full: one may begin in an epoch and end in the next, so no example is dropped or seen twice in an
    epoch. Resuming at a step needs no state and replays nothing.

    With `lengths`, one for each example, the draws of 32 steps are sorted by length, cut into batches, and these are
    shuffled: a batch then needs little padding.
    """

    drop_last = False

    def __init__(
        self,
        examples: int,
        batch_size: int,
        steps: int,
        seed: int,
        done: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.steps, self.seed = examples, batch_size, steps, seed
        self.done, self.lengths = done, lengths
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.steps - self.done

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        group = GROUP if self.lengths is not None else 1
        for first in range(self.done // group * group, self.steps, group):
            batches = self._batches(first, min(first + group, self.steps))
            yield from batches[max(0, self.done - first) :]

    def _batches(self, first: int, end: int) -> list[list[SeededIndex]]:
        """Those of the steps first to end."""
        size = self.batch_size
        draws = [(self._example(draw), draw) for draw in range(first * size, end * size)]
        if self.lengths is not None:
            lengths = self.lengths
            draws.sort(key=lambda draw: lengths[draw[0]])
        batches = [draws[begin : begin + size] for begin in range(0, len(draws), size)]
        if self.lengths is not None:
            order = np.random.default_rng((self.seed, 1, first)).permutation(len(batches))
            batches = [batches[i] for i in order]
        return batches

    def _example(self, draw: int) -> int:
        epoch = draw // self.examples
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        return int(self._order[draw % self.examples])


class SeededDataset(Dataset[Any]):
    """A dataset whose every item is drawn under a seed of its own.

    Augmentation by Python's, numpy's or torch's global generator then gives the same item in any worker, process or
    resumed run.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: SeededIndex) -> Any:
        index, draw = key
        seed_cpu(int(np.random.SeedSequence((self.seed, draw)).generate_state(1)[0]))
        return self.data[index]


def seed_cpu(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch's CPU, 0 <= seed < 2**64."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy generator is the one that augmentations use
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """`seed_cpu`, and the accelerators' generators, which take 20 times as long."""
    seed_cpu(seed)
    torch.manual_seed(seed)
