"""Which examples of labelled data are taken where a few have to do."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from inlay.errors import BadInput
from inlay.tasks.folds import Fold
from inlay.tasks.tables import list_first

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows")


def complete_parts(
    parts: dict[str, Rows],
    test: bool,
    fold: Fold,
    hold_out: Callable[[Rows, Fold, bool], tuple[Rows, Rows]],
    name: str,
    noun: str,
) -> None:
    """Hold out of training, in place, the parts that the data does not have of its own.

    Without a test part `validation` is held out. With one, what the data calls validation is the test part if it has
    no other; the part that chooses is then held out of training, after the test part if that has to be held out too.

    Args:
        parts: The data's own, by name: train, and perhaps validation and test.
        test: Whether a part is wanted that chooses nothing.
        fold: What is held out first.
        hold_out: Gives what is left of a training part and what is held out. The last argument says whether it is the
            first time, when it may warn.
        name: Of the data.
        noun: What an example is called.

    Raises:
        InlayError: As `hold_out`; too few examples for three parts; folds of data that has a validation part.
    """
    if fold.number is not None and "validation" in parts:
        raise BadInput(f"{name!r} has a validation split of its own, so it has no folds; leave fold out.")
    if test and "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    missing = [part for part in (("test", "validation") if test else ("validation",)) if part not in parts]
    for part in missing:
        first = part == missing[0]
        try:
            parts["train"], parts[part] = hold_out(parts["train"], fold if first else fold.first, first)
        except BadInput as error:
            if first:
                raise
            raise BadInput(
                f"{name!r} has too few different {noun}s for three parts (to train on, to choose by, to test); add "
                "some, or give it a validation or test split of its own."
            ) from error


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


def normalise_label(word: str) -> str:
    """A label in composed Unicode (NFC): é is one letter to every reader, and two as some systems write it."""
    return unicodedata.normalize("NFC", word)


def hold_out_by_class(
    ids: Sequence[int], labels: Sequence[str], fold: Fold, seed: int, noun: str, warn: bool = True
) -> list[int]:
    """Rows to hold out, by rank of a hash: no library's random stream has to stay as it is."""
    fold.check_count(len(ids), noun)
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(ids):
        groups.setdefault(label, []).append(row)
    held: list[int] = []
    for rows in groups.values():
        rows.sort(key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
        held += fold.take(rows)
    if fold.number and not held:
        raise BadInput(
            f"fold {fold.number} has no {noun}, as every class has fewer than {fold.count}; choose fewer folds."
        )
    single = [labels[label] for label, rows in groups.items() if len(rows) == 1]
    if not held:
        raise BadInput(f"there is only one {noun} of each of {list_first(single)}, so none can be held out; add some.")
    if single and warn:
        logger.warning("classes with one %s, which stays in training: %s.", noun, list_first(single))
    return sorted(held)


def hold_out_by_content(
    ids: Sequence[int],
    labels: Sequence[str],
    fold: Fold,
    seed: int,
    noun: str,
    contents: Sequence[Hashable],
    warn: bool = True,
) -> list[int]:
    """Rows to hold out: equal ones stay on one side, and those that stand with several labels stay in training.

    Args:
        ids: The class of each row, an index of `labels`.
        labels: Names of the classes.
        fold: Of the different examples of each class.
        seed: Chooses them.
        noun: What an example is called.
        contents: Equal for rows that are the same example.
        warn: Say what stays in training, and why.

    Raises:
        InlayError: No class has two different examples.
    """
    places = _group_equal(contents)
    clear = [rows for rows in places if len({ids[row] for row in rows}) == 1]
    if len(clear) < len(places) and warn:
        count = len(places) - len(clear)
        stand = f"{noun} stands" if count == 1 else f"{noun}s stand"
        logger.warning("%d %s with more than one label; check the labels.", count, stand)
    if not clear:
        raise BadInput(f"every {noun} stands with more than one label, so none can be held out; check the labels.")
    held = hold_out_by_class([ids[rows[0]] for rows in clear], labels, fold, seed, noun, warn)
    return sorted(row for one in held for row in clear[one])


def hold_out_if_possible_by_content(
    ids: Sequence[int],
    labels: Sequence[str],
    fold: Fold,
    seed: int,
    noun: str,
    contents: Sequence[Hashable],
) -> list[int]:
    """As `hold_out_by_content`; row by row, with a warning, where all contents are equal.

    Raises:
        InlayError: No class has two rows.
    """
    if fold.number is not None:  # folds that share equal examples would prove nothing
        return hold_out_by_content(ids, labels, fold, seed, noun, contents)
    try:
        return hold_out_by_content(ids, labels, fold, seed, noun, contents)
    except BadInput as error:
        held = hold_out_by_class(ids, labels, fold, seed, noun)
        logger.warning("%s For now training and validation share equal %ss.", error, noun)
        return held


def hold_out_unlabelled(fold: Fold, seed: int, contents: Sequence[Hashable], noun: str) -> list[int]:
    """Rows to hold out at random, where equal ones stay on one side; none if all are equal."""
    import numpy as np

    places = _group_equal(contents)
    fold.check_count(len(places), f"different {noun}")
    order = np.random.default_rng(seed).permutation(len(places)).tolist()
    return sorted(row for one in fold.take(order) for row in places[one])


def _group_equal(contents: Sequence[Hashable]) -> list[list[int]]:
    """Rows of equal content."""
    places: dict[Hashable, list[int]] = {}
    for row, content in enumerate(contents):
        places.setdefault(content, []).append(row)
    return list(places.values())


def warn_of_overlap(train: Iterable[Hashable], held: Sequence[Hashable], split: str, noun: str) -> None:
    """Say how many examples of another split are training examples too: scores on them are too good."""
    known = set(train)
    seen = sum(content in known for content in held)
    if seen:
        logger.warning("%d of %d %ss of %s are in training too.", seen, len(held), noun, split)
