"""Set single weights to zero. Tensors keep their shapes, so that nothing becomes faster; only zeros pack better."""

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.sites import head_modules, is_linear
from inlay.bases.widths import weight_axis
from inlay.combine.examples import Examples, load_examples
from inlay.compress.prune.pruning import Pruned
from inlay.compress.prune.target import Scope
from inlay.compress.prune.trained import TrainedModel, load_trained
from inlay.errors import BadInput
from inlay.measure import footprint

MASKS = {
    "magnitude": "Han et al. 2015, arXiv:1506.02626",
    "wanda": "Sun et al. 2024 (Wanda), arXiv:2306.11695",
}


def mask_weights(
    model: TrainedModel | str | Path,
    data: str | os.PathLike[str] | None = None,
    *,
    sparsity: float = 0.5,
    criterion: str = "magnitude",
    scope: Scope = "local",
    examples: int = 256,
) -> Pruned:
    """Set a share of the weights of all linear layers and convolutions outside the head to zero.

    Args:
        model: As `prune` takes it; it is left as it is.
        data: Labelled data of its task, for wanda.
        sparsity: Share of the weights that are zero afterwards, rounded down to whole weights of a layer (local),
            of the model (global) or of a row of a layer (wanda).
        criterion: `magnitude`: the smallest |w|. `wanda`: the smallest |w|·‖x‖₂ in each row of a layer; of a
            convolution x is what one input channel holds.
        scope: Of magnitude: `local`, the share of each layer, or `global`, of all weights together.
        examples: How many wanda looks at.

    Raises:
        InlayError: An unknown criterion, a sparsity that is no share, wanda without data.
    """
    data = None if data is None else os.fspath(data)
    if criterion not in MASKS:
        raise BadInput(f"unknown criterion {criterion!r} for single weights; choose one of {', '.join(MASKS)}.")
    if not 0 < sparsity < 1:
        raise BadInput(f"sparsity must be a number over 0 and below 1, not {sparsity}.")
    if criterion == "wanda" and (data is None or scope != "local"):
        raise BadInput("wanda compares the weights of a row by what they see: give data, and leave scope out.")
    trained = model if isinstance(model, TrainedModel) else load_trained(model)
    masked = copy.deepcopy(trained.model)
    layers = find_layers(masked)
    before = count_nonzero(layers.values())
    known = (
        load_examples(trained, data, examples, trained.seed, training=trained.training)
        if criterion == "wanda" and data
        else None
    )
    if known is not None:
        norms = _input_norms(masked, layers, known)
        for name, layer in layers.items():
            _zero_smallest_of_rows(layer, _rows(layer).abs() * norms[name], sparsity)
    elif scope == "local":
        for layer in layers.values():
            _zero_smallest([layer], sparsity)
    else:
        _zero_smallest(list(layers.values()), sparsity)
    weights = sum(layer.weight.numel() for layer in layers.values())
    left = count_nonzero(layers.values())
    facts = {
        "task": trained.task.name,
        "source": trained.origin,
        "data": data,
        "sparsity": sparsity,
        "criterion": criterion,
        "paper": MASKS[criterion],
        "scope": scope,
        "examples": known.count if known else 0,
        "masked_weights": weights,
        "zeros": weights - left,
        "before": {"nonzero": before, "params": footprint(trained.model).parameters},
        "after": {"nonzero": left, "params": footprint(masked).parameters},
    }
    return Pruned(trained.with_model(masked), {}, facts)


def find_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers and convolutions outside the head, by name."""
    heads = tuple(f"{name}." for name in head_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, nn.Conv2d)) and not f"{name}.".startswith(heads)
    }


def count_nonzero(layers: Any) -> int:
    """Weights of some layers that are not zero."""
    return sum(int(layer.weight.count_nonzero()) for layer in layers)


@torch.no_grad()
def _zero_smallest(layers: Sequence[nn.Module], sparsity: float) -> None:
    """Zero the smallest magnitudes among the weights of these layers."""
    magnitudes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    count = int(sparsity * len(magnitudes))
    gone = torch.zeros_like(magnitudes, dtype=torch.bool)
    gone[magnitudes.argsort(stable=True)[:count]] = True
    for layer, mask in zip(layers, gone.split([layer.weight.numel() for layer in layers]), strict=True):
        layer.weight.masked_fill_(mask.view(layer.weight.shape), 0)


@torch.no_grad()
def _zero_smallest_of_rows(layer: nn.Module, importance: Tensor, sparsity: float) -> None:
    """Zero the least important weights of each row, which makes one output; (outputs, inputs)."""
    count = int(sparsity * importance.shape[1])
    gone = torch.zeros_like(importance, dtype=torch.bool)
    gone.scatter_(1, importance.argsort(dim=1, stable=True)[:, :count], True)
    mask = gone.T if weight_axis(layer, "in") == 0 else gone.view(layer.weight.shape)
    layer.weight.masked_fill_(mask, 0)


def _rows(layer: nn.Module) -> Tensor:
    """The weight as (outputs, inputs of one)."""
    weight = layer.weight.detach()
    return weight.T if weight_axis(layer, "in") == 0 else weight.flatten(1)


@torch.no_grad()
def _input_norms(model: nn.Module, layers: Mapping[str, nn.Module], known: Examples) -> dict[str, Tensor]:
    """‖x‖₂ over all examples and places of what each weight is multiplied with; as `_rows`, or (1, inputs)."""
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else inputs[0]
            squares[name] = squares.get(name, 0) + x.flatten(0, -2).square().sum(0)

        return add

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(watch(name)).remove)
        for batch in known.batches:
            known.loss(model, batch)
    norms = {}
    for name, layer in layers.items():
        norm = squares[name].sqrt() if name in squares else torch.ones(_rows(layer).shape[1])  # never called
        if isinstance(layer, nn.Conv2d):
            group = norm.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
            norms[name] = group.repeat_interleave(layer.weight[0, 0].numel(), 1)
        else:
            norms[name] = norm[None]
    return norms
