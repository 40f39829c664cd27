"""The sum of adapters as a difference of the base's weights: for methods whose updates only the base can tell.

Each adapter is loaded, in float64, and folded into the base; what that changes is its update, of any method that folds
(DoRA, LoHa, LoKr, OFT, VeRA ... of peft). The sum is a partial delta, as large as the weights that it changes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model

from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.adapters.weight_file import PREFIX
from inlay.combine.heads import Heads
from inlay.combine.method_sum import SumOptions
from inlay.combine.parts import Array, Source
from inlay.combine.weights import Weight, weight_at
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import adapter_shapes, merge_keeping_weights, set_adapter_values
from inlay.methods.partial import PartialConfig
from inlay.tasks.base import load_base


def write_dense(
    sources: Sequence[Source],
    heads: Heads,
    options: SumOptions,
    base: str | None,
    folder: Path,
    metrics: dict[str, Any],
) -> None:
    """Combine the updates of adapters as differences of weights, and save them with the golden output that they give.

    Raises:
        InlayError: No base is named; an adapter that does not fold into it; one that changes weights which two modules
            share.
    """
    if options.rule.needs_factors:
        raise Unsupported(
            f"{options.rule.name} works on the factors of low-rank updates; use ties, or leave dense out."
        )
    name = base or next((source.file.base_name for source in sources if source.file.base_name), "")
    if not name:
        raise BadInput("a dense combination takes the base's weights, but no adapter names it; give base=.")
    deltas: list[dict[str, Array]] = []
    processor, task = None, None
    for source in sources:
        loaded = load_adapter(source.file.folder, name, device="cpu")
        if processor is None or task is None or source.name == options.keep:
            processor, task = loaded.processor, loaded.task
        deltas.append(_find_update(loaded, name, source))
    assert task is not None
    merged = _merge_deltas(deltas, [source.weight for source in sources], options)
    modules = sorted({key.rpartition(".")[0] for key in merged})
    if not modules:
        raise BadInput("these adapters change no weight of the base; there is nothing to combine.")
    model = load_base(name, task=task.name, labels=heads.labels if task.classifies else None)
    task.complete_base(model)
    model = get_peft_model(model, PartialConfig(target_modules=modules, modules_to_save=heads.modules or None)).eval()
    weights = {
        f"{PREFIX}{key.rpartition('.')[0]}.inlay_partial_delta.{key.rpartition('.')[2]}": torch.from_numpy(value)
        for key, value in merged.items()
    }
    weights |= {key: torch.from_numpy(heads.make(key)) for key in heads.shapes}
    if strange := weights.keys() - adapter_shapes(model).keys():
        raise Unsupported(f"{min(strange)} cannot be a difference of weights; leave dense out.")
    set_adapter_values(model, weights)
    save_adapter(model, folder, processor=processor, metrics=metrics, groups=heads.groups)


def _find_update(loaded: Any, name: str, source: Source) -> dict[str, Array]:
    """What folding an adapter into the base changes, by parameter, without its head."""
    labels = loaded.labels if loaded.task.classifies else None
    plain = load_base(name, task=loaded.task.name, labels=labels).double()
    before = dict(plain.named_parameters(remove_duplicate=False))
    if loaded.model.active_peft_config.is_prompt_learning:
        raise Unsupported(f"adapter {source.name!r} adds tokens, which are no difference of weights; leave dense out.")
    folded, _ = merge_keeping_weights(loaded.model.double())
    found = {}
    with torch.no_grad():
        for key, value in folded.named_parameters(remove_duplicate=False):
            if key not in before or key in source.head:
                continue
            delta = value - before[key]
            if torch.any(delta):
                found[key] = delta.float().numpy()
    for key in found:
        others = [other for other, value in before.items() if other != key and value is before[key]]
        if others:
            raise Unsupported(
                f"adapter {source.name!r} changes {key}, which the base shares with {others[0]}, and a difference of "
                "weights changes both; leave dense out, or train on a base whose weights are not tied."
            )
    return found


def _merge_deltas(deltas: list[dict[str, Array]], weights: list[Weight], options: SumOptions) -> dict[str, Array]:
    merge, found = options.rule.merge, {}
    for key in dict.fromkeys(key for own in deltas for key in own):
        here = [(own[key], weight_at(weight, key)) for own, weight in zip(deltas, weights, strict=True) if key in own]
        if merge is not None:
            found[key] = merge([d for d, _ in here], [w for _, w in here], options.settings, key)
        else:
            found[key] = np.sum([np.float32(w) * d for d, w in here], axis=0, dtype=np.float32)
    return found
