"""Small random networks of every convolutional family, and what is known of their blocks."""

import torch
import transformers as hf
from torch import nn

from inlay.bases.networks import configs, models  # noqa: F401  # models registers itself with the auto classes

STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "embedding_size": 8, "image_size": 32}
FAMILIES = {
    "MobileNetV1": {"image_size": 32, "depth_multiplier": 0.25},
    "MobileNetV2": {"image_size": 32, "depth_multiplier": 0.25},
    "MobileViT": {
        "image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
        "num_attention_heads": 2, "patch_size": 2,
    },
    "MobileViTV2": {
        "image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1]
    },
    "EfficientNet": {
        "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0, "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 6, 6], "hidden_dim": 320,
    },
    "Levit": {
        "image_size": 32, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "SwiftFormer": {"image_size": 32, "embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "PoolFormer": {
        "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_channels": 3
    },
    "RegNet": {**STAGES, "groups_width": 4},
    "ResNet": {**STAGES, "hidden_sizes": [8, 16]},
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "HGNetV2": {
        "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8], "stage_mid_channels": [8, 8], "stage_out_channels": [8, 8],
        "stage_num_blocks": [1, 2], "stage_numb_of_layers": [2, 2], "stage_downsample": [False, True],
        "stage_light_block": [False, True], "stage_kernel_size": [3, 5],
    },
    "Bit": {**STAGES, "num_groups": 4},
    "SqueezeNet": {
        "image_size": 32, "stem_channels": 8, "stem_kernel_size": 3, "squeeze_channels": [4, 4], "relu_logits": False,
        "expand1x1_channels": [8, 8], "expand3x3_channels": [8, 8], "pool_before": [1],
    },
    "ShuffleNetV1": {
        "image_size": 32, "stem_channels": 8, "stem_pool": False, "groups": 2, "stage_channels": [16, 32],
        "depths": [2, 1],
    },
    "ShuffleNetV2": {
        "image_size": 32, "stem_channels": 8, "stem_pool": False, "stage_channels": [16, 32], "depths": [2, 1],
        "last_channels": 16,
    },
}  # fmt: skip


def build_network(family, labels=5):
    """A classifier in eval mode, the same at each call.

    Weights are drawn so that a signal keeps its size through all layers, and batch norms have the statistics of one
    batch: as transformers initialises them, the deep ones answer every image alike, and would hide any mistake.
    """
    torch.manual_seed(0)
    kind = getattr(hf, f"{family}Config", None) or getattr(configs, f"{family}Config")
    config = kind(**FAMILIES[family], num_labels=labels, architectures=[f"{family}ForImageClassification"])
    model = hf.AutoModelForImageClassification.from_config(config)
    model.requires_grad_(False)
    for value in model.parameters():
        if value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5)
        else:
            value.add_(torch.rand_like(value) * 0.2)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(**draw_batch(family))
    for norm in norms:  # of one pixel, some channels hardly vary: they would magnify rounding
        norm.running_var.clamp_(min=0.5 * float(norm.running_var.mean()))
    return model.eval()


def draw_batch(family, rows=4, labels=5):
    """Pixels and labels, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    side = FAMILIES[family].get("image_size", 32)
    pixels = torch.randn(rows, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % labels}
