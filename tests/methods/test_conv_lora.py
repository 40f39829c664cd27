"""LoRA on convolutions computes its formula, group by group, and adds to what adapters do together."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from convolutional_networks import build_network, draw_batch
from inlay import (
    Bank,
    BottleneckConfig,
    CompositeConfig,
    ConvLoraConfig,
    PartialConfig,
    combine,
    load_adapter,
    load_base,
    load_processor,
    save_adapter,
)
from inlay.bases.sites import head_modules
from inlay.errors import InlayError
from inlay.methods.conv_lora import ConvLoraLayer


def adapt(layer, **settings):
    model = get_peft_model(nn.Sequential(layer), ConvLoraConfig(target_modules=["0"], init_weights=False, **settings))
    return model, model.base_model.model[0]


def draw_input(layer, side=9):
    torch.manual_seed(1)
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 5, layer.in_features)
    return torch.randn(2, layer.in_channels, *[side] * (layer.weight.ndim - 2))


def test_each_group_has_an_update_of_its_own():
    """Against torch's convolution of each group's channels with B_g A_g."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=3)
    x, plain = draw_input(layer), copy.deepcopy(layer)
    model, adapted = adapt(layer, r=2, scale=0.5)
    down, up = adapted.inlay_conv_lora_down["default"], adapted.inlay_conv_lora_up["default"]
    assert down.shape == (3 * 2, 4, 3, 3) and up.shape == (24, 2) and not adapted.inlay_conv_lora_delta
    wanted = []
    for g in range(3):
        hidden = F.conv2d(x[:, 4 * g : 4 * g + 4], down[2 * g : 2 * g + 2], None, 2, 1)
        wanted.append(F.conv2d(hidden, up[8 * g : 8 * g + 8, :, None, None]))
    torch.testing.assert_close(model(x), plain(x) + 0.5 * torch.cat(wanted, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 32), nn.Conv1d(8, 16, 5)])
def test_without_groups_it_is_the_lora_of_peft(layer):
    torch.manual_seed(0)
    x = draw_input(layer)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    model, adapted = adapt(layer, r=2, scale=2.0)
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(adapted.inlay_conv_lora_down["default"])
        inner.lora_B["default"].weight.copy_(
            adapted.inlay_conv_lora_up["default"].view_as(inner.lora_B["default"].weight)
        )
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "rank", "whole"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), 1, True),  # factors: 16 · 9 + 16 of 144 numbers
        (nn.Conv2d(16, 16, 1), 7, False),  # 224 of 256
        (nn.Conv2d(16, 16, 1), 8, True),  # 256 of 256
        (nn.Conv2d(64, 64, 3, groups=2), 4, False),
    ],
)
def test_it_holds_factors_only_where_they_are_smaller_than_the_layer(layer, rank, whole):
    _, adapted = adapt(layer, r=rank)
    held = [p for name, p in adapted.named_parameters() if "inlay_" in name]
    assert sum(p.numel() for p in held) <= layer.weight.numel()
    assert bool(adapted.inlay_conv_lora_delta) == whole == (len(held) == 1)


def test_an_update_and_biases_of_another_part_meet_at_one_layer():
    model = build_network("ShuffleNetV2")
    parts = [ConvLoraConfig(r=2, init_weights=False), PartialConfig(train="bias", init_weights=False)]
    wanted = copy.deepcopy(model)
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        wanted = get_peft_model(wanted, copy.deepcopy(part)).merge_and_unload()
    torch.manual_seed(0)
    both = get_peft_model(model, CompositeConfig(parts=parts)).eval()
    torch.manual_seed(1)
    for layer in both.modules():
        if hasattr(layer, "inlay_partial_delta"):
            for delta in layer.inlay_partial_delta["default"].values():
                nn.init.normal_(delta, std=0.02)
    batch = draw_batch("ShuffleNetV2")
    assert any(isinstance(module, ConvLoraLayer) for module in both.modules())
    outputs = both(**batch).logits
    torch.testing.assert_close(both.merge_and_unload()(**batch).logits, outputs, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def shufflenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shufflenet")
    build_network("ShuffleNetV1").save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save(folder, base, rank, **settings):
    torch.manual_seed(rank)
    model = load_base(base)
    model = get_peft_model(model, ConvLoraConfig(r=rank, init_weights=False, **settings))
    save_adapter(model.eval(), folder, processor=load_processor(base))
    with torch.no_grad():
        merged = model.merge_and_unload().state_dict()
    return {key: value - load_base(base).state_dict()[key] for key, value in merged.items() if "weight" in key}


@pytest.mark.parametrize("rule", ["add", "average", "ties"])
def test_sums_of_other_ranks_scales_and_layers_are_sums_of_the_updates(rule, shufflenet, tmp_path):
    """Factors where the ranks together are still small enough, whole differences elsewhere; one lacks some layers."""
    updates = [
        save(tmp_path / "a", shufflenet, 1, scale=3.0),
        save(tmp_path / "b", shufflenet, 2, target_modules=["reduce_1x1.convolution", "expand_1x1.convolution"]),
    ]
    made = combine({tmp_path / "a": 0.5, tmp_path / "b": -1.5}, rule, out=tmp_path / "sum", density=1.0)
    loaded = load_adapter(made.folder, base=load_base(shufflenet))
    kinds = {name.rpartition(".")[2] for name in loaded.file.shapes if "inlay_" in name}
    assert "inlay_conv_lora_delta" in kinds and ("inlay_conv_lora_down" in kinds) == (rule != "ties")
    found, before = loaded.merge().model.state_dict(), load_base(shufflenet).state_dict()
    share = -1.0 if rule == "average" else 1.0
    for key, first in updates[0].items():
        one, two = 0.5 * first / share, -1.5 * updates[1][key] / share
        wanted = one + two
        if rule == "ties":  # the mean of those that have the elected sign
            same = [(x.sign() == wanted.sign()) & (x != 0) for x in (one, two)]
            wanted = (one * same[0] + two * same[1]) / (same[0].float() + same[1].float()).clamp(min=1)
        torch.testing.assert_close(found[key] - before[key], wanted, rtol=1e-3, atol=1e-6, msg=key)


def test_rows_of_factors_and_of_whole_differences_share_a_batch(shufflenet, tmp_path):
    save(tmp_path / "a", shufflenet, 1)
    save(tmp_path / "b", shufflenet, 6)  # whole in most layers
    bank = Bank(load_base(shufflenet), {name: tmp_path / name for name in "ab"})
    pixels, rows = {"pixel_values": draw_batch("ShuffleNetV1")["pixel_values"]}, ["b", None, "a", "b"]
    alone = {name: load_adapter(tmp_path / name, base=load_base(shufflenet)).model for name in "ab"}
    alone[None] = load_base(shufflenet)
    with torch.no_grad():
        found = bank(pixels, rows).logits
        for i, name in enumerate(rows):
            torch.testing.assert_close(found[i], alone[name](**pixels).logits[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bank(pixels, ["b"] * 4).logits, alone["b"](**pixels).logits, rtol=1e-4, atol=1e-5)


def test_what_is_no_rank_and_no_layer_is_said():
    with pytest.raises(InlayError, match="r must be a whole number of at least 1, got 0"):
        ConvLoraConfig(r=0)
    with pytest.raises(InlayError, match="a BatchNorm2d has no such weight"):
        get_peft_model(nn.Sequential(nn.BatchNorm2d(3)), ConvLoraConfig(target_modules=["0"]))


def test_a_bottleneck_is_not_merged_across_groups():
    config = BottleneckConfig(width=2, activation=None, target_modules=["0"], sites=["mlp"])
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), config)
    with pytest.raises(InlayError, match="keeps apart in groups"):
        model.merge_adapter()


def test_an_adapter_whose_head_was_saved_with_the_norms_of_the_base_loads(tmp_path):
    """As older versions named the head of a PoolFormer, by which peft took every norm."""
    folder = tmp_path / "base"
    build_network("PoolFormer").save_pretrained(folder)
    base = load_base(folder, labels=["a", "b"])
    config = LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["norm", *head_modules(base)])
    model = get_peft_model(base, config).eval()
    saved = save_adapter(model, tmp_path / "a", processor=load_processor(folder))
    assert any("before_norm" in key for key in load_adapter(saved).file.shapes)
