"""The header of a safetensors file, checked against the bytes behind it, and the digest that is stored in it."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from inlay.errors import DamagedFile, Unsupported
from inlay.files.bounded_json import refuse_duplicates

# Larger ones are refused before they are read: a header has 134 bytes for each tensor.
MAX_HEADER, MAX_TENSORS = 16_000_000, 100_000
DIGEST = "inlay_sha256"
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def sign(data: bytes) -> bytes:
    """Add the digest to the metadata of a safetensors file given as bytes; equal content gives equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.setdefault("__metadata__", {})[DIGEST] = _digest(header, body)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _digest(header: dict[str, Any], body: bytes | memoryview) -> str:
    seen = start_digest(header)
    seen.update(body)
    return seen.hexdigest()


def start_digest(header: dict[str, Any]) -> Any:
    """SHA-256 that has seen a header, its own digest left out; the tensors, in the order of their bytes, follow."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != DIGEST}
    canonical = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode())


def read_header(path: Path, *, digest: bool = True) -> dict[str, Any]:
    """Parse the header of a safetensors file and compare it with the size and the digest of the file.

    Raises:
        InlayError: A file that is damaged, pickled, an LFS pointer, or larger than inlay reads.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(48)
        length = int.from_bytes(start[:8], "little")
        _check_start(path, start, size)
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        _check_tiling({key: entry for key, entry in header.items() if key != "__metadata__"}, size - 8 - length)
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a table of texts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}; download it again.") from None
    if DIGEST not in metadata and "inlay" in metadata:
        raise DamagedFile(f"{path} is damaged: its checksum is gone; download it again.")
    if digest and DIGEST in metadata and metadata[DIGEST] != _digest_of(path, header, 8 + length):
        raise DamagedFile(
            f"{path} is damaged: its content does not match the checksum stored in it; download it again."
        )
    return header


def _digest_of(path: Path, header: dict[str, Any], start: int) -> str:
    """By pieces: a file may be larger than what memory is left for it."""
    seen, piece = start_digest(header), bytearray(1 << 17)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(piece):
            seen.update(memoryview(piece)[:count])
    return seen.hexdigest()


def _check_start(path: Path, start: bytes, size: int) -> None:
    """Tell from the first bytes and the size whether it can be safetensors: a length, then a JSON object."""
    length = int.from_bytes(start[:8], "little")
    if start.startswith(b"version https://git-lfs"):
        raise DamagedFile(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`.")
    # a header of 640 bytes starts like a pickle, too: what comes after its length decides
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:9] != b"{":
        raise Unsupported(f"{path} is a pickle, not safetensors; inlay never opens pickles: save the adapter again.")
    if size == 0:
        raise DamagedFile(f"{path} is empty; download it again.")
    if size < 10 or 8 + length > size:
        raise DamagedFile(
            f"{path} is truncated or not a safetensors file: its header claims {length} bytes, the file has {size}; "
            "download it again."
        )
    if length > MAX_HEADER:
        raise DamagedFile(f"{path} has a header of {length:,} bytes, and inlay reads at most {MAX_HEADER:,}.")


def _check_tiling(tensors: dict[str, Any], size: int) -> None:
    """The tensors, in the order of their bytes, fill the body without holes and overlaps: the rule of the format."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"it claims {len(tensors):,} tensors, and inlay reads at most {MAX_TENSORS:,}")
    extents = sorted(_extent(key, entry) for key, entry in tensors.items())
    at = 0
    for begin, end in extents:
        if begin != at:
            raise ValueError("its tensors overlap, or leave bytes unused")
        at = end
    if at != size:
        raise ValueError(f"it is truncated: its tensors need {at} bytes, {size} are there")


def _extent(key: str, entry: Any) -> tuple[int, int]:
    if ".." in key or "/" in key or "\\" in key or not key.isprintable():
        raise ValueError(f"the tensor name {key[:80]!r} is a path")
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, kind = (entry.get(what) for what in ("shape", "data_offsets", "dtype"))
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and isinstance(kind, str) and kind in _WIDTHS):
        raise ValueError(f"its header does not describe the tensor {key[:80]!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * _WIDTHS[kind]:
        raise ValueError(f"the tensor {key[:80]!r} does not fill its bytes")
    return offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(item) is int and item >= 0 for item in value)
