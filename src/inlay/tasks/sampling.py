"""Which examples of labelled data are taken where a few have to do."""

from collections.abc import Sequence


def by_turns(labels: Sequence[int], seed: int) -> list[int]:
    """All rows in a random order in which the classes take turns."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(labels))
    turn: dict[int, int] = {}
    keyed = []
    for i in order.tolist():
        turn[labels[i]] = turn.get(labels[i], 0) + 1
        keyed.append((turn[labels[i]], i))
    return [i for _, i in sorted(keyed, key=lambda pair: pair[0])]
