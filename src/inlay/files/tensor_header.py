"""The header of a safetensors file, checked against the bytes after it, and the digest stored in the header."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from inlay.errors import DamagedFile, Unsupported
from inlay.files.bounded_json import refuse_duplicates

# Larger headers are refused before they are read. A header has 134 bytes per tensor.
MAX_HEADER, MAX_TENSORS = 16_000_000, 100_000
# A digest finds damage. It is no signature: whoever changes a file can change its digest with it, so the fast one does.
DIGEST = "inlay_xxh3_128"  # what new files get, by its key in the metadata
_DIGESTS: dict[str, Callable[[bytes], Any]] = {DIGEST: xxhash.xxh3_128, "inlay_sha256": hashlib.sha256}
PIECE = 1 << 19  # bytes that are read or written, and hashed, at once: they stay in the processor's cache
_BYTES_PER_NUMBER = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def sign(data: bytes) -> bytes:
    """Add the digest to the metadata of a safetensors file given as bytes. Equal content gives equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    digest = start_digest(header)
    digest.update(body)
    header.setdefault("__metadata__", {})[DIGEST] = digest.hexdigest()
    return encode_header(header) + body


def encode_header(header: dict[str, Any]) -> bytes:
    """The bytes before the tensors: the length of the header, and the header."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def start_digest(header: dict[str, Any], kind: str = DIGEST) -> Any:
    """The digest of a header without that digest. Update it with the tensors, in the order of their bytes."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != kind}
    canonical = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return _DIGESTS[kind](canonical.encode())


def find_digest(metadata: dict[str, str]) -> str:
    """The digest that is stored in the metadata of a file; empty where there is none."""
    return next((metadata[kind] for kind in _DIGESTS if kind in metadata), "")


def digest_file(path: Path, more: str = "") -> str:
    """The digest of all bytes of a file, and of a text that belongs to it: for one that holds no digest itself."""
    digest = xxhash.xxh3_128(more.encode())
    with FileIO(path) as file:
        piece = memoryview(bytearray(PIECE))
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


class BodyDigest:
    """The digest of a file, taken while its tensors are read, and compared with the one that is stored in it.

    Bytes that are read in their order are hashed as they come. Those that are left out are read when later ones come,
    or at the end; those that are read again count once.
    """

    def __init__(self, path: Path, file: FileIO, header: dict[str, Any], start: int) -> None:
        """Of a file that is open for reading, whose tensors start at byte `start`."""
        self._path, self._file, self._at = path, file, start
        metadata = header.get("__metadata__", {})
        self._wanted = find_digest(metadata)
        kind = next((kind for kind in _DIGESTS if kind in metadata), None)
        self._seen: Any = start_digest(header, kind) if kind else None  # None: there is no digest to compare with

    def add(self, at: int, data: memoryview) -> None:
        """Bytes that were read, and where they stand in the file."""
        if self._seen is None:
            return
        if self._at < at:
            self._read_until(at)
        if self._at == at:
            self._seen.update(data)
            self._at += len(data)

    def check(self) -> None:
        """Read what is left, and compare.

        Raises:
            InlayError: The file is damaged.
        """
        if self._seen is None:
            return
        self._read_until(os.fstat(self._file.fileno()).st_size)
        if self._seen.hexdigest() != self._wanted:
            raise DamagedFile(
                f"{self._path} is damaged: its content does not match the checksum stored in it; download it again."
            )

    def _read_until(self, end: int) -> None:
        """Hash the bytes before `end` in pieces, because the file may be larger than the free memory."""
        piece = memoryview(bytearray(PIECE))
        self._file.seek(self._at)
        while count := self._file.readinto(piece[: end - self._at]):
            self._seen.update(piece[:count])
            self._at += count


def read_header(path: Path, *, digest: bool = True) -> dict[str, Any]:
    """Parse the header of a safetensors file and compare it with the size and the digest of the file.

    Raises:
        InlayError: The file is damaged, a pickle, a Git LFS pointer, or larger than inlay reads.
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
            raise ValueError("its metadata does not map names to texts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}; download it again.") from None
    if not find_digest(metadata) and "inlay" in metadata:
        raise DamagedFile(f"{path} is damaged: its checksum is gone; download it again.")
    if digest:
        with FileIO(path) as raw:
            BodyDigest(path, raw, header, 8 + length).check()
    return header


def _check_start(path: Path, start: bytes, size: int) -> None:
    """Check by the first bytes and the size that the file can be safetensors: a length, then a JSON object."""
    length = int.from_bytes(start[:8], "little")
    if start.startswith(b"version https://git-lfs"):
        raise DamagedFile(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`.")
    # The length of a header of 640 bytes looks like the start of a pickle, so the byte after the length decides.
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
    """Check the rule of the format: the tensors fill the body without holes and overlaps."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"it claims {len(tensors):,} tensors, and inlay reads at most {MAX_TENSORS:,}")
    extents = sorted(_read_extent(key, entry) for key, entry in tensors.items())
    at = 0
    for begin, end in extents:
        if begin != at:
            raise ValueError("its tensors overlap or leave bytes unused")
        at = end
    if at != size:
        raise ValueError(f"it is truncated: its tensors need {at} bytes, but it has {size}")


def _read_extent(key: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor in the body, and the byte after its last one."""
    if ".." in key or "/" in key or "\\" in key or not key.isprintable():
        raise ValueError(f"the tensor name {key[:80]!r} is a path")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [begin, end, *shape]
        whole_numbers = isinstance(shape, list) and {*map(type, sizes)} == {int}
        described = whole_numbers and min(sizes) >= 0 and len(shape) <= 8
        bytes_per_number = _BYTES_PER_NUMBER[dtype]
    except (KeyError, TypeError, ValueError):  # no such entry, another kind of value, other than two offsets
        described = False
    if not described:
        raise ValueError(f"its header does not describe the tensor {key[:80]!r}")
    if end - begin != math.prod(shape) * bytes_per_number:
        raise ValueError(f"the tensor {key[:80]!r} does not fill its bytes")
    return begin, end
