"""The adapters of a bank by name: where they are, what their files say, which of them do not fit."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from inlay.adapters.checks import Result
from inlay.adapters.file import CONFIG, AdapterFile, hash_config, read_adapter
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.identity import Identity, identify_base
from inlay.adapters.load import check_given_base
from inlay.adapters.task import find_task_of_file
from inlay.bases.load import Dtype, read_config, resolve_base
from inlay.errors import BadInput, InlayError
from inlay.files.tensor_header import digest_file
from inlay.tasks.base import load_base


@dataclass
class Counts:
    """What a bank has done since it was made.

    Attributes:
        hits: Adapters of batches that were in memory.
        loads: Adapters that were read and checked.
        evictions: Adapters that gave way to others, by the budget.
        bytes: Size of the stacks now; unlike `Bank.bytes` it may be read while the bank computes.
    """

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    bytes: int = 0


class Catalogue(ABC):
    """What all banks know of their adapters.

    Attributes:
        model: The base.
        files: What was read of each resident adapter.
        checks: By resident adapter the result of each of CHECKS.
        refused: With `skip_unfit`, why each adapter was left out.
        refused_paths: Where those are.
        counts: Of loads and evictions.
        budget: Most bytes that adapters may take in memory; None: they all stay.

    Args:
        adapters: A folder of adapters, paths (the last part is the name), or paths by name.
        budget_mb: Most that adapters may take in memory.
        check_golden: Compute the golden output of each adapter when it is read first.
        skip_unfit: Leave out adapters that do not fit.

    Raises:
        InlayError: A folder without adapters, two of one name, a budget that is not positive.
    """

    model: PreTrainedModel

    def __init__(
        self,
        adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        budget_mb: float | None,
        check_golden: bool,
        skip_unfit: bool,
    ) -> None:
        self._paths = name_adapters(adapters)
        if budget_mb is not None and not budget_mb > 0:
            raise BadInput(f"budget_mb must be positive, got {budget_mb}.")
        self.check_golden = check_golden
        self.skip_unfit = skip_unfit
        self.files: dict[str, AdapterFile] = {}
        self.checks: dict[str, dict[str, Result]] = {}
        self.refused: dict[str, InlayError] = {}
        self.refused_paths: dict[str, str | Path] = {}
        self.counts = Counts()
        self.budget = None if budget_mb is None else int(budget_mb * 1e6)
        self._processors: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._digests: dict[Path, tuple[tuple[Any, ...], str]] = {}  # of files that hold none, with their version

    def _take_base(self, base: PreTrainedModel) -> None:
        """Take this base, on which no adapter has been read."""
        self.files.clear()
        self.checks.clear()
        self.model = check_given_base(base).eval()
        self._identity = identify_base(self.model)

    @property
    def names(self) -> list[str]:
        """All adapters that rows can ask for."""
        return list(self._paths)

    @property
    def identity(self) -> Identity:
        """Of the base."""
        return self._identity

    def add(self, path: str | Path, name: str | None = None) -> str:
        """Read an adapter and check it, in the place of one of that name if there is one; gives its name.

        Checked is what `load_adapter` checks. A file that is read again after it gave way does not compute its golden
        output again.

        Raises:
            InlayError: What does not fit, in one sentence; the bank is then as it was. Rows are under the adapter of
                that name, as in an open block of `Bank.rows`.
        """
        name = name or Path(path).name
        with self._lock:
            self._check_free(name)
            before = self._paths.get(name)
            self._paths[name] = path
            try:
                self._load(name)
            except Exception:
                if before is None:
                    del self._paths[name]
                else:
                    self._paths[name] = before
                raise
        return name

    def evict(self, name: str) -> None:
        """Take an adapter out of memory; whoever asks for it later has it read again.

        Raises:
            InlayError: The bank does not know it, or rows are under it.
        """
        with self._lock:
            self.find_path(name)
            self._check_free(name)
            if name in self.files:
                self._drop(name)
                del self.files[name], self.checks[name]

    def remove(self, name: str) -> None:
        """Forget an adapter: nobody can ask for it any more.

        Raises:
            InlayError: As `evict`.
        """
        with self._lock:
            self.evict(name)
            del self._paths[name]

    def labels(self, name: str) -> list[str]:
        """Class names of an adapter, in the order of its logits."""
        return self.read_file(name).labels

    def read_file(self, name: str) -> AdapterFile:
        """What the folder of an adapter says; it is read where the adapter is not in memory.

        Raises:
            InlayError: The bank does not know the adapter, or its folder is damaged.
        """
        known = self.files.get(name)
        return known if known is not None else self.read_folder(self.find_path(name))

    def read_folder(self, path: str | Path) -> AdapterFile:
        """What the folder of an adapter says that need not be in the bank; as all files here it has a digest.

        Raises:
            InlayError: It is damaged, or no adapter.
        """
        return self._with_digest(read_adapter(fetch(path)))

    def _with_digest(self, file: AdapterFile) -> AdapterFile:
        """The file as read, with the digest of its bytes and config where it holds none, as those of plain peft."""
        if file.digest:
            return file
        state = file.weights.stat()
        version = (state.st_ino, state.st_size, state.st_mtime_ns, hash_config(file.config))
        known = self._digests.get(file.weights)
        if known is None or known[0] != version:
            known = self._digests[file.weights] = version, digest_file(file.weights, hash_config(file.config))
        return replace(file, digest=known[1])

    def find_path(self, name: str) -> str | Path:
        """Where an adapter is read from: a folder, or a Hub id.

        Raises:
            BadInput: The bank does not know it.
        """
        if name not in self._paths:
            names = ", ".join(list(self._paths)[:5]) or "none"
            more = " ..." if len(self._paths) > 5 else ""
            raise BadInput(f"unknown adapter {name!r}; this bank has {names}{more}.")
        return self._paths[name]

    def load_processor(self, file: AdapterFile) -> Any:
        """What makes inputs for an adapter, one for all adapters of equal settings.

        Raises:
            InlayError: Neither the file nor the base says how inputs are made.
        """
        settings = file.record.get("preprocessing")
        task = find_task_of_file(file, self.model.config)
        base = str(self.model.name_or_path or file.base_name)
        key = json.dumps([task.name, base, settings], sort_keys=True)
        if key not in self._processors:
            self._processors[key] = task.load_processor(base, settings)
        return self._processors[key]

    def _load_all(self) -> None:
        """Read all adapters; with `skip_unfit` those that do not fit are refused."""
        for name in list(self._paths):
            try:
                self._load(name)
            except InlayError as error:
                if not self.skip_unfit:
                    raise
                self.refused[name] = error
                self.refused_paths[name] = self._paths.pop(name)

    @abstractmethod
    def _load(self, name: str) -> None:
        """Read an adapter and check it."""

    @abstractmethod
    def _drop(self, name: str) -> None:
        """Forget the tensors of an adapter."""

    def _check_free(self, name: str) -> None:
        """Raise InlayError if an adapter cannot be taken out or replaced now."""
        return


def load_base_of(
    name: str | Path, adapters: Mapping[str, str | Path], device: torch.device, dtype: Dtype
) -> PreTrainedModel:
    """The base of that name, for the task of the first adapter; with a new head if it was saved with another one."""
    config = read_config(str(name), resolve_base(str(name)), None)
    file = find_first(adapters, config.model_type)
    if file is None:
        return load_base(name, dtype=dtype, device=device)
    task = find_task_of_file(file, config)
    if not task.could_take_base(config):  # the comparison of bases says it better
        return load_base(name, dtype=dtype, device=device)
    with_head = getattr(transformers, task.auto_class)._model_mapping[type(config)].__name__
    own_head = not task.classifies or with_head in (config.architectures or [])
    labels = None if own_head else file.labels or None
    return load_base(name, task=task.name, labels=labels, dtype=dtype, device=device)


def find_first(adapters: Mapping[str, str | Path], model_type: str) -> AdapterFile | None:
    """The first adapter of a base of this type; without one the first."""
    first = None
    for path in adapters.values():
        try:
            file = read_adapter(fetch(path), digest=False)
        except InlayError:  # which reading it in its turn tells
            continue
        if file.record.get("base", {}).get("model_type", model_type) == model_type:
            return file
        first = first or file
    return first


def name_adapters(adapters: Any) -> dict[str, str | Path]:
    """Paths of adapters by their names."""
    if isinstance(adapters, Mapping):
        return dict(adapters)
    if isinstance(adapters, str | Path):
        folder = Path(adapters).expanduser()
        found = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not found:
            raise BadInput(f"{adapters} holds no adapters; give a folder of adapter folders, or their paths.")
        adapters = found
    named: dict[str, str | Path] = {}
    for path in adapters:
        name = Path(path).name
        if name in named:
            raise BadInput(f"two adapters are called {name!r}: {named[name]} and {path}; give names of your own.")
        named[name] = path
    return named
