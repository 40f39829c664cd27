"""Clicks and boxes as a user would give them, drawn from a reference for training and for measuring.

All chance comes from torch's global generator.

Source: the first clicks in the object, later ones where the answer is most wrong: Sofiiuk et al. 2021 (RITM),
arXiv:2102.06583, section 3; boxes jittered as in Kirillov et al. 2023, arXiv:2304.02643, appendix A.
"""

import torch
from torch.nn import functional as F

REACH = 5  # edge of the cube over which errors are counted to find where most of them are, in voxels


def clicks_in_objects(labels: torch.Tensor, count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random voxels of each class that is there.

    Args:
        labels: (B, D, H, W): 0 background, 1 to K, -1 to be ignored.
        count: Clicks for each class.
        classes: K.

    Returns:
        Points (B, K · count, 3) as voxel indices, and their labels (B, K · count), -1 for a class that is not there.
    """
    points, said = [], []
    for label in range(1, classes + 1):
        where = (labels == label).flatten(1).float()
        found = where.sum(1) > 0
        at = torch.multinomial(where + (~found)[:, None], count, replacement=True)
        points.append(_unravel(at, labels))
        said.append(torch.where(found[:, None], label, -1).expand(-1, count))
    return torch.cat(points, dim=1), torch.cat(said, dim=1)


def clicks_on_errors(logits: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clicks where an answer is most wrong, each with the class that is right there: background too.

    Every click takes the place in the densest region of errors, and the errors around it are then left to it.

    Args:
        logits: The answer, (B, K + 1, D, H, W).
        labels: (B, D, H, W), -1 to be ignored.
        count: Clicks for each row.

    Returns:
        Points (B, count, 3) and labels (B, count), -1 where nothing is wrong any more.
    """
    wrong = ((logits.argmax(1) != labels) & (labels >= 0)).float()
    points, said = [], []
    for _ in range(count):
        # Padded first: avg_pool3d refuses volumes that are smaller than its kernel, whatever its own padding.
        framed = F.pad(wrong[:, None], [REACH // 2] * 6)
        dense = F.avg_pool3d(framed, REACH, stride=1)[:, 0] * wrong
        jitter = 1 + 0.1 * torch.rand_like(dense)  # equal regions: any of them
        value, at = (dense * jitter).flatten(1).max(1, keepdim=True)
        label = labels.flatten(1).gather(1, at)
        points.append(_unravel(at, labels))
        said.append(torch.where(value > 0, label, -1))
        near = [(_axis(labels, i) - points[-1][..., i]).abs() <= REACH for i in range(3)]  # B n
        wrong = wrong * ~(near[0][:, :, None, None] & near[1][:, None, :, None] & near[2][:, None, None, :])
    return torch.cat(points, dim=1), torch.cat(said, dim=1)


def boxes_around(labels: torch.Tensor, classes: int, jitter: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """A box around each class, each face moved by up to `jitter` of the edge.

    Returns:
        Boxes (B, K, 6), two opposite corners as voxel indices, and their classes (B, K), -1 for one that is not there.
    """
    boxes, said = [], []
    for label in range(1, classes + 1):
        where, faces = labels == label, []
        for i in range(3):
            there = where.any(dim=[axis for axis in (1, 2, 3) if axis != i + 1])  # B n
            index = torch.arange(there.shape[1], device=labels.device)
            low = torch.where(there, index, there.shape[1]).amin(1).float()
            high = torch.where(there, index, -1).amax(1).float()
            moved = (torch.rand(2, len(labels), device=labels.device) * 2 - 1) * jitter * (high - low + 1)
            faces.append(torch.stack([low + moved[0], high + moved[1]]).clamp(0, there.shape[1] - 1))
        boxes.append(torch.cat([torch.stack([face[side] for face in faces], dim=-1) for side in (0, 1)], dim=-1))
        said.append(torch.where(where.flatten(1).any(1), label, -1))
    return torch.stack(boxes, dim=1), torch.stack(said, dim=1)


def _unravel(at: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Indices into a flat volume (B, N) as places (B, N, 3)."""
    _, height, width = labels.shape[1:]
    return torch.stack([at // (height * width), at // width % height, at % width], dim=-1).float()


def _axis(labels: torch.Tensor, i: int) -> torch.Tensor:
    return torch.arange(labels.shape[1 + i], device=labels.device)[None]
