"""Write a combination as an adapter folder, tensor by tensor, and read it back."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from inlay.adapters.file import CARD, CONFIG, FORMAT, METRICS, hash_config, read_adapter
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, describe_parts, find_stored_key, find_weights
from inlay.combine.heads import Heads
from inlay.combine.parts import Array, Source
from inlay.combine.weights import describe_weight
from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import write_json
from inlay.files.tensor_header import DIGEST, start_digest

_PIECE = 1 << 15  # numbers


class Stream:
    """A safetensors file in float32 that is written one tensor at a time, in the order of its header.

    Each tensor is read back and compared with what is in memory; another thread takes the digest for the header from
    what stands in the file. Keys are those of peft; a pipeline's file gets its own.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
        self.path, self._left = path, dict(shapes)
        header: dict[str, Any] = {"__metadata__": {**metadata, DIGEST: "0" * 64}}
        at = 0
        for key, shape in shapes.items():
            end = at + 4 * int(np.prod(shape, dtype=np.int64))
            header[find_stored_key(path, key)] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        self._header, self._back = header, np.empty(_PIECE, "<i4")
        self._file = path.open("w+b", buffering=0)
        self._write_bytes(self._encode_header())
        self._written: SimpleQueue[int] = SimpleQueue()
        self._pool = ThreadPoolExecutor(1)
        self._digest = self._pool.submit(self._digest_what_is_written, self._file.tell())

    def _encode_header(self) -> bytes:
        text = json.dumps(self._header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _write_bytes(self, data: Any) -> None:
        view, at = memoryview(data), 0
        while at < len(view):
            at += self._file.write(view[at : at + (1 << 30)])

    def _digest_what_is_written(self, start: int) -> str:
        """The digest of the file, as far as it is written, until a size of 0 tells its end."""
        seen, piece = start_digest(self._header), memoryview(bytearray(4 * _PIECE))
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while left := self._written.get():
                while left and (count := file.readinto(piece[:left])):
                    seen.update(piece[:count])
                    left -= count
                if left:
                    raise ComputationFailed(f"{self.path} was cut short while it was written; write it again.")
        return str(seen.hexdigest())

    def write(self, key: str, value: Array) -> None:
        """The next tensor.

        Raises:
            InlayError: It holds NaN or Inf.
        """
        expected = next(iter(self._left))
        if key != expected or value.shape != self._left.pop(expected):
            raise ValueError(f"expected {expected}, got {key} {value.shape}")  # a fault of this package
        flat = np.ascontiguousarray(value, "<f4").reshape(-1)
        for i in range(0, len(flat), _PIECE):  # in pieces that stay in the processor's cache
            if not np.isfinite(flat[i : i + _PIECE]).all():
                raise ComputationFailed(f"the combined tensor {key!r} holds NaN or Inf; nothing was written.")
        self._write_bytes(flat.view(np.uint8))
        if flat.nbytes:
            self._written.put(flat.nbytes)
        self._file.seek(-flat.nbytes, os.SEEK_CUR)
        for i in range(0, len(flat), _PIECE):
            piece = flat[i : i + _PIECE].view(np.int32)
            back = self._back[: len(piece)]
            count = self._file.readinto(memoryview(back.view(np.uint8)))  # type: ignore[arg-type]
            if count != back.nbytes or (piece != back).any():
                raise ComputationFailed(
                    f"{self.path} does not hold what was written to it; is the disk full or failing?"
                )

    def close(self) -> None:
        """Put the digest in its place."""
        if self._left:
            raise ValueError(f"{next(iter(self._left))} was not written")
        self._written.put(0)
        self._header["__metadata__"][DIGEST] = self._digest.result()
        self._file.seek(0)
        self._write_bytes(self._encode_header())
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file, whatever it holds."""
        self._written.put(0)
        self._pool.shutdown()
        self._file.close()


def make_record(sources: Sequence[Source], heads: Heads, keep: str | None, made: dict[str, Any]) -> dict[str, Any]:
    """What loading has to know: of the adapters, all but labels and head; empty where plain peft has saved all of them.

    A golden output is left out: it would take the base.

    Raises:
        InlayError: The adapters take other inputs, or are for other tasks.
    """
    having = [source for source in sources if source.file.record]
    if not having:
        return {}
    kept = next((source for source in having if source.name == keep), None)
    first = (kept or having[0]).file.record
    for source in having if kept is None else ():
        for what in ("task", "preprocessing"):
            if source.file.record.get(what) != first.get(what):
                differs = [
                    k
                    for k, v in _flatten(first.get(what)).items()
                    if _flatten(source.file.record.get(what)).get(k) != v
                ]
                raise BadInput(
                    f"adapters {having[0].name!r} and {source.name!r} were trained with another {what} "
                    f"({', '.join(differs) or 'more settings'}), and a combination has one; say whose is kept: heads="
                    f"{having[0].name!r} or {source.name!r}."
                )
    labels = heads.labels or list(first["labels"])
    return {
        "format": FORMAT,
        "task": first["task"],
        "base": first["base"],
        "labels": labels,
        **({"tasks": heads.groups} if heads.groups else {}),
        "head": first["head"],
        "preprocessing": first["preprocessing"],
        "golden": [],
        "combined": made,
    }


def _flatten(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}


def write_settings(folder: Path, config: dict[str, Any], record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """adapter_config.json, metrics.json and README.md; the config is the one whose fingerprint the record has."""
    write_json(folder / CONFIG, config)
    write_json(folder / METRICS, metrics)
    made = metrics["combined"]
    rows = "\n".join(f"| {row['name']} | {describe_weight(row['weight'])} |" for row in made["of"])
    said = (
        f"## Combined\n\nBy `{made['rule']}` ({made['paper']}). Relative error of the update: {made['error']:.2g}. "
        f"Head: {made['heads']}.\n\n| adapter | weight |\n|---|---|\n{rows}\n"
    )
    if "tasks" in record:
        groups = "; ".join(f"`{name}`: {', '.join(rows)}" for name, rows in record["tasks"].items())
        said += f"\nGroups of labels, to choose one by `predict(..., group=)`: {groups}.\n"
    if record:
        from inlay.adapters.card import make_card

        text = make_card(record, config, metrics)
        text = text.replace("## Results", f"{said}\n## Results", 1)
    else:
        library = "diffusers" if find_weights(folder).name == PIPELINE_WEIGHTS else "peft"
        name = folder.name.strip(".").removesuffix(".inlay-new")
        text = f"---\nlibrary_name: {library}\n---\n\n# {name}\n\n{said}"
    (folder / CARD).write_text(text, encoding="utf-8")


def make_metadata(
    path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], record: dict[str, Any]
) -> dict[str, str]:
    """The metadata of the safetensors header."""
    metadata = {"format": "pt", **describe_parts(path, config, shapes)}
    if record:
        own = {**record, "config": hash_config(config)}
        metadata["inlay"] = json.dumps(own, separators=(",", ":"), ensure_ascii=False)
    return metadata


def read_back(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Reload what was written: a folder that holds together, its tensors (which Stream has compared) in their places.

    Raises:
        InlayError: The file is not what was computed.
    """
    if read_adapter(folder, digest=False).shapes != shapes:
        raise ComputationFailed(f"{find_weights(folder)} does not hold what was computed; is the disk full?")


@cache
def list_versions() -> dict[str, str]:
    """What a combination depends on."""
    return {name: version(name) for name in ("inlay", "numpy")}
