"""One tiny random model of each family whose inner widths are known, and a batch with labels for it."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from inlay.bases.networks.configs import ShuffleNetV1Config, ShuffleNetV2Config, SqueezeNetConfig
from inlay.bases.networks.shufflenet_v1 import ShuffleNetV1ForImageClassification
from inlay.bases.networks.shufflenet_v2 import ShuffleNetV2ForImageClassification
from inlay.bases.networks.squeezenet import SqueezeNetForImageClassification
from inlay.bases.widths import find_groups

_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
_IMAGE = {"image_size": 8, "patch_size": 4, **_BLOCKS}
_TEXT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHUFFLE = {"stem_channels": 8, "depths": [2, 2], "num_labels": 3}

MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**_IMAGE, intermediate_size=24)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**_IMAGE, intermediate_size=24)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**_IMAGE, mlp_ratio=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=16, n_inner=24, **_TEXT)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_BLOCKS, intermediate_size=24, **_TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_BLOCKS, num_key_value_heads=2, intermediate_size=24, **_TEXT)),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=3)
    ),
    "squeezenet": lambda: SqueezeNetForImageClassification(
        SqueezeNetConfig(
            stem_channels=8,
            squeeze_channels=[4, 6],
            expand1x1_channels=[8, 8],
            expand3x3_channels=[6, 8],
            pool_before=[0],
            num_labels=3,
        )
    ),
    "shufflenet_v1": lambda: ShuffleNetV1ForImageClassification(
        ShuffleNetV1Config(groups=1, stage_channels=[16, 32], **_SHUFFLE)
    ),
    "shufflenet_v1 of 2 groups": lambda: ShuffleNetV1ForImageClassification(
        ShuffleNetV1Config(groups=2, stage_channels=[32, 64], **_SHUFFLE)
    ),
    "shufflenet_v2": lambda: ShuffleNetV2ForImageClassification(
        ShuffleNetV2Config(stage_channels=[16, 32], last_channels=16, **_SHUFFLE)
    ),
}


def build(family: str) -> nn.Module:
    """A model in eval mode, the same at each call, with weights that make every unit count."""
    torch.manual_seed(0)
    model = MODELS[family]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 2)
        elif hasattr(module, "weight") and module.weight is not None and module.weight.ndim > 1:
            nn.init.normal_(module.weight, std=0.3)
    return model.eval().requires_grad_(False)


def batch_for(model: nn.Module, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_ids":
        ids = torch.randint(3, 40, (rows, 6), generator=generator)
        labels = torch.randint(3, (rows,), generator=generator) if model.config.model_type == "bert" else ids
        return {"input_ids": ids, "labels": labels}
    size = model.config.image_size if model.config.model_type in ("vit", "deit", "dinov2") else 32
    images = torch.randn(rows, 3, size, size, generator=generator)
    return {"pixel_values": images, "labels": torch.randint(3, (rows,), generator=generator)}


def every_other_unit(model: nn.Module) -> dict[str, torch.Tensor]:
    """The units to keep: all second ones, of the first group one more."""
    keep = {group.name: torch.arange(0, group.units, 2) for group in find_groups(model)}
    first = find_groups(model)[0]
    keep[first.name] = torch.arange(first.units)[: max(1, first.units // 2)]
    return keep
