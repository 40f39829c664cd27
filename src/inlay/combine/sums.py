"""SUM_BY_PEFT_TYPE: the sum of each method that has one; a new method adds its class here."""

from inlay.combine.attention_prefix import AttentionPrefixSum
from inlay.combine.bottleneck import BottleneckSum
from inlay.combine.conv_adapter import ConvAdapterSum
from inlay.combine.conv_lora import ConvLoraSum
from inlay.combine.convpass import ConvPassSum
from inlay.combine.ia3 import Ia3Sum
from inlay.combine.lora import LoraSum
from inlay.combine.method_sum import Sum
from inlay.combine.partial import PartialSum
from inlay.combine.prompt import PrefixSum, PromptSum
from inlay.combine.spatial import SpatialSum
from inlay.combine.ssf import SsfSum
from inlay.combine.visual_prompt import VisualPromptSum

_SUMS: tuple[type[Sum], ...] = (
    LoraSum,
    ConvLoraSum,
    Ia3Sum,
    SsfSum,
    BottleneckSum,
    ConvPassSum,
    ConvAdapterSum,
    AttentionPrefixSum,
    VisualPromptSum,
    PartialSum,
    SpatialSum,
    PromptSum,
    PrefixSum,
)
SUM_BY_PEFT_TYPE = {each.peft_type: each for each in _SUMS}
