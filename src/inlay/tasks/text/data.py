"""Prompts with the texts that should follow them: from embedded data, tables, running text and the Hub."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from inlay.errors import BadInput
from inlay.tasks.evaluation import Split, Training, choose_split, split_note
from inlay.tasks.tables import KINDS, Table, hub_splits, kind_of, list_first, read_table

logger = logging.getLogger(__name__)

PAIRS = (
    ("prompt", "completion"),
    ("mr", "ref"),  # E2E
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("source", "target"),
    ("meaning_representation", "human_reference"),  # E2E on the Hub, GEM
    ("meaning_representation", "target"),
)
SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
WANTED = "builtin:restaurants, a table, a text, a folder of them or a Hub dataset"
Row = tuple[Any, str]  # a prompt and its completion
MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}


@dataclass(frozen=True)
class TextData:
    """Prompts and completions in two or three splits, in columns of these names.

    A completion is a string. A prompt is a string, empty before running text, or, in all rows alike, a list of chat
    messages {"role", "content"}: `TextProcessor` takes both.

    Attributes:
        plain: True of running text without prompts, to be cut into full blocks.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset | None
    plain: bool

    @property
    def separator(self) -> str:
        """Between prompt and completion: a line break, and nothing in running text, which goes on as it is."""
        return "" if self.plain else "\n"

    @property
    def chat(self) -> bool:
        """True if prompts are lists of messages."""
        return not isinstance(self.train[0]["prompt"], str)


@dataclass(frozen=True)
class Columns:
    """Where a table has prompts, what stands below them (or None), and completions; no prompt: chat or plain text."""

    prompt: str | None
    input: str | None
    completion: str


def load_texts(
    name: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    validation: float = 0.1,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> TextData:
    """Prompts and completions for training, validation and, where the data has one, test.

    Tables have the columns prompt and completion, mr and ref (E2E), question and answer, instruction (with or
    without input) and output or response, source and target, meaning_representation and human_reference or target,
    in small or capital letters; or `messages`, a list of {"role", "content"} whose last is the assistant's and the
    completion, after a prompt of the others; or else `text`, which is running text, as .txt is, one document a file.

    Args:
        name: `builtin:restaurants`; a .csv, .tsv, .jsonl, .json, .parquet or .txt file, packed as .gz or not; a
            folder of such files of one kind that are called after splits (train.csv, devset.csv); a Hub dataset id.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses the prompts to hold out where the data has no split validation, val, valid or dev.
        validation: Share to hold out, between 0 and 1: of the distinct prompts, each with all its completions; of
            running text the last part, from a paragraph on.
        prompt_column: Column of the prompts, where it cannot be told.
        completion_column: Column of the completions, where it cannot be told; without prompt_column it holds
            chat messages or running text.

    Raises:
        InlayError: The data cannot be found or read, a row has no text or no completion (its line is named), or
            there is nothing to hold out.
    """
    if not 0 < validation < 1:
        raise BadInput(f"validation must be a share between 0 and 1, got {validation}.")
    if prompt_column and not completion_column:
        raise BadInput("prompt_column needs completion_column; pass both.")
    splits, plain = _own_splits(name, revision, prompt_column, completion_column)
    if "validation" in splits:
        _say_overlap(splits["train"], splits["validation"])
    elif plain:
        splits["train"], splits["validation"] = _last_part(splits["train"], validation, name)
    else:
        splits["train"], splits["validation"] = _held_out(splits["train"], validation, seed, name)
    made = {split: _dataset(rows) for split, rows in splits.items() if rows}
    return TextData(name, made["train"], made["validation"], made.get("test"), plain)


def load_texts_to_score(
    name: str, *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, datasets.Dataset, bool, list[str]]:
    """Prompts and completions for an adapter that is trained already; unlike for training, one prompt is enough.

    Args:
        name: As for `load_texts`.
        split: Which part, as `choose_split` has it; by itself the test split, where there is one.
        training: Of the adapter.

    Returns:
        The split, its rows as in `TextData`, whether they are running text without prompts, and notes.

    Raises:
        InlayError: As `load_texts`; no such split.
    """
    training = training or Training()
    splits, plain = _own_splits(name)
    own = [each for each in ("train", "validation", "test") if each in splits]
    chosen = choose_split(name, split, own, "test" if "test" in splits else "validation", training)
    if "validation" not in splits and chosen in ("train", "validation"):
        parts = (
            _last_part(splits["train"], 0.1, name) if plain else _held_out(splits["train"], 0.1, training.seed, name)
        )
        splits["train"], splits["validation"] = parts
    rows = [row for each in splits.values() for row in each] if chosen == "all" else splits[chosen]
    return chosen, _dataset(rows), plain, split_note(name, chosen, own, training)


def by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[Any, list[str]]:
    """Distinct prompts in their order, each with all its completions: what a generated text is compared with.

    A chat is, as a key, a tuple of its messages, each (("role", ...), ("content", ...)): `TextProcessor` takes it
    as it takes the list.
    """
    found: dict[Any, list[str]] = {}
    for row in rows:
        found.setdefault(_key(row["prompt"]), []).append(row["completion"])
    return found


def _key(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else tuple(tuple((key, m[key]) for key in MESSAGE) for m in prompt)


def _own_splits(
    name: str, revision: str | None = None, prompt_column: str | None = None, completion_column: str | None = None
) -> tuple[dict[str, list[Row]], bool]:
    """The rows of each split that a source has of its own, and whether they are running text without prompts."""
    tables = _tables(name, Path(os.path.expanduser(name)), revision)  # noqa: PTH111 - Path's own raises for an unknown user
    columns = _columns(tables["train"][0], prompt_column, completion_column)
    if "test" in tables:
        tables["test"] = [table for table in tables["test"] if _has_completions(table, columns)]
    splits = {split: [row for table in found for row in _rows(table, columns)] for split, found in tables.items()}
    if len({type(prompt) for rows in splits.values() for prompt, _ in rows}) > 1:
        raise BadInput(f"{name!r} mixes chat messages and plain text; split it into two data sets.")
    empty = [split for split, rows in splits.items() if not rows and tables[split]]
    if empty:
        raise BadInput(f"{', '.join(empty)} of {name!r} has no text; fill it or leave it out.")
    plain = columns.prompt is None and isinstance(splits["train"][0][0], str)
    return splits, plain


def _tables(name: str, path: Path, revision: str | None) -> dict[str, list[Table]]:
    """By split (train, validation, test) the tables of a source, with columns of any name."""
    embedded = name.startswith("builtin:")
    if revision is not None and (embedded or path.exists()):
        raise BadInput(f"expected revision with a Hub dataset, but {name!r} is local. Leave revision out.")
    if embedded:
        return _builtin(name)
    if name and path.exists():
        return {"train": [read_table(path)]} if path.is_file() else read_folder(path)
    found = hub_splits(name, revision, WANTED)
    named = {SPLITS[own]: own for own in reversed(SPLITS) if own in found}
    if "train" not in named and len(found) == 1:
        named = {"train": next(iter(found))}
    if "train" not in named or not len(found[named["train"]]):
        raise BadInput(f"{name!r} has no rows in a split 'train'; it has {list_first(list(found))}.")
    return {split: [_table(found[own], own, name)] for split, own in named.items() if len(found[own])}


def _table(rows: datasets.Dataset, split: str, name: str) -> Table:
    where = f"split {split} of {name}"
    return Table(where, rows.column_names, lambda column: rows[column][:], range(1, len(rows) + 1))


def _builtin(name: str) -> dict[str, list[Table]]:
    if name != "builtin:restaurants":
        raise BadInput(f"unknown data {name!r}; the embedded texts are builtin:restaurants.")
    from inlay.builtin.restaurants import split_restaurants

    tables = {}
    for split, described in split_restaurants(seed=0).items():
        pairs = [(meaning.meaning, reference) for meaning in described for reference in meaning.references]
        columns = dict(zip(("prompt", "completion"), zip(*pairs, strict=True), strict=True))
        tables[split] = [Table(name, list(columns), columns.__getitem__, range(1, len(pairs) + 1))]
    return tables


def read_folder(folder: Path) -> dict[str, list[Table]]:
    """The tables of a folder by the split that each file is called after."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "." and kind_of(p) in KINDS)
    matches = {p: re.match(rf"({'|'.join(SPLITS)})(set)?(?![a-z])", p.name.lower()) for p in files}
    named = {file: SPLITS[match[1]] for file, match in matches.items() if match}
    unused = [file.name for file in files if named and file not in named]
    if len(files) == 1 or len(set(named.values())) == 1:
        named = dict.fromkeys(named or files, "train")
    kinds = {kind_of(file) for file in named}
    if "train" not in named.values() or len(kinds) > 1:
        has = list_first([file.name for file in files]) or "no such file"
        raise BadInput(
            f"{str(folder)!r} must hold files of one kind ({', '.join(KINDS)}) named after splits (train.csv), but "
            f"has {has}; "
            "pass the one you mean."
        )
    if unused:
        logger.warning("%d files are not called after a split and not used: %s.", len(unused), list_first(unused))
    tables: dict[str, list[Table]] = {}
    for file, split in named.items():
        tables.setdefault(split, []).append(read_table(file))
    return tables


def find_column(table: Table, column: str) -> str | None:
    """A column's name as the table writes it."""
    if column in table.names:
        return column
    alike = [name for name in table.names if name.strip().lower() == column.lower()]
    return alike[0] if len(alike) == 1 else None


def _columns(table: Table, prompt: str | None, completion: str | None) -> Columns:
    """The columns to read: as asked, or by name."""
    known = {"messages", "text", *(name for pair in PAIRS for name in pair)}
    names = {name for name in known if find_column(table, name)}
    choices: list[tuple[str | None, str]] = [pair for pair in PAIRS if names >= set(pair)]
    choices += [(None, "messages")] if "messages" in names else []
    choices = choices or ([(None, "text")] if "text" in names else [])  # beside a pair, `text` is the pair once more
    if completion:
        choices = (
            [(prompt, completion)] if all(c is None or find_column(table, c) for c in (prompt, completion)) else []
        )
    if len(choices) != 1:
        wanted = "prompt and completion, mr and ref, question and answer, instruction and output, messages or text"
        wanted = list_first([c for c in (prompt, completion) if c]) if completion else f"columns such as {wanted}"
        got = " as well as ".join(" and ".join(filter(None, c)) for c in choices) or list_first(table.names)
        raise BadInput(
            f"{table.name!r} needs {wanted}, but has {got}; rename the columns, or give load_texts "
            f"prompt_column and completion_column, or the latter alone for chat messages and running text."
        )
    below = "input" if choices[0][0] == "instruction" and find_column(table, "input") else None
    return Columns(choices[0][0], below, choices[0][1])


def _has_completions(table: Table, columns: Columns) -> bool:
    """False for a competition's test file, which has prompts alone."""
    whole = find_column(table, columns.completion) is not None
    if not whole:
        logger.warning("%s has no column %s and is left out.", table.name, columns.completion)
    return whole


def _rows(table: Table, columns: Columns) -> list[Row]:
    """Prompt and completion of every row, checked."""
    if not len(table):
        raise BadInput(f"{table.name!r} has no rows; fill it or leave it out.")
    texts = _values(table, columns.completion)
    if columns.prompt is None and (columns.completion == "messages" or isinstance(texts[0], list)):
        return _chats(table, columns.completion, texts)
    _check_text(table, columns.completion, texts)
    if columns.prompt is None:  # lines of a book: some are empty
        return [("", text) for text in texts if text.strip()]
    _refuse(table, [i for i, text in enumerate(texts) if not text.strip()], "a completion in every row", "none")
    prompts = _values(table, columns.prompt)
    _check_text(table, columns.prompt, prompts)
    if columns.input is not None and find_column(table, columns.input):
        below = [more or "" for more in _values(table, columns.input)]
        _check_text(table, columns.input, below)
        prompts = [f"{prompt}\n{more}" if more else prompt for prompt, more in zip(prompts, below, strict=True)]
    return list(zip(prompts, texts, strict=True))


def _check_text(table: Table, column: str, values: Sequence[Any]) -> None:
    wrong = [i for i, value in enumerate(values) if not _is_text(value)]
    _refuse(table, wrong, f"text in column {column!r}", "other values")


def _values(table: Table, column: str) -> Sequence[Any]:
    found = find_column(table, column)
    if found is None:
        raise BadInput(f"{table.name!r} has no column {column!r}, it has {list_first(table.names)}; add it.")
    return table.column(found)


def _is_text(value: Any) -> bool:
    """True for a string that UTF-8 can write: JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _refuse(table: Table, rows: Sequence[int], wanted: str, got: str) -> None:
    if rows:
        raise BadInput(f"{table.where(rows)}: expected {wanted}, got {got}. Fix or remove them.")


def _chats(table: Table, column: str, chats: Sequence[Any]) -> list[Row]:
    """The last message as the completion of those before it."""
    wrong = [i for i, chat in enumerate(chats) if not _is_chat(chat)]
    _refuse(table, wrong, f"lists of messages {{'role', 'content'}}, both text, in {column!r}", "others")
    wrong = [i for i, chat in enumerate(chats) if chat[-1]["role"] != "assistant"]
    _refuse(table, wrong, "an assistant's message at the end", "another role")
    _refuse(table, [i for i, chat in enumerate(chats) if len(chat) < 2], "a message before the last", "none")
    wrong = [i for i, chat in enumerate(chats) if not chat[-1]["content"].strip()]
    _refuse(table, wrong, "a completion in every row", "none")
    others = {key for chat in chats for message in chat for key, value in message.items() if value} - MESSAGE.keys()
    if others:
        logger.warning(
            "of messages in %s only role and content are used, not %s.", table.name, list_first(sorted(others))
        )
    return [([{key: m[key] for key in MESSAGE} for m in chat[:-1]], chat[-1]["content"]) for chat in chats]


def _is_chat(chat: Any) -> bool:
    messages = isinstance(chat, list) and len(chat) > 0 and all(isinstance(message, dict) for message in chat)
    return messages and all(_is_text(message.get(key)) for message in chat for key in MESSAGE)


def _held_out(rows: list[Row], share: float, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """Training and validation without a prompt in both; by rank of a hash, alike on every machine."""
    keys = [_key(prompt) for prompt, _ in rows]
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    if len(prompts) < 2:
        raise BadInput(
            f"all {len(rows)} rows of {name!r} have one prompt, so none can be held out; add a validation file."
        )
    held = set(prompts[: min(max(1, round(len(prompts) * share)), len(prompts) - 1)])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for key, row in zip(keys, rows, strict=True):
        parts[key in held].append(row)
    return parts


def _last_part(rows: list[Row], share: float, name: str) -> tuple[list[Row], list[Row]]:
    """Running text before and after a point, moved on to the next paragraph, line or word if one is near."""
    total, row = sum(len(text) for _, text in rows), 0
    at = min(round(total * (1 - share)), total - 1)
    while row < len(rows) - 1 and at >= len(rows[row][1]):
        at -= len(rows[row][1])
        row += 1
    text = rows[row][1]
    near = text[at : at + (len(text) - at) // 4]
    at += next((near.find(gap) + len(gap) for gap in ("\n\n", "\n", " ") if gap in near), 0)
    parts = ([*rows[:row], ("", text[:at])], [("", text[at:]), *rows[row + 1 :]])
    train, held = ([(prompt, text) for prompt, text in part if text.strip()] for part in parts)
    if not train or not held:
        raise BadInput(f"{name!r} is too short to hold out a part of it; add a validation file.")
    return train, held


def _say_overlap(train: list[Row], held: list[Row]) -> None:
    prompts, known = {_key(prompt) for prompt, _ in held} - {""}, {_key(prompt) for prompt, _ in train}
    if prompts & known:
        logger.warning("%d of %d prompts of validation are in training too.", len(prompts & known), len(prompts))


def _dataset(rows: list[Row]) -> datasets.Dataset:
    prompts, completions = zip(*rows, strict=True)
    prompt = datasets.Value("string") if isinstance(prompts[0], str) else datasets.List(MESSAGE)
    features = datasets.Features({"prompt": prompt, "completion": datasets.Value("string")})
    return datasets.Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)}, features=features)
