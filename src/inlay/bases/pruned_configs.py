"""Configs of models whose inner widths differ from layer to layer, and their registration with AutoConfig.

Their models, in `inlay.bases.pruned`, are subclasses of many models of transformers, which take seconds to import. So
they are imported when one of these configs is made, and not before.
"""

from importlib import import_module
from typing import Any

from transformers import AutoConfig
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.deit.configuration_deit import DeiTConfig
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mobilenet_v2.configuration_mobilenet_v2 import MobileNetV2Config
from transformers.models.vit.configuration_vit import ViTConfig

# Ends their model_type, in front of which stands that of the model of transformers with the same names of modules.
PRUNED = "_pruned"


class _PrunedConfig:
    """Comes before a config of transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        import_module("inlay.bases.pruned")  # registers the models
        super().__post_init__(**kwargs)  # type: ignore[misc]


class PrunedViTConfig(_PrunedConfig, ViTConfig):
    """ViTConfig with the widths of each layer."""

    model_type = f"vit{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedDeiTConfig(_PrunedConfig, DeiTConfig):
    """DeiTConfig with the widths of each layer."""

    model_type = f"deit{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedDinov2Config(_PrunedConfig, Dinov2Config):
    """Dinov2Config with the widths of each layer."""

    model_type = f"dinov2{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedMobileNetV2Config(_PrunedConfig, MobileNetV2Config):
    """MobileNetV2Config with the widths of each layer."""

    model_type = f"mobilenet_v2{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedGPT2Config(_PrunedConfig, GPT2Config):
    """GPT2Config with the widths of each layer."""

    model_type = f"gpt2{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedLlamaConfig(_PrunedConfig, LlamaConfig):
    """LlamaConfig with the widths of each layer."""

    model_type = f"llama{PRUNED}"
    widths: dict[str, list[int]] | None = None


class PrunedBertConfig(_PrunedConfig, BertConfig):
    """BertConfig with the widths of each layer."""

    model_type = f"bert{PRUNED}"
    widths: dict[str, list[int]] | None = None


for _config in (
    PrunedViTConfig,
    PrunedDeiTConfig,
    PrunedDinov2Config,
    PrunedMobileNetV2Config,
    PrunedGPT2Config,
    PrunedLlamaConfig,
    PrunedBertConfig,
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
