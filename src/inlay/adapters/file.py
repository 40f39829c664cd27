"""Read an adapter folder as bytes: what it claims to be, checked before a tensor is touched.

Inside the safetensors metadata, `inlay` holds a JSON record (base, labels, preprocessing, head, golden output), and
`inlay_xxh3_128` (in older files `inlay_sha256`) the digest of everything else in the file, so that a flipped bit is
found wherever it is.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from inlay.adapters.config import check_config
from inlay.adapters.metadata import check_record
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, WEIGHTS, find_peft_keys, find_weights
from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.files.bounded_json import is_text, parse_json
from inlay.files.tensor_header import find_digest, read_header

CONFIG, METRICS, CARD = "adapter_config.json", "metrics.json", "README.md"
PICKLE = "adapter_model.bin"  # of peft before 0.7; only an import opens one
ORIGIN = "origin.json"  # of a pulled folder: repository, commit and hashes
FORMAT = 1  # of the record; raised when an older inlay would read it wrong
# Larger ones are refused before they are read; a usual config has a few kB.
MAX_BYTES = {CONFIG: 1_000_000, METRICS: 16_000_000, WEIGHTS: 16_000_000_000}
_INCIDENTAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder that holds together.

    Attributes:
        folder: Where it is.
        config: adapter_config.json.
        shapes: Key, as peft has it, and shape of every tensor.
        record: What inlay stored, empty for an adapter saved by plain peft.
        metrics: metrics.json, empty if there is none.
        bytes_weights: Size of the file with the tensors.
        digest: Of that file's content, as stored in it; empty for an adapter saved by plain peft.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    record: dict[str, Any]
    metrics: dict[str, Any]
    bytes_weights: int
    digest: str = ""

    @property
    def name(self) -> str:
        """The folder's name; of one in the Hub's cache that of the repository."""
        cached = _cached(self.folder)
        return cached["repo"] if cached else self.folder.resolve().name

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return find_weights(self.folder)

    @property
    def origin(self) -> dict[str, str]:
        """`repo` and `commit` on the Hub that it is a copy of; empty for one that was made here."""
        path = self.folder / ORIGIN
        noted = _cached(self.folder) or (_json(path) if path.is_file() else {})
        return {key: noted[key] for key in ("repo", "commit") if isinstance(noted.get(key), str)}

    @property
    def base_name(self) -> str:
        """The base it was trained on, as `load_base` takes it; empty if unknown."""
        return str(self.record.get("base", {}).get("name") or self.config.get("base_model_name_or_path") or "")

    @property
    def labels(self) -> list[str]:
        """Class names, empty if unknown."""
        return list(self.record.get("labels", []))

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """Of a combination of classifiers: by the adapter that a group of labels is from, its class names with the "
        "logits that stand for them; else empty."""
        found, count = self.record.get("tasks", {}), len(self.labels)
        named = isinstance(found, dict) and all(isinstance(rows, dict) and rows for rows in found.values())
        if not named or not all(type(i) is int and 0 <= i < count for rows in found.values() for i in rows.values()):
            raise DamagedFile(
                f"the tasks in the record of {self.folder} do not name classes with their logits; download it again."
            )
        return dict(found)


def read_adapter(folder: str | Path, *, digest: bool = True) -> AdapterFile:
    """Read and check an adapter folder without loading tensors or a base.

    Args:
        folder: Of the adapter.
        digest: Compare the tensors with the digest that was stored with them; False where that is done when they are
            read, or for a file of one's own, just made.

    Raises:
        InlayError: Not an adapter folder; files that are links out of it, or too large; a config that is no JSON, asks
            for harm or was changed since; weights that are truncated, damaged, pickled, or an LFS pointer; tensor names
            that are paths; a record of a newer format.
    """
    return take_all_steps(folder, digest=digest).file()


def take_all_steps(folder: str | Path, *, digest: bool = True) -> "Reading":
    """The same, with the header of the file, for who reads the tensors next."""
    reading = Reading(Path(folder), digest)
    for name in READING_STEPS:
        run_step(name, reading)
    return reading


@dataclass
class Reading:
    """An adapter folder while it is read: what each step leaves to those after it.

    Attributes:
        folder: Of the adapter.
        digest: As in `read_adapter`.
        header: Of the safetensors file.
        shapes: Key, as peft has it, and shape of every tensor.
        config: adapter_config.json.
        record: What inlay stored.
        metrics: metrics.json.
    """

    folder: Path
    digest: bool = True
    header: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Path:
        """The file with the tensors, the same one in every step."""
        return find_weights(self.folder)

    @property
    def metadata(self) -> dict[str, str]:
        """Of the safetensors file."""
        return dict(self.header.get("__metadata__", {}))

    def file(self) -> AdapterFile:
        """What was read, once all steps are done."""
        size = self.weights.stat().st_size
        digest = find_digest(self.metadata)
        return AdapterFile(self.folder, self.config, self.shapes, self.record, self.metrics, size, digest)


def run_step(name: str, reading: Reading) -> None:
    """Take one step of `READING_STEPS`.

    Raises:
        InlayError: What the step finds, or a file that cannot be read at all.
    """
    try:
        READING_STEPS[name](reading)
    except OSError as error:
        raise DamagedFile(f"{reading.folder} cannot be read ({error.strerror or error}).") from error


def _check_folder(reading: Reading) -> None:
    """The files are there, themselves, and no larger than inlay reads."""
    folder = reading.folder
    if not (folder / CONFIG).is_file():
        state = "does not exist"
        if folder.exists():
            state = f"is not an adapter: it has no {CONFIG}" if folder.is_dir() else "is a file"
            if inner := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
                state += f"; adapters in it: {', '.join(inner[:5])}{' ...' if len(inner) > 5 else ''}"
            if (folder / PIPELINE_WEIGHTS).is_file():
                state += f"; inlay import makes one of its {PIPELINE_WEIGHTS}"
        raise BadInput(f"{folder} {state}; give the folder that save_adapter or peft wrote.")
    if not reading.weights.is_file():
        pickled = (
            f" ({PICKLE} is a pickle, which loading never opens: inlay import makes safetensors of its tensors)"
            if (folder / PICKLE).exists()
            else ""
        )
        raise DamagedFile(f"{folder} has no {WEIGHTS}{pickled}; save the adapter again as safetensors.")
    if not is_text(folder.name):
        raise BadInput(f"the name of {str(folder)!r} is not valid UTF-8; rename it.")
    _check_files(folder, reading.weights)


def _read_tensor_header(reading: Reading) -> None:
    """The names and shapes of the tensors, which fill the file without a gap; its checksum."""
    reading.header = read_header(reading.weights, digest=reading.digest)
    keys = find_peft_keys(reading.weights, reading.header)
    reading.shapes = {key: tuple(reading.header[stored]["shape"]) for stored, key in keys.items()}


def _read_config(reading: Reading) -> None:
    """The config, which asks for nothing that the tensors cannot give, and for no harm."""
    path = reading.folder / CONFIG
    config = _json(path, exact=True)
    if not isinstance(config.get("peft_type"), str):
        raise DamagedFile(f"{path} names no peft_type, so it is not an adapter's config.")
    check_config(config, reading.shapes, path)
    reading.config = config


def _read_record_and_metrics(reading: Reading) -> None:
    """What inlay stored inside, of this very config; what was measured."""
    folder = reading.folder
    reading.metrics = _json(folder / METRICS) if (folder / METRICS).is_file() else {}
    record = _record(folder, reading.weights, reading.metadata)
    if record and record["config"] != hash_config(reading.config):
        raise DamagedFile(
            f"{folder / CONFIG} is not what was saved with the weights; download it again, or save the adapter again."
        )
    reading.record = record


# In this order; the first of the CHECKS are these.
READING_STEPS: dict[str, Callable[[Reading], None]] = {
    "files": _check_folder,
    "header": _read_tensor_header,
    "config": _read_config,
    "record": _read_record_and_metrics,
}


def _check_files(folder: Path, weights: Path) -> None:
    """Each file is there itself, or is a link within: the Hub's cache keeps them in `blobs` next to `snapshots`."""
    inside = folder.resolve()
    homes = [inside, *(parent.parent / "blobs" for parent in inside.parents if parent.name == "snapshots")]
    for path in (folder / CONFIG, weights, folder / METRICS, folder / CARD):
        if path.is_symlink() and not any(_target(path).is_relative_to(home) for home in homes):
            raise Unsupported(f"{path} is a link to a file outside of the folder; put the file itself there.")
        limit = MAX_BYTES.get(WEIGHTS if path == weights else path.name)
        if limit and path.is_file() and (size := path.stat().st_size) > limit:
            raise DamagedFile(
                f"{path} has {size:,} bytes, and inlay reads at most {limit:,}; that is too large for an adapter."
            )


def _target(link: Path) -> Path:
    """Where it leads in the end; one that leads in a circle, nowhere."""
    try:
        return link.resolve()
    except RuntimeError:  # before Python 3.13
        return Path()


def hash_config(config: dict[str, Any]) -> str:
    """Digest of what an adapter_config.json says of the computation: names and versions do not count."""
    counted = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def expand_path(path: str | Path) -> Path:
    """The path with ~ and ~user expanded, or as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _cached(folder: Path) -> dict[str, Any]:
    """Repository and commit of a folder in the Hub's cache, models--user--name/snapshots/COMMIT/..., or nothing."""
    parts = folder.absolute().parts
    for at in range(len(parts) - 2, 0, -1):
        if parts[at] == "snapshots" and parts[at - 1].startswith("models--"):
            repo = parts[at - 1].removeprefix("models--").replace("--", "/")
            return {"repo": "/".join([repo, *parts[at + 2 :]]), "commit": parts[at + 1]}
    return {}


def _json(path: Path, *, exact: bool = False) -> dict[str, Any]:
    """A JSON object; `exact` as in `parse_json`."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer: run `git lfs pull`")
        content = parse_json(text, exact=exact)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not readable as JSON ({error}); download the adapter again.") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _record(folder: Path, weights: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "inlay" not in metadata:
        return {}
    try:
        record = parse_json(metadata["inlay"])
        version = record["format"]
        if type(version) is not int:
            raise ValueError("format is not a number")
        if not isinstance(record.get("task", ""), str):
            raise ValueError("task is not text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(
            f"the record inside {weights} cannot be read ({error}); download the adapter again."
        ) from None
    if version > FORMAT:
        raise Unsupported(
            f"{folder} was saved in format {version}, this inlay reads up to {FORMAT}: pip install --upgrade inlay."
        )
    check_record(record, weights)
    return record
