"""Carry an adapter of the whole base onto a pruned one: what belongs to units that are gone is cut out of it."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.adapters.weight_file import PREFIX
from inlay.adapters.weights import read_weights
from inlay.bases.pruned import read_widths
from inlay.bases.widths import Group, find_groups, narrowed, places_that_stay, weight_axis
from inlay.compress.prune.pruning import Pruned, leave_out, prune
from inlay.compress.prune.save import read_record
from inlay.compress.prune.trained import load_trained
from inlay.errors import BadInput, Unsupported, WrongBase
from inlay.methods._peft import PeftConfig, adapter_shapes, fill_injected_adapter, inject_empty_adapter
from inlay.tasks.base import load_base
from inlay.tasks.evaluation import Training


def prune_under_adapter(
    adapter: str | Path, data: str, *, base: str | Path | None = None, **how: Any
) -> tuple[Pruned, Pruned]:
    """Prune an adapter's base as the two together would be pruned, and leave the adapter out of it.

    With the adapter that `carry_adapter` then makes the pruned base computes what the pruned merged model does.

    Args:
        adapter: A folder.
        data: Labelled data of the adapter's task.
        base: Instead of the one that the adapter names.
        how: As `prune` takes it.

    Returns:
        The pruned base, and the pruned merged model.

    Raises:
        InlayError: What `load_adapter` and `prune` say.
    """
    merged = load_trained(adapter, base=base)
    if "adapter" not in merged.origin:
        raise BadInput(f"{adapter} is a model; only an adapter can be carried onto its pruned base. Leave carry out.")
    name = merged.origin["base"]
    whole = load_base(name, task=merged.task.name, device="cpu")
    pruned = prune(merged, data, **how)
    groups = find_groups(whole)
    keep = {group: torch.tensor(units) for group, units in pruned.kept.items()}
    made = leave_out(whole, groups, keep)
    with torch.no_grad():  # what compensation has changed of the readers
        cut, fitted = narrowed(merged.model, keep).state_dict(), pruned.trained.model.state_dict()
        for key, value in made.state_dict().items():
            if key.rpartition(".")[0] in _readers(groups):
                value += fitted[key] - cut[key]
    task = merged.task
    labels = task.labels(made, None) if task.classifies else []
    trained = replace(merged, model=made, labels=labels, origin={"model": name}, groups={})
    facts = {**pruned.facts, "source": trained.origin, "seen_with": merged.name}
    return Pruned(trained, pruned.kept, facts), pruned


def carry_adapter(adapter: str | Path, pruned: str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """Save an adapter of a base as one of its pruned form; together they compute what the pruned merged model does.

    LoRA, (IA)3, SSF and partial tuning are cut where a module has become narrower. A bottleneck between the layers of
    the outer width stays as it is, and so does a head.

    Args:
        adapter: A folder, trained on the whole base.
        pruned: A folder that `save_pruned` wrote, of that base, not healed since.
        out: The folder of the new adapter.
        base: The whole base, instead of the one that the adapter names.

    Raises:
        InlayError: A base that was pruned from other weights; a method whose tensors cannot be cut.
    """
    record = read_record(pruned)
    loaded = load_adapter(adapter, base, device="cpu")
    whole = load_base(base or loaded.file.base_name, task=loaded.task.name, device="cpu")
    keep = {name: torch.tensor(units) for name, units in record["kept"].items()}
    groups = find_groups(whole)
    labels = loaded.labels if loaded.task.classifies else None
    narrow_base = load_base(pruned, task=loaded.task.name, labels=labels, device="cpu")
    _check_origin(str(pruned), whole, groups, keep, narrow_base)
    weights = cut_tensors(read_weights(loaded.file), whole, keep)
    config = PeftConfig.from_pretrained(str(loaded.file.folder))
    model = inject_empty_adapter(narrow_base, copy.deepcopy(config))
    expected = adapter_shapes(model)
    for key, value in weights.items():
        if expected.get(key) != tuple(value.shape):
            raise Unsupported(
                f"{key} of adapter {loaded.name!r} ({loaded.file.config['peft_type']}) depends on units that are gone "
                f"and cannot be cut: it should be {expected.get(key)} and is {tuple(value.shape)}. Merge the adapter "
                "and prune the merged model."
            )
    fill_injected_adapter(model, weights)
    metrics = Training.select(loaded.file.metrics)
    return save_adapter(model.eval(), out, processor=loaded.processor, metrics=metrics)


def _readers(groups: Sequence[Group]) -> set[str]:
    return {part.module for group in groups for part in group.read}


def _check_origin(name: str, whole: Any, groups: Sequence[Group], keep: Mapping[str, Tensor], narrow_base: Any) -> None:
    """Compare what computes the kept units in both bases; what reads them may have been fitted."""
    known = {group.name: group.units for group in groups}
    same = all(unit in known and int(kept.max()) < known[unit] for unit, kept in keep.items())
    cut = narrowed(whole, keep) if same else whole
    modules = {part.module for group in groups for part in group.made}
    if same and read_widths(cut) == read_widths(narrow_base):
        there = narrow_base.state_dict()
        same = all(
            torch.allclose(value, there[key], rtol=1e-4, atol=1e-6)
            for key, value in cut.state_dict().items()
            if key.rpartition(".")[0] in modules - _readers(groups)
        )
    else:
        same = False
    if not same:
        raise WrongBase(
            f"{name} was pruned from other weights than the adapter's base {whole.name_or_path!r}, or was healed "
            "since; prune that base (inlay prune ADAPTER --carry FOLDER)."
        )


def cut_tensors(weights: Mapping[str, Tensor], whole: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter without what belongs to units that are left out.

    Args:
        weights: As peft stores them.
        whole: The base that the adapter was trained on.
        keep: By group, the units that stay.

    Raises:
        InlayError: A DoRA on a layer that reads fewer units, whose norms change.
    """
    places = places_that_stay(whole, keep)
    return {key: _cut(key, value, whole, places) for key, value in weights.items()}


# By the end of a tensor's key: which of its axes belongs to which side of the module it stands at.
_AXES: tuple[tuple[str, dict[str, int]], ...] = (
    (r"lora_A\.weight", {"in": 1}),
    (r"lora_B\.(weight|bias)", {"out": 0}),
    (r"lora_magnitude_vector", {"out": 0}),
    (r"ia3_l", {"out": 0, "in": 1}),
    (r"inlay_partial_delta\.bias", {"out": 0}),
    (r"inlay_ssf_(scale|shift)", {"out": 0}),
)


def _cut(key: str, value: Tensor, whole: nn.Module, places: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    name = key.removeprefix(PREFIX)
    module = max((module for module in places if name.startswith(f"{module}.")), key=len, default="")
    if not module:
        return value
    leaf, sides = name.removeprefix(f"{module}."), places[module]
    if leaf == "lora_magnitude_vector" and "in" in sides:
        raise Unsupported(
            f"{module} reads fewer units, which changes the norms that a DoRA scales; merge the adapter and prune the "
            "merged model."
        )
    axes = next((axes for pattern, axes in _AXES if re.fullmatch(pattern, leaf)), {})
    if leaf == "inlay_partial_delta.weight":  # of the shape of the weight itself
        axes = {side: weight_axis(whole.get_submodule(module), side) for side in sides}
    for side, axis in axes.items():
        if side in sides and axis < value.ndim and value.shape[axis] > 1:
            value = value.index_select(axis, sides[side])
    return value.contiguous()
