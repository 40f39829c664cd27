"""Clicks are obeyed: what was clicked gets its class, and with it the voxels around that the model was less sure of.

A model may not hear a click, above all where it is sure of something else. What a user has said is right all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from inlay.tasks.volumes.windows import ScanPrompts

MARGIN = 1.0  # by how much the logit of a clicked voxel's class is to be above all others
SPREAD = 2.0  # standard deviation, in voxels, with which a click reaches further
REACH = 3  # of them, beyond which it does not


def lift_clicked(logits: torch.Tensor, prompts: Sequence[ScanPrompts]) -> torch.Tensor:
    """Logits by which each clicked voxel is of the class that was said; a copy.

    A click lifts its class by what it lacks there, and by a Gaussian share of that around it. Each voxel hears
    only the click that is nearest to it: clicks of different classes do not disturb each other, and one that the model
    has heard keeps others off. Of two in one voxel the later one counts.

    Args:
        logits: (B, K + 1, D, H, W).
        prompts: Those of each row.
    """
    lifted = logits.clone()
    for row, said in zip(lifted, prompts, strict=True):
        if len(said.points):
            _lift_row(row, said.points, said.labels.to(row.device))
    return lifted


def _lift_row(row: torch.Tensor, points: torch.Tensor, labels: torch.Tensor) -> None:
    """One row (K + 1, D, H, W), in place. Nothing is read from a GPU."""
    sizes = row.shape[1:]
    places = [[min(max(round(p), 0), n - 1) for p, n in zip(point, sizes, strict=True)] for point in points.tolist()]
    d, h, w = torch.tensor(places, device=row.device).T
    there = row[:, d, h, w]  # K+1 N
    highest = there.scatter(0, labels[None], -torch.inf).amax(0)
    lacking = (highest + MARGIN - there.gather(0, labels[None])[0]).clamp(min=0)
    nearest, lift = row.new_full(sizes, torch.inf), row.new_zeros(sizes)
    classes = torch.zeros(sizes, dtype=torch.long, device=row.device)
    reach = int(REACH * SPREAD)
    for place, lack, label in zip(places, lacking, labels, strict=True):
        box = tuple(slice(max(0, p - reach), p + reach + 1) for p in place)
        apart = [
            (torch.arange(n, device=row.device)[part] - p) ** 2 for n, part, p in zip(sizes, box, place, strict=True)
        ]
        square = apart[0][:, None, None] + apart[1][:, None] + apart[2]
        closer = square <= nearest[box]
        share = torch.exp(-square / (2 * SPREAD**2))
        nearest[box] = torch.where(closer, square, nearest[box])
        lift[box] = torch.where(closer, lack * share, lift[box])
        classes[box] = torch.where(closer, label, classes[box])
    row.scatter_add_(0, classes[None], lift[None])
