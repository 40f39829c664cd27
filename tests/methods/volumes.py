"""A tiny SAM, volumes for it, and the published encoder in its plain, slow form."""

import torch
from torch.nn import functional as F
from transformers import SamConfig, SamModel, SamVisionConfig

from inlay import SpatialAdapterConfig

SIZE = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 64, "output_channels": 32}
SMALL = {"enlarge": 2, "enlarge_depth": 2, "patch_depth": 8, "window": 4, "width": 8, "depth_rows": 8}
CONFIG = {**SMALL, "classes": ["organ", "lesion"], "decoder_width": 16}


def build(patch=8, image=64):
    """A SamModel in eval mode, the same at each call, with tables of positions that are not zero."""
    torch.manual_seed(0)
    vision = SamVisionConfig(
        **SIZE,
        image_size=image,
        patch_size=patch,
        window_size=3,
        global_attn_indexes=[1, 3],
        num_pos_feats=16,
        initializer_range=0.05,
    )
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    prompts = {"hidden_size": 32, "image_size": image, "patch_size": patch, "image_embedding_size": image // patch}
    config = SamConfig(vision_config=vision.to_dict(), prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = SamModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def settings(**more):
    """A small adapter for two classes."""
    return SpatialAdapterConfig(**{**CONFIG, **more})


def volumes(rows=2, sizes=(21, 35, 30), seed=1):
    """Volumes (B, 1, D, H, W)."""
    return torch.randn(rows, 1, *sizes, generator=torch.Generator().manual_seed(seed))


def call(function, *inputs):
    """What it gives for them."""
    return function(*inputs)


def published_levels(encoder, parts, config, volume, run=call):
    """The encoder of Gong et al. 2023, arXiv:2306.13465, formula by formula; levels (B, C, D, H, W).

    `run` calls each of its pieces; torch's `checkpoint` would recompute them.
    """
    base = encoder.get_base_layer()
    x = run(published_tokens, volume, base, parts.patches, config)
    levels = []
    for i, (block, own) in enumerate(zip(base.layers, parts.blocks, strict=True)):
        x = run(published_block, x, block, own, config.window, config.window // 2 if i % 2 == 0 else 0)
        if i in parts.ends:
            levels.append(run(published_neck, x, parts.necks[len(levels)]))
    return levels


def published_tokens(volume, base, patches, config):
    """Slices enlarged, patches of each by the 2D convolution, these by a depth-wise one along the slices, positions."""
    patch = base.patch_embed.projection
    big = F.interpolate(volume, scale_factor=(config.enlarge_depth, config.enlarge, config.enlarge), mode="trilinear")
    slices = big.movedim(2, 1).flatten(0, 1).repeat(1, 3, 1, 1)
    flat = F.conv2d(slices, patch.weight, patch.bias, stride=patch.stride)
    flat = flat.unflatten(0, (len(volume), -1)).movedim(1, 2)  # B C D H W
    p, filters = config.patch_depth, patches.depth + 1 / config.patch_depth
    x = F.conv3d(flat, filters[:, None, :, None, None], patches.bias, stride=(p, 1, 1), groups=len(filters))
    x = x.movedim(1, -1)
    x = x + F.adaptive_avg_pool2d(base.pos_embed.movedim(-1, 1), x.shape[2:4]).movedim(1, -1)[:, None]
    return x + patches.positions[:, None, None]


def published_neck(x, neck):
    """A 1x1x1 and a 3x3x3 convolution, each with a norm; (B, C, D, H, W)."""
    y = F.conv3d(x.movedim(-1, 1), neck.conv1.weight[..., None, None, None])
    y = F.layer_norm(y.movedim(1, -1), y.shape[1:2], neck.norm1.weight, neck.norm1.bias, 1e-6).movedim(-1, 1)
    y = F.conv3d(y, neck.conv2.weight, padding=1)
    return F.layer_norm(y.movedim(1, -1), y.shape[1:2], neck.norm2.weight, neck.norm2.bias, 1e-6).movedim(-1, 1)


def published_block(x, block, own, window, shift):
    """Adapter, attention in shifted cubic windows with a decomposed relative position bias, MLP."""
    a = own.adapter
    h = F.relu(F.linear(x, a.down.weight, a.down.bias))
    h = F.relu(F.conv3d(h.movedim(-1, 1), a.conv.weight, a.conv.bias, padding=1, groups=h.shape[-1])).movedim(1, -1)
    x = x + F.relu(F.linear(h, a.up.weight, a.up.bias))

    norm = own.norms
    first, second = block.layer_norm1, block.layer_norm2
    y = F.layer_norm(x, x.shape[-1:], first.weight + norm[0], first.bias + norm[1], first.eps)
    y = y.roll((-shift,) * 3, (1, 2, 3))
    batch, *sizes, channels = y.shape
    n, attention = window, block.attn
    counts = [size // n for size in sizes]
    y = y.view(batch, counts[0], n, counts[1], n, counts[2], n, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    y = y.reshape(-1, n**3, channels)
    heads = attention.num_attention_heads
    q, k, v = attention.qkv(y).view(len(y), n**3, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    tables = [
        F.interpolate(t.T[None], size=2 * n - 1, mode="linear")[0].T for t in (attention.rel_pos_h, attention.rel_pos_w)
    ]
    where = torch.stack(torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"), -1).view(-1, 3)  # d h w
    for axis, table in enumerate([(tables[0] + tables[1]) / 2 + own.positions, *tables]):
        apart = where[:, axis][:, None] - where[:, axis][None] + n - 1
        scores = scores + torch.einsum("mhqc,qkc->mhqk", q, table[apart])
    if shift:
        region = torch.zeros(1, *sizes, 1, device=x.device)
        parts = [(slice(0, -n), slice(-n, -shift), slice(-shift, None))] * 3
        for i, d in enumerate(parts[0]):
            for j, h_ in enumerate(parts[1]):
                for k_, w in enumerate(parts[2]):
                    region[:, d, h_, w] = 9 * i + 3 * j + k_
        region = region.view(counts[0], n, counts[1], n, counts[2], n).permute(0, 2, 4, 1, 3, 5).reshape(-1, n**3)
        mask = -100.0 * (region[:, :, None] != region[:, None]).to(attention.qkv.weight.dtype)
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(y), n**3, channels)
    y = attention.proj(y).view(batch, *counts, n, n, n, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    y = y.reshape(batch, *sizes, channels).roll((shift,) * 3, (1, 2, 3))
    x = x + y
    y = F.layer_norm(x, x.shape[-1:], second.weight + norm[2], second.bias + norm[3], second.eps)
    return x + block.mlp(y)
