"""Many adapters on one base, each in a model of its own; all models share the base's weights.

    bank = ModelBank("builtin:sam-tiny", "adapters/")            # a folder of adapters for scans
    segment(bank.load("hippocampus"), "scan.nii.gz")

For adapters that a `Bank` does not hold, as they change how the base computes: the 3D spatial adapter makes a model of
volumes of one of images. Rows of one batch cannot have different adapters here.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from inlay.adapters.checks import Candidate
from inlay.adapters.file import Reading
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.load import LoadedAdapter, OwnBase, load_onto
from inlay.bases.device import Device, choose_device
from inlay.bases.load import Dtype
from inlay.serve.catalogue import Catalogue, load_base_of


class ModelBank(Catalogue):
    """A base with any number of adapters, each in a model of its own.

    Its methods are those of a `Bank` that do not concern rows.

    Attributes:
        model: The base, without an adapter.
        files: What was read of each resident adapter: its config, labels and preprocessing.
        checks: By resident adapter the result of each of CHECKS.
        refused: With `skip_unfit`, why each adapter was left out.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
        *,
        budget_mb: float | None = None,
        check_golden: bool = True,
        skip_unfit: bool = False,
        device: Device | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        """Prepare a base for adapters, which are given as to `Bank`.

        Args:
            base: A name for `load_base`, or a model without an adapter.
            adapters: A folder of adapters, paths (the last part is the name), or paths by name.
            budget_mb: Most that adapters may take in memory; they are then read when they are first asked for, and the
                least recently used ones give way. Without it all are read now.
            check_golden: As for `Bank`.
            skip_unfit: Leave out adapters that do not fit, which `refused` then names, instead of raising an error.
            device: As for `Bank`.
            dtype: Of a base that is given by name.

        Raises:
            InlayError: A folder without adapters, two of one name, or what `add` says.
        """
        super().__init__(adapters, budget_mb=budget_mb, check_golden=check_golden, skip_unfit=skip_unfit)
        if not isinstance(base, nn.Module):
            base = load_base_of(base, self._paths, choose_device(device), dtype)
        self._take_base(base)
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the least recently used first
        if self.budget is None:
            self._load_all()

    @property
    def resident(self) -> list[str]:
        """Those that are in memory, the least recently used first."""
        return list(self._loaded)

    @property
    def bytes(self) -> int:
        """Size of the adapters in memory."""
        return sum(self._count_bytes(loaded) for loaded in list(self._loaded.values()))

    def load(self, name: str) -> LoadedAdapter:
        """An adapter in its model, which is read and checked where it is not in memory.

        Raises:
            InlayError: The bank does not know it, or what does not fit, in one sentence.
        """
        with self._lock:
            self.find_path(name)
            if name in self._loaded:
                self.counts.hits += 1
            else:
                self._load(name)
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def as_model(self, name: str) -> nn.Module:
        """The model of an adapter."""
        return self.load(name).model

    @override
    def _load(self, name: str) -> None:
        host = OwnBase(share_weights(self.model), identity=self._identity, computes=self.check_golden)
        candidate = Candidate(Reading(fetch(self.find_path(name))), host)
        loaded = load_onto(candidate, host)
        self._loaded[name], self.checks[name] = loaded, candidate.results
        self._loaded.move_to_end(name)
        self.files[name] = self._with_digest(loaded.file)
        self.counts.loads += 1
        self._make_room()
        self.counts.bytes = self.bytes

    @override
    def _drop(self, name: str) -> None:
        del self._loaded[name]
        self.counts.bytes = self.bytes

    def _make_room(self) -> None:
        """Evict the least recently used adapters while they take more than the budget; the last one stays."""
        while self.budget is not None and len(self._loaded) > 1 and self.bytes > self.budget:
            self.evict(next(iter(self._loaded)))
            self.counts.evictions += 1

    def _count_bytes(self, loaded: LoadedAdapter) -> int:
        shared = {id(value) for value in _tensors_of(self.model)}
        return sum(value.nbytes for value in _tensors_of(loaded.model) if id(value) not in shared)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's structure whose parameters and buffers are the model's own."""
    return copy.deepcopy(model, {id(value): value for value in _tensors_of(model)})


def _tensors_of(model: nn.Module) -> list[Any]:
    return [*model.parameters(), *model.buffers()]
