"""What criteria and compensation know of a model: what the readers of its units see on some examples, and gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay.bases.eval_mode import eval_mode
from inlay.bases.widths import Group, weight_axis
from inlay.errors import ComputationFailed
from inlay.train.losses import Loss

Need = Literal["activations", "gradients"]


@dataclass
class Seen:
    """What one reader has seen, over all rows: tokens of texts and images, places that a kernel stands on.

    Attributes:
        rows: How many.
        sum: Of its input, (G, F) in float64. F is a row of its weight, as `weight_matrix` has it; G are its groups.
        gram: Sum of x·xᵀ, (G, F, F) in float64.
    """

    rows: int
    sum: Tensor
    gram: Tensor


@dataclass
class Evidence:
    """What is known of a model on the examples it was shown.

    Attributes:
        seen: By name of the reader; empty where no activations were asked for.
        positive: By group, the share of values over 0 of each unit, (U,).
        taylor: By group, the mean over examples of (Σ a·∂L/∂a)², (U,); empty where no gradients were asked for.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    positive: dict[str, Tensor] = field(default_factory=dict)
    taylor: dict[str, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[dict[str, Any]],
    loss: Loss,
    needs: set[Need],
) -> Evidence:
    """Show examples to a model, in eval mode, and add up what is needed; nothing of it is kept but the sums.

    Args:
        model: Without an adapter in it.
        groups: Of `find_groups`.
        batches: What the model takes, with labels.
        loss: Of a batch.
        needs: What to compute.

    Raises:
        InlayError: The sums are not finite.
    """
    evidence = Evidence()
    if not needs:
        return evidence
    readers = {part.module: model.get_submodule(part.module) for group in groups for part in group.read}
    mask: list[Tensor | None] = [None]  # of the tokens of the present batch
    with eval_mode(model), ExitStack() as hooks, _with_gradients(model, groups, "gradients" in needs):
        if "activations" in needs:
            for name, reader in readers.items():
                watch = _watch_inputs(evidence, name, reader, mask)
                hooks.callback(reader.register_forward_pre_hook(watch).remove)
        for group in groups:
            reader = readers[group.read[0].module]
            watch = _watch_group(evidence, group, reader, "gradients" in needs)
            hooks.callback(reader.register_forward_pre_hook(watch).remove)
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            if "gradients" in needs:
                loss(model, batch).loss.backward()
                model.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    loss(model, batch)
    counts = [len(next(iter(batch.values()))) for batch in batches]
    evidence.positive = {name: total / sum(counts) for name, total in evidence.positive.items()}
    evidence.taylor = {name: total / sum(counts) for name, total in evidence.taylor.items()}
    sums = [*(seen.gram for seen in evidence.seen.values()), *evidence.taylor.values()]
    if not all(bool(torch.isfinite(each).all()) for each in sums):
        raise ComputationFailed("the model's activations or gradients on these examples are NaN or Inf.")
    return evidence


@contextmanager
def _with_gradients(model: nn.Module, groups: Sequence[Group], wanted: bool) -> Iterator[None]:
    """Let what the readers see have a gradient, through the weights of what computes it."""
    weights = [model.get_submodule(part.module).weight for group in groups for part in group.made] if wanted else []
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
            weight.grad = None


def _watch_inputs(evidence: Evidence, name: str, reader: nn.Module, mask: list[Tensor | None]) -> Callable[..., None]:
    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = reader_inputs(reader, inputs[0].detach())  # (B, N, G, F)
        tokens = mask[0]
        rows = x[tokens.bool()] if tokens is not None and tokens.shape == x.shape[:2] else x.flatten(0, 1)
        each = rows.transpose(0, 1)  # (G, B·N, F)
        gram, total = (each.mT @ each).cpu().double(), each.sum(1).cpu().double()  # sums of batches in float64
        seen = evidence.seen.get(name)
        if seen is None:
            evidence.seen[name] = Seen(len(rows), total, gram)
        else:
            seen.rows, seen.sum, seen.gram = seen.rows + len(rows), seen.sum + total, seen.gram + gram

    return watch


def _watch_group(evidence: Evidence, group: Group, reader: nn.Module, gradients: bool) -> Callable[..., None]:
    places = channel_places(reader, group.read[0].places)

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        along = 1 if isinstance(reader, nn.Conv2d) else x.ndim - 1

        def of_units(values: Tensor) -> Tensor:  # (B, ..., C) to (B, units, rest)
            return values.movedim(along, 1).flatten(2)[:, places.to(values.device)].flatten(2)

        shares = (of_units(x.detach()) > 0).float().mean(2).sum(0).cpu().double()
        evidence.positive[group.name] = evidence.positive.get(group.name, 0) + shares

        def add_gradient(gradient: Tensor) -> None:
            # The loss is a mean over the rows of the batch; what one row alone would have is B times that.
            change = of_units(x.detach() * gradient).sum(2).cpu().double() * len(x)
            evidence.taylor[group.name] = evidence.taylor.get(group.name, 0) + change.square().sum(0)

        if gradients:
            x.register_hook(add_gradient)

    return watch


def reader_inputs(reader: nn.Module, x: Tensor) -> Tensor:
    """What a row of the reader's weight is multiplied with, (B, N, G, F): tokens, or the patches of a convolution."""
    if not isinstance(reader, nn.Conv2d):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    patches = functional.unfold(x, reader.kernel_size, reader.dilation, reader.padding, reader.stride)
    return patches.transpose(1, 2).unflatten(2, (reader.groups, -1))


def weight_matrix(reader: nn.Module) -> Tensor:
    """The weight of a reader, (G, outputs of a group, F) on the CPU; F are a group's inputs times a kernel's places."""
    weight = reader.weight.detach().cpu()
    if not isinstance(reader, nn.Conv2d):
        return (weight.T if weight_axis(reader, "in") == 0 else weight)[None]
    return weight.flatten(1).unflatten(0, (reader.groups, -1))


def feature_places(reader: nn.Module, places: Tensor) -> Tensor:
    """Of each unit, where it stands in a row of the reader's weight: its places, times those of a kernel; (U, n)."""
    each = reader.weight[0, 0].numel() if isinstance(reader, nn.Conv2d) else 1
    return (places[..., None] * each + torch.arange(each)).flatten(1)


def channel_places(reader: nn.Module, places: Tensor) -> Tensor:
    """Of each unit, the channels of the reader's input: its places in each of the groups; (U, n)."""
    if not isinstance(reader, nn.Conv2d):
        return places
    return (torch.arange(reader.groups)[:, None] * reader.weight.shape[1] + places[:, None]).flatten(1)
