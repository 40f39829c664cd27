"""Prompts and completions that are read from shards as they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import datasets

from inlay.errors import BadInput
from inlay.tasks.evaluation import Split, Training
from inlay.tasks.shards import Shards, choose_scored, is_held_out, open_shards, read_scored
from inlay.tasks.tables import Table, list_first
from inlay.tasks.text.data import (
    Columns,
    Row,
    TextData,
    find_text_columns,
    make_dataset,
    make_key,
    parse_rows,
    warn_of_unused_columns,
)
from inlay.tasks.text.packing import PackedView
from inlay.tasks.text.processor import TextProcessor
from inlay.tasks.text.view import TextView
from inlay.train.stream import BUFFER, Stream

OverLong: TypeAlias = Literal["cut", "drop", "refuse"]
LOOKED_AT = 100  # rows whose columns are looked at


@dataclass(frozen=True)
class TextStream(TextData):
    """Texts of which the training part is a stream of rows; `stream_examples` makes tokens of them."""

    train: Any


@dataclass(frozen=True)
class _TextRows:
    """Makes rows of prompts and completions of the rows of a table: of those that are held out, of the others, or all.

    Attributes:
        name: Of the data.
        columns: Of the table.
        group: The column whose values are held out together.
        seed: Chooses what is held out.
        held: Whether to give what is held out; None: everything.
    """

    name: str
    columns: Columns
    group: str | None
    seed: int
    held: bool | None

    def __call__(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Row]:
        """The rows that there are."""
        groups = None if self.group is None else [str(row[self.group]) for row in rows]
        found = parse_rows(_make_table(self.name, rows, places), self.columns, groups)
        if self.held is None:
            return found
        return [row for row in found if is_held_out(_hold_out_by(row), self.seed) == self.held]


@dataclass(frozen=True)
class _Examples:
    """Makes the examples of a `TextView`, or of a `PackedView` of it, of the rows of a block.

    Attributes:
        rows: Makes rows of prompts and completions.
        processor: Makes tokens of these.
        over_long: As in `TextView`.
        block: As there.
        pack: Whether several of them share a row.
    """

    rows: _TextRows
    processor: TextProcessor
    over_long: OverLong
    block: bool
    pack: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Any]:
        """Those of these rows."""
        found = self.rows(rows, places)
        if not found:
            return []
        try:
            view: Any = TextView(make_dataset(found), self.processor, over_long=self.over_long, block=self.block)
        except BadInput:
            if self.over_long == "drop":  # all of them are too long
                return []
            raise
        view = PackedView(view, self.processor.max_length) if self.pack else view
        return [view[i] for i in range(len(view))]


def load_text_stream(
    name: str, *, revision: str | None = None, seed: int = 0, group: str | None = None, buffer: int | None = None
) -> TextStream:
    """Prompts and completions, or running text, for training as a stream, and for validation.

    Without validation shards one prompt in twenty is held out with all its completions, or one document in twenty, by a
    hash of the text; the first thousand rows of these are scored.

    Args:
        name: As for `open_shards`, with columns as in `load_texts`.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses what is held out.
        group: Column of what is held out together.
        buffer: Rows that are shuffled together; default: 1,000.

    Raises:
        InlayError: As `open_shards` and `load_texts`; no text was held out.
    """
    splits = open_shards(name, revision)
    columns = _find_columns(splits["train"], name, group)
    own = splits.get("validation")
    arrange = _TextRows(name, columns, group, seed, False if own is None else None)
    train = Stream(splits["train"].rows, arrange, buffer=buffer or BUFFER, names=splits["train"].names)
    validation = _read_scored(own or splits["train"], own is None, replace(arrange, held=None))
    test = _read_scored(splits["test"], False, replace(arrange, held=None)) if "test" in splits else None
    plain = columns.prompt is None and isinstance(validation[0]["prompt"], str)
    return TextStream(name, train, validation, test, plain)


def load_text_stream_to_score(
    name: str, *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, datasets.Dataset, bool, list[str]]:
    """Prompts and completions of shards for an adapter that is trained already.

    Args:
        name: As for `open_shards`.
        split: validation or test; by itself the test split, where there is one.
        training: Of the adapter.

    Returns:
        The split, its rows as in `TextData`, whether they are running text without prompts, and notes.

    Raises:
        InlayError: As `load_text_stream`; no such split.
    """
    training = training or Training()
    splits = open_shards(name)
    chosen: Split = split or ("test" if "test" in splits else "validation")
    shards, cut, notes = choose_scored(name, splits, chosen, training)
    group = training.group_for(name)
    columns = _find_columns(shards, name, group)
    rows = _read_scored(shards, cut, _TextRows(name, columns, group, training.seed, None))
    return chosen, rows, columns.prompt is None and isinstance(rows[0]["prompt"], str), notes


def stream_examples(
    stream: Stream, processor: TextProcessor, *, over_long: OverLong = "cut", block: bool = False, pack: bool = False
) -> Stream:
    """A stream of rows as one of examples; each block of rows is cut or packed by itself."""
    arrange = _Examples(stream.arrange, processor, over_long, block, pack)  # type: ignore[arg-type]
    return replace(stream, arrange=arrange, length=count_tokens)


def count_tokens(example: Mapping[str, Any]) -> int:
    """Of an example."""
    return len(example["input_ids"])


def _find_columns(shards: Shards, name: str, group: str | None) -> Columns:
    rows = Stream(shards.rows, buffer=LOOKED_AT).read_first(LOOKED_AT)
    if not rows:
        raise BadInput(f"{name!r} has no rows; pass data with some.")
    table = _make_table(name, rows, [""] * len(rows))
    if group is not None and group not in table.names:
        raise BadInput(
            f"{name!r} has no column {group!r} to keep together; choose one of its columns ({list_first(table.names)})."
        )
    columns = find_text_columns(table, None, None)
    warn_of_unused_columns(name, [table], [*columns.used, *([] if group is None else [group])])
    return columns


def _make_table(name: str, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> Table:
    return Table(name, list(rows[0]), lambda column: [row[column] for row in rows], places)


def _hold_out_by(row: Row) -> bytes:
    """What a row is held out by: its group, or else its prompt, or the text of a document."""
    return str(row.group if row.group is not None else make_key(row.prompt) or row.completion).encode()


def _read_scored(shards: Shards, cut: bool, arrange: _TextRows) -> datasets.Dataset:
    """Rows to score: those of a split, or those that are held out of it."""
    stream = Stream(shards.rows, replace(arrange, held=True if cut else None), names=shards.names)
    rows = read_scored(stream, cut, arrange.name, "texts")
    return make_dataset(rows)
