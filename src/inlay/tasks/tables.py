"""Tables of text from files and the Hub, with the line of each row, so that an error can name it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlay.errors import BadInput, DamagedFile, Unreachable
from inlay.tasks.image_decoding import explain_unreadable

if TYPE_CHECKING:
    import datasets

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (*SEPARATORS, ".jsonl", ".json", ".parquet", ".txt")
SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
PATHS = (*KINDS, ".xlsx", ".xls", ".ods", ".arrow", ".zip", ".ndjson", ".md", ".docx", ".pdf")
# How files begin that are not the text which their suffix announces.
SIGNATURES = {
    b"PAR1": "parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
}


@dataclass(frozen=True)
class Table:
    """Named columns of equal length.

    Attributes:
        name: What an error calls the table: its path, or split and data set.
        names: Of the columns.
        column: All values of a column by its name.
        places: Where each row begins, from 1; of streamed data the shard too.
        unit: What places count: lines of a file, its header among them, or rows.
    """

    name: str
    names: list[str]
    column: Callable[[str], Sequence[Any]]
    places: Sequence[int | str]
    unit: Literal["line", "row"] = "row"

    def __len__(self) -> int:
        return len(self.places)

    def where(self, rows: Sequence[int]) -> str:
        """These rows, counted from 0, in the words of an error: 2 rows of 'a.csv' (lines 3, 8)."""
        one = len(rows) == 1
        places = list_first([self.places[row] for row in rows])
        return f"{len(rows)} row{'' if one else 's'} of {self.name!r} ({self.unit}{'' if one else 's'} {places})"


def kind_of(path: Path) -> str:
    """The suffix that tells how to read a file: `.txt` of both a.txt and A.TXT.GZ."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_table(path: Path) -> Table:
    """One file as a table; running text (.txt) is one row with the column `text`.

    Text is UTF-8, with or without a byte order mark; .gz is unpacked.

    Raises:
        InlayError: The file is empty, not UTF-8 or broken, with the line where it is; two columns have one name.
    """
    kind, name = kind_of(path), str(path)
    if kind not in KINDS:
        raise BadInput(f"{name!r} is neither a table nor text ({', '.join(KINDS)}); convert it.")
    if kind == ".parquet":
        table = _read_parquet(path)
    else:
        text = _read_text(path)
        if kind == ".txt":
            table = Table(name, ["text"], {"text": [text]}.__getitem__, [1], "line")
        elif kind in SEPARATORS:
            table = _parse_separated(text, name, SEPARATORS[kind])
        elif kind == ".json" and text.lstrip().startswith("["):
            table = _parse_json_array(text, name)
        else:
            table = _parse_json_lines(text, name)
    twice = [column for column in dict.fromkeys(table.names) if table.names.count(column) > 1]
    if not len(table) or twice:
        raise BadInput(
            f"{name!r} has two columns {list_first(twice)}; rename one." if twice else f"{name!r} has no rows."
        )
    return table


def find_column(table: Table, column: str) -> str | None:
    """A column's name as the table writes it."""
    if column in table.names:
        return column
    alike = [name for name in table.names if name.strip().lower() == column.lower()]
    return alike[0] if len(alike) == 1 else None


def hub_splits(name: str, revision: str | None, wanted: str) -> dict[str, datasets.Dataset]:
    """Every split of a Hub dataset. Of .csv files all values are text as it is written, but for classes it declares.

    Raises:
        InlayError: It cannot be had, or the name is that of a file; the message says what else was `wanted`.
    """
    import datasets

    _check_hub_id(name)
    try:
        found = dict(datasets.load_dataset(name, revision=revision))
        first = next(iter(found.values()))
        if first.info.builder_name == "csv":  # pandas has read 001 as 1, and None as nothing
            text = {
                column: feature if isinstance(feature, datasets.ClassLabel) else datasets.Value("string")
                for column, feature in first.features.items()
            }
            options = {"features": datasets.Features(text), "keep_default_na": False, "na_values": [""]}
            found = dict(datasets.load_dataset(name, revision=revision, **options))
        return found
    except Exception as error:  # no network, no such dataset or revision, gated: each has its own type
        raise _explain_unreachable(name, error, wanted) from error


def hub_rows(name: str, revision: str | None, wanted: str) -> dict[str, datasets.IterableDataset]:
    """Every split of a Hub dataset, to be read as it is needed; errors as in `hub_splits`."""
    import datasets

    _check_hub_id(name)
    try:
        return dict(datasets.load_dataset(name, revision=revision, streaming=True))
    except Exception as error:  # no network, no such dataset or revision, gated: each has its own type
        raise _explain_unreachable(name, error, wanted) from error


def _explain_unreachable(name: str, error: Exception, wanted: str) -> Unreachable:
    return Unreachable(
        f"{name!r} is no file or folder here, and the Hub gave {type(error).__name__} ({explain_unreadable(error)}); "
        f"check the name and the network, or pass {wanted}."
    )


def _check_hub_id(name: str) -> None:
    """Refuse what can only be meant for a file or folder, and is none here.

    Raises:
        InlayError: Offers the path with slashes where that is there.
    """
    slashed = Path(name.replace("\\", "/"))
    if "\\" in name and slashed.exists():
        raise BadInput(f"there is no file or folder {name!r}; write it with slashes, {str(slashed)!r}.")
    # A Hub id is a name, or an owner and a name; a suffix of files and a drive are of paths.
    is_path = re.match(r"[A-Za-z]:|[~./]", name) or "\\" in name or name.count("/") > 1 or kind_of(Path(name)) in PATHS
    if is_path:
        raise BadInput(f"there is no file or folder {name!r} on this machine; check the path.")


def list_first(names: Sequence[object]) -> str:
    """The first five of a list, for an error."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # gzip, whatever the file is called
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFile(f"'{path}' cannot be read: {explain_unreadable(error)}.") from error
    kind = next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), None)
    if kind:
        raise BadInput(f"'{path}' holds {kind}, not text in UTF-8; give it the suffix of what it is, or convert it.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DamagedFile(f"line {line} of '{path}' is not UTF-8; save the file as UTF-8.") from error
    if not text.strip():
        raise DamagedFile(f"'{path}' is empty.")
    return text


def _parse_separated(text: str, name: str, separator: str) -> Table:
    """Rows of .csv and .tsv; a quoted value may go over several lines, and empty lines count but are no rows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    places, line = [], 1
    _check_separator(text, name, separator)
    try:
        for row in reader:
            if row:
                rows.append(row)
                places.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DamagedFile(
            f"line {line} of {name!r} cannot be read as a table row: {explain_unreadable(error)}. Fix its quotes, or "
            "use .jsonl."
        ) from error
    header, rows, places = [column.strip() for column in rows[0]], rows[1:], places[1:]
    table = Table(name, header, lambda column: [row[header.index(column)] for row in rows], places, "line")
    wrong = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if wrong:
        raise DamagedFile(
            f"{table.where(wrong)}: the header names {len(header)} columns, and these have more or fewer values."
        )
    return table


def _check_separator(text: str, name: str, separator: str) -> None:
    """Refuse a header of one column that holds another separator, as spreadsheets write where the comma is decimal."""
    header = text.lstrip().split("\n", 1)[0]
    used = next((mark for mark in (";", "\t", "|", ",") if mark in header), None)
    if separator not in header and used:
        words = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
        remedy = (
            "name it .tsv" if used == "\t" else "name it .csv" if used == "," else "save it with commas, or as .jsonl"
        )
        raise BadInput(f"the columns of {name!r} are separated by {words[used]}, not {words[separator]}; {remedy}.")


def _parse_json_lines(text: str, name: str) -> Table:
    rows, places = [], []
    # Not splitlines: a JSON string may hold other ends of lines, such as U+2028.
    for place, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_parse_json(line, f"line {place} of {name!r}"))
            places.append(place)
    return _table_of_objects(rows, name, places, "line")


def _parse_json_array(text: str, name: str) -> Table:
    rows = _parse_json(text, repr(name))
    return _table_of_objects(rows, name, range(1, len(rows) + 1), "row")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal)  # 1.10 stays 1.10: a label is text as it is written
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{where} is not JSON: {explain_unreadable(error)}.") from error


def _table_of_objects(rows: list[Any], name: str, places: Sequence[int], unit: Literal["line", "row"]) -> Table:
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    names = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    table = Table(name, names, lambda column: [row.get(column) for row in rows], places, unit)
    if wrong:
        raise DamagedFile(f"{table.where(wrong)} hold no JSON objects with named values; fix or remove them.")
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        rows = ParquetFile(path).read()
        rows.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DamagedFile(f"'{path}' cannot be read as parquet: {explain_unreadable(error)}.") from error
    return Table(str(path), rows.column_names, lambda name: rows.column(name).to_pylist(), range(1, len(rows) + 1))
