"""The order of the examples is a function of the seed and the step, and so is what is drawn for each."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from inlay.train.sampler import SeededDataset, SeededSampler


@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (7, 7), (3, 8), (12, 5)])
def test_every_epoch_is_a_permutation_in_full_batches(examples, batch):
    batches = list(SeededSampler(examples, batch, steps=2 * examples, seed=3))
    assert [len(b) for b in batches] == [batch] * (2 * examples)
    flat = [draw for b in batches for draw in b]
    assert [number for _, number in flat] == list(range(len(flat)))
    orders = [[i for i, _ in flat[e : e + examples]] for e in range(0, len(flat), examples)]
    assert all(sorted(order) == list(range(examples)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_resuming_at_a_step_gives_the_tail_of_the_whole():
    whole = list(SeededSampler(10, 4, steps=30, seed=3))
    for done in (0, 1, 13, 29, 30):
        rest = SeededSampler(10, 4, steps=30, seed=3, done=done)
        assert list(rest) == whole[done:]
        assert list(rest) == whole[done:], "a second pass over the same object differs"
        assert len(rest) == 30 - done
    assert list(SeededSampler(10, 4, steps=30, seed=4)) != whole


class Noisy(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(())])  # noqa: NPY002


class Read(Noisy):
    """Reads the rows of a batch together."""

    def read_rows(self, indices):
        return list(indices)

    def prepare(self, row):
        return self[row]


def test_an_item_is_the_same_whoever_draws_it():
    def rows(workers, done=0):
        loader = DataLoader(
            SeededDataset(Noisy(), 5), batch_sampler=SeededSampler(10, 4, 12, seed=3, done=done), num_workers=workers
        )
        return list(loader)

    alone = rows(0)
    for other in (rows(1), rows(2)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[7:], rows(2, done=7), strict=True))
    together = [SeededDataset(Read(), 5).__getitems__(keys) for keys in SeededSampler(10, 4, 12, seed=3)]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(alone, together, strict=True))
    noise = torch.cat(alone)[:, 1:]
    assert len(noise.unique(dim=0)) == len(noise), "two draws share their noise"
