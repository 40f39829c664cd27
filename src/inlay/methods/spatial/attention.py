"""SAM's attention in windows of a volume: relative positions, shifts and padding as further columns of q and k.

Along each axis the bias of a query is a row over the places of its window, so the whole bias q·R_d + q·R_h + q·R_w is a
product of q with those three rows behind it and of k with one-hot places behind it. A fused kernel then runs with no
(N, N) bias or mask, in training too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

CLOSED = -100.0  # added to a score along each axis on which two tokens must not meet


class Axis(NamedTuple):
    """How one axis of the grid of tokens is cut into windows.

    Attributes:
        size: Tokens along the axis.
        window: Tokens of a window, at most `size`.
        windows: How many there are; the last one is padded to windows · window tokens.
        shift: By how many tokens the windows are rolled, 0 or window // 2.
    """

    size: int
    window: int
    windows: int
    shift: int


def cut_windows(sizes: Sequence[int], window: int, shifted: bool) -> list[Axis]:
    """The windows of a grid of tokens (D, H, W); `window` 0 means one window over everything."""
    axes = []
    for size in sizes:
        within = size if window == 0 else min(window, size)
        axes.append(Axis(size, within, -(-size // within), within // 2 if shifted and size > within else 0))
    return axes


def relative_rows(table: torch.Tensor, size: int) -> torch.Tensor:
    """A table of relative positions (L, d), linearly interpolated to 2·size - 1 rows, as (size, size, d) [query, key].

    Source: SamVisionAttention.get_rel_pos of transformers.
    """
    table = resize_table(table, 2 * size - 1)
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at[None] + size - 1]


def resize_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table (L, d), linearly interpolated to (rows, d)."""
    return table if len(table) == rows else F.interpolate(table.T[None], size=rows, mode="linear")[0].T


def window_barrier(axis: Axis, device: torch.device) -> torch.Tensor | None:
    """(windows, window, window): `CLOSED` where query and key of a window are not neighbours; None: nowhere.

    A shifted window joins both ends of the volume (Liu et al. 2021, arXiv:2103.14030, figure 4); padding is no token.
    """
    length = axis.windows * axis.window
    if axis.shift == 0 and length == axis.size:
        return None
    place = torch.arange(length, device=device).roll(-axis.shift)  # of the token that stands there after the roll
    side = (torch.arange(length, device=device) >= length - axis.shift).int()
    group = torch.where(place < axis.size, side, 2).view(axis.windows, axis.window)
    return CLOSED * (group[:, :, None] != group[:, None]).float()


def split_windows(x: torch.Tensor, axes: Sequence[Axis], heads: int) -> torch.Tensor:
    """(B, D, H, W, heads · d) as windows (B, nD, nH, nW, heads, wD, wH, wW, d): a view, but for roll and padding."""
    pad = [axis.windows * axis.window - axis.size for axis in axes]
    if any(pad):
        x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    if any(axis.shift for axis in axes):
        x = x.roll([-axis.shift for axis in axes], (1, 2, 3))
    for i, axis in enumerate(axes):
        x = x.unflatten(1 + 2 * i, (axis.windows, axis.window))
    return x.unflatten(-1, (heads, -1)).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)


def join_windows(x: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    """The inverse of `split_windows`: (B, D, H, W, heads · d)."""
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if any(axis.shift for axis in axes):
        x = x.roll([axis.shift for axis in axes], (1, 2, 3))
    return x[:, : axes[0].size, : axes[1].size, : axes[2].size]


def attend_in_windows(
    attention: nn.Module, x: torch.Tensor, depth: torch.Tensor | None, axes: Sequence[Axis]
) -> torch.Tensor:
    """What the frozen attention of SAM gives on the tokens of a volume.

    Args:
        attention: A SamVisionAttention; its projections may be wrapped.
        x: Tokens (B, D, H, W, C).
        depth: Table of relative positions along D, (L, d); None where SAM has none for its own axes.
        axes: From `cut_windows`.

    Returns:
        (B, D, H, W, C).
    """
    base: Any = attention
    qkv = base.qkv(x.flatten(1, 3)).view(*x.shape[:4], -1)
    q, k, v = (split_windows(part, axes, base.num_attention_heads) for part in qkv.chunk(3, dim=-1))
    tables = () if depth is None else (depth, base.rel_pos_h, base.rel_pos_w)
    rows = [relative_rows(table.to(q.dtype), axis.window) for table, axis in zip(tables, axes, strict=False)]
    walls = [window_barrier(axis, x.device) for axis in axes]
    if torch.is_grad_enabled():
        out = _attend(base, q, k, v, rows, walls)
    else:  # one layer of windows at a time: the wider q, k and v of the whole volume are never there
        out = torch.empty_like(q)
        for b in range(q.shape[0]):
            for i in range(q.shape[1]):
                near = [walls[0] if walls[0] is None else walls[0][i : i + 1], *walls[1:]]
                at = (slice(b, b + 1), slice(i, i + 1))
                out[at] = _attend(base, q[at], k[at], v[at], rows, near)
    return base.proj(join_windows(out, axes).flatten(1, 3)).view_as(x)


def _attend(
    base: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Sequence[torch.Tensor],
    walls: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """softmax(scale · q kᵀ + bias) v in windows shaped as `split_windows` gives them."""
    size, queries, keys = q.shape[-1], [q], [k]
    for i, place in enumerate("dhw"):
        column = torch.einsum(f"...dhwc,{place}kc->...dhwk", q, rows[i]) if rows else None
        wall = walls[i]
        if wall is not None:
            shape = [1] * 9
            shape[1 + i], shape[5 + i], shape[8] = wall.shape
            wall = wall.view(shape).to(q.dtype)
            column = wall if column is None else column + wall
        if column is not None:
            at = torch.eye(q.shape[5 + i], dtype=q.dtype, device=q.device)
            at = at.view([-1 if axis == i else 1 for axis in range(3)] + [len(at)])
            queries.append((column / base.scale).expand(*q.shape[:-1], at.shape[-1]))
            keys.append(at.expand(*q.shape[:-1], -1))
    q, k, v = (torch.cat(parts, dim=-1).flatten(5, 7).flatten(0, 3) for parts in (queries, keys, [v]))
    v = F.pad(v, (0, q.shape[-1] - size))  # fused kernels take one size for all three
    dropout = base.dropout if base.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=base.scale)
    return out[..., :size].view(*queries[0].shape)
