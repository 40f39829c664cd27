"""Points and boxes that a user might give for a mask, drawn at random from the mask.

All functions take masks of shape (..., H, W) and use torch's global generator; points are x, y and boxes x0, y0, x1, y1
in pixels, whose centres are at integers.
"""

import torch
from torch import Tensor

from inlay.builtin.scenes import Scenes


def draw_points(regions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pixels of a region, each as likely as any other, drawn anew for each of `count` points.

    Args:
        regions: Boolean, of shape (..., H, W).
        count: N, at least 1.

    Returns:
        Points (..., N, 2), float32, and whether they are in their region (..., N), which they are unless it is empty.
    """
    width = regions.shape[-1]
    rank = regions.flatten(-2).cumsum(-1, dtype=torch.int32)  # ... H·W: the how-manieth pixel of the region
    total = rank[..., -1:]
    wanted = (torch.rand(*total.shape[:-1], count) * total).int().clamp_max(total - 1) + 1
    index = torch.searchsorted(rank, wanted.clamp_min(1)).clamp_max(rank.shape[-1] - 1)
    points = torch.stack([index % width, index // width], -1).float()
    return points, (total > 0).expand(wanted.shape)


def boxes_around(masks: Tensor, jitter: float = 0.0) -> Tensor:
    """Smallest boxes around masks, corners inclusive; (..., 4), float32. That of an empty mask is the whole image.

    Args:
        masks: Boolean, of shape (..., H, W).
        jitter: Deviation by which each side is moved, as a share of the box's width or height; it stays in the image.
    """
    height, width = masks.shape[-2:]
    columns, rows = masks.any(-2), masks.any(-1)  # ... W, ... H

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.int().argmax(-1)
        last = line.shape[-1] - 1 - line.flip(-1).int().argmax(-1)
        return first, last

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    boxes = torch.stack([x0, y0, x1, y1], -1).float()
    if jitter:
        size = torch.stack([x1 - x0, y1 - y0] * 2, -1) + 1
        boxes = boxes + torch.randn(boxes.shape) * jitter * size
        boxes = torch.minimum(boxes.clamp_min(0), torch.tensor([width - 1.0, height - 1.0] * 2))
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
        boxes = torch.cat([low, high], -1)
    return boxes


def draw_objects(made: Scenes, count: int) -> Tensor:
    """P = count objects of each scene, with repetition, half of them with all that they hold; boolean (N, P, H, W)."""
    own, parents = torch.from_numpy(made.instances).long(), torch.from_numpy(made.parents).long()
    first = parents.gather(1, own.flatten(1))  # N H·W: what holds the object of each pixel
    holders = [each.view_as(own)[:, None] for each in (first, parents.gather(1, first))]
    most = own.flatten(1).amax(1, keepdim=True)
    wanted = ((torch.rand(len(own), count) * most).long() + 1).minimum(most)[:, :, None, None]
    whole = (torch.rand(wanted.shape) < 0.5) & (wanted > 0)
    return (own[:, None] == wanted) | (whole & ((holders[0] == wanted) | (holders[1] == wanted)))
