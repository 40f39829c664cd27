"""Fit what reads a pruned layer anew, so that its outputs stay as close to those of before as they can."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from inlay.bases.widths import Group, weight_axis
from inlay.compress.prune.statistics import Seen, feature_places, weight_matrix

RIDGE = 1e-4  # of the mean diagonal of the kept inputs' Gram matrix


@torch.no_grad()
def compensate(
    model: nn.Module,
    groups: Sequence[Group],
    seen: Mapping[str, Seen],
    keep: Mapping[str, Tensor],
    ridge: float = RIDGE,
) -> None:
    """Change the weights by which the kept units are read, in place, before the others are left out.

    Each reader gets the W that makes ‖X·W₀ᵀ - X_kept·Wᵀ‖² + λ‖W - W₀,kept‖² least over the examples, where it has a
    bias with the bias that belongs to it. λ is `ridge` times the mean square of a kept input. Where nothing is left
    out nothing changes.

    Args:
        model: Not narrowed yet.
        groups: Of `find_groups`.
        seen: Of `observe`, by name of the reader.
        keep: By group, the units that stay.
        ridge: See above; over 0, so that equal or dead units make no harm.

    Source: the last step of ThiNet (Luo et al. 2017, arXiv:1707.06342, section 3.3); in closed form for transformers
    CORP (arXiv:2602.05243).
    """
    kept: dict[str, Tensor] = {}
    for group in groups:
        if group.name in keep:
            left_out = torch.ones(group.units, dtype=torch.bool)
            left_out[keep[group.name]] = False
            for part in group.read:
                reader = model.get_submodule(part.module)
                mask = kept.setdefault(part.module, torch.ones(weight_matrix(reader).shape[2], dtype=torch.bool))
                mask[feature_places(reader, part.places[left_out]).flatten()] = False
    for name, mask in kept.items():
        if not bool(mask.all()):
            _refit(model.get_submodule(name), seen[name], mask, ridge)


def _refit(reader: nn.Module, seen: Seen, kept: Tensor, ridge: float) -> None:
    """Give a reader the weight and the bias that fit the inputs it keeps; each group of a convolution by itself."""
    weight = weight_matrix(reader).double()  # G outputs F
    bias = getattr(reader, "bias", None)
    mean, moments = seen.sum / seen.rows, seen.gram / seen.rows
    if bias is not None:  # what a bias can make up for is no error
        moments = moments - mean[:, :, None] * mean[:, None]
    inner, across = moments[:, kept][:, :, kept], moments[:, kept][:, :, ~kept]
    penalty = ridge * inner.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    inner = inner + penalty[:, None, None] * torch.eye(inner.shape[1], dtype=torch.float64)
    gone = weight[:, :, ~kept]
    change = torch.linalg.solve(inner, across @ gone.mT).mT  # G outputs kept
    if bias is not None:
        shift = gone @ mean[:, ~kept, None] - change @ mean[:, kept, None]
        bias += shift.flatten().to(bias)
    weight[:, :, kept] += change
    flat = weight.flatten(0, 1)
    reader.weight.copy_(flat.T if weight_axis(reader, "in") == 0 else flat.view(reader.weight.shape))
