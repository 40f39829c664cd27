"""Train a pruned model again for a little while: by a small LoRA that is then merged, or all of its weights."""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from inlay.bases.batch_norm import is_batch_norm
from inlay.bases.learning_rate import scale_rate
from inlay.bases.pruned import new_with_widths
from inlay.bases.sites import lora_targets
from inlay.compress.prune.trained import TrainedModel
from inlay.errors import BadInput, Unsupported
from inlay.measure import footprint
from inlay.methods import METHODS
from inlay.methods._peft import merge_keeping_weights
from inlay.tasks.task import LabelledBatches
from inlay.train.config import TrainConfig
from inlay.train.loop import fit

EVERY = 1_000_000_000  # examples: all that the data has
Way = Literal["lora", "full", "scratch"]


@dataclass(frozen=True)
class Healed:
    """A pruned model that was trained again.

    Attributes:
        trained: The model, without an adapter in it.
        facts: How it was trained, as JSON takes it: way, rank, parameters that were trained and their share, steps.
    """

    trained: TrainedModel
    facts: dict[str, Any]


def heal(
    trained: TrainedModel,
    data: str | os.PathLike[str],
    *,
    way: Way = "lora",
    share: float = 0.05,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Healed:
    """Train a pruned model on the training part of its data, with the task's loss, and return another one.

    Args:
        trained: The pruned model, which is left as it is.
        data: Labelled data of its task.
        way: `lora`: an adapter, which is then merged. `full`: all weights. `scratch`: all weights, which are drawn anew
            first: what a model of this size learns by itself in as many steps.
        share: Of the model's parameters that the LoRA may have.
        steps: Of the optimiser.
        batch_size: Examples in a step.
        learning_rate: Default: that of METHODS for LoRA or for all weights, less on a wide base (`scale_rate`).
        seed: Of the order of the data, and of new weights.
        output_dir: Folder of the run, which goes on when it was interrupted; None: it is not kept.

    Raises:
        InlayError: What `fit` raises; a share that is too small for rank 1.
    """
    data = os.fspath(data)
    set_seed(seed)
    model: Any = copy.deepcopy(trained.model) if way != "scratch" else new_with_widths(trained.model)
    model.to(next(trained.model.parameters()).device)
    rank = 0
    if way == "lora":
        rank = largest_rank(model, share)
        model = get_peft_model(model, METHODS["lora"].config(model, rank))  # the head is trained already
    elif way in ("full", "scratch"):
        model.requires_grad_(True)
    else:
        raise BadInput(f"unknown way {way!r}; choose one of lora, full, scratch.")
    size = footprint(model)
    labelled = trained.task.load_labelled(trained.with_model(model), data, EVERY, trained.seed, trained.training)
    if way == "scratch":
        set_statistics(model, labelled, 4, batch_size)
    rate = learning_rate or scale_rate(METHODS["lora" if way == "lora" else "full"].learning_rate, trained.model)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=str(output_dir or Path(folder) / "run"),
            epochs=steps * batch_size / len(labelled.view),
            batch_size=batch_size,
            learning_rate=rate,
            seed=seed,
            workers=0,
        )
        result = fit(
            model, labelled.view, None, config, collate=labelled.collate, loss=labelled.loss, settings={"way": way}
        )
    healed = merge_keeping_weights(model)[0] if way == "lora" else model
    facts = {
        "way": way,
        **({"rank": rank} if rank else {}),
        "trained_parameters": size.trainable,
        "share": size.trainable / footprint(trained.model).parameters,
        "steps": result.steps,
        "batch_size": batch_size,
        "learning_rate": rate,
        "seed": seed,
        "seconds": round(result.seconds, 1),
    }
    return Healed(trained.with_model(healed.requires_grad_(False).eval()), facts)


@torch.no_grad()
def set_statistics(model: nn.Module, labelled: LabelledBatches, batches: int, size: int) -> None:
    """Give the batch norms of a new model the statistics of the first batches, as `fit` keeps those that they have."""
    norms = [module for module in model.modules() if is_batch_norm(module)]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    device = next(model.parameters()).device
    for first in range(0, min(batches * size, len(labelled.view)), size):
        items = [labelled.view[i] for i in range(first, min(first + size, len(labelled.view)))]
        labelled.loss(model, {key: value.to(device) for key, value in labelled.collate(items).items()})
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()


def largest_rank(model: PreTrainedModel, share: float) -> int:
    """The largest rank of a LoRA on every linear layer that has no more than this share of the model's parameters.

    Raises:
        InlayError: Rank 1 has more.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share must be a number over 0 and at most 1, not {share}.")
    modules = [model.get_submodule(name) for name in lora_targets(model)]
    each = sum(_sum_of_sides(module) for module in modules)
    parameters = footprint(model).parameters
    rank = int(share * parameters / each)
    if not rank:
        raise Unsupported(
            f"a LoRA of rank 1 has {each:,} parameters, {each / parameters:.1%} of the pruned model; raise the share "
            f"from {share:.1%}."
        )
    return rank


def _sum_of_sides(module: nn.Module) -> int:
    """Parameters of a LoRA of rank 1: one row of the weight, with the kernel of a convolution, and one column."""
    return module.weight[0].numel() + len(module.weight)
