"""Examples that belong together: of one patient, slide or site. Groups are found in the data, and held out whole."""

import hashlib
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import regex

from inlay.errors import BadInput
from inlay.tasks.folds import Fold
from inlay.tasks.tables import Table, find_column, list_first

logger = logging.getLogger(__name__)

ORDERS, NEAR = 20, 0.01  # in which groups are tried, and how near to the share is near enough
SECONDS = 1.0  # for one path: an expression may come with an adapter of someone else, and some never end


def find_groups(
    group: str,
    data: str,
    columns: Sequence[str],
    read_column: Callable[[str], Sequence[Any]],
    paths: Sequence[str] | None = None,
) -> list[str]:
    """The group of each example: what stands in a column, or what a regular expression finds in the path of its file.

    Args:
        group: A column, or else the expression. What its first parentheses match is the group, or the whole match where
            it has none.
        data: Name of the data, for messages.
        columns: Names of those that there are.
        read_column: All values of one of them.
        paths: Of the files, as `relative_paths` gives them; None: the examples are in no files.

    Raises:
        InlayError: No such column, no regular expression, or an example without a group.
    """
    if group in columns:
        found = ["" if value is None or value != value else str(value).strip() for value in read_column(group)]
        empty = [i for i, value in enumerate(found) if not value]
        if empty:
            raise BadInput(
                f"column '{group}' of {data!r} is empty in {len(empty)} of {len(found)} rows (from 0: "
                f"{list_first(empty)}); every example needs a group."
            )
        return found
    known = ", ".join(map(repr, columns)) or "none"
    if paths is None:
        raise BadInput(f"{data!r} has no column '{group}' to keep together; choose one of its columns ({known}).")
    subject = f"the regular expression '{group}' for {data!r}"
    if columns:
        subject = f"'{group}' is no column of {data!r} (it has {known}), and as a regular expression it"
    try:
        expression = regex.compile(group)
        matches = [expression.search(path, timeout=SECONDS) for path in paths]
    except regex.error as error:
        raise BadInput(f"{subject} cannot be read: {error}.") from error
    except TimeoutError:
        raise BadInput(
            f"the regular expression '{group}' takes more than {SECONDS:g} s for one path of {data!r}; simplify it."
        ) from None
    found = [(match[1 if expression.groups else 0] or "") if match else "" for match in matches]
    without = [path for path, value in zip(paths, found, strict=True) if not value]
    if len(without) == len(found):
        raise BadInput(f"{subject} matches no path (the first is {paths[0]!r}); give one that does.")
    if without:
        raise BadInput(
            f"{len(without)} of {len(found)} paths of {data!r} have no match of '{group}' ({list_first(without)}); "
            "give an expression that finds a group in each."
        )
    return found


def read_groups(tables: Sequence[Table], group: str | None, data: str, *, required: bool) -> list[str] | None:
    """The group of each row of tables of text, by the column that names it; None where it was not asked for.

    Args:
        tables: Of one split.
        group: The column, in small or capital letters.
        data: Name of the data, for messages.
        required: Refuse a table without it; otherwise the groups of all rows are then not known.

    Raises:
        InlayError: No such column, or nothing in it in some row.
    """
    if group is None:
        return None
    found: list[str] = []
    for table in tables:
        column = find_column(table, group)
        if column is None and not required:
            return None
        found += find_groups(column or group, data, table.names, table.column)
    return found


class File(Protocol):
    """An example that is a file, and its group."""

    @property
    def group(self) -> str | None:
        """Where it is known."""


Files = TypeVar("Files", bound=Any)  # dataclasses that are a File


def group_files(files: Sequence[Files], group: str | None, data: str, paths: Sequence[str]) -> list[Files]:
    """Examples in files with the groups that a regular expression finds in their paths; as they are without one.

    Raises:
        InlayError: As `find_groups`.
    """
    if group is None or not files:
        return list(files)
    found = find_groups(group, data, (), lambda column: (), paths)
    return [replace(file, group=each) for file, each in zip(files, found, strict=True)]


def list_groups(rows: Sequence[File]) -> list[str] | None:
    """The group of each example, where those of all are known."""
    groups = [row.group for row in rows if row.group is not None]
    return groups if len(groups) == len(rows) else None


def relative_paths(paths: Sequence[str | Path], folder: Path) -> list[str]:
    """Paths from the folder of the data on, with slashes; those outside of it as they are."""
    root, made = folder.absolute(), []
    for path in map(Path, paths):
        inside = path.absolute().is_relative_to(root)
        made.append((path.absolute().relative_to(root) if inside else path).as_posix())
    return made


def hold_out_groups(
    groups: Sequence[str],
    contents: Sequence[Hashable],
    fold: Fold,
    seed: int,
    noun: str,
    *,
    ids: Sequence[int] | None = None,
    labels: Sequence[str] = (),
    warn: bool = True,
) -> list[int]:
    """Rows to hold out, whole groups at a time, with every class as near to the share as groups allow.

    Groups that have an equal example are one group, unless these are so many that less than half of the share could be
    held out: then equal examples are on both sides, and are counted in a warning.

    Args:
        groups: Of each row.
        contents: Equal for rows that are the same example.
        fold: Of the rows of each class.
        seed: Chooses the groups, alike on every machine.
        noun: What an example is called.
        ids: The class of each row, an index of `labels`; None: there are no classes.
        labels: Names of the classes.
        warn: Say what stays in training or stands on both sides, and why.

    Raises:
        InlayError: There is one group only, or every group has all examples of a class; too few groups for folds.
    """
    if len(set(groups)) < 2:
        raise BadInput(
            f"all {len(groups)} {noun}s are of one group ({groups[0]!r}), so none can be held out; add others."
        )
    classes = np.zeros(len(groups), np.int64) if ids is None else np.asarray(ids)
    units: Sequence[str] = _join_equal(groups, contents)
    if len(set(units)) < len(set(groups)):
        held = _choose_groups(units, classes, fold.share, seed)
        units = units if len(held) >= fold.share / 2 * len(groups) else groups
    fold.check_count(len(set(units)), "group")
    held = _choose_fold(units, classes, fold, seed)
    if units is groups:
        chosen = {*held}
        outside = {content for row, content in enumerate(contents) if row not in chosen}
        both = sum(contents[row] in outside for row in held)
        if warn and both:
            logger.warning("%d of %d %ss held out are in training too, in other groups.", both, len(held), noun)
    if not held:
        raise BadInput(f"every group has all {noun}s of a class, so none can be held out; add {noun}s of other groups.")
    missing = sorted({*classes.tolist()} - {*classes[held].tolist()})
    if warn and missing:
        logger.warning(
            "no %s of these classes is held out, as training would be left without one of a class: %s.",
            noun, list_first([labels[i] for i in missing]),
        )  # fmt: skip
    return held


def _choose_fold(groups: Sequence[str], classes: np.ndarray, fold: Fold, seed: int) -> list[int]:
    """Rows of the groups of a fold, each chosen from what those before it have left; the last one takes all of that.

    Raises:
        InlayError: Groups so unequal that a fold would be empty.
    """
    rest, held = np.arange(len(groups)), np.arange(0)
    for number, share in enumerate(fold.shares()):
        rest = np.setdiff1d(rest, held)
        left = [groups[i] for i in rest.tolist()]
        if number and len(set(left)) < fold.count - number:
            raise BadInput(f"the groups are too unequal for {fold.count} folds; choose fewer folds.")
        last = number and number == fold.count - 1
        held = rest[
            _take_groups(left, classes[rest], classes) if last else _choose_groups(left, classes[rest], share, seed)
        ]
    return held.tolist()


def _take_groups(groups: Sequence[str], classes: np.ndarray, everywhere: np.ndarray) -> list[int]:
    """Rows of all groups, but for those without which training would be left without a class.

    Args:
        groups: Of each row.
        classes: Of each row.
        everywhere: The classes of all rows of the data.
    """
    left = np.bincount(everywhere)  # of each class, for training
    taken: list[int] = []
    for name in dict.fromkeys(groups):
        rows = [i for i, group in enumerate(groups) if group == name]
        counts = np.bincount(classes[rows], minlength=len(left))
        if ((counts < left) | (counts == 0)).all():
            left = left - counts
            taken += rows
    return sorted(taken)


def _choose_groups(groups: Sequence[str], classes: np.ndarray, share: float, seed: int) -> list[int]:
    """Rows of the groups to hold out; none where each group has all rows of a class.

    In an order by rank of a hash of their names, groups are taken while that brings the shares of the classes nearer to
    the one that is asked for; of several such orders the best counts. scikit-learn's StratifiedGroupKFold would follow
    a stream of random numbers that its next version may change, and what an adapter has not seen must be found again.
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), classes.max() + 1))  # groups, classes
    np.add.at(counts, (place, classes), 1)
    shares = counts[:, counts.any(0)] / counts.sum(0)[counts.any(0)]  # of each class, that a group has

    def distance(taken: np.ndarray) -> float:
        """From the share of each class, more where nothing of a class is held out; infinite where nothing is left."""
        return float(((taken - share) ** 2 + (taken == 0)).sum()) if (taken < 1 - 1e-9).all() else math.inf

    best: list[int] = []
    nearest = np.zeros(shares.shape[1])
    for attempt in range(ORDERS):
        digests = [hashlib.sha256(f"{seed}:{attempt}:{name}".encode()).digest() for name in names]
        chosen, taken = [], np.zeros(shares.shape[1])
        for i in sorted(range(len(names)), key=digests.__getitem__):
            if distance(taken + shares[i]) < distance(taken):
                chosen.append(i)
                taken = taken + shares[i]
        if distance(taken) < distance(nearest):
            best, nearest = chosen, taken
        if np.abs(nearest - share).max() < NEAR:
            break
    return np.flatnonzero(np.isin(place, best)).tolist()


def _join_equal(groups: Sequence[str], contents: Sequence[Hashable]) -> list[str]:
    """For each row the first name of all groups that are joined to its own by equal contents."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    names, group = np.unique(np.asarray(groups), return_inverse=True)
    numbers = {content: i for i, content in enumerate(dict.fromkeys(contents))}
    content = np.array([numbers[each] for each in contents]) + len(names)
    size = len(names) + len(numbers)
    _, part = connected_components(coo_matrix((np.ones(len(group)), (group, content)), (size, size)), directed=False)
    first: dict[int, str] = {}
    for i, name in enumerate(names.tolist()):
        first.setdefault(int(part[i]), name)
    return [first[int(part[i])] for i in group]


def join_units(groups: Sequence[str], units: Sequence[Hashable]) -> dict[Hashable, str]:
    """The group of each unit that has several rows, such as a prompt; groups that share a unit are one."""
    return dict(zip(units, _join_equal(groups, units), strict=True))


def warn_of_shared_groups(parts: Mapping[str, Sequence[str] | None], noun: str) -> None:
    """Say how many groups stand on both sides of the data's own splits: scores on them are too good.

    Args:
        parts: The group of each example by split; None: it is not known.
        noun: What an example is called.
    """
    for held, before in (("validation", ("train",)), ("test", ("train", "validation"))):
        for split in before:
            here, there = parts.get(held), parts.get(split)
            shared = {*(here or ())} & {*(there or ())}
            if here and shared:
                count = sum(group in shared for group in here)
                known = "training" if split == "train" else split
                logger.warning(
                    "%d of %d groups of %s (%d of its %d %ss) are in %s too: %s.",
                    len(shared), len({*here}), held, count, len(here), noun, known, list_first(sorted(shared)),
                )  # fmt: skip
