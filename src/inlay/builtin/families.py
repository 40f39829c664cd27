"""Descriptions of restaurants, and whether each says that families are welcome: a generated task of reading.

`restaurants` writes the texts. Whether children are welcome is said in a dozen ways, some of them negative, among
phrases on price, rating, food and place, and a third of the texts does not say it.
"""

import random
import re

from inlay.builtin.restaurants import generate_restaurants

FAMILY_LABELS = ("welcome", "not welcome", "not said")


def families(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Texts with their labels, each label equally often but for a rest; the same for the same seed on every Python.

    Args:
        count: Number of texts, at most 9,000.
        seed: Chooses the texts and their order.
    """
    share = -(-count // len(FAMILY_LABELS))
    found: dict[str, list[str]] = {label: [] for label in FAMILY_LABELS}
    for described in generate_restaurants(max(60, 9 * share), seed=seed, references=1):
        told = re.search(r"familyFriendly\[(yes|no)\]", described.meaning)
        label = {"yes": "welcome", "no": "not welcome"}[told[1]] if told else "not said"
        if len(found[label]) < share:
            found[label].append(described.references[0])
    draw = random.Random(seed).random
    pairs = [(text, label) for label, texts in found.items() for text in texts]
    return sorted(pairs, key=lambda _: draw())[:count]


def split_families(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """420 texts for training and 300 for validation; no two say the same of a place.

    So few that methods differ: with 1,500 every one of them learns all ways to say it.
    """
    every = families(720, seed=seed)
    return {"train": every[:420], "validation": every[420:]}
