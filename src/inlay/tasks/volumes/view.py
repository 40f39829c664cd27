"""Scans as a model takes them: whole ones, and random crops with 3D augmentation."""

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from inlay.errors import BadInput
from inlay.tasks.volumes.data import Case
from inlay.tasks.volumes.grid import Shape, Triple
from inlay.tasks.volumes.scan import IGNORED, PADDING, Scan, VolumeProcessor

COMMON = 0.5  # share of the scans from which on a class is not rare
FOREGROUND = 2 / 3  # share of crops that hold a voxel of a class, each class of the scan alike
SAMPLED = 10_000  # voxels of a class that crops are placed at
UNSCORED = -2  # within a crop: a voxel of the scan that is to be ignored, where IGNORED is beyond the scan
ANISOTROPIC = 2.0  # times the spacing within slices from which a scan is rotated only within them


class Places(NamedTuple):
    """Where the crops of a scan are placed: indices of some voxels in its flat label map.

    Attributes:
        classes: Of each class that the scan has.
        labelled: Of all that are not to be ignored, the background included; None: nothing is to be ignored.
    """

    classes: dict[int, torch.Tensor]
    labelled: torch.Tensor | None


class VolumeView(torch.utils.data.Dataset):
    """One split as a model takes it: item i is {"pixel_values": float (C, D, H, W), "labels": int64 (D, H, W)}.

    Validation takes whole scans. Training takes a random crop of the processor's size; where a scan is smaller, the
    rest has labels -1 and the image is 0, its mean. All randomness comes from the global generators of Python and
    torch: with the same seed an item is the same in any process.

    Args:
        cases: A split of `VolumeData`, each with a label map.
        processor: Reads them, and says how large a crop is.
        training: Crops instead of whole scans.
        augment: Of crops: half are rotated by up to 15 degrees and scaled by 0.85 to 1.18; some change in gamma,
            contrast and brightness, and get noise.
        flip: Axes along which half of the crops are mirrored: 0 D, 1 H, 2 W. Left and right (2) may be told apart by
            the classes. Default: those that the processor names, and so the adapter.
        foreground: Share of crops that are placed at a voxel of a class. The others are anywhere, or at a voxel that is
            not to be ignored, where others are.
        crops: Of each scan in an epoch, at least 1: items i·crops to (i + 1)·crops - 1 are of case i. A scan in the
            cache is read once for all of them.
        present: The classes of each case, as `find_present_classes` gives them. Of crops, those of scans with a rare
            class, which less than half of the cases have, then take the place of some others, and are placed at it more
            often: `weigh_classes` says by how much. None: all scans and classes are drawn alike.
        cache_gb: Memory for scans as they were read, in each process; beyond it, the one that was used longest ago
            goes, and is read again.

    Raises:
        InlayError: No cases, one without a label map, or settings out of range.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        processor: VolumeProcessor,
        *,
        training: bool = False,
        augment: bool = True,
        flip: Sequence[int] | None = None,
        foreground: float = FOREGROUND,
        crops: int = 1,
        present: Sequence[Collection[int]] | None = None,
        cache_gb: float = 4.0,
    ) -> None:
        bare = [case.name for case in cases if case.label is None]
        if not len(cases) or bare:
            raise BadInput(f"case {bare[0]!r} has no label map." if bare else "there are no cases.")
        flip = processor.flip if flip is None else flip
        if not set(flip) <= {0, 1, 2} or not 0 <= foreground <= 1 or crops < 1 or not cache_gb >= 0:
            raise BadInput(
                "flip must name axes 0, 1 or 2, foreground be from 0 to 1, crops at least 1 and cache_gb at least 0, "
                f"got {tuple(flip)}, {foreground}, {crops} and {cache_gb}."
            )
        self.cases, self.processor = tuple(cases), processor
        self.training, self.augment, self.flip, self.foreground = training, augment, tuple(flip), foreground
        self.crops, self.cache_gb = crops if training else 1, cache_gb
        self.weights = weigh_classes(present or ())
        case_weights = [max([1.0, *(self.weights.get(c, 1.0) for c in classes)]) for classes in present or ()]
        self._excess = [*accumulate(weight - 1 for weight in case_weights)] if self.weights and training else []
        self._cache: OrderedDict[int, tuple[Scan, Places]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.cases) * self.crops

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_bytes": 0}  # workers read for themselves

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scan, places = self._read(self._draw_case(range(len(self))[int(index)] // self.crops))
        assert scan.labels is not None  # cases without are refused
        if not self.training:
            return {"pixel_values": scan.image, "labels": scan.labels.long()}
        image, labels = self._draw_crop(scan, places)
        axes = [axis for axis in self.flip if random.random() < 0.5]
        image, labels = image.flip([axis + 1 for axis in axes]), labels.flip(axes)
        if self.augment:
            image = torch.cat([vary_intensity(channel[None], labels != IGNORED) for channel in image])
        return {"pixel_values": image.contiguous(), "labels": labels.clamp(min=IGNORED).contiguous()}

    def scan(self, index: int) -> Scan:
        """The scan of an item, with what brings predictions back to its own grid."""
        return self._read(range(len(self))[int(index)] // self.crops)[0]

    def _draw_case(self, index: int) -> int:
        """This case, or in its place one with a rare class, so that each is drawn in proportion to its weight."""
        if not self._excess or random.random() * (len(self.cases) + self._excess[-1]) < len(self.cases):
            return index
        return random.choices(range(len(self.cases)), cum_weights=self._excess)[0]

    def _read(self, index: int) -> tuple[Scan, Places]:
        """A scan, and where its crops are placed, from the cache if they are there."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        scan = self.processor.read(self.cases[index])
        assert scan.labels is not None
        scan = Scan(**vars(scan) | {"labels": scan.labels.to(torch.int16)})
        found = scan, _find_places(scan.labels) if self.training else Places({}, None)
        self._bytes += _count_bytes(scan)
        self._cache[index] = found
        while self._bytes > self.cache_gb * 1e9:
            _, (old, _) = self._cache.popitem(last=False)
            self._bytes -= _count_bytes(old)
        return found

    def _draw_crop(self, scan: Scan, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """A random crop, image (C, d, h, w) and labels (d, h, w), as `cut_crop` gives them."""
        size, shape = self.processor.crop, scan.image.shape[1:]
        voxels = places.labelled  # where all is ignored but a few slices, hardly any other crop would say something
        if places.classes and random.random() < self.foreground:
            voxels = places.classes[self._draw_class([*places.classes])]
        at = None if voxels is None else _unravel(int(voxels[random.randrange(len(voxels))]), shape)
        start = [
            _draw_start(n, c, None if at is None else at[i]) for i, (n, c) in enumerate(zip(shape, size, strict=True))
        ]
        if self.augment and random.random() < 0.5:
            return rotate_crop(scan, (start[0], start[1], start[2]), size)
        return cut_crop(scan, start, size)

    def _draw_class(self, present: list[int]) -> int:
        """One of the classes of a scan, each in proportion to its weight."""
        if not self.weights:
            return random.choice(present)
        return random.choices(present, [self.weights.get(number, 1.0) for number in present])[0]


def collate_volumes(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of pixel_values (B, C, D, H, W) and labels (B, D, H, W), padded at the ends of axes to the largest.

    There labels are -1 and the image is 0.
    """
    largest = [max(item["labels"].shape[axis] for item in items) for axis in range(3)]
    fills = {"pixel_values": PADDING, "labels": IGNORED}
    batch = {}
    for key, fill in fills.items():
        padded = []
        for item in items:
            room = [n for axis in (2, 1, 0) for n in (0, largest[axis] - item["labels"].shape[axis])]
            padded.append(functional.pad(item[key], room, value=fill))
        batch[key] = torch.stack(padded)
    return batch


def cut_crop(scan: Scan, start: Sequence[int], size: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The voxels of a scan from `start` on, image (C, *size) and labels `size`; `start` may lie outside.

    Labels beyond the scan are `IGNORED`, and those to be ignored in it `UNSCORED`: the image is there.
    """
    assert scan.labels is not None
    image, labels = torch.full((len(scan.image), *size), PADDING), torch.full(size, IGNORED)
    inside, outside = [], []
    for n, begin, length in zip(scan.labels.shape, start, size, strict=True):
        low, high = max(begin, 0), max(min(begin + length, n), 0)
        inside.append(slice(low, high))
        outside.append(slice(low - begin, high - begin))
    image[:, *outside] = scan.image[:, *inside]
    within = scan.labels[*inside].long()
    labels[*outside] = within.masked_fill(within == IGNORED, UNSCORED)
    return image, labels


def rotate_crop(scan: Scan, start: Shape, size: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cut_crop`, of the scan rotated and scaled at random about the crop's centre, in one interpolation."""
    assert scan.labels is not None
    matrix = random_affine(scan.spacing_mm)  # voxels of the crop to voxels of the scan, about the centre
    half = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    reach = (matrix.abs() @ half).ceil().long() + 1
    centre = torch.tensor(start) + half
    low = [max(0, math.floor(c - r)) for c, r in zip(centre.tolist(), reach.tolist(), strict=True)]
    high = [
        min(n, math.ceil(c + r) + 1) for c, r, n in zip(centre.tolist(), reach.tolist(), scan.labels.shape, strict=True)
    ]
    box = [slice(begin, end) for begin, end in zip(low, high, strict=True)]
    image, labels = scan.image[:, *box], scan.labels[*box].long()
    labels = labels.masked_fill(labels == IGNORED, UNSCORED)
    # affine_grid wants x, y, z within -1..1, outer edges of the outer voxels.
    lengths = torch.tensor(labels.shape, dtype=torch.float64)
    shift = (2 * (centre - torch.tensor(low)) + 1) / lengths - 1
    scale = matrix * torch.tensor(size, dtype=torch.float64) / lengths[:, None]
    theta = torch.cat([scale.flip(0, 1), shift.flip(0)[:, None]], 1).float()[None]
    grid = functional.affine_grid(theta, [1, 1, *size], align_corners=False)
    # Outside the scan both become 0: the padding of the image, and -1 of the labels.
    labels = functional.grid_sample(labels[None, None].float() - IGNORED, grid, "nearest", align_corners=False)
    labels = labels[0, 0].round().long() + IGNORED
    image = functional.grid_sample(image[None], grid, "bilinear", align_corners=False)[0]
    return image.masked_fill(labels == IGNORED, PADDING), labels


def random_affine(spacing_mm: Triple) -> torch.Tensor:
    """A rotation by up to 15 degrees about each axis and a scaling by 0.85 to 1.18, in voxels D, H, W; (3, 3).

    Between thick slices nothing is rotated or scaled: interpolation there would invent what was not scanned.
    """
    thick = [s >= ANISOTROPIC * sorted(spacing_mm)[1] for s in spacing_mm]
    spacing = torch.tensor(spacing_mm, dtype=torch.float64)
    scales = math.exp(random.uniform(-1, 1) * math.log(1.18))
    matrix = torch.diag(torch.tensor([1.0 if flat else scales for flat in thick], dtype=torch.float64))
    for a, b in ((1, 2), (0, 2), (0, 1)):
        angle = random.uniform(-1, 1) * math.radians(15)
        if thick[a] or thick[b]:
            continue
        turn = torch.eye(3, dtype=torch.float64)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix * spacing / spacing[:, None]


def vary_intensity(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """One channel of a crop (1, d, h, w) with other gamma, contrast, brightness and noise; 0 where not `inside`.

    Each of them happens sometimes.
    """
    if random.random() < 0.3:
        low, high = image.min(), image.max()
        span = (high - low).clamp(min=1e-6)
        image = ((image - low) / span) ** math.exp(random.uniform(-1, 1) * math.log(1.5)) * span + low
    if random.random() < 0.3:
        image = image * random.uniform(0.75, 1.25)
    if random.random() < 0.3:
        image = image + random.uniform(-0.2, 0.2)
    if random.random() < 0.2:
        image = image + torch.randn(image.shape) * random.uniform(0, 0.15)
    return image.masked_fill(~inside, PADDING)


def weigh_classes(present: Sequence[Collection[int]]) -> dict[int, float]:
    """How much more often rare classes are drawn than common ones: sqrt(COMMON / share of the scans that have it).

    Args:
        present: The classes of each scan.

    Returns:
        Weights above 1, of rare classes only.

    Source: repeat factor sampling, Gupta et al. 2019, arXiv:1908.03195, which takes 0.001 for 1,203 classes of images.
    """
    scans = Counter(value for classes in present for value in classes)
    weights = {value: math.sqrt(COMMON * len(present) / count) for value, count in sorted(scans.items())}
    return {value: weight for value, weight in weights.items() if weight > 1}


def _find_places(labels: torch.Tensor) -> Places:
    """Where the crops of a scan with these labels (D, H, W) are placed."""
    flat = labels.flatten()
    classes = {value: _sample_voxels(flat == value) for value in range(1, int(flat.max()) + 1)}
    labelled = _sample_voxels(flat != IGNORED) if bool((flat == IGNORED).any()) else None
    return Places(
        {value: voxels for value, voxels in classes.items() if len(voxels)},
        labelled if labelled is not None and len(labelled) else None,
    )


def _sample_voxels(where: torch.Tensor) -> torch.Tensor:
    """Indices of at most `SAMPLED` voxels of a flat mask, evenly spread over it."""
    indices = torch.nonzero(where)[:, 0]
    return indices[:: max(1, -(-len(indices) // SAMPLED))].clone()


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, int, int]:
    _, h, w = shape
    return index // (h * w), index // w % h, index % w


def _draw_start(length: int, size: int, at: int | None) -> int:
    """Where a crop begins along an axis: with `at` about its middle, anywhere, or centred if the scan is shorter."""
    if length <= size:
        return (length - size) // 2
    if at is None:
        return random.randint(0, length - size)
    begin = at - size // 2 + random.randint(-(size // 4), size // 4)
    return min(max(begin, 0), length - size)


def _count_bytes(scan: Scan) -> int:
    """Bytes of a scan."""
    return scan.image.nbytes + (scan.labels.nbytes if scan.labels is not None else 0)
