"""METHODS: the ways to adapt a model, ours and peft's, in one table. Each row stands in the file of its method."""

from inlay.methods import attention_prefix as prefix
from inlay.methods import (
    baselines,
    bottleneck,
    composite,
    conv_adapter,
    conv_lora,
    convpass,
    ia3,
    lora,
    partial,
    prompt,
    ssf,
    visual_prompt,
)
from inlay.methods._peft import mirror_convolutions
from inlay.methods.attention_prefix import AttentionPrefixConfig
from inlay.methods.bottleneck import BottleneckConfig
from inlay.methods.composite import CompositeConfig
from inlay.methods.conv_adapter import ConvAdapterConfig
from inlay.methods.conv_lora import ConvLoraConfig
from inlay.methods.convpass import ConvPassConfig
from inlay.methods.method import Method
from inlay.methods.partial import PartialConfig
from inlay.methods.spatial import adapter as spatial
from inlay.methods.spatial.adapter import SpatialAdapterConfig
from inlay.methods.ssf import SsfConfig
from inlay.methods.visual_prompt import VisualPromptConfig

__all__ = [
    "METHODS",
    "AttentionPrefixConfig",
    "BottleneckConfig",
    "CompositeConfig",
    "ConvAdapterConfig",
    "ConvLoraConfig",
    "ConvPassConfig",
    "Method",
    "PartialConfig",
    "SpatialAdapterConfig",
    "SsfConfig",
    "VisualPromptConfig",
]

_ROWS: tuple[Method, ...] = (
    baselines.PROBE,
    *lora.ROWS,
    *conv_lora.ROWS,
    *ia3.ROWS,
    *ssf.ROWS,
    *bottleneck.ROWS,
    *convpass.ROWS,
    *conv_adapter.ROWS,
    *visual_prompt.ROWS,
    *prefix.ROWS,
    *prompt.ROWS,
    *partial.ROWS,
    *composite.ROWS,
    *spatial.ROWS,
    baselines.FULL,
)
METHODS = {row.name: row for row in _ROWS}

mirror_convolutions()
