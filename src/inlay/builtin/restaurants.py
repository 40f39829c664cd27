"""Meanings and sentences that say them: a generated task of the shape of E2E NLG (Novikova et al., arXiv:1706.09254).

    name[The Silver Oak], eatType[pub], food[Thai], area[riverside]
    The Silver Oak is a Thai pub by the river.

Every reference says the whole meaning and nothing else. `inlay.builtin.topics` has the words; here they become
sentences: an opener takes some slots, one or two more sentences take the rest.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from itertools import islice
from math import prod
from typing import TypeVar

from inlay.builtin.topics import NEGATIVE, TOPICS, Topic
from inlay.errors import BadInput

T = TypeVar("T")


@dataclass(frozen=True)
class Described:
    """A meaning, `slot[value], slot[value]`, and different texts that each say all of it."""

    meaning: str
    references: list[str]


def generate_restaurants(count: int, *, seed: int, references: int = 5) -> list[Described]:
    """Descriptions of restaurants: `generate_descriptions` of that topic."""
    return generate_descriptions("restaurants", count, seed=seed, references=references)


def split_restaurants(seed: int = 0) -> dict[str, list[Described]]:
    """1,200 restaurants for training, 150 for validation and 150 for test.

    No two have the same values apart from the name, so what is held out is a new combination, not just a new name.
    """
    every = generate_restaurants(1500, seed=seed)
    return {"train": every[:1200], "validation": every[1200:1350], "test": every[1350:]}


def generate_descriptions(topic: str, count: int, *, seed: int, references: int = 5) -> list[Described]:
    """Distinct meanings of 3 to 8 slots with their references, the same for the same seed on every Python.

    The first meanings do not depend on `count`. Two of them differ in more than the name.

    Args:
        topic: One of `TOPICS`: restaurants, hotels, films, gadgets, parks.
        count: Number of meanings; each topic has more than 10,000.
        seed: Chooses meanings and texts.
        references: Texts per meaning, 1 to 8, all different.

    Raises:
        InlayError: An unknown topic, or a number out of range.
    """
    if topic not in TOPICS or count < 0 or not 1 <= references <= 8:
        raise BadInput(
            f"topic must be one of {', '.join(TOPICS)}, count at least 0 and references 1 to 8, got {topic!r}, {count} "
            f"and {references}."
        )
    sizes = [len(TOPICS[topic].nouns), *map(len, TOPICS[topic].slots.values())]
    most = prod(size + 1 for size in sizes) // 2  # each slot has a value or is absent; near to all, drawing gets slow
    if count > most:
        raise BadInput(f"there are only about {most} different {topic}, got a count of {count}; lower it.")
    return list(islice(_distinct(topic, seed, references), count))


def split_descriptions(seed: int = 0) -> dict[str, list[Described]]:
    """What `builtin:gpt2-tiny` was trained on besides prose: 2,000 meanings of each other topic, and 50 held out."""
    topics = [generate_descriptions(name, 2050, seed=seed, references=3) for name in TOPICS if name != "restaurants"]
    return {
        "train": [item for items in topics for item in items[:-50]],
        "test": [item for items in topics for item in items[-50:]],
    }


def write_out(items: Sequence[Described]) -> list[str]:
    """Meaning, line break, reference: one text for each reference."""
    return [f"{item.meaning}\n{text}" for item in items for text in item.references]


def rename_places(items: list[Described], words: Sequence[str], seed: int) -> list[Described]:
    """Other names, of these words, in three of four places: who has seen a name once only must copy it to learn it.

    A name is a value with a capital that every reference holds as it is.
    """
    draw, new = random.Random(seed), []
    for item in items:
        texts = [item.meaning, *item.references]
        for name in re.findall(r"\[([A-Z][^]]*)\]", item.meaning):
            if all(name in text for text in texts) and draw.random() < 0.75:
                other = " ".join(draw.choice(words).capitalize() for _ in name.split())
                texts = [text.replace(name, other) for text in texts]
        new.append(Described(texts[0], texts[1:]))
    return new


def _distinct(name: str, seed: int, references: int) -> Iterator[Described]:
    topic, seen = TOPICS[name], set()
    for number in count_up():
        draw = _Draw(f"{name} {seed} {number}")
        values = _meaning(topic, draw)
        key = tuple(pair for pair in values.items() if pair[0] != "name")
        if key not in seen:
            seen.add(key)
            meaning = ", ".join(f"{slot}[{value}]" for slot, value in values.items())
            yield Described(meaning, _references(topic, values, references, draw))


class _Draw:
    """Choices from `random.random`, the one method of `random` whose sequence Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def below(self, end: int) -> int:
        return int(self.random() * end)

    def one(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

    def shuffled(self, of: Sequence[T]) -> list[T]:
        return sorted(of, key=lambda _: self.random())


def _meaning(topic: Topic, draw: _Draw) -> dict[str, str]:
    """Values of the name and of 2 to 7 other slots, in the order of the topic."""
    others = {topic.kind: list(topic.nouns)} | {slot: list(words) for slot, words in topic.slots.items()}
    chosen = draw.shuffled(list(others))[: 2 + draw.below(len(others) - 1)]
    values = {slot: draw.one(others[slot]) for slot in others if slot in chosen}
    return {"name": draw.one(topic.names), **values}


OPENERS = (  # {thing} is the noun with its adjectives; {after}, {where} and {says} are one or more phrases of that role
    "{name} is {thing} {where}.",
    "{name} is {thing} {after}.",
    "{name} is {thing} {after} {where}.",
    "{name} is {thing} that {says}.",
    "{name}, {thing}, {says}.",
    "{name}, {thing} {where}, {says}.",
    "{where}, there is {thing} called {name}.",
    "{where}, you will find {name}, {thing}.",
    "There is {thing} called {name} {where}.",
    "There is {thing} called {name} that {says}.",
    "If you are looking for {thing} {after}, try {name}.",
    "If you want {thing} {where}, try {name}.",
    "If you want {thing} that {says}, try {name}.",
)
SECOND = ("It {says}.", "The {noun} {says}.", "This {noun} {says}.")
THIRD = ("It {says}.", "In addition, it {says}.", "{name} {says}.")
ROLES = (("where", 1, 2), ("after", 1, 1), ("before", 0, 2), ("says", 1, 3))  # least and most phrases in one sentence


def _references(topic: Topic, values: dict[str, str], number: int, draw: _Draw) -> list[str]:
    """Different texts with different openers, as far as the openers suit the meaning."""
    found: list[str] = []
    openers = draw.shuffled(OPENERS)
    while len(found) < number:
        openers.append(openers.pop(0))
        text = " ".join(_sentences(topic, values, openers[-1], draw))
        if text and text not in found:
            found.append(text)
    return found


def _sentences(topic: Topic, values: dict[str, str], opener: str, draw: _Draw) -> Iterator[str]:
    """The opener and what it leaves unsaid, or nothing if the opener needs what the meaning does not have."""
    words = {slot: topic.slots[slot][value] for slot, value in values.items() if slot in topic.slots}
    noun = draw.one(topic.nouns[values[topic.kind]] if topic.kind in values else topic.things)
    left, said = draw.shuffled(list(words)), dict[str, list[str]]()
    for role, least, most in ROLES:
        if least and f"{{{role}}}" not in opener:
            continue
        able = [slot for slot in left if getattr(words[slot], role)]
        taken = able[: least + draw.below(most + 1 - least)]
        if len(taken) < least:
            return
        left = [slot for slot in left if slot not in taken]
        said[role] = [draw.one(getattr(words[slot], role)) for slot in words if slot in taken]
    fields = {"name": values["name"], "noun": noun, "thing": _with_article([*said.pop("before")[::-1], noun])}
    fields |= {role: " ".join(phrases) for role, phrases in said.items() if role != "says"}
    yield _sentence(opener, fields, said.get("says", []), draw)
    cut = len(left) if len(left) <= 3 and draw.below(3) else -(-len(left) // 2)
    for patterns, slots in ((SECOND, left[:cut]), (THIRD, left[cut:])):
        if slots:
            yield _sentence(draw.one(patterns), fields, [draw.one(words[slot].says) for slot in slots], draw)


def _sentence(pattern: str, fields: dict[str, str], says: list[str], draw: _Draw) -> str:
    text = pattern.format(**fields, says=_joined(says, draw))
    return text[0].upper() + text[1:]


def _joined(phrases: list[str], draw: _Draw) -> str:
    """`a, b and c`; negative phrases stand last, half the time as `a and b, but not c`."""
    negative = [phrase for phrase in phrases if phrase.startswith(NEGATIVE)]
    positive = [phrase for phrase in phrases if phrase not in negative]
    if positive and negative and draw.below(2):
        return (", but " if positive[1:] else " but ").join((_listed(positive), _listed(negative)))
    return _listed(positive + negative)


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def _with_article(words: list[str]) -> str:
    return " ".join(["an" if words[0][0] in "aeiouAEIOU" else "a", *words])
