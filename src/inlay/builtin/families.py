"""Descriptions of restaurants, and whether each says that families are welcome: a generated task of reading.

`restaurants` writes the texts. Whether children are welcome is said in a dozen ways, some of them negative, among
phrases on price, rating, food and place, and a third of the texts does not say it. Some of these ways occur in the
validation texts only, so that reading is what is tested, and not a list of phrases.
"""

import random
import re

from inlay.builtin.restaurants import generate_restaurants

FAMILY_LABELS = ("welcome", "not welcome", "not said")
HELD_OUT_PHRASES = ("suitable for children", "child-friendly")  # the first with and without "not"


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
    """900 texts for training and 300 for validation; no two say the same of a place.

    One in seven of those for validation says it in a way that training does not have.
    """
    every = families(1800, seed=seed)
    seen = [row for row in every[300:] if not any(phrase in row[0].lower() for phrase in HELD_OUT_PHRASES)]
    return {"train": seen[:900], "validation": every[:300]}
