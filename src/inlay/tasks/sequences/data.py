"""Labelled texts, or pairs of them: from embedded data, tables and the Hub."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from inlay.errors import BadInput
from inlay.tasks.classification import LabelledRows, choose_labelled_rows, warn_of_overlaps
from inlay.tasks.evaluation import Split, Training, check_labels, name_groups
from inlay.tasks.folds import FOLDS, Fold
from inlay.tasks.groups import read_groups
from inlay.tasks.sampling import complete_parts, normalise_label, sort_labels
from inlay.tasks.tables import SPLITS, Table, find_column, hub_splits, list_first, read_table
from inlay.tasks.text.data import read_folder, warn_of_unused_columns

logger = logging.getLogger(__name__)

PAIRS = (
    ("sentence1", "sentence2"),  # GLUE: MRPC, RTE, STS-B, WNLI
    ("premise", "hypothesis"),  # MNLI, SNLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("text1", "text2"),
    ("text", "pair"),
)
TEXTS = ("text", "sentence", "review", "content")
LABELS = ("label", "labels", "class", "target", "category")
WANTED = "builtin:families, a table, a folder of them or a Hub dataset"
Row = tuple[str, str | None, str, str | None]  # a text, what it is compared with, its label and its group


@dataclass(frozen=True)
class SequenceData:
    """Labelled texts in two or three parts: columns `text`, `label` (an index of `labels`) and, of pairs, `pair`.

    Attributes:
        test: The part that chooses nothing: what the data calls test, where it has labels, or what was asked for.
        test_split: The split of the data that `evaluate` finds it under.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    labels: tuple[str, ...]
    test: datasets.Dataset | None = None
    test_split: Split = "test"

    @property
    def paired(self) -> bool:
        """Whether each example is two texts."""
        return "pair" in self.train.column_names


def load_sequences(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    validation: float = 1 / FOLDS,
    fold: int | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    group: str | None = None,
    test: bool = False,
) -> SequenceData:
    """Labelled texts for training, validation and, where the data has one, test.

    Tables have a column of texts (text, sentence, review, content) or two of pairs (sentence1 and sentence2, premise
    and hypothesis, question1 and question2, question and sentence, text1 and text2, text and pair), and one of labels
    (label, labels, class, target, category), in small or capital letters; other columns are named in a warning. Labels
    are text as it is written (`001` is not `1`), in composed Unicode (NFC), and true and false of JSON and parquet.

    Args:
        name: `builtin:families`; a .csv, .tsv, .jsonl, .json or .parquet file, packed as .gz or not; a folder of such
            files that are called after splits (train.csv, dev.csv); a Hub dataset id.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses the texts to hold out where the data has no split validation, val, valid or dev.
        validation: Share of each class to hold out, between 0 and 1. Equal texts stay on one side, and what stands with
            several labels stays in training.
        fold: Which part of `validation` is held out, from 0; all parts together are the data. None: the first.
        text_column: Column of the texts, where it cannot be told.
        pair_column: Column of the second texts; without it, but with text_column, there are none.
        label_column: Column of the labels, where it cannot be told.
        group: Keep together what stands with one value in this column: the patient, the author. The rows then have a
            column `group`.
        test: Keep a part that chooses nothing where the data has no test split: what would be validation without this;
            validation is then held out of the rest.

    Raises:
        InlayError: The data cannot be found or read, a row lacks a text or a label (its line is named), there are fewer
            than two classes, or a class stands in validation only.
    """
    name = os.fspath(name)
    part = Fold(validation, fold)
    if pair_column and not text_column:
        raise BadInput("pair_column needs text_column too; pass both.")
    tables = _read_tables(name, revision)
    columns = find_sequence_columns(tables["train"][0], text_column, pair_column, label_column)
    own = _labelled_splits(name, tables, columns, group)
    rows = {split: read_rows(tables[split], columns, group, name, required=split == "train") for split in own}
    labels = sort_labels([label for _, _, label, _ in rows["train"]])
    if len(labels) < 2:
        raise BadInput(f"the training texts of {name!r} have one class only ({list_first(labels)}); add another.")
    parts = {split: label_rows(found, labels, name, split) for split, found in rows.items()}
    warn_of_overlaps(parts, "text")
    test_split: Split = "test" if "test" in parts or not test else "validation"

    def hold_out(found: LabelledRows, part: Fold, first: bool) -> tuple[LabelledRows, LabelledRows]:
        return found.hold_out(labels, part, seed, "text", first=first, refuse_equal=True)

    complete_parts(parts, test, part, hold_out, name, name_groups(group) if group else "text")
    made = {split: found.rows for split, found in parts.items()}
    return SequenceData(name, made["train"], made["validation"], tuple(labels), made.get("test"), test_split)


def load_sequences_to_score(
    name: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    adapter: str,
    split: Split | None = None,
    training: Training | None = None,
) -> tuple[Split, datasets.Dataset, list[str]]:
    """Labelled texts for an adapter that is trained already; unlike for training, one class or one text is enough.

    Args:
        name: As for `load_sequences`.
        labels: Of the adapter, in the order of its logits. The data may have some of them only, in any order.
        adapter: Its name, for errors.
        split: Which part, as `choose_split` has it; by itself the test split, where there is one.
        training: Of the adapter.

    Returns:
        The split, its texts with columns as in `SequenceData` and labels as indices of `labels`, and notes.

    Raises:
        InlayError: As `load_sequences`; labels that the adapter does not have; no such split.
    """
    name = os.fspath(name)
    training = training or Training()
    tables = _read_tables(name, None)
    columns = find_sequence_columns(tables["train"][0], None, None, None)
    group = training.group_for(name)
    own = _labelled_splits(name, tables, columns, group)
    known = [normalise_label(label) for label in labels]

    def load(parts: list[str]) -> LabelledRows:
        read = [table for part in parts for table in tables[part]]
        found = read_rows(read, columns, group, name, required=parts == ["train"])
        check_labels(name, sort_labels([label for _, _, label, _ in found]), known, adapter)
        return label_rows(found, known, name, parts[0])

    scored: Split = "test" if "test" in own else "validation"
    return choose_labelled_rows(name, own, load, known, wanted=split, scored=scored, training=training, noun="text")


def _labelled_splits(
    name: str, tables: dict[str, list[Table]], columns: tuple[str, str | None, str], group: str | None
) -> list[str]:
    """The splits that can be used, train among them; the others, and the columns that are not used, are named."""
    own = [split for split in tables if split == "train" or _has_labels(tables[split], columns[2])]
    for split in tables:
        if split not in own:
            logger.warning("split %s of %r has no labels and is left out.", split, name)
    used = list(filter(None, (*columns, group)))
    warn_of_unused_columns(name, [table for split in own for table in tables[split]], used)
    return own


def _read_tables(name: str, revision: str | None) -> dict[str, list[Table]]:
    """By split (train, validation, test) the tables of a source."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    local = name.startswith("builtin:") or (name and path.exists())
    if revision is not None and local:
        raise BadInput(f"revision is for a Hub dataset, but {name!r} is local; leave it out.")
    if name.startswith("builtin:"):
        return _read_builtin(name)
    if local:
        return {"train": [read_table(path)]} if path.is_file() else read_folder(path)
    found = hub_splits(name, revision, WANTED)
    named = {SPLITS[own]: own for own in reversed(SPLITS) if own in found}
    if "validation" not in named and "validation_matched" in found:  # MNLI
        named["validation"] = "validation_matched"
    named = named if "train" in named or len(found) > 1 else {"train": next(iter(found))}
    if "train" not in named:
        raise BadInput(f"{name!r} has no split 'train', only {list_first(list(found))}; use another.")
    return {split: [_hub_table(found[own], own, name)] for split, own in named.items() if len(found[own])}


def _hub_table(rows: datasets.Dataset, split: str, name: str) -> Table:
    """A split of a Hub dataset, classes by their names; -1 of a hidden test set is no label."""

    def column(of: str) -> Sequence[Any]:
        feature, values = rows.features[of], rows[of][:]
        if not isinstance(feature, datasets.ClassLabel):
            return values
        return [feature.names[v] if v is not None and v >= 0 else None for v in values]

    return Table(f"split {split} of {name}", rows.column_names, column, range(1, len(rows) + 1))


def _read_builtin(name: str) -> dict[str, list[Table]]:
    if name != "builtin:families":
        raise BadInput(f"there are no embedded texts {name!r} with labels; use builtin:families, or pass a file.")
    from inlay.builtin.families import split_families

    tables = {}
    for split, rows in split_families().items():
        columns = dict(zip(("text", "label"), zip(*rows, strict=True), strict=True))
        tables[split] = [Table(name, list(columns), columns.__getitem__, range(1, len(rows) + 1))]
    return tables


def find_sequence_columns(
    table: Table, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None, str]:
    """The columns of texts, second texts and labels: as asked, or by name."""
    present = {c for c in {*TEXTS, *LABELS, *(c for both in PAIRS for c in both)} if find_column(table, c)}
    if text:
        chosen: list[tuple[str, str | None]] = [(text, pair)]
    else:
        chosen = [both for both in PAIRS if present >= set(both)]
        chosen = chosen or [(one, None) for one in TEXTS if one in present]
    labels = [label] if label else [one for one in LABELS if one in present]
    if len(chosen) != 1 or len(labels) != 1:
        what = "text" if len(chosen) != 1 else "label"
        known = list_first(TEXTS) + ", or sentence1 and sentence2" if what == "text" else list_first(LABELS)
        raise BadInput(
            f"{table.name!r} must have one column of {what}s ({known}), but has {list_first(table.names)}; rename one, "
            f"or give load_sequences {what}_column."
        )
    return (*chosen[0], labels[0])


def _has_labels(tables: list[Table], label: str) -> bool:
    """False for a competition's test split."""
    found = [find_column(table, label) for table in tables]
    return all(name is not None for name in found) and any(
        value not in (None, -1) for table, name in zip(tables, found, strict=True) for value in table.column(name or "")
    )


def read_rows(
    tables: list[Table], columns: tuple[str, str | None, str], group: str | None, name: str, *, required: bool
) -> list[Row]:
    """Texts, labels and groups of every row, checked; a group that not all tables have may be `required`."""
    read = [row for table in tables for row in _read_texts(table, columns)]
    groups = read_groups(tables, group, name, required=required)
    if groups is None:
        return [(*row, None) for row in read]
    return [(*row, each) for row, each in zip(read, groups, strict=True)]


def _read_texts(table: Table, columns: tuple[str, str | None, str]) -> list[tuple[str, str | None, str]]:
    """Texts and labels of a table."""
    text, pair, label = columns
    texts, words = _read_column(table, text), _read_column(table, label)
    pairs: Sequence[Any] = _read_column(table, pair) if pair else [None] * len(texts)
    for column, values in ((text, texts), *(((pair, pairs),) if pair else ())):
        wrong = [i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
        if wrong:
            raise BadInput(f"column {column!r} holds no text in {table.where(wrong)}; fill or remove them.")
    wrong = [i for i, word in enumerate(words) if not isinstance(word, str | int | Decimal) or not str(word).strip()]
    if wrong:
        raise BadInput(f"there is no label (a word or a number) in {table.where(wrong)}; fill or remove them.")
    return list(zip(texts, pairs, map(_write_label, words), strict=True))


def _write_label(word: str | int | Decimal) -> str:
    """A label as text: true and false as JSON writes them, everything else as it stands."""
    return str(word).lower() if isinstance(word, bool) else normalise_label(str(word))


def _read_column(table: Table, column: str) -> Sequence[Any]:
    found = find_column(table, column)
    if found is None:
        raise BadInput(f"{table.name!r} has no column {column!r}, only {list_first(table.names)}; add or rename it.")
    return table.column(found)


def label_rows(rows: list[Row], labels: Sequence[str], name: str, split: str) -> LabelledRows:
    """Rows of a split with their labels as numbers.

    Raises:
        InlayError: A label that is none of `labels`.
    """
    places = {label: i for i, label in enumerate(labels)}
    unknown = sort_labels([label for _, _, label, _ in rows if label not in places])
    if unknown:
        raise BadInput(f"{name!r} has the labels {list_first(unknown)} in {split} only; add them to training.")
    columns = {"text": [r[0] for r in rows], "label": [places[r[2]] for r in rows]}
    if rows[0][1] is not None:
        columns["pair"] = [r[1] for r in rows]
    if rows[0][3] is not None:
        columns["group"] = [r[3] for r in rows]
    return LabelledRows(datasets.Dataset.from_dict(columns), [r[:2] for r in rows])
