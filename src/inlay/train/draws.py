"""Which example is seen when, as a pure function of the seed: what makes a resumed run equal to the whole one."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

Draw = tuple[int, int]  # (index of the example, number of the draw since the run began)


class Draws(Sampler[list[Draw]]):
    """Batches from an endless stream of shuffled epochs, each step's a function of (seed, step) alone.

    All batches are full: one may begin in an epoch and end in the next, so no example is dropped or seen twice in an
    epoch. Resuming at a step needs no state and replays nothing.
    """

    drop_last = False

    def __init__(self, examples: int, batch_size: int, steps: int, seed: int, done: int = 0) -> None:
        self.examples, self.batch_size, self.steps, self.seed, self.done = (
            examples,
            batch_size,
            steps,
            seed,
            done,
        )

    def __len__(self) -> int:
        return self.steps - self.done

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.done, self.steps):
            batch = []
            for draw in range(step * self.batch_size, (step + 1) * self.batch_size):
                if draw // self.examples != epoch:
                    epoch = draw // self.examples
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
                batch.append((int(order[draw % self.examples]), draw))
            yield batch


class Drawn(Dataset[Any]):
    """A dataset whose every item is drawn under a seed of its own.

    Augmentation by Python's, numpy's or torch's global generator then gives the same item in any worker, process or
    resumed run.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Draw) -> Any:
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
