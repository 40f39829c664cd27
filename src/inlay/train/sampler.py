"""The order of the training examples: a pure function of the seed, so a resumed run equals an uninterrupted one."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

GROUP = 32  # steps whose examples are sorted by length together: about 1 % padding, and batches still vary

SeededIndex = tuple[int, int]  # (index of the example, number of the draw since the run began)


class SeededSampler(Sampler[list[SeededIndex]]):
    """Batches from an endless stream of shuffled epochs. The batch of a step depends on (seed, step) only.

    All batches are full. A batch may begin in one epoch and end in the next, so that no example is dropped, or seen
    twice in an epoch. A run resumes at any step without stored state and without replaying earlier steps.

    With `lengths`, one per example, the examples of 32 steps are sorted by length and cut into batches, which are then
    shuffled. A batch of similar lengths needs little padding.
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

    def start_at(self, step: int) -> "SeededSampler":
        """The same batches from this step on."""
        return SeededSampler(self.examples, self.batch_size, self.steps, self.seed, step, self.lengths)

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        group = GROUP if self.lengths is not None else 1
        for first in range(self.done // group * group, self.steps, group):
            batches = self._draw_batches(first, min(first + group, self.steps))
            yield from batches[max(0, self.done - first) :]

    def _draw_batches(self, first: int, end: int) -> list[list[SeededIndex]]:
        """The batches of the steps from `first` up to, not including, `end`."""
        size = self.batch_size
        draws = [(self._find_example(draw), draw) for draw in range(first * size, end * size)]
        if self.lengths is not None:
            lengths = self.lengths
            draws.sort(key=lambda draw: lengths[draw[0]])
        batches = [draws[begin : begin + size] for begin in range(0, len(draws), size)]
        if self.lengths is not None:
            order = np.random.default_rng((self.seed, 1, first)).permutation(len(batches))
            batches = [batches[i] for i in order]
        return batches

    def _find_example(self, draw: int) -> int:
        epoch = draw // self.examples
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        return int(self._order[draw % self.examples])


class SeededDataset(Dataset[Any]):
    """A dataset that sets a separate random seed before it reads an item.

    Augmentation that uses the global generator of Python, numpy or torch then gives the same item in every worker,
    process and resumed run. Where the data has `read_rows(indices)` and `prepare(row)`, the rows of a batch are read
    together, and `prepare` makes the items.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: SeededIndex) -> Any:
        index, draw = key
        seed_draw(self.seed, draw)
        return self.data[index]

    def __getitems__(self, keys: Sequence[SeededIndex]) -> list[Any]:
        if not hasattr(self.data, "read_rows"):
            return [self[key] for key in keys]
        rows = self.data.read_rows([index for index, _ in keys])
        seeds = [_mix_seed(self.seed, draw) for _, draw in keys]
        items = []
        for row, seed in zip(rows, seeds, strict=True):
            seed_cpu(seed)
            items.append(self.data.prepare(row))
        return items


def seed_draw(seed: int, draw: int) -> None:
    """Seed the global generators of the CPU for the item with this number since the run began."""
    seed_cpu(_mix_seed(seed, draw))


def _mix_seed(seed: int, draw: int) -> int:
    """A seed of its own for each draw of a run."""
    entropy: Any = (seed, draw)
    if max(entropy) < 2**32:
        entropy = np.array(entropy, np.uint32)  # the same words, in half the time
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_cpu(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch on the CPU; 0 <= seed < 2**64."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy generator is the one that augmentations use
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the global generators of the CPU and of the accelerators. This takes 20 times as long as `seed_cpu`."""
    seed_cpu(seed)
    torch.manual_seed(seed)
