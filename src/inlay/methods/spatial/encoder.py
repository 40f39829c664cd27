"""SAM's image encoder on volumes: what is trained for that, and the way of a volume through frozen and trained parts.

    patches     frozen 2D convolution on each slice of the enlarged volume, then a trained depth-wise one over slices;
                the mean over the channels of a scan, and what is learned of how each counts
    positions   SAM's table, resized to H x W, plus a trained table over D
    block       x <- x + W_up · f(conv_3x3x3 ∗ (W_down · x));  x <- x + attention(norm(x));  x <- x + MLP(norm(x))
    levels      after every fourth or so block a neck of 1x1x1 and 3x3x3 convolutions

Source: Gong et al. 2023 (3DSAM-adapter), arXiv:2306.13465; the attention in shifted windows is that of Liu et al. 2021,
arXiv:2103.14030. Tokens are (B, D, H, W, C), channels last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from inlay.methods.spatial.attention import attend_in_windows, cut_windows, resize_table

_ROWS = 16384  # tokens that pass through an MLP at once where no gradient is kept


class Bottleneck3d(nn.Module):
    """The spatial adapter of one block: W_down, a depth-wise convolution, W_up.

    Args:
        size: C, features of a token.
        width: Of the bottleneck.
        kernel: Edge of the depth-wise convolution; 1: none.
        activation: Name in transformers; after the convolution, or as published after each of the three.
        reference: As published, with a start that is not zero.
    """

    def __init__(self, size: int, width: int, kernel: int, activation: str, reference: bool) -> None:
        super().__init__()
        self.down = nn.Linear(size, width)
        self.conv = nn.Conv3d(width, width, kernel, padding=kernel // 2, groups=width) if kernel > 1 else nn.Identity()
        self.up = nn.Linear(width, size)
        self.act, self.reference = ACT2FN[activation], reference
        if not reference:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
            if kernel > 1:  # a token starts with itself, and learns to see its neighbours
                nn.init.dirac_(self.conv.weight, groups=width)
                nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to tokens (B, D, H, W, C)."""
        h = self.down(x.to(self.down.weight.dtype))
        h = self.act(h) if self.reference else h
        # channels last as they are: a depth-wise convolution is three times as fast so
        h = self.act(self.conv(h.movedim(-1, 1)).movedim(1, -1))
        h = self.up(h)
        return (self.act(h) if self.reference else h).to(x.dtype)


class BlockParts(GradientCheckpointingLayer):
    """What is trained in one block: the adapter, and how norms and relative positions differ from SAM's.

    Attributes:
        norms: Changes of weight and bias of both norms, (4, C); None: the norms stay.
        positions: Change of the table of relative positions over D, which starts as the mean of SAM's two, (L, d).
    """

    def __init__(self, block: nn.Module, config: Any, width: int) -> None:
        super().__init__()
        base: Any = block
        size = base.layer_norm1.weight.shape[0]
        self.adapter = Bottleneck3d(size, width, config.kernel, config.activation, config.reference)
        self.norms = nn.Parameter(torch.zeros(4, size)) if config.train_norms else None
        window = config.window or config.depth_rows
        head = size // base.attn.num_attention_heads
        self.positions = nn.Parameter(torch.zeros(2 * window - 1, head)) if base.attn.use_rel_pos else None
        self.after, self.window, self.shifted = config.position == "after", config.window, False

    def forward(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        """The block on tokens (B, D, H, W, C)."""
        base: Any = block
        if not self.after:
            x = x + self.adapter(x)
        axes = cut_windows(x.shape[1:4], self.window, self.shifted)
        x = x + attend_in_windows(base.attn, self._norm(x, base.layer_norm1, 0), self._depth(base.attn), axes)
        if self.after:
            x = x + self.adapter(x)
        return _add_branch(x, lambda rows: base.mlp(self._norm(rows, base.layer_norm2, 2)))

    def _norm(self, x: torch.Tensor, norm: nn.LayerNorm, first: int) -> torch.Tensor:
        if self.norms is None:
            return norm(x)
        weight, bias = norm.weight + self.norms[first], norm.bias + self.norms[first + 1]
        return F.layer_norm(x, norm.normalized_shape, weight.to(x.dtype), bias.to(x.dtype), norm.eps)

    def _depth(self, attention: Any) -> torch.Tensor | None:
        """The table of relative positions over D: the mean of those over H and W, and what was learned."""
        if self.positions is None:
            return None
        mean = (
            resize_table(attention.rel_pos_h, len(self.positions))
            + resize_table(attention.rel_pos_w, len(self.positions))
        ) / 2
        return mean + self.positions


def _add_branch(x: torch.Tensor, branch: Any) -> torch.Tensor:
    """x + branch(x); without gradients by pieces, so that the hidden layer is never there as a whole."""
    if torch.is_grad_enabled():
        return x + branch(x)
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat([piece + branch(piece) for piece in rows.split(_ROWS)]).view_as(x)


class Patches3d(nn.Module):
    """The trained side of the patch embedding: a depth-wise convolution over slices, and positions over D.

    A scan of n channels starts with their mean. Each feature then learns by itself how much each channel counts: filter
    j of a feature is (depth + 1 / p_d + channels_j) / n. It is a sum, and no product, so that adapters add exactly.

    Attributes:
        depth: Change of the filter from the mean over the slices, (C, p_d).
        bias: (C,).
        positions: (L, C), resized to the tokens along D.
        channels: Change of each channel's share, (n, C); None: the scan has one channel.
    """

    def __init__(self, size: int, patch_depth: int, rows: int, channels: int = 1) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.zeros(size, patch_depth))
        self.bias = nn.Parameter(torch.zeros(size))
        self.positions = nn.Parameter(torch.zeros(rows, size))
        self.channels = nn.Parameter(torch.zeros(channels, size)) if channels > 1 else None

    def forward(self, volume: torch.Tensor, encoder: nn.Module, enlarge: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, D', H', W', C) of a volume (B, n, D, H, W) whose edges are multiples of `stride`.

        Enlarging, the convolution on slices and the one over depth are linear: together they are one small strided
        convolution over H and W of each channel of the raw volume, as grey in SAM's three, and one over D.
        """
        base: Any = encoder
        kernel, bias = base.patch_embed.projection.weight, base.patch_embed.projection.bias
        patch, depth = kernel.shape[-1], self.depth.shape[1]
        over_d, over_h = (
            interpolation_matrix(size, by).to(self.depth) for size, by in ((depth, enlarge[0]), (patch, enlarge[1]))
        )
        flat = torch.einsum("chw,hy,wx->cyx", kernel.sum(1).to(over_h), over_h, over_h)[:, None, None]
        filters = self._filters()  # C n p_d
        step_d, step = depth // enlarge[0], patch // enlarge[1]
        x = F.pad(volume.to(flat.dtype), (1, 1, 1, 1, 1, 1), mode="replicate")
        x = F.conv3d(x.flatten(0, 1)[:, None], flat, stride=(1, step, step))  # B·n C D+2 H' W'
        x = x.unflatten(0, volume.shape[:2]).transpose(1, 2).flatten(1, 2)  # B C·n D+2 H' W'
        x = F.conv3d(x, (filters @ over_d)[..., None, None], stride=(step_d, 1, 1), groups=len(filters))
        x = x.movedim(1, -1) + (bias * filters.flatten(1).sum(1) + self.bias)
        x = x + resize_table(self.positions, x.shape[1])[:, None, None]
        if base.pos_embed is not None:
            x = x + _resize_positions(base.pos_embed, x.shape[2:4])
        return x.to(kernel.dtype)

    def _filters(self) -> torch.Tensor:
        """The filters over slices, (C, n, p_d): for each feature one a channel."""
        filters = (self.depth + 1 / self.depth.shape[1])[:, None]
        return filters if self.channels is None else (filters + self.channels.T[..., None]) / len(self.channels)


def interpolation_matrix(size: int, by: int) -> torch.Tensor:
    """Linear interpolation as a matrix (size, size / by + 2): a patch of enlarged samples from raw ones and two more.

    Source: interpolate(mode="trilinear", align_corners=False) of torch, along one axis.
    """
    at = (torch.arange(size, dtype=torch.float32) + 0.5) / by + 0.5  # among raw samples, of which the first is outside
    near = torch.arange(size // by + 2, dtype=torch.float32)
    return (1 - (at[:, None] - near).abs()).clamp(min=0)


def _resize_positions(table: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """SAM's table of positions (1, H, W, C) at another size: the mean where it shrinks, bilinear where it grows."""
    table = table.movedim(-1, 1)
    for axis, size in ((2, sizes[0]), (3, sizes[1])):
        if size < table.shape[axis]:
            table = F.adaptive_avg_pool2d(table, [size if i == axis else table.shape[i] for i in (2, 3)])
        elif size > table.shape[axis]:
            new = [size if i == axis else table.shape[i] for i in (2, 3)]
            table = F.interpolate(table, size=new, mode="bilinear", align_corners=False)
    return table.movedim(1, -1)[:, None]


class Neck3d(GradientCheckpointingLayer):
    """Tokens of one level as features: 1x1x1 convolution, norm, 3x3x3 convolution, norm."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Linear(size, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, H, W, C) -> (B, E, D, H, W)."""
        x = self.norm1(self.conv1(x.to(self.conv1.weight.dtype)))
        return self.norm2(self.conv2(x.movedim(-1, 1)).movedim(1, -1)).movedim(-1, 1)


class EncoderParts(nn.Module):
    """All that one adapter trains in SAM's image encoder; `forward` takes a volume through both.

    Args:
        encoder: A SamVisionEncoder, frozen.
        config: A SpatialAdapterConfig.
    """

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        super().__init__()
        base: Any = encoder
        size, count = base.config.hidden_size, len(base.layers)
        width = config.width or max(1, round(size / config.reduction))
        self.patches = Patches3d(size, config.patch_depth, config.depth_rows, config.channel_count)
        self.blocks = nn.ModuleList(BlockParts(block, config, width) for block in base.layers)
        for i, block in enumerate(self.blocks):
            block.shifted = config.shift and i % 2 == 0
        self.ends = sorted({round(count * (i + 1) / config.levels) - 1 for i in range(min(config.levels, count))})
        self.necks = nn.ModuleList(Neck3d(size, base.config.output_channels) for _ in self.ends)
        self.enlarge = (config.enlarge_depth, config.enlarge)
        if not config.init_weights:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)

    def forward(self, volume: torch.Tensor, encoder: nn.Module) -> tuple[torch.Tensor, ...]:
        """(B, n, D, H, W), of multiples of the stride -> one (B, E, D', H', W') for each level."""
        base: Any = encoder
        x = self.patches(volume, encoder, self.enlarge)
        levels: list[torch.Tensor] = []
        for i, (block, parts) in enumerate(zip(base.layers, self.blocks, strict=True)):
            x = parts(x, block)
            if i in self.ends:
                levels.append(self.necks[len(levels)](x))
        return tuple(levels)
