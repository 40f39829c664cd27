"""Prompts with the texts that should follow them: from embedded data, tables, running text and the Hub."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets

from inlay.errors import BadInput
from inlay.tasks.evaluation import Split, Training, choose_split, name_groups, split_note
from inlay.tasks.folds import PROMPT_FOLDS, Fold
from inlay.tasks.groups import hold_out_groups, list_groups, read_groups, warn_of_shared_groups
from inlay.tasks.sampling import complete_parts
from inlay.tasks.tables import KINDS, SPLITS, Table, find_column, hub_splits, kind_of, list_first, read_table

logger = logging.getLogger(__name__)

# Columns of prompts and of completions, as the common formats name them (trl, axolotl, LLaMA-Factory and data cards).
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),  # preferences: the answer that was preferred
    ("mr", "ref"),  # E2E
    ("question", "answer"),
    ("question", "answers"),  # SQuAD
    ("question", "response"),  # OpenOrca
    ("question", "chosen"),
    ("query", "response"),  # MetaMath
    ("problem", "solution"),
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("source", "target"),
    ("meaning_representation", "human_reference"),  # E2E on the Hub, GEM
    ("meaning_representation", "target"),
)
CHATS = ("messages", "conversations")  # OpenAI, ShareGPT
BEFORE = {"question": ("context", "article")}  # SQuAD; what a question is about stands in front of it
BEHIND = {"instruction": ("input", "context")}  # Alpaca, Dolly
SYSTEM = ("system", "system_prompt")  # LLaMA-Factory, Intel's orca_dpo_pairs; OpenOrca
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # of ShareGPT, in the words of chat templates
WANTED = "builtin:restaurants, a table, a text, a folder of them or a Hub dataset"
MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}
Message: TypeAlias = dict[str, Any]  # role and content
SPEAKERS = ("user", "assistant")  # of a pair in a history


class Row(NamedTuple):
    """A prompt and its completion, and the group that it belongs to, where one was asked for."""

    prompt: Any
    completion: str
    group: str | None = None


@dataclass(frozen=True)
class TextData:
    """Prompts and completions in two or three parts, in columns of these names.

    A completion is a string. A prompt is a string, empty before running text, or, in all rows alike, a list of chat
    messages {"role", "content"}: `TextProcessor` takes both.

    Attributes:
        test: The part that chooses nothing: what the data calls test, where it has completions, or what was asked for.
        plain: True of running text without prompts, to be cut into full blocks.
        test_split: The split of the data that `evaluate` finds the test part under.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset | None
    plain: bool
    test_split: Split = "test"

    @property
    def separator(self) -> str:
        """Between prompt and completion: a line break, and nothing in running text, which goes on as it is."""
        return "" if self.plain else "\n"

    @property
    def chat(self) -> bool:
        """True if prompts are lists of messages."""
        return not isinstance(self.validation[0]["prompt"], str)


@dataclass(frozen=True)
class Columns:
    """Where a table has prompts and completions, and what belongs to a prompt; no prompt: chats or running text.

    Attributes:
        prompt: What is asked.
        completion: What follows; a whole conversation where there is no prompt, or running text.
        system: What the model is told before everything else.
        history: Earlier turns of the conversation.
        before: Texts in front of the prompt.
        behind: Texts below the prompt.
    """

    prompt: str | None
    completion: str
    system: str | None = None
    history: str | None = None
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        """All of them."""
        named = (self.prompt, self.completion, self.system, self.history, *self.before, *self.behind)
        return [column for column in named if column is not None]


def load_texts(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    validation: float = 1 / PROMPT_FOLDS,
    fold: int | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    group: str | None = None,
    test: bool = False,
) -> TextData:
    """Prompts and completions for training, validation and, where the data has one, test.

    Tables name their columns as the common formats do, in small or capital letters:

    - prompt and completion, response or chosen; question and answer, answers (SQuAD), response or chosen; instruction
      and output or response (Alpaca, Dolly); query and response; problem and solution; mr and ref (E2E); source and
      target; meaning_representation and human_reference or target. A prompt follows the `context` of its question
      and precedes the `input` or `context` of its instruction.
    - `messages`, a list of {"role", "content"}, or `conversations`, of {"from", "value"} (ShareGPT): the last message
      is the assistant's and the completion, the others are the prompt. Prompts and completions that are lists of
      messages make such a chat together, and so does `chosen` without a prompt.
    - `text`, where there is nothing of these: running text, as .txt is, one document a file.

    `system` (or system_prompt) and `history`, a list of earlier pairs of prompt and answer, stand first: as messages
    of a chat, and as lines above a prompt of text. Columns that are not used are named in a warning.

    Args:
        name: `builtin:restaurants`; `builtin:descriptions`, running text that the embedded GPT-2 was not trained on,
            though on its like; a .csv, .tsv, .jsonl, .json, .parquet or .txt file, packed as .gz or not; a
            folder of such files of one kind that are called after splits (train.csv, devset.csv); a Hub dataset id.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses the prompts to hold out where the data has no split validation, val, valid or dev.
        validation: Share to hold out, between 0 and 1: of the distinct prompts, each with all its completions; of
            running text the last part, from a paragraph on.
        fold: Which part of `validation` is held out, from 0; all parts together are the data. Running text has none,
            but by `group`. None: the first.
        prompt_column: Column of the prompts, where it cannot be told.
        completion_column: Column of the completions, where it cannot be told; without prompt_column it holds
            chat messages or running text.
        group: Keep together what stands with one value in this column: the author, the book. Running text is then held
            out by whole documents. The rows then have a column `group`.
        test: Keep a part that chooses nothing where the data has no test split: what would be validation without this;
            validation is then held out of the rest.

    Raises:
        InlayError: The data cannot be found or read, a row has no text or no completion (its line is named), or
            there is nothing to hold out.
    """
    name = os.fspath(name)
    part = Fold(validation, fold)
    if prompt_column and not completion_column:
        raise BadInput("prompt_column needs completion_column; pass both.")
    splits, plain = _read_splits(name, revision, prompt_column, completion_column, group)
    warn_of_shared_groups({split: list_groups(rows) for split, rows in splits.items()}, "row")
    for split in ("validation", "test"):
        if split in splits:
            _warn_of_overlap(splits["train"], splits[split], split)
    test_split: Split = "test" if "test" in splits or not test else "validation"

    def hold_out(rows: list[Row], part: Fold, first: bool) -> tuple[list[Row], list[Row]]:
        return _hold_out(rows, plain, part, seed, name, first=first)

    complete_parts(splits, test, part, hold_out, name, name_groups(group) if group else "text" if plain else "prompt")
    made = {split: make_dataset(rows) for split, rows in splits.items()}
    return TextData(name, made["train"], made["validation"], made.get("test"), plain, test_split)


def load_texts_to_score(
    name: str | os.PathLike[str], *, split: Split | None = None, training: Training | None = None
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
    name = os.fspath(name)
    training = training or Training()
    splits, plain = _read_splits(name, group=training.group_for(name))
    own = [each for each in ("train", "validation", "test") if each in splits]
    chosen = choose_split(name, split, own, "test" if "test" in splits else "validation", training)
    if "validation" not in splits and chosen in ("train", "validation"):
        fold = training.fold_for(name, 1 / PROMPT_FOLDS)
        splits["train"], splits["validation"] = _hold_out(splits["train"], plain, fold, training.seed, name)
    rows = [row for each in splits.values() for row in each] if chosen == "all" else splits[chosen]
    return chosen, make_dataset(rows), plain, split_note(name, chosen, own, training)


def group_by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[Any, list[str]]:
    """Distinct prompts in their order, each with all its completions: what a generated text is compared with.

    A chat is, as a key, a tuple of its messages, each (("role", ...), ("content", ...)): `TextProcessor` takes it
    as it takes the list.
    """
    found: dict[Any, list[str]] = {}
    for row in rows:
        found.setdefault(make_key(row["prompt"]), []).append(row["completion"])
    return found


def make_key(prompt: Any) -> Any:
    """A prompt as what sets and mappings hold."""
    return prompt if isinstance(prompt, str) else tuple(tuple((key, m[key]) for key in MESSAGE) for m in prompt)


def _read_splits(
    name: str,
    revision: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    group: str | None = None,
) -> tuple[dict[str, list[Row]], bool]:
    """The rows of each split that a source has of its own, and whether they are running text without prompts."""
    tables = _read_tables(name, Path(os.path.expanduser(name)), revision)  # noqa: PTH111 - Path's own raises for an unknown user
    columns = find_text_columns(tables["train"][0], prompt_column, completion_column)
    if "test" in tables:
        tables["test"] = [table for table in tables["test"] if _has_completions(table, columns)]
    used = columns.used if group is None else [*columns.used, group]
    warn_of_unused_columns(name, [table for found in tables.values() for table in found], used)
    splits = {
        split: [
            row
            for table in found
            for row in parse_rows(table, columns, read_groups([table], group, name, required=split == "train"))
        ]
        for split, found in tables.items()
        if found
    }
    if len({type(row.prompt) for rows in splits.values() for row in rows}) > 1:
        raise BadInput(f"{name!r} mixes chat messages and plain text; split it into two data sets.")
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise BadInput(f"{', '.join(empty)} of {name!r} has no text; fill it or leave it out.")
    plain = columns.prompt is None and isinstance(splits["train"][0].prompt, str)
    return splits, plain


def _read_tables(name: str, path: Path, revision: str | None) -> dict[str, list[Table]]:
    """By split (train, validation, test) the tables of a source, with columns of any name."""
    embedded = name.startswith("builtin:")
    if revision is not None and (embedded or path.exists()):
        raise BadInput(f"revision is for a Hub dataset, but {name!r} is local; leave it out.")
    if embedded:
        return _read_builtin(name)
    if name and path.exists():
        return {"train": [read_table(path)]} if path.is_file() else read_folder(path)
    found = hub_splits(name, revision, WANTED)
    named = {SPLITS[own]: own for own in reversed(SPLITS) if own in found}
    if "train" not in named and len(found) == 1:
        named = {"train": next(iter(found))}
    if "train" not in named or not len(found[named["train"]]):
        raise BadInput(f"{name!r} has no rows in a split 'train'; it has {list_first(list(found))}.")
    return {split: [_hub_table(found[own], own, name)] for split, own in named.items() if len(found[own])}


def _hub_table(rows: datasets.Dataset, split: str, name: str) -> Table:
    where = f"split {split} of {name}"
    return Table(where, rows.column_names, lambda column: rows[column][:], range(1, len(rows) + 1))


def _read_builtin(name: str) -> dict[str, list[Table]]:
    from inlay.builtin.restaurants import split_descriptions, split_restaurants, write_out

    if name == "builtin:descriptions":
        texts = write_out(split_descriptions()["test"])
        return {"train": [Table(name, ["text"], lambda _: texts, range(1, len(texts) + 1))]}
    if name != "builtin:restaurants":
        raise BadInput(f"unknown data {name!r}; the embedded texts are builtin:restaurants and builtin:descriptions.")
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
            f"{str(folder)!r} must hold files of one kind ({', '.join(KINDS)}) named after splits (train.csv), but has "
            f"{has}; pass the one you mean."
        )
    if unused:
        logger.warning("%d files are not called after a split and not used: %s.", len(unused), list_first(unused))
    tables: dict[str, list[Table]] = {}
    for file, split in named.items():
        tables.setdefault(split, []).append(read_table(file))
    return tables


def warn_of_unused_columns(name: str, tables: Sequence[Table], used: Sequence[str]) -> None:
    """Name the columns of the tables that are not used, in one warning."""
    unused: list[str] = []
    for table in tables:
        known = {find_column(table, column) for column in used}
        unused += [column for column in table.names if column not in known and column not in unused]
    if unused:
        logger.warning("columns of %r that are not used: %s.", name, ", ".join(unused))


def find_text_columns(table: Table, prompt: str | None, completion: str | None) -> Columns:
    """The columns to read: as asked, or by name."""
    if completion:
        given = [column for column in (prompt, completion) if column]
        if any(find_column(table, column) is None for column in given):
            raise BadInput(
                f"{table.name!r} has no columns {list_first(given)}, only {list_first(table.names)}; pass the names of "
                "columns that it has."
            )
        return _add_surroundings(table, prompt, completion)
    names = {
        name for name in {*CHATS, "chosen", "text", *(c for pair in PAIRS for c in pair)} if find_column(table, name)
    }
    choices: list[tuple[str | None, str]] = [pair for pair in PAIRS if names >= set(pair)]
    choices += [(None, chats) for chats in CHATS if chats in names]
    # Next to a pair, `text` is the pair once more; `chosen` without a prompt holds it.
    for single in ("chosen", "text"):
        choices = choices or ([(None, single)] if single in names else [])
    if not choices:
        raise BadInput(
            f"{table.name!r} has no columns of prompts and completions that are known by name (such as prompt and "
            "completion, question and answer, instruction and output, mr and ref, messages, conversations or text), "
            f"only {list_first(table.names)}; rename them, or give load_texts prompt_column and completion_column "
            "(completion_column only for chats and running text)."
        )
    if len(choices) > 1:
        several = " as well as ".join(" and ".join(filter(None, choice)) for choice in choices)
        raise BadInput(
            f"{table.name!r} has {several}; rename those that are not meant, or give load_texts prompt_column and "
            "completion_column (completion_column only for chats and running text)."
        )
    return _add_surroundings(table, *choices[0])


def _add_surroundings(table: Table, prompt: str | None, completion: str) -> Columns:
    """These columns with those of the table that belong to them."""
    if prompt is None and not _column_holds(table, completion, list):
        return Columns(None, completion)
    asked = (prompt or "").lower()
    return Columns(
        prompt,
        completion,
        system=next((column for column in SYSTEM if _column_holds(table, column, str)), None),
        history="history" if _column_holds(table, "history", str | list) else None,
        before=tuple(column for column in BEFORE.get(asked, ()) if _column_holds(table, column, str)),
        behind=tuple(column for column in BEHIND.get(asked, ()) if _column_holds(table, column, str)),
    )


def _column_holds(table: Table, column: str, kind: Any) -> bool:
    """Whether a table has such a column, and the first value in it is of this kind."""
    found = find_column(table, column)
    values = [] if found is None else table.column(found)
    return isinstance(next((value for value in values if value is not None), None), kind)


def _has_completions(table: Table, columns: Columns) -> bool:
    """False for a competition's test file, which has prompts only."""
    whole = find_column(table, columns.completion) is not None
    if not whole:
        logger.warning("%s has no column %s and is left out.", table.name, columns.completion)
    return whole


def parse_rows(table: Table, columns: Columns, known: Sequence[str] | None) -> list[Row]:
    """Prompt and completion of every row, checked, with the groups that are known."""
    if not len(table):
        raise BadInput(f"{table.name!r} has no rows; fill it or leave it out.")
    groups: Sequence[str | None] = known or [None] * len(table)
    completions = _read_column(table, columns.completion)
    if columns.prompt is None:
        if columns.completion in CHATS or isinstance(completions[0], list):
            return _read_chats(table, columns, completions, groups)
        _check_text(table, columns.completion, completions)
        texts = zip(completions, groups, strict=True)
        return [Row("", text, group) for text, group in texts if text.strip()]  # lines of a book: some are empty
    prompts = _read_column(table, columns.prompt)
    if isinstance(prompts[0], list) or (isinstance(completions[0], list) and columns.completion != "answers"):
        chats = [_join_chat(*row) for row in zip(prompts, completions, strict=True)]
        return _read_chats(table, columns, chats, groups)
    _check_text(table, columns.prompt, prompts)
    prompts = _surround_prompts(table, columns, prompts)
    if columns.completion == "answers" and not isinstance(completions[0], str):
        return _expand_answers(table, prompts, completions, groups)
    _check_text(table, columns.completion, completions)
    empty = [i for i, text in enumerate(completions) if not text.strip()]
    _refuse_rows(table, empty, "the completion is empty")
    return list(map(Row, prompts, completions, groups))


def _surround_prompts(table: Table, columns: Columns, prompts: Sequence[str]) -> list[str]:
    """Prompts of text, each among the lines that belong to it."""
    above: list[Sequence[str]] = [_read_texts(table, column) for column in (columns.system,) if column]
    above += (
        [["\n".join(_contents(turns)) for turns in _read_histories(table, columns.history)]] if columns.history else []
    )
    above += [_read_texts(table, column) for column in columns.before]
    below = [_read_texts(table, column) for column in columns.behind]
    return ["\n".join(filter(None, parts)) for parts in zip(*above, prompts, *below, strict=True)]


def _read_texts(table: Table, column: str) -> list[str]:
    """The texts of a column that not every table of the data has, nor every row."""
    if find_column(table, column) is None:
        return [""] * len(table)
    values = [value or "" for value in _read_column(table, column)]
    _check_text(table, column, values)
    return values


def _read_histories(table: Table, column: str) -> list[list[Message]]:
    """Earlier turns of each row as messages: from pairs of a prompt and its answer, from messages or from text."""
    if find_column(table, column) is None:
        return [[] for _ in range(len(table))]
    found = [_read_turns(value) for value in _read_column(table, column)]
    wrong = [i for i, turns in enumerate(found) if turns is None]
    _refuse_rows(table, wrong, f"column {column!r} holds no list of pairs of prompt and answer")
    return [turns or [] for turns in found]


def _read_turns(history: Any) -> list[Message] | None:
    """The messages of a history; None of what is none."""
    if not history:
        return []
    if isinstance(history, str):
        return [{"role": "user", "content": history}] if _is_text(history) else None
    if _is_chat(history):
        return [_read_message(message) for message in history]
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        return None
    if not all(_is_text(text) for pair in history for text in pair):
        return None
    return [{"role": role, "content": text} for pair in history for role, text in zip(SPEAKERS, pair, strict=True)]


def _expand_answers(
    table: Table, prompts: Sequence[str], answers: Sequence[Any], groups: Sequence[str | None]
) -> list[Row]:
    """A row for each different answer, of SQuAD's {"text": [...], "answer_start": [...]} or lists of texts."""
    found: list[Any] = [value.get("text") if isinstance(value, dict) else value for value in answers]
    wrong = [i for i, each in enumerate(found) if not isinstance(each, list) or not all(map(_is_text, each))]
    _refuse_rows(table, wrong, "column 'answers' holds no list of texts, nor SQuAD's {'text': [...]}")
    bare = [i for i, each in enumerate(found) if not any(text.strip() for text in each)]
    if bare:
        logger.warning("%s have no answer (SQuAD 2 has such questions) and are left out.", table.where(bare))
    return [
        Row(prompt, text, group)
        for prompt, each, group in zip(prompts, found, groups, strict=True)
        for text in dict.fromkeys(each)
        if text.strip()
    ]


def _check_text(table: Table, column: str, values: Sequence[Any]) -> None:
    wrong = [i for i, value in enumerate(values) if not _is_text(value)]
    _refuse_rows(table, wrong, f"column {column!r} holds no text")


def _read_column(table: Table, column: str) -> Sequence[Any]:
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


def _refuse_rows(table: Table, rows: Sequence[int], problem: str) -> None:
    """Name the rows, if there are any, with their problem."""
    if rows:
        raise BadInput(f"{table.where(rows)}: {problem}; fix or remove {'it' if len(rows) == 1 else 'them'}.")


def _join_chat(prompt: Any, completion: Any) -> Any:
    """The conversation of a prompt and its completion, each a text or a list of messages; None of anything else.

    A completion may begin with its prompt, as `chosen` does in preferences.
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not _is_chat(asked) or not _is_chat(answered):
        return None
    asked, answered = ([_read_message(message) for message in part] for part in (asked, answered))
    contained = {message["content"] for message in asked} <= {message["content"] for message in answered}
    return answered if contained and answered[0]["role"] != "assistant" else [*asked, *answered]


def _read_chats(table: Table, columns: Columns, chats: Sequence[Any], groups: Sequence[str | None]) -> list[Row]:
    """The last message as the completion of those before it."""
    wrong = [i for i, chat in enumerate(chats) if not _is_chat(chat)]
    shape = "list of messages {'role', 'content'} or {'from', 'value'} of text"
    _refuse_rows(table, wrong, f"{columns.completion!r} holds no {shape}")
    read = [[_read_message(message) for message in chat] for chat in chats]
    wrong = [i for i, chat in enumerate(read) if chat[-1]["role"] != "assistant"]
    _refuse_rows(table, wrong, "the last message is not the assistant's")
    short = [i for i, chat in enumerate(read) if len(chat) < 2]
    _refuse_rows(table, short, "there is no message before the answer")
    wrong = [i for i, chat in enumerate(read) if not chat[-1]["content"].strip()]
    _refuse_rows(table, wrong, "the answer is empty")
    read_keys = {*MESSAGE, "from", "value"}
    others = {key for chat in chats for message in chat for key, value in message.items() if value} - read_keys
    if others:
        logger.warning(
            "of messages in %s only role and content are used, not %s.", table.name, ", ".join(sorted(others))
        )
    if columns.history:
        turns = _read_histories(table, columns.history)
        read = [_put_in_front(chat, earlier) for chat, earlier in zip(read, turns, strict=True)]
    if columns.system:
        told = _read_texts(table, columns.system)
        read = [
            _put_in_front(chat, [{"role": "system", "content": t}]) if t else chat
            for chat, t in zip(read, told, strict=True)
        ]
    return [Row(chat[:-1], chat[-1]["content"], group) for chat, group in zip(read, groups, strict=True)]


def _put_in_front(chat: list[Message], first: list[Message]) -> list[Message]:
    """A conversation with these messages in front: two of the system become one, which templates take."""
    if not first:
        return chat
    told = [message["content"] for message in (*first, *chat) if message["role"] == "system"]
    system = [{"role": "system", "content": "\n".join(dict.fromkeys(told))}] if told else []
    return [*system, *(message for message in (*first, *chat) if message["role"] != "system")]


def _is_chat(chat: Any) -> bool:
    """True for a list of messages whose role and content are text, by these names or by those of ShareGPT."""
    if not isinstance(chat, list) or not chat or not all(isinstance(message, dict) for message in chat):
        return False
    return all(_is_text(value) for message in chat for value in _read_message(message).values())


def _read_message(message: dict[str, Any]) -> Message:
    """Role and content of a message; None where it has none."""
    role = message["from"] if message.get("role") is None and "from" in message else message.get("role")
    content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _contents(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages]


def _hold_out(
    rows: list[Row], plain: bool, fold: Fold, seed: int, name: str, *, first: bool = True
) -> tuple[list[Row], list[Row]]:
    """Training and validation: of prompts some, of running text the end, and of groups some."""
    groups = list_groups(rows)
    if groups is not None:
        contents = [make_key(row.prompt) or row.completion for row in rows]
        held = {*hold_out_groups(groups, contents, fold, seed, "text" if plain else "prompt", warn=first)}
        return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
    if not plain:
        return _hold_out_prompts(rows, fold, seed, name)
    if fold.number is not None:
        raise BadInput(
            f"{name!r} is running text, of which the end is held out, so it has no folds; leave fold out, or name the "
            "column of what belongs together (group)."
        )
    return _hold_out_end(rows, fold.share, name)


def _hold_out_prompts(rows: list[Row], fold: Fold, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """Training and validation without a prompt in both; by rank of a hash, alike on every machine."""
    keys = [make_key(row.prompt) for row in rows]
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    if len(prompts) < 2:
        raise BadInput(
            f"all {len(rows)} rows of {name!r} have one prompt, so none can be held out; add a validation file."
        )
    fold.check_count(len(prompts), "prompt")
    held = set(fold.take(prompts))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for key, row in zip(keys, rows, strict=True):
        parts[key in held].append(row)
    return parts


def _hold_out_end(rows: list[Row], share: float, name: str) -> tuple[list[Row], list[Row]]:
    """Running text before and after a point, moved on to the next paragraph, line or word if one is near.

    A document that stands on both sides of it, or is cut there and stands elsewhere too, is trained on only.
    """
    total, row = sum(len(document.completion) for document in rows), 0
    at = min(round(total * (1 - share)), total - 1)
    while row < len(rows) - 1 and at >= len(rows[row][1]):
        at -= len(rows[row][1])
        row += 1
    text = rows[row][1]
    near = text[at : at + (len(text) - at) // 4]
    at += next((near.find(gap) + len(gap) for gap in ("\n\n", "\n", " ") if gap in near), 0)
    before, after = rows[:row], rows[row + 1 :]
    if rows[row] in before or rows[row] in after:
        at = len(text)
    known = {*before, rows[row]}
    parts = (
        [*before, Row("", text[:at]), *(document for document in after if document in known)],
        [Row("", text[at:]), *(document for document in after if document not in known)],
    )
    train, held = ([document for document in part if document.completion.strip()] for part in parts)
    if not train or not held:
        raise BadInput(
            f"{name!r} has too little text to hold out a part that is not trained on; add a validation file."
        )
    return train, held


def _warn_of_overlap(train: list[Row], held: list[Row], split: str) -> None:
    """Count the prompts, or the documents without prompts, of a split that are in training too."""
    known, found = ({make_key(row.prompt) or row.completion for row in rows} for rows in (train, held))
    if found & known:
        noun = "prompts" if any(row.prompt for row in held) else "documents"
        logger.warning("%d of %d %s of %s are in training too.", len(found & known), len(found), noun, split)


def make_dataset(rows: list[Row]) -> datasets.Dataset:
    """The columns `prompt` and `completion`, and `group` where it is known."""
    prompts, completions, _ = zip(*rows, strict=True)
    groups = list_groups(rows)
    prompt = datasets.Value("string") if isinstance(prompts[0], str) else datasets.List(MESSAGE)
    features = datasets.Features({"prompt": prompt, "completion": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)}, features=features)
    return made if groups is None else made.add_column("group", groups)
