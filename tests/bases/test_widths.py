"""Units can be left out of every known family, and the config says the widths that are left."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from inlay.bases.pruned import adopt_config, even_widths, is_stock, new_with_widths, read_widths
from inlay.bases.widths import find_groups, narrow, narrowed, weight_axis
from inlay.errors import BadInput, Unsupported
from inlay.measure import count_macs
from prunable_models import MODELS, batch_for, build, every_other_unit

AUTO = {"gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@torch.no_grad()
def silence(model, keep):
    """Let nothing read the units that are not kept: without them the model computes the same."""
    for group in find_groups(model):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[keep[group.name]] = False
        for part in group.read:
            reader = model.get_submodule(part.module)
            reader.weight.index_fill_(weight_axis(reader, part.side), part.places[gone].flatten(), 0)


@pytest.mark.parametrize("family", MODELS)
def test_leaving_out_what_nothing_reads_changes_nothing_also_after_saving(family, tmp_path):
    model = build(family)
    batch, keep = batch_for(model), every_other_unit(model)
    silence(model, keep)
    before = logits(model, batch)
    macs = count_macs(model, {k: v for k, v in batch.items() if k != "labels"})
    made = adopt_config(narrowed(model, keep))
    torch.testing.assert_close(logits(made, batch), before, rtol=1e-4, atol=1e-5)
    assert count_macs(made, {k: v for k, v in batch.items() if k != "labels"}) < macs

    made.save_pretrained(tmp_path)
    auto = AUTO.get(family, AutoModelForImageClassification)
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(loaded) is type(made) and read_widths(loaded) == read_widths(made)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded.eval(), batch), logits(made, batch), rtol=1e-4, atol=1e-5)
    fresh = new_with_widths(loaded)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("vit", {"intermediate_size": 12, "num_attention_heads": 2, "head_dim": 4}),
        ("deit", {"intermediate_size": 12, "num_attention_heads": 2, "head_dim": 4}),
        ("dinov2", {"mlp_ratio": 1, "num_attention_heads": 2, "head_dim": 4}),
        ("llama", {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}),
    ],
)
def test_even_widths_are_a_config_of_transformers(family, changed):
    model = build(family)
    groups = find_groups(model)
    widths = even_widths(model, groups, 0.5)
    made = adopt_config(narrowed(model, {name: torch.arange(count) for name, count in widths.items()}))
    assert is_stock(made) and type(made) is type(model)
    assert {name: getattr(made.config, name) for name in changed} == changed


def test_half_the_expansion_is_an_expand_ratio_of_half():
    model = build("mobilenet_v2")
    widths = even_widths(model, find_groups(model), 0.5)
    made = adopt_config(narrowed(model, {name: torch.arange(count) for name, count in widths.items()}))
    halved = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1, expand_ratio=3.0))
    assert is_stock(made) and read_widths(made) == read_widths(halved) != read_widths(model)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_an_even_mlp_is_a_config_of_transformers_where_fewer_heads_are_none(family):
    model = build(family)
    mlp = {group.name: torch.arange(8) for group in find_groups(model, ["mlp"])}
    made = adopt_config(narrowed(model, mlp))
    assert is_stock(made) and 8 in (
        made.config.to_dict().get("n_inner"),
        made.config.to_dict().get("intermediate_size"),
    )
    heads = {group.name: torch.arange(2) for group in find_groups(model, ["heads"])}
    uneven = adopt_config(narrowed(model, heads))
    assert not is_stock(uneven) and uneven.config.model_type == f"{family}_pruned"
    assert AutoConfig.for_model(uneven.config.model_type, widths={"mlp": [1, 2]}).widths == {"mlp": [1, 2]}


def test_a_pruned_model_is_pruned_again_and_becomes_even():
    model = build("vit")
    first = adopt_config(narrowed(model, every_other_unit(model)))
    assert read_widths(first) == {"heads": [2, 2], "mlp": [12, 12]} and is_stock(first)
    uneven = adopt_config(narrowed(first, {"vit.layers.0.mlp": torch.tensor([1, 5, 7])}))
    assert not is_stock(uneven) and read_widths(uneven)["mlp"] == [3, 12]
    even = adopt_config(narrowed(uneven, {"vit.layers.1.mlp": torch.tensor([0, 2, 4])}))
    assert is_stock(even) and even.config.intermediate_size == 3 and even.config.head_dim == 4


def test_the_units_that_stay_are_those_that_were_named():
    model = build("llama")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    narrow(model, {"model.layers.1.heads": torch.tensor([1]), "model.layers.0.mlp": torch.tensor([3, 20])})
    after = model.state_dict()
    # the second of two groups of heads: queries 2 and 3, keys and values 1, of 4 places each
    for name, rows in (("q_proj", slice(8, 16)), ("k_proj", slice(4, 8)), ("v_proj", slice(4, 8))):
        key = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(after[key], weights[key][rows])
    key = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(after[key], weights[key][:, 8:16])
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(
            after[f"model.layers.0.mlp.{name}.weight"], weights[f"model.layers.0.mlp.{name}.weight"][[3, 20]]
        )
    assert model.model.layers[0].mlp.down_proj.in_features == 2


def test_a_group_that_is_not_there_or_would_be_empty_is_refused():
    model = build("vit")
    with pytest.raises(
        BadInput, match=r"'vit\.layers\.9\.mlp' is not in this model; keep at least one unit of each of vit"
    ):
        narrow(model, {"vit.layers.9.mlp": torch.tensor([0])})
    with pytest.raises(BadInput, match=r"'vit\.layers\.0\.mlp' has no units left"):
        narrow(model, {"vit.layers.0.mlp": torch.tensor([], dtype=torch.long)})
    with pytest.raises(BadInput, match="no units of the kind expansion; it has heads, mlp"):
        find_groups(model, ["expansion"])
    swin = SwinForImageClassification(
        SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=8, patch_size=2, window_size=2)
    )
    with pytest.raises(Unsupported, match=r"inner widths of SwinForImageClassification \(swin\) are not known"):
        find_groups(swin)


def test_a_shufflenet_whose_groups_cannot_be_kept_apart_keeps_its_blocks():
    from inlay.bases.networks.configs import ShuffleNetV1Config
    from inlay.bases.networks.shufflenet_v1 import ShuffleNetV1ForImageClassification

    # 4 inner channels in each of 3 groups: not as many of each group for each group
    config = ShuffleNetV1Config(
        groups=3, stem_channels=12, stage_channels=[48], depths=[2], bottleneck_channels=[12, 18], num_labels=3
    )
    model = ShuffleNetV1ForImageClassification(config)
    assert [group.name for group in find_groups(model)] == ["shufflenet.blocks.1.branch"]
    assert isinstance(model.shufflenet.blocks[1].conv_3x3.convolution, nn.Conv2d)
