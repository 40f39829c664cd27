"""From the levels of an encoded volume, and prompts, to a score of every class in every voxel.

    tokens      each level through a 3x3x3 convolution; the last one first exchanges with the prompts by attention
    half size   their sum, enlarged to two voxels a token, with features of the scan, clicks, boxes, the previous mask
    full size   enlarged once more, with features of the scan's own voxels; one more convolution gives the scores

What does not depend on prompts is computed once for a volume and handed on, so that a further click costs little.

Source: after the multi-level decoder of Gong et al. 2023, arXiv:2306.13465, with what its code lacks: labels and
places of points, boxes, the previous mask, and voxel-sized detail. Prompts and image attend to each other as in
Kirillov et al. 2023, arXiv:2304.02643, section 3.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

SPREAD = 2.0  # standard deviation of a click where the decoder sees it as a volume, in voxels


class Encoded(NamedTuple):
    """What of a volume no prompt changes: `image_embeddings` of the model's output.

    Attributes:
        last: Features of the last level, (B, E, D', H', W').
        others: The sum of what the other levels give, (B, w, D', H', W').
        fine: Features of the scan's voxels, (B, w / 4, D, H, W), up to the end of the last tokens.
        coarse: Features of it at half size.
        volume: The scan, (B, n, D, H, W), as it came.
    """

    last: torch.Tensor
    others: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor
    volume: torch.Tensor


class PromptTensors(NamedTuple):
    """What a user, or a simulated one, says of a volume; places are voxel indices (d, h, w).

    Attributes:
        points: (B, N, 3).
        labels: (B, N): 0 is background, k a class, -1 no point.
        boxes: (B, M, 6): two opposite corners inside the object.
        box_labels: (B, M): a class, -1 no box.
        previous: Logits of an earlier answer (B, K + 1, D, H, W).
    """

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    box_labels: torch.Tensor | None = None
    previous: torch.Tensor | None = None


class Convolution(GradientCheckpointingLayer, nn.Sequential):
    """3x3x3 convolution, group norm and GELU.

    Args:
        inputs: Channels of each part of the input.
        outputs: Channels of the output.
    """

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__(
            nn.Conv3d(sum(inputs), outputs, 3, padding=1), nn.GroupNorm(math.gcd(outputs, 8), outputs), nn.GELU()
        )
        self.inputs = tuple(inputs)

    def forward(self, *parts: torch.Tensor | None) -> torch.Tensor:
        """Of the parts side by side; one that is None counts as 0, and costs nothing."""
        convolution, norm, activation = self
        there = [
            (x, w) for x, w in zip(parts, convolution.weight.split(self.inputs, dim=1), strict=True) if x is not None
        ]
        x, weight = there[0] if len(there) == 1 else (torch.cat(each, dim=1) for each in zip(*there, strict=True))
        return activation(norm(F.conv3d(x, weight, convolution.bias, padding=1)))


class PromptExchange(nn.Module):
    """Prompts read from the image, then the image from the prompts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        heads = math.gcd(size, 8)
        self.read = nn.MultiheadAttention(size, heads, batch_first=True)
        self.write = nn.MultiheadAttention(size, heads, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))

    def forward(
        self, image: torch.Tensor, place: torch.Tensor, prompts: torch.Tensor, absent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both anew. image: (B, N, E); place: (N, E); prompts: (B, P, E); absent: (B, P), which are none."""
        seen = self.norms[0](image)
        prompts = prompts + self.read(self.norms[1](prompts), seen + place, seen, need_weights=False)[0]
        prompts = prompts + self.think(prompts)
        said = self.norms[2](prompts)
        written = self.write(seen + place, said, said, key_padding_mask=absent, need_weights=False)[0]
        return image + written, prompts


class VolumeDecoder(GradientCheckpointingLayer):
    """Scores (B, K + 1, D, H, W) from levels and prompts; channel 0 is the background.

    Args:
        channels: E, features of a level.
        levels: How many levels there are.
        width: Features inside the decoder.
        classes: K.
        prompts: False: no part for prompts is made.
        queries: Learned prompts that are always there.
        inputs: n, channels of the scan.
    """

    def __init__(
        self,
        channels: int,
        levels: int,
        width: int,
        classes: int,
        prompts: bool,
        queries: int = 10,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        half, fine, self.classes = max(8, width // 2), max(8, width // 4), classes
        self.levels = nn.ModuleList(Convolution([channels], width) for _ in range(levels))
        self.tokens = nn.Linear(levels * width, width)
        self.guides = (classes + 1, classes, classes + 1) if prompts else ()  # clicks, boxes, the previous answer
        self.fine, self.coarse = Convolution([inputs], fine), Convolution([fine], half)
        self.refine = nn.Sequential(Convolution([width, half, *self.guides], half), Convolution([half], half))
        self.shrink = nn.Conv3d(half, fine, 1)
        self.score = nn.Sequential(Convolution([fine], fine), nn.Conv3d(fine, classes + 1, 1))
        if prompts:
            self.marks = nn.Conv3d(sum(self.guides), fine, 1, bias=False)
            self.queries = nn.Parameter(torch.randn(queries, channels) * channels**-0.5)
            # no point; background and the classes; then the two corners of a box around each class
            self.kinds = nn.Embedding(3 * classes + 2, channels)
            self.previous = nn.Linear(classes + 1, channels, bias=False)
            self.exchanges = nn.ModuleList(PromptExchange(channels) for _ in range(2))

    @property
    def takes_prompts(self) -> bool:
        """True if it was made for prompts."""
        return hasattr(self, "kinds")

    def encode(self, levels: Sequence[torch.Tensor], volume: torch.Tensor, stride: tuple[int, int, int]) -> Encoded:
        """The part that prompts do not change; `stride` are the voxels of a token."""
        weights = self.tokens.weight.chunk(len(levels), dim=1)
        given = [
            _map_channels(head(x), w)
            for head, x, w in zip(self.levels, levels, weights, strict=True)
            if x is not levels[-1]
        ]
        first = levels[0].new_zeros(len(volume), self.tokens.out_features, *levels[0].shape[2:])
        fine = self.fine(_extend(volume.to(self.tokens.weight.dtype), covered_voxels(levels[-1], stride)))
        coarse = self.coarse(F.adaptive_avg_pool3d(fine, half_size(levels[-1], stride)))
        return Encoded(levels[-1], sum(given, first), fine, coarse, volume)

    def forward(self, encoded: Encoded, prompts: PromptTensors, stride: tuple[int, int, int]) -> torch.Tensor:
        """Logits; `stride` as in `encode`."""
        last, others, fine, coarse, volume = encoded
        previous = None
        if self.takes_prompts and prompts.previous is not None:
            previous = _extend(prompts.previous.softmax(1).to(fine.dtype), fine.shape[2:])
        last = self._exchange_with_prompts(last, prompts, previous, stride) if self.takes_prompts else last
        weight = self.tokens.weight.chunk(len(self.levels), dim=1)[-1]
        x = others + _map_channels(self.levels[-1](last), weight, self.tokens.bias)
        guides = self._draw_guides(prompts, previous, fine, coarse.shape[2:])
        x = self.refine[1](self.refine[0](_resize(x, coarse.shape[2:]), coarse, *guides))
        x = _resize(self.shrink(x), fine.shape[2:]) + fine  # summed: a click then costs one narrow convolution here
        for i, guide in enumerate(self._draw_guides(prompts, previous, fine, fine.shape[2:])):
            if guide is not None:
                x = x + F.conv3d(guide, self.marks.weight.split(self.guides, dim=1)[i])
        x = self.score(x)
        return x[:, :, : volume.shape[2], : volume.shape[3], : volume.shape[4]]

    def _exchange_with_prompts(
        self, last: torch.Tensor, prompts: PromptTensors, previous: torch.Tensor | None, stride: tuple[int, int, int]
    ) -> torch.Tensor:
        """The last level after its exchange with the prompts, (B, E, D', H', W')."""
        batch, channels = last.shape[:2]
        if previous is None:  # zeros add nothing, but are in the graph: DDP wants it
            mask = last.new_zeros(batch, self.classes + 1, *last.shape[2:])
        else:
            mask = F.adaptive_avg_pool3d(previous.to(last.dtype), last.shape[2:])
        last = last + _map_channels(mask, self.previous.weight)
        place = _encode_places(_token_places(last.shape[2:], last.device), channels).to(last.dtype)
        tokens, absent = (
            [self.queries.expand(batch, -1, -1)],
            [last.new_zeros(batch, len(self.queries), dtype=torch.bool)],
        )
        for points, labels in self._prompt_places(prompts):
            at = (points.float() + 0.5) / points.new_tensor(stride, dtype=torch.float32) - 0.5  # in tokens
            tokens.append(_sample(last, at) + _encode_places(at, channels).to(last.dtype) + self.kinds(labels + 1))
            absent.append(labels < 0)
        said, none = torch.cat(tokens, dim=1), torch.cat(absent, dim=1)
        image = last.flatten(2).transpose(1, 2)
        for exchange in self.exchanges:
            image, said = exchange(image, place, said, none)
        return image.transpose(1, 2).unflatten(2, last.shape[2:])

    def _prompt_places(self, prompts: PromptTensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Points and the corners of boxes, as places (B, N, 3) and rows of `kinds` less one (B, N)."""
        said = [] if prompts.points is None or prompts.labels is None else [(prompts.points, prompts.labels)]
        if prompts.boxes is not None and prompts.box_labels is not None:
            k, labels = self.classes, prompts.box_labels
            for i, corner in enumerate(prompts.boxes.split(3, dim=-1)):
                said.append((corner, torch.where(labels < 0, labels, labels + (i + 1) * k)))
        return said

    def _draw_guides(
        self, prompts: PromptTensors, previous: torch.Tensor | None, volume: torch.Tensor, sizes: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """Clicks, boxes and the previous answer as volumes of `sizes`, each None where there is none of it.

        `volume` has the sizes of the voxels. Places are float32 whatever its type: bfloat16 has no odd number over 256.
        """
        if not self.takes_prompts:
            return []
        batch, k = len(volume), self.classes
        clicks = boxes = None
        scale = [n / m for n, m in zip(volume.shape[2:], sizes, strict=True)]  # voxels
        axes = [
            (torch.arange(m, device=volume.device, dtype=torch.float32) + 0.5) * s - 0.5
            for m, s in zip(sizes, scale, strict=True)
        ]
        if prompts.points is not None and prompts.labels is not None:
            near = [
                torch.exp(-0.5 * ((prompts.points[..., i, None] - axis) / SPREAD) ** 2) for i, axis in enumerate(axes)
            ]
            clicks = volume.new_zeros(batch, k + 1, *sizes)
            for label in range(k + 1):
                said = prompts.labels.eq(label).float()
                clicks[:, label] = torch.einsum("bn,bnd,bnh,bnw->bdhw", said, *near).clamp(max=1)
        if prompts.boxes is not None and prompts.box_labels is not None:
            low, high = prompts.boxes.split(3, dim=-1)
            inside = [
                ((axis >= low[..., i, None] - s / 2) & (axis <= high[..., i, None] + s / 2)).float()
                for i, (axis, s) in enumerate(zip(axes, scale, strict=True))
            ]
            boxes = volume.new_zeros(batch, k, *sizes)
            for label in range(1, k + 1):
                said = prompts.box_labels.eq(label).float()
                boxes[:, label - 1] = torch.einsum("bn,bnd,bnh,bnw->bdhw", said, *inside).clamp(max=1)
        if previous is not None and list(previous.shape[2:]) != list(sizes):
            previous = F.adaptive_avg_pool3d(previous, sizes)
        return [clicks, boxes, previous]


def covered_voxels(tokens: torch.Tensor, stride: tuple[int, int, int]) -> list[int]:
    """Voxels (D, H, W) that the tokens (B, E, D', H', W') stand for."""
    return [n * s for n, s in zip(tokens.shape[2:], stride, strict=True)]


def half_size(tokens: torch.Tensor, stride: tuple[int, int, int]) -> list[int]:
    """Half size: two voxels a token along each axis, or one where a token is no longer."""
    return [n if s == 1 else n * 2 for n, s in zip(tokens.shape[2:], stride, strict=True)]


def _map_channels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear map over the channels of (B, C, D, H, W)."""
    return F.conv3d(x, weight[:, :, None, None, None], bias)


def _resize(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    return F.interpolate(x, size=list(sizes), mode="trilinear") if list(x.shape[2:]) != list(sizes) else x


def _extend(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """(B, C, D, H, W) with its last planes repeated up to `sizes`."""
    d, h, w = (new - old for new, old in zip(sizes, x.shape[2:], strict=True))
    return F.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x


def _token_places(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """(D · H · W, 3): the place of every token."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _encode_places(at: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines and cosines of places (..., 3) in tokens, (..., channels); wave lengths from 4 to 256 tokens."""
    count = channels // 6
    rates = 2 * math.pi / 4 / 64 ** (torch.arange(count, device=at.device, dtype=at.dtype) / max(1, count - 1))
    angles = (at[..., None] * rates).flatten(-2)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(waves, (0, channels - waves.shape[-1]))


def _sample(features: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Features (B, E, D, H, W) at places (B, N, 3) in tokens, trilinear: (B, N, E)."""
    sizes = at.new_tensor(features.shape[2:])
    where = ((2 * at + 1) / sizes - 1).flip(-1)[:, :, None, None]  # x y z within -1 to 1
    found = F.grid_sample(features, where.to(features.dtype), padding_mode="border", align_corners=False)
    return found[..., 0, 0].transpose(1, 2)
