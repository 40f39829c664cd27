"""Which examples of labelled data are taken where a few have to do."""

import hashlib
import logging
import re
from collections.abc import Sequence

from inlay.errors import BadInput
from inlay.tasks.tables import list_first

logger = logging.getLogger(__name__)


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


def sort_labels(words: Sequence[str]) -> list[str]:
    """Each word once, by name; whole numbers by value."""
    numbers = all(re.fullmatch(r"-?\d{1,18}", word) for word in words)
    return sorted(set(words), key=lambda word: (int(word) if numbers else 0, word))


def hold_out_by_class(ids: Sequence[int], labels: Sequence[str], share: float, seed: int, noun: str) -> list[int]:
    """Rows to hold out, by rank of a hash: no library's random stream has to stay as it is."""
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(ids):
        groups.setdefault(label, []).append(row)
    held: list[int] = []
    for rows in groups.values():
        rows.sort(key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
        held += rows[: min(max(1, round(len(rows) * share)), len(rows) - 1)]
    single = [labels[label] for label, rows in groups.items() if len(rows) == 1]
    if not held:
        raise BadInput(f"there is only one {noun} of each of {list_first(single)}, so none can be held out; add some.")
    if single:
        logger.warning("classes with one %s, which stays in training: %s.", noun, list_first(single))
    return sorted(held)
