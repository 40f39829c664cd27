"""Load an adapter onto the base that it fits, or say in one sentence why it does not."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from inlay.adapters import golden
from inlay.adapters.base_weights import put_base_weights, split_base_weights
from inlay.adapters.checks import Candidate, run_checks
from inlay.adapters.file import CONFIG, AdapterFile, Reading
from inlay.adapters.find_base import choose_base_in, find_base_next_to, holds_models
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.identity import Identity, identify_base
from inlay.adapters.sketch import find_precision
from inlay.adapters.task import find_task_of_file
from inlay.bases.device import Device, choose_device
from inlay.bases.load import Dtype, find_head, read_config, resolve_base
from inlay.bases.quantize import Quantize
from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported, WrongBase
from inlay.methods._peft import (
    PeftConfig,
    PeftModel,
    adapter_shapes,
    carries_adapter,
    count_virtual_tokens,
    fill_injected_adapter,
    inject_empty_adapter,
    merge_keeping_weights,
    name_tied_modules,
    remove_all_adapters,
    tie_filled_adapter,
)
from inlay.tasks.adapter import route_group
from inlay.tasks.base import load_base
from inlay.tasks.task import Task


@dataclass
class LoadedAdapter:
    """An adapter on its base, ready to use.

    Attributes:
        model: The PeftModel in eval mode.
        task: What it is for, a row of TASKS.
        processor: The image processor, TextProcessor or VolumeProcessor that it was trained with.
        labels: Class names in the order of the logits; of an adapter for volumes without background; none for a
            language model or SAM on images.
        file: What was read from disk.
        verified: True if base, tensors and golden output were checked; False for a folder that only peft has written.
        deviation: Relative difference to the golden output; None if there is none.
        output: The golden output as it was found; None if none was computed.
    """

    model: PeftModel | PreTrainedModel
    task: Task
    processor: Any
    labels: list[str]
    file: AdapterFile
    verified: bool
    deviation: float | None
    output: list[float] | None = field(default=None, repr=False)
    _unmerge: Callable[[], PeftModel] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The folder's, or that of its repository on the Hub."""
        return self.file.name

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json, empty if there is none."""
        return self.file.metrics

    @property
    def groups(self) -> list[str]:
        """Names of the groups of labels of a combination of classifiers; none for others."""
        return list(self.file.groups)

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """Class names of one group of a combination, and which logits stand for them; None: all classes.

        Raises:
            InlayError: There is no such group.
        """
        return route_group(f"adapter {self.file.name!r}", self.labels, self.file.groups, group)

    def merge(self) -> "LoadedAdapter":
        """Fold the adapter into the base's weights: the same outputs without its latency. `unmerge` undoes it.

        Raises:
            InlayError: The base is quantised, where merging would lose much of the adapter, or it is merged already; a
                prompt or prefix, which no weight can stand for.
        """
        if not isinstance(self.model, PeftModel):
            raise BadInput("this adapter is merged already.")
        self.model, self._unmerge = merge_in_memory(self.model)
        return self

    def unmerge(self) -> "LoadedAdapter":
        """Put the base's own weights back, bit for bit, with the adapter in it again."""
        if self._unmerge is None:
            raise BadInput("this adapter is not merged.")
        self.model, self._unmerge = self._unmerge(), None
        return self


def merge_in_memory(model: PeftModel) -> tuple[nn.Module, Callable[[], PeftModel]]:
    """As `merge_keeping_weights`, where that loses nothing of the adapter.

    Raises:
        InlayError: A prompt or prefix; a base that is not held in float32; what `merge_keeping_weights` says.
    """
    if model.active_peft_config.is_prompt_learning:
        raise Unsupported("prompts and prefixes are tokens, which no weight can stand for; use it unmerged.")
    kind = find_precision(model)
    if kind != "float32":
        raise Unsupported(f"merging into {kind} weights would round the adapter away; load the base in float32 first.")
    return merge_keeping_weights(model)


def load_adapter(
    path: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    device: Device | None = None,
) -> LoadedAdapter:
    """Load an adapter, its head, labels and preprocessing, and check that they compute what they computed when saved.

    Args:
        path: A folder, or a Hub id.
        base: A name for `load_base`, or a model without an adapter (it is wrapped in place, and left as it was when the
            adapter does not fit); default: the base that the adapter names.
        revision: Of the adapter, for a Hub id.
        dtype: Of the base, where it is loaded here.
        quantize: "8bit" or "4bit", where it is loaded here.
        device: Such as "cpu" or "cuda:1"; default: the best that this machine has. A base that is given stays where it
            is.

    Raises:
        InlayError: Whatever `read_adapter` finds; a method or a setting that this peft does not know; a pattern that
            is not done in time; a base of another structure or with other weights; tensors that are missing,
            superfluous or of another shape; NaN; another golden output.
    """
    host = OwnBase(base, dtype, quantize, device)
    return load_onto(Candidate(Reading(fetch(path, revision)), host), host)


class OwnBase:
    """The base of one adapter: loaded for it, or given by the caller, who gets it back as it was if it does not fit.

    Attributes:
        shared: The base was given: it may be used again.
        computes: The golden output is computed.
        base: The model, from `load_base` on.
        task: What the adapter is for, from `inject` on.
        model: The base with the adapter in it, from `inject` on.
        processor: What makes its inputs, from `load_processor` on.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel | None,
        dtype: Dtype = "float32",
        quantize: Quantize | None = None,
        device: Device | None = None,
        *,
        identity: Identity | None = None,
        computes: bool = True,
    ) -> None:
        if isinstance(base, nn.Module) and device is not None:
            raise BadInput("the base is a model already: move it with base.to(device) and leave device out.")
        self._device = choose_device(device)
        self.shared, self.computes = isinstance(base, nn.Module), computes
        if self.shared and (quantize is not None or dtype != "float32"):
            asked = f"quantize={quantize!r}" if quantize is not None else f"dtype={dtype!r}"
            raise BadInput(
                f"{asked} has no effect on a base that is a model already; leave it out, or give the base's name."
            )
        self.restore: Callable[[], None] = lambda: None
        self._asked, self._dtype, self._quantize = base, dtype, quantize
        self.base: PreTrainedModel
        self.task: Task
        self.model: PeftModel
        self.processor: Any = None
        self._identity = identity

    def load_base(self, file: AdapterFile) -> str:
        """Load the base, or take the one that was given."""
        asked = self._asked
        if isinstance(asked, nn.Module):
            self.base = check_given_base(asked)
        else:
            self.base = load_own_base(file, asked, self._dtype, self._quantize, self._device)
        heads = file.record.get("head", [])
        self.base.new_poolers = [name for name in heads if name.rpartition(".")[2] == "pooler"]
        return str(self.base.name_or_path)

    def identify_base(self) -> Identity:
        """Which base it is; an adapter in it does not count."""
        self._identity = self._identity or identify_base(self.base)
        return self._identity

    def module_names(self) -> list[str]:
        """Of the base, before the adapter is in it."""
        return [name for name, _ in self.base.named_modules()]

    def inject(self, file: AdapterFile, weights: dict[str, torch.Tensor]) -> None:
        """Put the adapter into the base, with a head of its size."""
        if getattr(self.base, "new_head", False) and not self.shared:
            _check_head(file, self.base)
        self.task = find_task_of_file(file, self.base.config)
        self.task.complete_base(self.base)
        self.restore = _undo(self.base)
        if file.labels and self.task.classifies:
            set_head(self.base, file)
        weights, carried = split_base_weights(file, weights, self.base)
        put_base_weights(file, self.base, carried, self.shared)
        self.model = attach_adapter(file, self.base, weights)
        self.task.restore_labels(self.model.active_peft_config, file.labels)

    def load_processor(self, file: AdapterFile) -> Any:
        """The one that the adapter was trained with; for one that plain peft saved what its base has."""
        self.processor = self.task.load_processor(self.base.name_or_path, file.record.get("preprocessing"))
        return self.processor

    def golden_output(self, file: AdapterFile, processor: Any) -> list[float]:
        """What the adapter makes of its golden input."""
        return golden.compute_output(self.model, processor, self.task)


def load_onto(candidate: Candidate, host: OwnBase) -> LoadedAdapter:
    """Check an adapter on the base of its host, which is left as it was when the adapter does not fit.

    Raises:
        InlayError: As `load_adapter`.
    """
    try:
        run_checks(candidate)
        if not host.computes:  # which has not needed it
            host.load_processor(candidate.file)
    except Exception:
        host.restore()
        raise
    file, model, task = candidate.file, host.model, host.task
    labels = task.labels(host.base, model.active_peft_config) if task.classifies else list(file.labels)
    return LoadedAdapter(
        model, task, host.processor, labels, file, bool(file.record), candidate.deviation, candidate.output
    )


def _check_head(file: AdapterFile, model: PreTrainedModel) -> None:
    """A head that was drawn for the adapter's labels is to be replaced by the file's."""
    lacking = [name for name in find_head(model) if not any(f".{name}." in key for key in file.shapes)]
    if lacking:
        raise DamagedFile(
            f"adapter {file.name!r} has labels that are not its base's, but lacks a head ({lacking[0]!r}); download "
            "it again."
        )


def check_given_base(base: nn.Module) -> PreTrainedModel:
    """A model as a base: of transformers, and without an adapter in it."""
    if not isinstance(base, PreTrainedModel):
        raise BadInput(f"base must be a name or a model of transformers, got {type(base).__name__}.")
    if carries_adapter(base):
        raise BadInput("this base carries an adapter already; give another copy of it, or unload that one first.")
    base.config.architectures = [type(base).__name__]  # that of the file it came from may have had another head
    return base


def load_own_base(
    file: AdapterFile,
    name: str | Path | None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    device: Device | None = None,
) -> PreTrainedModel:
    """The base that was asked for, or the one that the adapter names, at the revision that it was trained on.

    A folder with several models in it stands for the one among them that has the recorded weights.
    """
    if name is not None and holds_models(name):
        name = choose_base_in(file, name)
    where = str(name or file.base_name)
    if not where:
        raise BadInput(f"adapter {file.name!r} names no base; give base=.")
    config, revision = (
        _read_config_of_base(file, where) if name is None else (read_config(where, resolve_base(where), None), None)
    )
    task = find_task_of_file(file, config)
    if not task.could_take_base(config):  # the comparison of bases says it better
        return load_base(where, dtype=dtype, quantize=quantize, device=device)
    labels = file.labels if file.labels and task.classifies else None
    return load_base(
        where, task=task.name, labels=labels, dtype=dtype, quantize=quantize, revision=revision, device=device
    )


def _read_config_of_base(file: AdapterFile, name: str) -> tuple[Any, str | None]:
    """Config of the base that an adapter names, and the revision to take of it, which a folder has none of.

    Raises:
        InlayError: It cannot be had; where a base of its name lies next to the adapter, that is named.
    """
    try:
        where = resolve_base(name)
        revision = None if Path(where).is_dir() else file.record.get("base", {}).get("revision")
        return read_config(name, where, revision), revision
    except InlayError as error:
        found = find_base_next_to(file)
        remedy = f"base={str(found)!r}, which has its name" if found else "base= with where it is now"
        raise type(error)(f"adapter {file.name!r} was trained on {name!r}: {error} Or give {remedy}.") from None


def set_head(base: PreTrainedModel, file: AdapterFile) -> None:
    """Give a base that was loaded for other labels a head of the adapter's size; its weights come from the file."""
    labels, config = file.labels, base.config
    if len(labels) != config.num_labels:
        heads = _head_layers(base)
        last = [name for name, layer in heads.items() if layer.out_features == config.num_labels]
        if not last:
            raise WrongBase(
                f"this base was loaded with {config.num_labels} labels, adapter {file.name!r} has {len(labels)}: "
                f"load it with load_base(name, task={find_task_of_file(file, config).name!r}, labels=...)."
            )
        for name in last:
            old = heads[name]
            fresh = nn.Linear(old.in_features, len(labels), old.bias is not None, old.weight.device, old.weight.dtype)
            base.set_submodule(name, fresh.requires_grad_(False))
    _set_labels(base, dict(enumerate(labels)))


def _head_layers(base: PreTrainedModel) -> dict[str, nn.Linear]:
    heads = find_head(base)
    return {n: m for n, m in base.named_modules() if n.split(".")[0] in heads and isinstance(m, nn.Linear)}


def _set_labels(base: PreTrainedModel, id2label: dict[int, str]) -> None:
    base.config.num_labels = base.num_labels = len(id2label)
    base.config.id2label = id2label
    base.config.label2id = {label: i for i, label in id2label.items()}


def _undo(base: PreTrainedModel) -> Callable[[], None]:
    """What brings a base back to how it came, if the adapter turns out not to fit it."""
    layers, id2label = _head_layers(base), base.config.id2label

    def undo() -> None:
        remove_all_adapters(base)
        for name, layer in layers.items():
            base.set_submodule(name, layer)
        _set_labels(base, id2label)

    return undo


def attach_adapter(file: AdapterFile, base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PeftModel:
    """The base with the adapter in it, which is injected and compared with the file before anything is allocated."""
    model = inject_checked(file, base, weights)
    fill_injected_adapter(model, weights)
    model.to(next(p for p in base.parameters() if p.is_floating_point()).device)
    tie_filled_adapter(model)
    return model.eval()


def inject_checked(file: AdapterFile, base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PeftModel:
    """The base with the adapter in it, without its values; raises InlayError where names or shapes are not the file's.

    Nothing is read of the base but its structure, which may stand on the meta device. The patterns of the config have
    been tried before (`check_patterns`).
    """
    try:
        config = PeftConfig.from_pretrained(str(file.folder))
        _check_tokens(file, config, weights)
        name_tied_modules(config, base, weights)
        if getattr(config, "use_dora", False) and find_precision(base) == "int8":
            raise Unsupported(
                f"adapter {file.name!r} is a DoRA, for which peft loses the scales of an 8-bit base; load it in 4 "
                "bits or whole."
            )
        model = inject_empty_adapter(base, copy.deepcopy(config))
    except InlayError:
        raise
    except Exception as error:  # a config is data from anywhere: it makes peft fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WrongBase(f"{file.folder / CONFIG} does not fit this base: {reason}") from error
    expected = adapter_shapes(model)
    missing, superfluous = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    heads = [name for name in file.record.get("head", []) if any(f".{name}." in key for key in missing)]
    if heads:
        raise DamagedFile(
            f"adapter {file.name!r} lacks its head {heads[0]!r} ({len(missing)} tensors missing); download it again."
        )
    if missing or superfluous:
        parts = [f"lacks {len(missing)} tensors ({min(missing)})"] if missing else []
        parts += [f"has {len(superfluous)} that no module takes ({min(superfluous)})"] if superfluous else []
        raise WrongBase(f"adapter {file.name!r} does not fit its config on this base: it {' and '.join(parts)}.")
    for key in sorted(expected):
        if expected[key] != tuple(weights[key].shape):
            head = any(f".{name}." in key for name in find_head(base))
            hint = " Give base=load_base(name, labels=...) with the adapter's labels." if head else ""
            raise WrongBase(
                f"adapter {file.name!r} does not fit its config on this base: {key} should be {expected[key]}, "
                f"the file has {tuple(weights[key].shape)}.{hint}"
            )
    return model


def _check_tokens(file: AdapterFile, config: PeftConfig, weights: dict[str, torch.Tensor]) -> None:
    """Of a prompt or prefix, before peft allocates as many tokens as the config names."""
    if not config.is_prompt_learning:
        return
    wanted, found = count_virtual_tokens(config), weights.get("prompt_embeddings")
    if len(weights) > 1 or found is None or found.shape[:1] != (wanted,):
        raise DamagedFile(
            f"adapter {file.name!r} does not fit its config: expected one tensor prompt_embeddings of {wanted} virtual "
            f"tokens, got {', '.join(f'{k} {tuple(v.shape)}' for k, v in list(weights.items())[:2])}; download it "
            "again."
        )
