"""Adapters as what they hold at each site, tensor by tensor from their files: no model, no torch, no whole file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.adapters.file import WEIGHTS, AdapterFile, check_digest, read_adapter
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.patterns import check_patterns
from inlay.adapters.sketch_distance import TOLERANCE, distance
from inlay.errors import InlayError

Array = npt.NDArray[np.float32]
PREFIX = "base_model.model."  # of the keys in a file of peft
PROMPT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING")
PROMPTS = "prompt_embeddings"  # the one tensor of peft's prompts and prefixes

# The beginning of the first part of a key that belongs to a method, not to the base.
_METHODS = {
    "lora_": "LORA",
    "ia3_": "IA3",
    "inlay_bottleneck_": "INLAY_BOTTLENECK",
    "inlay_attention_prefix_": "INLAY_ATTENTION_PREFIX",
    "inlay_visual_prompt_": "INLAY_VISUAL_PROMPT",
    "inlay_partial_": "INLAY_PARTIAL",
    "inlay_spatial3d_": "INLAY_SPATIAL3D",
}
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Tensors:
    """The tensors of a safetensors file that `read_adapter` has checked, each read, as float32, when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._entries: dict[str, Any] = header
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._entries[key]["shape"])

    def read(self, key: str) -> Array:
        """One tensor.

        Raises:
            InlayError: It holds whole numbers.
        """
        kind = self._entries[key]["dtype"]
        if kind not in _FLOATS:
            raise InlayError(f"the tensor {key!r} of {self.path} is of {kind}; only floating-point ones add.")
        found = np.empty(self.shape(key), _FLOATS[kind])
        self._fill(key, found)
        if kind == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32, copy=False)

    def into(self, key: str, place: Array) -> None:
        """One tensor into a contiguous piece of another: a file in float32 is read right there."""
        if self._entries[key]["dtype"] == "F32" and place.flags.c_contiguous:
            self._fill(key, place)
        else:
            place[...] = self.read(key)

    def _fill(self, key: str, place: npt.NDArray[Any]) -> None:
        if not place.size:
            return
        view, at = memoryview(place.reshape(-1).view(np.uint8)), 0  # type: ignore[arg-type]
        self._file.seek(self._start + self._entries[key]["data_offsets"][0])
        while at < len(view):  # one call reads 2 GB at most
            count = self._file.readinto(view[at:])
            if not count:
                raise InlayError(f"{self.path} was cut short while it was read; get it again.")
            at += count

    def close(self) -> None:
        """No more reading."""
        self._file.close()


@dataclass(frozen=True)
class Part:
    """What one method of one adapter holds: the whole adapter, or a part of a composite one.

    Attributes:
        name: The adapter's.
        weight: What it is multiplied with.
        config: The method's settings.
        sites: By the module's name in the base: the key in the file of each leaf, such as `lora_A.weight`.
        tensors: The file.
    """

    name: str
    weight: float
    config: dict[str, Any]
    sites: dict[str, dict[str, str]]
    tensors: Tensors

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
        parts: By peft_type.
        intact: That the file is what its digest says, once that is known.
        head: Key in the file of each tensor of a module that was trained whole, by name without PREFIX.
    """

    name: str
    weight: float
    file: AdapterFile
    tensors: Tensors
    parts: dict[str, Part]
    intact: Future[None]
    head: dict[str, str] = field(default_factory=dict)

    def weighted(self, weight: float) -> "Source":
        """The same adapter with another weight."""
        parts = {kind: replace(part, weight=weight) for kind, part in self.parts.items()}
        return replace(self, weight=weight, parts=parts)


@contextmanager
def opened(adapters: Mapping[Any, float]) -> Iterator[list[Source]]:
    """Adapters by folder or Hub id, with their weights, checked to be of one base.

    Digests are taken meanwhile, beside the work of the block: `check_whole` waits for them, as does the block's end.
    Where a block fails on a damaged file, it is the damage that is said.

    Raises:
        InlayError: Whatever `read_adapter` finds; no adapter; a weight that is no finite number; other bases; tensors
            that belong neither to a method nor to a head.
    """
    if not adapters:
        raise InlayError("expected adapters and their weights, such as {'a': 1.0, 'b': 0.5}, got none.")
    for path, weight in adapters.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
            raise InlayError(f"the weight of {path} must be a finite number, got {weight!r}.")
    files = [read_adapter(fetch(path), digest=False) for path in adapters]
    sources: list[Source] = []
    with ThreadPoolExecutor(min(len(adapters), 4)) as pool, ExitStack() as held:
        whole = [pool.submit(check_digest, file.folder) for file in files]
        try:
            names = short_names([file.folder for file in files])
            _check_bases(dict(zip(names, files, strict=True)))
            for name, weight, file, future in zip(names, adapters.values(), files, whole, strict=True):
                tensors = Tensors(file.folder / WEIGHTS)
                held.callback(tensors.close)
                sources.append(_source(name, float(weight), file, tensors, future))
            yield sources
        finally:
            for future in whole:
                future.result()


def check_whole(sources: Iterable[Source]) -> None:
    """Wait for the digests of all files.

    Raises:
        InlayError: A file is damaged.
    """
    for source in sources:
        source.intact.result()


def short_names(folders: list[Path]) -> list[str]:
    """The last part of each path, and as many before it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InlayError(f"expected different adapters, got one twice among {', '.join(map(str, folders))}.")


def _check_bases(files: Mapping[str, AdapterFile]) -> None:
    """Sketches where there are some, else names: updates of one base mean nothing to another."""
    (first, one), *others = files.items()
    for name, other in others:
        a, b = one.record.get("base"), other.record.get("base")
        if a and b:
            limit = max(TOLERANCE[a["precision"]], TOLERANCE[b["precision"]])
            if distance(a["sketch"], b["sketch"]) <= limit:
                continue
            more = ", which has other weights" if a["name"] == b["name"] else ""
            raise InlayError(
                f"adapter {first!r} was trained on {a['name']}, {name!r} on {b['name']}{more}; only adapters of one "
                "base can be combined."
            )
        if one.base_name and other.base_name and one.base_name != other.base_name:
            raise InlayError(
                f"adapter {first!r} was trained on {one.base_name}, {name!r} on {other.base_name}; only adapters of "
                "one base can be combined (for one base under two names put one into base_model_name_or_path of both)."
            )


def _source(name: str, weight: float, file: AdapterFile, tensors: Tensors, intact: Future[None]) -> Source:
    config = file.config
    inner, whole = config.get("parts") or [], config.get("modules_to_save") or []
    named = isinstance(whole, list) and all(isinstance(module, str) for module in whole)
    if not named or not all(isinstance(part, dict) and isinstance(part.get("peft_type"), str) for part in inner):
        raise InlayError(f"the config of adapter {name!r} has parts or modules_to_save of a wrong kind; get it again.")
    configs = {part["peft_type"]: part for part in inner} or {config["peft_type"]: config}
    sites: dict[str, dict[str, dict[str, str]]] = {kind: {} for kind in configs}
    head: dict[str, str] = {}
    known = configs.keys() <= {*_METHODS.values(), *PROMPT_TYPES}  # others are refused, with the reason, by `sums`
    for key in tensors:
        plain = key.removeprefix(PREFIX)
        kind, site, leaf = _place(plain, config["peft_type"])
        if not kind and any(f".{module}." in f".{plain}" for module in whole):
            head[plain] = key
        elif not known or kind in sites:
            sites[kind if known else config["peft_type"]].setdefault(site, {})[leaf] = key
        elif not kind and plain.endswith(".bias") and config.get("bias", "none") != "none":
            raise InlayError(
                f"adapter {name!r} holds biases of the base itself (bias={config['bias']!r}), which do not add without "
                'it; train with bias="none", or lora_bias=True.'
            )
        else:
            raise InlayError(
                f"the tensor {key!r} of adapter {name!r} belongs neither to its method nor to modules_to_save; such "
                "adapters cannot be combined."
            )
    check_patterns(config, {site for found in sites.values() for site in found}, name)
    parts = {kind: Part(name, weight, configs[kind], sites[kind], tensors) for kind in configs}
    return Source(name, weight, file, tensors, parts, intact, head)


def _place(key: str, kind: str) -> tuple[str, str, str]:
    """Method, site and leaf of a key; no method for a tensor of the base."""
    if key == PROMPTS:
        return kind, "", key
    words = key.split(".")
    for i, word in enumerate(words):
        for beginning, method in _METHODS.items():
            if word.startswith(beginning):
                return method, ".".join(words[:i]), ".".join(words[i:])
    return "", "", key
