"""Known counts, without memory and without touching the model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from inlay.errors import InlayError
from inlay.measure import count_macs
from inlay.measure.macs import copy_to_meta

PICTURE = {"pixel_values": torch.empty(1, 3, 224, 224, device="meta")}


def on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k)


class Choosy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class Keeper(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = torch.ones(4)  # neither parameter nor buffer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input * self.scale)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(5, 7), {"input": torch.empty(2, 3, 5)}, 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 6, 3, padding=1), {"input": torch.empty(1, 4, 8, 8)}, 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), {"input": torch.empty(1, 4, 8, 8)}, 6 * 6 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), {"input": torch.empty(1, 4, 8, 8)}, 8 * 8 * 4 * 6 * 4),
        (nn.Conv3d(1, 2, 3), {"input": torch.empty(1, 1, 5, 5, 5)}, 27 * 2 * 27),
        (Attention(), {"q": torch.empty(1, 2, 5, 8), "k": torch.empty(1, 2, 9, 8)}, 2 * 2 * 5 * 9 * 8),
        (Keeper(), {"input": torch.empty(1, 4)}, 16),
        (nn.LayerNorm(8), {"input": torch.empty(2, 8)}, 0),
    ],
)
def test_by_hand(model: nn.Module, inputs: dict[str, torch.Tensor], expected: int):
    assert count_macs(model, inputs) == expected


def test_vit_base_and_its_lora():
    model = on_meta(ViTForImageClassification, ViTConfig())
    assert count_macs(model, PICTURE) == 17_563_061_760
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert count_macs(adapted, PICTURE) - 17_563_061_760 == 12 * 2 * 197 * 16 * (768 + 768)
    eager = on_meta(ViTForImageClassification, ViTConfig(attn_implementation="eager"))
    assert count_macs(eager, PICTURE) == 17_563_061_760


def test_mobilenet():
    model = on_meta(MobileNetV2ForImageClassification, MobileNetV2Config(num_labels=1001))
    assert count_macs(model, PICTURE) == 300_775_552
    assert count_macs(model, {"pixel_values": torch.empty(4, 3, 224, 224)}) == 4 * 300_775_552


def test_gpt2():
    model = on_meta(GPT2LMHeadModel, GPT2Config())
    tokens = torch.zeros(1, 1024, dtype=torch.long)
    assert count_macs(model, {"input_ids": tokens}) == 145_824_153_600
    assert count_macs(model, {"input_ids": tokens, "labels": tokens}) == 145_824_153_600
    with pytest.raises(InlayError, match=r"GPT2LMHeadModel on input_ids .* Leave attention masks out"):
        count_macs(model, {"input_ids": tokens, "attention_mask": tokens})


@pytest.mark.parametrize("layer", ["Linear8bitLt", "Linear4bit"])
def test_quantised_counts_as_dense(layer: str):
    kinds = pytest.importorskip("bitsandbytes").nn
    options = {"has_fp16_weights": False} if layer == "Linear8bitLt" else {"quant_type": "nf4"}
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), getattr(kinds, layer)(64, 32, **options)).to("cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["1"]))
    assert count_macs(adapted, {"input": torch.empty(3, 64)}) == 3 * (64 * 64 + 64 * 32 + 2 * (64 + 32))
    assert isinstance(adapted.base_model.model[1].base_layer, getattr(kinds, layer))


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    inputs = {"input": torch.randn(2, 4)}
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count_macs(model, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_allocated_and_ties_stay():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10), "norm": nn.BatchNorm1d(4)})
    model["head"].weight = model["embed"].weight
    shadow = copy_to_meta(model)
    assert all(tensor.is_meta for tensor in [*shadow.parameters(), *shadow.buffers()])
    assert shadow["head"].weight is shadow["embed"].weight


def test_errors():
    with pytest.raises(InlayError, match=r"Choosy on x \(2, 2\) .* depends on values"):
        count_macs(Choosy(), {"x": torch.ones(2, 2)})
    with pytest.raises(InlayError, match="check the shapes"):
        count_macs(nn.Linear(4, 4), {"input": torch.ones(2, 5)})
