"""LoRA on every layer of a convolutional network, those in groups and the depth-wise ones too.

A convolution in G groups has a weight W of shape (d_out, d_in / G, k, k); a linear layer is one of k = G = 1. Each
group g has its own factors, and the module computes with W + ΔW:

    ΔW_g = s · B_g A_g          B_g: (d_out / G, r),  A_g: (r, d_in / G · k · k),  s: a scale, alpha / r of LoRA

so that merging changes no output, and works whatever a module makes of its weight (BiT standardises it first). Where
the factors would hold as many numbers as W or more, as always in a depth-wise convolution, ΔW itself is trained.

peft's LoRA leaves A ungrouped, of which no weight can be the sum, and adds to the output, which takes other
convolutions; its training step costs less, as it needs no gradient of the size of W. The factors of a convolution are
those of LoCon: Yeh et al. 2023, arXiv:2309.14859.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from typing_extensions import override

from inlay.bases.sites import Sites, list_layers
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterTuner, WeightLayer
from inlay.methods.method import Method
from inlay.peft_types import PEFT_TYPES, has_factors


@dataclass
class ConvLoraConfig(AdapterConfig):
    """Settings of LoRA on convolutions; without target_modules every layer but those of the head."""

    r: int = field(default=8, metadata={"help": "Rank r of the update of each group."})
    scale: float = field(default=2.0, metadata={"help": "Factor s of B·A: alpha / r of LoRA."})
    ranks: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of modules where they are not r, by name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_CONV_LORA"]
        wrong = [rank for rank in (self.r, *self.ranks.values()) if not isinstance(rank, int) or rank < 1]
        if wrong:
            raise BadInput(f"r must be a whole number of at least 1, got {wrong[0]!r}.")


class ConvLoraLayer(WeightLayer):
    """Wraps a linear layer or a convolution.

    Attributes:
        inlay_conv_lora_down: By adapter, A of all groups, (G · r, d_in / G, k, k), where it has factors.
        inlay_conv_lora_up: By adapter, B, (d_out, r).
        inlay_conv_lora_delta: By adapter, ΔW as it is, of the shape of W, where it has none.
    """

    nesting = 0
    adapter_layer_names = ("inlay_conv_lora_down", "inlay_conv_lora_up", "inlay_conv_lora_delta")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_conv_lora_down = nn.ParameterDict()
        self.inlay_conv_lora_up = nn.ParameterDict()
        self.inlay_conv_lora_delta = nn.ParameterDict()

    @property
    def groups(self) -> int:
        """Of the convolution; 1 of a linear layer."""
        return getattr(self.get_base_layer(), "groups", 1)

    @override
    def add(self, name: str, config: ConvLoraConfig, tuner: AdapterTuner, key: str) -> None:
        weight, rank = self.get_base_layer().weight, config.ranks.get(key, config.r)
        start = (lambda *size: torch.zeros(*size)) if config.init_weights else (lambda *size: torch.randn(*size) * 0.02)
        if has_factors(tuple(weight.shape), self.groups, rank):
            down = torch.empty(self.groups * rank, *weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as peft and loralib do
            self.inlay_conv_lora_down[name] = nn.Parameter(down)
            self.inlay_conv_lora_up[name] = nn.Parameter(start(len(weight), rank))
        else:
            self.inlay_conv_lora_delta[name] = nn.Parameter(start(*weight.shape))
        self.options[name] = config.scale

    def update(self, name: str) -> torch.Tensor:
        """ΔW of one adapter, of the shape of W."""
        if name in self.inlay_conv_lora_delta:
            return self.inlay_conv_lora_delta[name]
        down = self.inlay_conv_lora_down[name].flatten(1).unflatten(0, (self.groups, -1))  # G r i
        up = self.inlay_conv_lora_up[name].unflatten(0, (self.groups, -1))  # G o r
        return self.options[name] * (up @ down).reshape(self.get_base_layer().weight.shape)

    @override
    def merged_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """W + ΔW, the updates of several adapters added first."""
        if not names:  # rows of a batch that have no adapter
            return {}
        weight = self.get_base_layer()._parameters["weight"]
        first, *others = [self.update(name) for name in names]
        return {"weight": (weight + sum(others, first)).to(weight.dtype)}


class ConvLoraModel(AdapterTuner):
    """The tuner of ConvLoraConfig."""

    prefix = "inlay_conv_lora_"
    tuner_layer_cls = ConvLoraLayer

    @override
    def targets(self, config: ConvLoraConfig, found: Sites) -> Sequence[str]:
        return list_layers(self.model)

    @override
    def layer_class(self, target: nn.Module) -> type[ConvLoraLayer]:
        weight = target._parameters.get("weight")
        if not isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or weight is None:
            raise Unsupported(
                f"lora-conv changes the weight of a linear layer or a convolution, and a {type(target).__name__} has "
                "no such weight; give other target_modules."
            )
        if not weight.is_floating_point():
            raise Unsupported(
                f"the weight of a {type(target).__name__} is held in {weight.dtype} and cannot be changed; use lora, "
                "which adds to the output, or a base that is not quantised."
            )
        return ConvLoraLayer


register_method("inlay_conv_lora", ConvLoraConfig, ConvLoraModel)

CONV_LORA = Method(
    name="lora-conv",
    paper=PEFT_TYPES["INLAY_CONV_LORA"].paper,
    attaches="every layer",
    width="rank r of each group",
    merges=True,
    kind="update",
    learning_rate=3e-3,
    config=lambda model, width: ConvLoraConfig(r=width),
    bases=("conv",),
)
ROWS = (CONV_LORA,)
