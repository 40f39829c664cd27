"""The attention of SAM and SAM 2 with further keys and values in front, and the windows that it sees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionAttention
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention

from inlay.errors import Unsupported
from inlay.methods.base import Groups

WINDOWED = (SamVisionAttention, Sam2MultiScaleAttention)  # they take (B, H, W, C): an image, or its windows


def gather_prefix(
    groups: Groups, prefix: Callable[[str], tuple[torch.Tensor, torch.Tensor]], rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values of all rows, (rows or 1, P, size), and where rows differ in P, which of them count (rows, P).

    Args:
        groups: Which adapters act on which rows.
        prefix: Gives keys and values of an adapter by its name, each (P, size).
        rows: Size of the batch.
    """
    pairs = [[prefix(name) for name in names] for names, _ in groups]
    if groups[0][1] is None:
        key, value = (torch.cat([pair[i] for pair in pairs[0]])[None] for i in (0, 1))
        return key, value, None
    some = next(pair for of_group in pairs for pair in of_group)[0]
    longest = max(sum(len(key) for key, _ in of_group) for of_group in pairs)
    key = some.new_zeros(rows, longest, some.shape[1])
    value, mask = torch.zeros_like(key), torch.zeros(rows, longest, dtype=torch.bool, device=some.device)
    for of_group, (_, index) in zip(pairs, groups, strict=True):
        length = sum(len(k) for k, _ in of_group)
        if length:
            key[index, :length] = torch.cat([k for k, _ in of_group])
            value[index, :length] = torch.cat([v for _, v in of_group])
            mask[index, :length] = True
    return key, value, None if mask.all() else mask


def attend_with_prefix(
    attention: nn.Module, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor | None
) -> Any:
    """What one of WINDOWED gives when further keys and values stand in front of those of its tokens.

    They have no place in the image, so their relative-position bias is zero. The padding of a window, which SAM lets
    take part as tokens, stays as it is. Where SAM 2 pools the queries at the beginning of a stage, keys and values are
    not pooled, and neither are these.

    Args:
        attention: A SamVisionAttention or Sam2MultiScaleAttention, eager or sdpa; its projections may be wrapped.
        hidden: (B, H, W, C): an image, or a window (then B counts windows).
        key: (B or 1, P, heads x head size).
        value: As key.
        counts: (B, P), which of the P keys exist for a row; None: all.

    Returns:
        As the attention itself: of SAM (B, H, W, C), and the weights of the tokens (B heads, H W, H W) from an eager
        one, else None; of SAM 2 (B, H', W', C').

    Source: their forward in transformers, with the keys of Li & Liang 2021.
    """
    base: Any = attention
    batch, height, width, _ = hidden.shape
    heads = base.num_attention_heads
    qkv = base.qkv(hidden).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # B heads HW d
    size = q.shape[-1]
    extra_key, extra_value = (  # B P C -> B heads P d
        x.to(q.dtype).unflatten(-1, (heads, size)).transpose(1, 2).expand(batch, -1, -1, -1) for x in (key, value)
    )
    length = extra_key.shape[2]
    k, v = torch.cat([extra_key, k], dim=2), torch.cat([extra_value, v], dim=2)

    bias = None
    if counts is not None:
        unseen = torch.zeros_like(counts, dtype=q.dtype).masked_fill(~counts, torch.finfo(q.dtype).min)
        bias = F.pad(unseen, (0, height * width))[:, None, None]
    if isinstance(base, Sam2MultiScaleAttention):
        return _attend_to_stage(base, q, k, v, bias, height, width)
    if base.use_rel_pos:
        where = (height, width)
        flat = q.reshape(batch * heads, height * width, size)
        places = base.get_decomposed_rel_pos(flat, base.rel_pos_h, base.rel_pos_w, where, where)
        places = F.pad(places.reshape(batch, heads, height * width, height * width), (length, 0))
        bias = places if bias is None else places + bias

    if type(base).__name__ == "SamVisionSdpaAttention":
        weights = None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        scores = (q * base.scale) @ k.transpose(-2, -1)
        probabilities = (scores if bias is None else scores + bias).softmax(-1, dtype=torch.float32).to(q.dtype)
        weights = probabilities[..., length:].flatten(0, 1)
        out = F.dropout(probabilities, base.dropout, base.training) @ v
    out = out.transpose(1, 2).reshape(batch, height, width, -1)
    return base.proj(out), weights


def _attend_to_stage(
    base: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    height: int,
    width: int,
) -> torch.Tensor:
    """The end of Sam2MultiScaleAttention: pools the queries (B, heads, HW, d) of an image or window, then attends."""
    kind = base.config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise Unsupported(
            f"prefixes and prompts do not work with the attention {kind!r}; load the base with eager or sdpa."
        )
    heads = q.shape[1]
    if base.query_stride:
        grid = q.transpose(2, 3).flatten(0, 1).unflatten(-1, (height, width))  # B heads, d, H, W
        grid = F.max_pool2d(grid, base.query_stride, base.query_stride)
        height, width = grid.shape[-2:]
        q = grid.flatten(2).transpose(1, 2).unflatten(0, (-1, heads))
    if kind == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        scores = q @ k.transpose(-2, -1) * base.scale
        out = (scores if bias is None else scores + bias).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    return base.proj(out.transpose(1, 2).reshape(len(q), height, width, -1))


def join_windows(windows: torch.Tensor, window: int, height: int, width: int) -> torch.Tensor:
    """The images (B, H, W, C) of which SAM has made windows (B windows, w, w, C); what they were padded with is gone.

    Source: SamVisionLayer.window_unpartition of transformers.
    """
    rows, columns = -(-height // window), -(-width // window)
    grid = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # B rows w columns w C
    return grid.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def split_into_windows(images: torch.Tensor, window: int) -> torch.Tensor:
    """Images (B, H, W, C) as SAM's windows (B windows, w, w, C), padded with zeros on the right and below.

    Source: SamVisionLayer.window_partition of transformers.
    """
    _, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, 0, -width % window, 0, -height % window))
    grid = padded.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # B rows w columns w C
    return grid.transpose(2, 3).flatten(0, 2)
