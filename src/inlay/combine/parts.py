"""What is combined: adapters as the tensors that each method holds at each site, read one by one from their files."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.adapters.file import AdapterFile
from inlay.adapters.weight_file import find_peft_keys
from inlay.combine.weights import Weight, find_part
from inlay.errors import DamagedFile, Unsupported
from inlay.files.tensor_header import PIECE, BodyDigest

Array = npt.NDArray[np.float32]

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Tensors:
    """The tensors of a safetensors file, each read, as float32, when asked for. Keys are those of peft."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Of a file with this header, as `read_header` has checked it."""
        self._file = FileIO(path)
        self._start = 8 + int.from_bytes(self._file.read(8), "little")
        self._digest = BodyDigest(path, self._file, header, self._start)
        self._entries: dict[str, Any] = {key: header[stored] for stored, key in find_peft_keys(path, header).items()}
        self._shapes: dict[str, tuple[int, ...]] = {key: tuple(entry["shape"]) for key, entry in self._entries.items()}
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._shapes[key]

    def read(self, key: str) -> Array:
        """One tensor.

        Raises:
            InlayError: It holds whole numbers.
        """
        kind = self._entries[key]["dtype"]
        if kind == "I64" and not self.shape(key):  # a batch norm of a head counts its batches
            count = np.empty((), "<i8")
            self._read_bytes(key, count)
            return count.astype(np.float32)
        if kind not in _FLOATS:
            raise Unsupported(f"the tensor {key!r} of {self.path} is of {kind}; only floating-point ones add.")
        found = np.empty(self.shape(key), _FLOATS[kind])
        self._read_bytes(key, found)
        if kind == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32, copy=False)

    def read_into(self, key: str, place: Array) -> None:
        """One tensor into a contiguous piece of another: a file in float32 is read right there."""
        if self._entries[key]["dtype"] == "F32" and place.flags.c_contiguous:
            self._read_bytes(key, place)
        else:
            place[...] = self.read(key)

    def _read_bytes(self, key: str, place: npt.NDArray[Any]) -> None:
        if not place.size:
            return
        view, at = memoryview(place.reshape(-1).view(np.uint8)), 0  # type: ignore[arg-type]
        start = self._start + self._entries[key]["data_offsets"][0]
        while at < len(view):
            self._file.seek(start + at)  # the digest may have read what stands before
            count = self._file.readinto(view[at : at + PIECE])
            if not count:
                raise DamagedFile(f"{self.path} was cut short while it was read; download it again.")
            self._digest.add(start + at, view[at : at + count])
            at += count

    def check_digest(self) -> None:
        """Compare the file with the digest in it, if it has one; this reads what was not read yet.

        Raises:
            InlayError: The file is damaged.
        """
        self._digest.check()

    def close(self) -> None:
        """No more reading."""
        self._file.close()


@dataclass(frozen=True)
class Part:
    """What one method of one adapter holds: the whole adapter, or a part of a composite one.

    Attributes:
        name: The adapter's.
        config: The method's settings.
        sites: By the module's name in the base: the key in the file of each leaf, such as `lora_A.weight`.
        tensors: The file.
        weight: What it is multiplied with.
    """

    name: str
    config: dict[str, Any]
    sites: dict[str, dict[str, str]]
    tensors: Tensors
    weight: float = 1.0

    def shape(self, site: str, leaf: str) -> tuple[int, ...]:
        """Of one leaf."""
        return self.tensors.shape(self.sites[site][leaf])

    def read(self, site: str, leaf: str) -> Array:
        """One leaf."""
        return self.tensors.read(self.sites[site][leaf])


@dataclass(frozen=True)
class Source:
    """One adapter that is to be combined.

    Attributes:
        name: Its folder's, with as much of the path as tells it from the others.
        weight: What its effect is multiplied with.
        file: Its config and record.
        tensors: Its file.
        methods: What each method of it holds, by peft_type, without the weight.
        head: Key in the file of each tensor of a module that was trained whole, by name without PREFIX.
    """

    name: str
    weight: Weight
    file: AdapterFile
    tensors: Tensors
    methods: dict[str, Part]
    head: dict[str, str] = field(default_factory=dict)

    def list_parts(self, kind: str) -> list[Part]:
        """What one method holds, with its weight; where weights go by part of the base, each of these by itself."""
        if kind not in self.methods:
            return []
        whole = self.methods[kind]
        if not isinstance(self.weight, dict):
            return [replace(whole, weight=self.weight)]
        found: dict[str, dict[str, dict[str, str]]] = {}
        for site, leaves in whole.sites.items():
            found.setdefault(find_part(site), {})[site] = leaves
        return [replace(whole, sites=sites, weight=self.weight[part]) for part, sites in found.items()]

    def list_modules(self) -> list[str]:
        """Names of all modules that it adapts, and of the tensors of those that were trained whole."""
        return [*(site for part in self.methods.values() for site in part.sites), *self.head]

    def with_weight(self, weight: Weight) -> "Source":
        """The same adapter with another weight."""
        return replace(self, weight=weight)
