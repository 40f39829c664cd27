"""Clicks and boxes as a user would give them, drawn from a reference for training and for measuring.

All chance comes from torch's global generator. Everything is computed where the volumes are, and nothing is read back
from a GPU: loops have a fixed number of steps.

Source: the first clicks in the object, later ones where the answer is most wrong, or at the centre of the largest
error: Sofiiuk et al. 2021 (RITM), arXiv:2102.06583, section 3; boxes jittered as in Kirillov et al. 2023,
arXiv:2304.02643, appendix A.
"""

import torch
from torch.nn import functional as F

REACH = 5  # edge of the cube over which errors are counted to find where most of them are, in voxels
ROUNDS = 10  # in which the names of components spread
DEPTH = 16  # voxels from its surface up to which the inside of an error is measured


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
        dense = _measure_density(wrong) * wrong
        jitter = 1 + 0.1 * torch.rand_like(dense)  # equal regions: any of them
        value, at = (dense * jitter).flatten(1).max(1, keepdim=True)
        label = labels.flatten(1).gather(1, at)
        points.append(_unravel(at, labels))
        said.append(torch.where(value > 0, label, -1))
        near = [(_axis(labels, i) - points[-1][..., i]).abs() <= REACH for i in range(3)]  # B n
        wrong = wrong * ~(near[0][:, :, None, None] & near[1][:, None, :, None] & near[2][:, None, None, :])
    return torch.cat(points, dim=1), torch.cat(said, dim=1)


def clicks_at_centres(logits: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clicks at the centres of the largest errors, the largest first, each with the class that is right there.

    An error is a connected component (26 neighbours) of the voxels whose class is wrong; its centre is the voxel that
    is farthest from its surface. Of several (a shell may be one voxel thick) it is the one in the densest region of
    errors. Users are simulated so where models are compared.

    Args:
        logits: The answer, (B, K + 1, D, H, W).
        labels: (B, D, H, W), -1 to be ignored.
        count: Clicks for each row.

    Returns:
        Points (B, count, 3) and labels (B, count), -1 where there are no further errors.
    """
    wrong = (logits.argmax(1) != labels) & (labels >= 0)
    names = name_components(wrong).flatten(1)
    depth = (measure_depth(wrong) + _measure_density(wrong.float()) / 2).flatten(1)  # of depths, which are whole, ties
    sizes = torch.zeros_like(names, dtype=torch.float32)
    sizes = sizes.scatter_add(1, names, wrong.flatten(1).float()).gather(1, names) * wrong.flatten(1)
    points, said = [], []
    for _ in range(count):
        size, some = sizes.max(1, keepdim=True)
        largest = names == names.gather(1, some)
        at = (depth * largest).argmax(1, keepdim=True)
        points.append(_unravel(at, labels))
        said.append(torch.where(size > 0, labels.flatten(1).gather(1, at), -1))
        sizes = sizes.masked_fill(largest, 0)
    return torch.cat(points, dim=1), torch.cat(said, dim=1)


def name_components(mask: torch.Tensor) -> torch.Tensor:
    """For each voxel of a mask (B, D, H, W) the flat index of one voxel, the same for all that are connected to it.

    Neighbours are all 26. A component that winds more than a scan does may get several names. Outside of the mask each
    voxel has its own index.

    Source: names hook onto larger ones and skip ahead, as in Zhang et al. 2020 (FastSV), arXiv:1910.05971.
    """
    flat = mask.flatten(1)
    own = torch.arange(flat.shape[1], device=mask.device).expand_as(flat)
    names = own
    for _ in range(ROUNDS):
        near = names.masked_fill(~flat, -1).view(mask.shape)
        for axis in (1, 2, 3):
            before, after = _shift(near, axis, 1), _shift(near, axis, -1)
            near = torch.maximum(near, torch.maximum(before, after))
        near = torch.where(flat, near.flatten(1), own)
        names = names.scatter_reduce(1, names, near, "amax")  # whoever a voxel is named after learns of its neighbours
        names = torch.maximum(names, near)
        names = names.gather(1, names)
    return names


def measure_depth(mask: torch.Tensor) -> torch.Tensor:
    """Squared distance in voxels of each voxel of a mask (B, D, H, W) to the nearest outside of it, up to DEPTH².

    What lies beyond the volume counts as outside, but not above and below one single plane: an image has an inside.

    Source: the exact Euclidean distance axis by axis, Felzenszwalb & Huttenlocher 2012, doi:10.4086/toc.2012.v008a019.
    """
    depth = mask.float() * DEPTH**2
    for axis in (axis for axis in (1, 2, 3) if mask.shape[axis] > 1):
        nearest = depth
        for step in range(1, DEPTH + 1):
            around = torch.minimum(_shift(depth, axis, step, 0.0), _shift(depth, axis, -step, 0.0))
            nearest = torch.minimum(nearest, around + step**2)
        depth = nearest
    return depth


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


def damage_masks(labels: torch.Tensor, classes: int, balls: int = 2, reach: int = 2) -> torch.Tensor:
    """Masks that a user might want corrected: the reference with balls of wrong classes in it, half of them moved.

    Args:
        labels: (B, D, H, W): 0 background, 1 to K, -1 to be ignored, which becomes background.
        classes: K.
        balls: About voxels of each class, of 1 to 5 voxels' radius, each of one class or of background.
        reach: Voxels by which a mask is moved at most along each axis.

    Returns:
        Classes (B, D, H, W).
    """
    masks = labels.clamp(min=0)
    points, said = clicks_in_objects(labels, balls, classes)
    for i in range(points.shape[1]):
        radius, label = 1 + 4 * torch.rand(()), int(torch.randint(classes + 1, ()))
        apart = [(_axis(labels, axis) - points[:, i, axis, None]) ** 2 for axis in range(3)]  # B n
        square = apart[0][:, :, None, None] + apart[1][:, None, :, None] + apart[2][:, None, None, :]
        masks = masks.masked_fill((square <= radius**2) & (said[:, i, None, None, None] > 0), label)
    if torch.rand(()) < 0.5:
        masks = masks.roll(torch.randint(-reach, reach + 1, (3,)).tolist(), (1, 2, 3))
    return masks


def _measure_density(wrong: torch.Tensor) -> torch.Tensor:
    """The share of wrong voxels in a cube around each voxel, (B, D, H, W), from 0 to 1."""
    # Padded first: avg_pool3d refuses volumes that are smaller than its kernel, whatever its own padding.
    framed = F.pad(wrong[:, None], [REACH // 2] * 6)
    return F.avg_pool3d(framed, REACH, stride=1)[:, 0]


def _unravel(at: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Indices into a flat volume (B, N) as places (B, N, 3)."""
    _, height, width = labels.shape[1:]
    return torch.stack([at // (height * width), at // width % height, at % width], dim=-1).float()


def _axis(labels: torch.Tensor, i: int) -> torch.Tensor:
    return torch.arange(labels.shape[1 + i], device=labels.device)[None]


def _shift(volume: torch.Tensor, axis: int, by: int, fill: float = -1) -> torch.Tensor:
    """A volume moved along an axis, with `fill` behind it."""
    length = volume.shape[axis]
    by = max(-length, min(length, by))
    kept = volume.narrow(axis, max(0, -by), length - abs(by))
    room = [0, 0] * (volume.ndim - 1 - axis) + [max(0, by), max(0, -by)]
    return F.pad(kept, room, value=fill)
