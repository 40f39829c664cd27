"""Data in shards, opened without being loaded: .tar files (WebDataset), .parquet and .jsonl files, and Hub datasets."""

import glob
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.tasks.evaluation import Split, Training
from inlay.tasks.image_decoding import explain_unreadable
from inlay.tasks.sampling import normalise_label, sort_labels
from inlay.tasks.tables import SPLITS, hub_rows, kind_of, list_first
from inlay.train.stream import Stream

BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "json"}  # of datasets, by the suffix of a shard
CLASS_FILES = ("labels.txt", "classes.txt")
HELD_OUT, MOST_HELD_OUT = 0.05, 1000  # share of a stream that is not trained on, and how much of it is scored
MOST_SCORED = 5000  # rows of a split of its own


@dataclass(frozen=True)
class Shards:
    """One split of streamed data.

    Attributes:
        rows: All rows, with columns of any name; images undecoded.
        files: Where each shard is; none on the Hub.
    """

    rows: datasets.IterableDataset
    files: tuple[Path, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the files."""
        return [file.name for file in self.files]

    @property
    def folder(self) -> Path | None:
        """Where the first file is."""
        return self.files[0].parent if self.files else None


def is_streamed(name: str, asked: bool | None) -> bool:
    """Whether data is read as it is needed: it was asked for, or this is a glob or a .tar file."""
    return bool(asked) or _is_pattern(name) or kind_of(Path(name)) == ".tar"


def open_shards(name: str, revision: str | None = None) -> dict[str, Shards]:
    """The splits of streamed data: train, and where there are any validation and test.

    Args:
        name: A file, a folder of shards, a glob of them (`data/train-*.tar`, `data/train-{000..127}.tar`) or a Hub
            dataset id. Files that are called after splits belong to these. A glob of training shards also finds the
            validation and test shards next to them.
        revision: Branch, tag or commit of a Hub dataset.

    Raises:
        InlayError: There are no such shards, they are of several kinds, or the first one cannot be read.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    if not _is_pattern(name) and not path.exists():
        found = hub_rows(name, revision, "a folder or a glob of shards")
        named = {SPLITS[own]: own for own in reversed(SPLITS) if own in found}
        named = named if "train" in named or len(found) > 1 else {"train": next(iter(found))}
        if "train" not in named:
            raise BadInput(f"{name!r} has no split 'train'; it has {list_first(list(found))}.")
        return {split: Shards(_leave_undecoded(found[own], name)) for split, own in named.items()}
    if revision is not None:
        raise BadInput(f"revision is for a Hub dataset, but {name!r} is local; leave it out.")
    return {split: _open_files(files) for split, files in _find_files(name, path).items()}


def choose_scored(
    name: str, splits: Mapping[str, Shards], chosen: Split, training: Training
) -> tuple[Shards, bool, list[str]]:
    """What is scored of streamed data.

    Args:
        name: Of the data.
        splits: From `open_shards`.
        chosen: validation, or test where the data has it.
        training: Of the adapter.

    Returns:
        The shards, whether only what is held out of them is scored, and a note.

    Raises:
        InlayError: No such split.
    """
    if chosen not in ("validation", "test") or (chosen == "test" and "test" not in splits):
        raise Unsupported(
            f"of streamed data what is held out is scored, or a split of its own, but not {chosen!r} of {name!r}; "
            "leave the split out."
        )
    if chosen in splits:
        note = f"{name!r} is streamed; at most {MOST_SCORED:,} rows of its {chosen} shards are scored."
        return splits[chosen], False, [note]
    note = (
        f"{name!r} is streamed; what was scored is of the part that recipes hold out (seed {training.seed}), at most "
        f"{MOST_HELD_OUT:,} rows."
    )
    return splits["train"], True, [note]


def read_scored(stream: Stream, cut: bool, name: str, noun: str) -> list[Any]:
    """The rows to score, undecoded: the first ones of a split of its own, or with `cut` of what is held out.

    Args:
        stream: Of these rows only.
        cut: As `choose_scored` returns it.
        name: Of the data.
        noun: What the rows are, in the plural.

    Raises:
        InlayError: There are none.
    """
    rows = stream.read_first(MOST_HELD_OUT if cut else MOST_SCORED)
    if rows:
        return rows
    if cut:
        raise BadInput(
            f"none of the {noun} of {name!r} were held out, as there are too few to stream; add validation shards, or "
            "pass a folder or a table without --stream."
        )
    raise BadInput(f"the shards to score of {name!r} have no {noun}; add some.")


def is_held_out(key: bytes, seed: int, share: float = HELD_OUT) -> bool:
    """Whether an example is not trained on. It depends on the example and the seed only: not on the order of the data,
    nor on what else is in it."""
    digest = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def read_classes(shards: Shards, file: str | None) -> list[str] | None:
    """Class names in the order of their numbers, one a line: of this file, or of labels.txt or classes.txt next to the
    shards; None without either.

    Raises:
        InlayError: The file cannot be read, or holds fewer than two names or one twice.
    """
    folder = shards.folder
    beside = [folder / each for each in CLASS_FILES if (folder / each).is_file()] if folder else []
    if file is None and not beside:
        return None
    path = beside[0] if file is None else Path(file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the class names in '{path}' cannot be read: {explain_unreadable(error)}.") from error
    names = [normalise_label(line.strip()) for line in lines if line.strip()]
    if len(set(names)) < max(2, len(names)):
        raise BadInput(f"'{path}' must hold two or more class names, one a line, none twice; it holds {len(names)}.")
    return names


def find_classes(shards: Shards, column: str, name: str, keys: Sequence[str] = ()) -> list[str]:
    """Class names from all labels of local shards, without reading what else they hold.

    Args:
        shards: To train on.
        column: Of the labels; of .tar files the suffix of their members.
        name: Of the data.
        keys: Where the label is in a value of the column, such as ("label",) of JSON.

    Raises:
        InlayError: The data is not on this machine.
    """
    if not shards.files:
        raise BadInput(
            f"the labels of {name!r} are no classes that it names; write their names into a file, one a line, and pass "
            "it as --classes."
        )
    values: set[str] = set()
    for file in shards.files:
        rows = _read_members(file, column) if kind_of(file) == ".tar" else _read_column(file, column)
        for value in rows:
            for key in keys:
                value = value[key]
            values.add(write_label(value))
    return sort_labels(list(values))


def write_label(value: Any) -> str:
    """A label as text: true and false as JSON writes them, everything else as it stands."""
    return str(value).lower() if isinstance(value, bool) else normalise_label(str(value))


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[{") and not Path(name).exists()


def _find_files(name: str, path: Path) -> dict[str, list[Path]]:
    """The files of each split."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if kind_of(file) in BUILDERS and file.name[0] != "."]
    else:
        files = [path] if path.exists() else [Path(file) for each in _expand(str(path)) for file in _match(each)]
    if not files:
        raise BadInput(f"no shards ({', '.join(BUILDERS)}) are found by {name!r}; check the path.")
    splits = _split_by_name(files)
    if set(splits) == {"train"} and not path.is_dir():
        near = [other for folder in dict.fromkeys(file.parent for file in files) for other in sorted(folder.iterdir())]
        others = _split_by_name([file for file in near if kind_of(file) == kind_of(files[0])])
        splits |= {split: found for split, found in others.items() if split in ("validation", "test")}
    if not splits:
        splits = {"train": files}
    kinds = {kind_of(file) for found in splits.values() for file in found}
    if "train" not in splits or len(kinds) > 1 or not kinds <= set(BUILDERS):
        has = list_first([file.name for file in files])
        raise BadInput(
            f"{name!r} must be shards of one kind ({', '.join(BUILDERS)}), some to train on, but finds {has}; pass the "
            "ones you mean."
        )
    return splits


def _split_by_name(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Those of the files that are called after a split."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        if match := re.match(rf"({'|'.join(SPLITS)})(set)?(?![a-z])", file.name.lower()):
            splits.setdefault(SPLITS[match[1]], []).append(file)
    return splits


def _expand(pattern: str) -> list[str]:
    """`a-{008..010}.tar` as a-008.tar, a-009.tar, a-010.tar: the notation of WebDataset."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None:
        return [pattern]
    numbers = range(int(braces[1]), int(braces[2]) + 1)
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [whole for i in numbers for whole in _expand(f"{before}{i:0{len(braces[1])}}{after}")]


def _match(pattern: str) -> list[str]:
    """The files of a glob; a name without one must exist.

    Raises:
        InlayError: There is no such file.
    """
    if not any(mark in pattern for mark in "*?["):
        if not Path(pattern).is_file():
            raise BadInput(f"there is no shard {pattern!r}; check the range in braces.")
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _open_files(files: Sequence[Path]) -> Shards:
    builder = BUILDERS[kind_of(files[0])]
    escaped = [glob.escape(str(file.absolute())) for file in files]  # datasets takes [ and * in a path for a pattern
    try:
        rows = datasets.load_dataset(builder, data_files={"train": escaped}, split="train", streaming=True)
    except Exception as error:  # what a reader raises for a bad file is not documented
        raise DamagedFile(f"'{files[0]}' cannot be read: {explain_unreadable(error.__cause__ or error)}.") from error
    return Shards(_leave_undecoded(rows, str(files[0])), tuple(files))


def _leave_undecoded(rows: datasets.IterableDataset, name: str) -> datasets.IterableDataset:
    """With images as bytes, which data workers decode."""
    if rows.features is None:
        rows = rows._resolve_features()
    if rows.features is None:
        raise BadInput(f"{name!r} has no rows; pass data with some.")
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _read_column(file: Path, column: str) -> list[Any]:
    if kind_of(file) == ".parquet":
        from pyarrow.parquet import read_table  # type: ignore[import-untyped]

        found: list[Any] = read_table(file, columns=[column]).column(column).to_pylist()
        return found
    from inlay.tasks.tables import read_table as read_text_table

    return list(read_text_table(file).column(column))


def _read_members(file: Path, suffix: str) -> list[Any]:
    """The values of the members of a .tar file with this suffix; the others are passed over."""
    import json
    import tarfile

    decode = json.loads if suffix == "json" else lambda text: text.strip()
    with tarfile.open(file) as archive:
        members = (member for member in archive if member.name.rpartition("/")[2].partition(".")[2] == suffix)
        return [decode(archive.extractfile(member).read().decode()) for member in members]  # type: ignore[union-attr]
