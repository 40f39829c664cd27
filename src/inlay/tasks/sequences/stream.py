"""Labelled texts, or pairs of them, that are read from shards as they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from inlay.errors import BadInput
from inlay.tasks.evaluation import Split, Training
from inlay.tasks.sampling import normalise_label
from inlay.tasks.sequences.data import Row, SequenceData, find_sequence_columns, label_rows, read_rows
from inlay.tasks.sequences.processor import SequenceProcessor
from inlay.tasks.sequences.view import SequenceView
from inlay.tasks.shards import (
    Shards,
    choose_scored,
    find_classes,
    is_held_out,
    open_shards,
    read_classes,
    read_scored,
)
from inlay.tasks.tables import Table
from inlay.tasks.text.stream import LOOKED_AT, count_tokens
from inlay.train.stream import BUFFER, Stream


@dataclass(frozen=True)
class SequenceStream(SequenceData):
    """Labelled texts of which the training part is a stream of rows; `stream_sequences` makes tokens of them."""

    train: Any

    @property
    def paired(self) -> bool:
        """Whether each example is two texts."""
        return "pair" in self.validation.column_names


@dataclass(frozen=True)
class _SequenceRows:
    """Makes labelled rows of the rows of a table: of those that are held out, of the others, or of all.

    Attributes:
        name: Of the data.
        columns: Of texts, second texts and labels.
        names: The class that each number means; empty: labels are what they are.
        group: The column whose values are held out together.
        seed: Chooses what is held out.
        held: Whether to give what is held out; None: everything.
    """

    name: str
    columns: tuple[str, str | None, str]
    names: Sequence[str]
    group: str | None
    seed: int
    held: bool | None

    def __call__(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Row]:
        """The rows that there are."""
        table = Table(self.name, list(rows[0]), lambda column: [self._read(row, column) for row in rows], places)
        found = read_rows([table], self.columns, self.group, self.name, required=True)
        if self.held is None:
            return found
        return [row for row in found if is_held_out(_hold_out_by(row), self.seed) == self.held]

    def _read(self, row: Mapping[str, Any], column: str) -> Any:
        value = row[column]
        if not self.names or column != self.columns[2] or not isinstance(value, int):
            return value
        return self.names[value] if 0 <= value < len(self.names) else None


@dataclass(frozen=True)
class _Examples:
    """Makes the items of a `SequenceView` of the rows of a block."""

    rows: _SequenceRows
    labels: Sequence[str]
    processor: SequenceProcessor

    def __call__(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Any]:
        """Those of these rows."""
        found = self.rows(rows, places)
        if not found:
            return []
        return SequenceView(label_rows(found, self.labels, self.rows.name, "training").rows, self.processor).items


def load_sequence_stream(
    name: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    group: str | None = None,
    classes: str | None = None,
    buffer: int | None = None,
) -> SequenceStream:
    """Labelled texts for training as a stream, and for validation.

    Without validation shards one text in twenty is held out, by a hash of it; the first thousand of these are scored.

    Args:
        name: As for `open_shards`, with columns as in `load_sequences`.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses what is held out.
        group: Column of what is held out together.
        classes: As in `load_image_stream`.
        buffer: Rows that are shuffled together; default: 1,000.

    Raises:
        InlayError: As `open_shards` and `load_sequences`; no text was held out.
    """
    splits = open_shards(name, revision)
    columns, declared = _find_columns(splits["train"], name)
    named = read_classes(splits["train"], classes) or declared
    labels = list(map(normalise_label, named)) or find_classes(splits["train"], columns[2], name)
    own = splits.get("validation")
    arrange = _SequenceRows(name, columns, named, group, seed, False if own is None else None)
    train = Stream(splits["train"].rows, arrange, buffer=buffer or BUFFER, names=splits["train"].names)
    validation = _read_scored(own or splits["train"], own is None, replace(arrange, held=None), labels)
    return SequenceStream(name, train, validation, tuple(labels))


def load_sequence_stream_to_score(
    name: str, labels: Sequence[str], *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, datasets.Dataset, list[str]]:
    """Labelled texts of shards for an adapter that is trained already.

    Args:
        name: As for `open_shards`.
        labels: Of the adapter, in the order of its logits.
        split: validation or test; by itself the test split, where there is one.
        training: Of the adapter.

    Returns:
        The split, its rows as in `SequenceData`, and notes.

    Raises:
        InlayError: As `load_sequence_stream`; labels that the adapter does not have; no such split.
    """
    training = training or Training()
    splits = open_shards(name)
    chosen: Split = split or ("test" if "test" in splits else "validation")
    shards, cut, notes = choose_scored(name, splits, chosen, training)
    columns, declared = _find_columns(shards, name)
    named = declared or read_classes(shards, None) or labels
    arrange = _SequenceRows(name, columns, named, training.group_for(name), training.seed, None)
    return chosen, _read_scored(shards, cut, arrange, [normalise_label(label) for label in labels]), notes


def stream_sequences(data: SequenceStream, processor: SequenceProcessor) -> Stream:
    """The training part as a stream of the items of `SequenceView`."""
    arrange = _Examples(data.train.arrange, data.labels, processor)
    return replace(data.train, arrange=arrange, length=count_tokens)


def _find_columns(shards: Shards, name: str) -> tuple[tuple[str, str | None, str], list[str]]:
    """The columns, and the class names that the data declares."""
    rows = Stream(shards.rows, buffer=LOOKED_AT).read_first(LOOKED_AT)
    if not rows:
        raise BadInput(f"{name!r} has no rows; pass data with some.")
    table = Table(name, list(rows[0]), lambda column: [row[column] for row in rows], [""] * len(rows))
    columns = find_sequence_columns(table, None, None, None)
    feature = (shards.rows.features or {}).get(columns[2])
    return columns, list(feature.names) if isinstance(feature, datasets.ClassLabel) else []


def _hold_out_by(row: Row) -> bytes:
    """What a row is held out by: its group, or else its texts."""
    text, pair, _, group = row
    return str(group if group is not None else (text, pair)).encode()


def _read_scored(shards: Shards, cut: bool, arrange: _SequenceRows, labels: Sequence[str]) -> datasets.Dataset:
    """Rows to score: those of a split, or those that are held out of it."""
    stream = Stream(shards.rows, replace(arrange, held=True if cut else None), names=shards.names)
    rows = read_scored(stream, cut, arrange.name, "texts")
    return label_rows(rows, labels, arrange.name, "validation").rows
