"""The folder of an exported model: what it says of itself in export.json, read and checked without ONNX Runtime.

export.json holds the task, the labels, the preprocessing, where the model is from, the opset and the versions of the
libraries, the digests of the files, a golden output, and of a quantised model the table of the probe that chose it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.adapters.file import CONFIG as ADAPTER_CONFIG
from inlay.adapters.file import expand_path
from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.files.bounded_json import parse_json
from inlay.tasks import find_task
from inlay.tasks.task import Task

RECORD = "export.json"
FORMAT = 1  # raised when an older inlay would read it wrong
RUNTIMES = ("onnxruntime", "torch")
MAX_BYTES = 16_000_000
_FIELDS: dict[str, type] = {
    "format": int,
    "task": str,
    "source": dict,
    "labels": list,
    "groups": dict,
    "preprocessing": dict,
    "mode": str,
    "runtime": str,
    "output": str,
    "golden": list,
    "files": dict,
    "training": dict,
}


@dataclass(frozen=True)
class ExportedFile:
    """The folder of an exported model that holds together.

    Attributes:
        folder: Where it is.
        record: export.json.
        task: What the model is for, a row of TASKS.
    """

    folder: Path
    record: dict[str, Any]
    task: Task

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """Of labels, in a combination of classifiers, as in `AdapterFile.groups`."""
        return dict(self.record["groups"])

    @property
    def bytes(self) -> int:
        """Of the files of the model: its graph, or its weights."""
        return sum((self.folder / name).stat().st_size for name in self.record["files"])


def is_exported(folder: str | Path) -> bool:
    """Whether a folder of this machine says that it is an exported model."""
    return (expand_path(folder) / RECORD).is_file()


def read_exported(folder: str | Path) -> ExportedFile:
    """Read and check the folder of an exported model; its files are what was written.

    Raises:
        InlayError: Not such a folder, a newer format, or damaged files.
    """
    where = expand_path(folder)
    path = where / RECORD
    if not path.is_file():
        hint = "; it is an adapter: use load_adapter" if (where / ADAPTER_CONFIG).is_file() else ""
        raise BadInput(
            f"{where} is not an exported model: it has no {RECORD}{hint}. Give the folder that `inlay export` or "
            "`inlay quantize` wrote."
        )
    record = _read_record(path)
    if record["format"] > FORMAT:
        raise Unsupported(
            f"{where} was exported in format {record['format']}, this inlay reads up to {FORMAT}: "
            "pip install --upgrade inlay."
        )
    for name, digest in record["files"].items():
        file = where / name
        if Path(name).name != name or not isinstance(digest, str) or not file.is_file():
            raise DamagedFile(f"{where} has no file {name!r}, which its {RECORD} names; export it again.")
        if hash_file(file) != digest:
            raise DamagedFile(f"{file} is not what was exported: its digest is another; export it again.")
    return ExportedFile(where, record, find_task(record["task"]))


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(path: Path) -> dict[str, Any]:
    """export.json, with all that loading takes from it."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DamagedFile(f"{path} has {size:,} bytes, and inlay reads at most {MAX_BYTES:,}; export it again.")
    try:
        record = parse_json(path.read_text(encoding="utf-8"), exact=True)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not readable as JSON ({error}); export it again.") from None
    wrong = [k for k, kind in _FIELDS.items() if not isinstance(record, dict) or type(record.get(k)) is not kind]
    if not wrong:
        wrong += ["labels"] * (not all(isinstance(label, str) for label in record["labels"]))
        wrong += ["groups"] * (not _are_groups(record["groups"], len(record["labels"])))
        wrong += ["golden"] * (not all(type(value) in (int, float) for value in record["golden"]))
        wrong += ["runtime"] * (record["runtime"] not in RUNTIMES)
    if wrong:
        raise DamagedFile(f"{path} has no usable {wrong[0]!r}; export it again.")
    return dict(record)


def _are_groups(groups: dict[str, Any], labels: int) -> bool:
    """Whether each group names classes with the numbers of their logits."""
    numbers = [i for rows in groups.values() for i in (rows.values() if isinstance(rows, dict) and rows else [None])]
    return all(type(i) is int and 0 <= i < labels for i in numbers)
