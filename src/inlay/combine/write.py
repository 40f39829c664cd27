"""Write a combination as an adapter folder, tensor by tensor, and check that the folder holds together."""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from inlay.adapters.file import CARD, CONFIG, FORMAT, METRICS, hash_config, read_adapter
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, describe_parts, find_stored_key, find_weights
from inlay.combine.heads import Heads
from inlay.combine.parts import Array, Source
from inlay.combine.weights import describe_weight
from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import write_json
from inlay.files.tensor_header import DIGEST, PIECE, encode_header, start_digest


class Stream:
    """A safetensors file in float32 that is written one tensor at a time, in the order of its header.

    The digest for the header is taken of each piece as it is written. Keys are those of peft; a pipeline's file gets
    its own.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
        self._left = dict(shapes)
        header: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for key, shape in shapes.items():
            end = at + 4 * math.prod(shape)
            header[find_stored_key(path, key)] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        self._digest = start_digest(header)
        self._place = self._digest.hexdigest().encode()  # of the final digest, which is as long
        self._header = encode_header({**header, "__metadata__": {**metadata, DIGEST: self._place.decode()}})
        self._file = FileIO(path, "w")
        if hasattr(os, "posix_fallocate"):  # writing into place that is there takes less time
            with suppress(OSError):  # a file system that cannot, or a full disk, which the first write to it reports
                os.posix_fallocate(self._file.fileno(), 0, len(self._header) + at)
        self._write_bytes(self._header)

    def _write_bytes(self, data: Any) -> None:
        view, at = memoryview(data), 0
        while at < len(view):
            at += self._file.write(view[at:])

    def write(self, key: str, value: Array) -> None:
        """The next tensor.

        Raises:
            InlayError: It holds NaN or Inf.
        """
        expected = next(iter(self._left))
        if key != expected or value.shape != self._left.pop(expected):
            raise ValueError(f"expected {expected}, got {key} {value.shape}")  # a fault of this package
        flat = np.ascontiguousarray(value, "<f4").reshape(-1)
        for i in range(0, len(flat), PIECE // 4):
            piece = flat[i : i + PIECE // 4]
            if not np.isfinite(piece).all():
                raise ComputationFailed(f"the combined tensor {key!r} holds NaN or Inf; nothing was written.")
            data = piece.view(np.uint8)
            self._digest.update(data)
            self._write_bytes(data)

    def finish(self) -> None:
        """Put the digest in its place."""
        if self._left:
            raise ValueError(f"{next(iter(self._left))} was not written")
        self._file.seek(0)
        self._write_bytes(self._header.replace(self._place, self._digest.hexdigest().encode()))

    def close(self) -> None:
        """Let go of the file, whatever it holds."""
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
    """Read what was written as an adapter: a folder that holds together, the file as long as its header says.

    Raises:
        InlayError: The file is not what was computed.
    """
    if read_adapter(folder, digest=False).shapes != shapes:
        raise ComputationFailed(f"{find_weights(folder)} does not hold what was computed; is the disk full?")


@cache
def list_versions() -> dict[str, str]:
    """What a combination depends on."""
    return {name: version(name) for name in ("inlay", "numpy")}
