"""Where methods attach is right for every listed model and by structure; adapters attach, train and come back."""

import copy
import logging
from dataclasses import fields

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from convolutional_networks import FAMILIES as CONVOLUTIONAL
from convolutional_networks import build_network, draw_batch
from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.bases.processors import load_processor
from inlay.bases.sites import (
    SITES,
    Sites,
    computes_as_torch,
    head_modules,
    is_linear,
    is_norm,
    lora_targets,
    sites,
    uses_weight_linearly,
)
from inlay.errors import InlayError
from inlay.methods import METHODS
from inlay.tasks.base import load_base
from inlay.tasks.golden import golden_image as picture

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = {**BLOCKS, "intermediate_size": 64}
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
PVT = {"image_size": 64, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
QV = {"q_proj", "v_proj"}

# class, config, leaves and number of the attention targets, number of all targets, head
FAMILIES = {
    "ViT": (VIT, QV, 4, 12, ["classifier"]),
    "DeiT": (VIT, QV, 4, 12, ["classifier"]),
    "Dinov2": (BLOCKS, QV, 4, 12, ["classifier"]),
    "Beit": (VIT, QV, 4, 12, ["classifier"]),
    "Swin": (WINDOWS, QV, 4, 13, ["classifier"]),
    "Swinv2": (WINDOWS, {"query", "value"}, 4, 17, ["classifier"]),
    "CLIP": ({"vision_config": VIT, "text_config": TEXT}, QV, 4, 12, ["classifier"]),
    "Siglip": ({"vision_config": VIT, "text_config": TEXT}, QV, 4, 12, ["classifier"]),
    "ConvNext": ({"image_size": 32, **STAGES}, {"pwconv1", "pwconv2", "1"}, 11, 11, ["classifier"]),
    "ResNet": ({"embedding_size": 8, **STAGES}, {"convolution"}, 15, 15, ["classifier"]),
    "MobileNetV1": ({"image_size": 32, "depth_multiplier": 0.25}, {"convolution"}, 13, 13, ["classifier"]),
    "MobileNetV2": ({"image_size": 32, "depth_multiplier": 0.35}, {"convolution"}, 34, 34, ["classifier"]),
    "PoolFormer": ({**STAGES, "num_channels": 3}, {"conv1", "conv2", "projection"}, 11, 11, ["classifier"]),
    "Pvt": (PVT, {"query", "value"}, 8, 24, ["classifier"]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, and a folder with a small random classifier of seven classes."""
    torch.manual_seed(0)
    config = getattr(hf, f"{request.param}Config")(**FAMILIES[request.param][0])
    config.num_labels = 7
    config.id2label, config.label2id = {i: f"c{i}" for i in range(7)}, {f"c{i}": i for i in range(7)}
    model = getattr(hf, f"{request.param}ForImageClassification")(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, str(folder)


def test_an_adapter_attaches_trains_and_comes_back(family, tmp_path):
    name, folder = family
    _, leaves, count, count_all, heads = FAMILIES[name]
    torch.manual_seed(0)
    base, processor = load_base(folder, labels=["a", "b", "c"]), load_processor(folder)
    attention, targets = lora_targets(base, "attention"), lora_targets(base)
    assert {target.rpartition(".")[2] for target in attention} == leaves and len(attention) == count
    assert set(attention) <= set(targets) and len(targets) == count_all
    assert head_modules(base) == heads and base.config.num_labels == 3
    pixels = processor([picture(), picture().rotate(90)], return_tensors="pt")["pixel_values"]
    side = getattr(getattr(base.config, "vision_config", base.config), "image_size", None)
    assert name == "PoolFormer" or side is None or pixels.shape == (2, 3, side, side)

    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=heads))
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trainable.values():
            value.copy_(torch.randn_like(value) * 0.1)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    loss = model.eval()(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
    loss.backward()
    for key, value in trainable.items():
        assert value.grad is not None and value.grad.abs().sum() > 0, f"no gradient reaches {key}"
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)

    loaded = load_adapter(save_adapter(model, tmp_path / "zoo", processor=processor))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    found = dict(loaded.model.named_buffers())
    assert buffers.keys() == found.keys() and all(torch.equal(found[key], buffers[key]) for key in buffers)
    assert loaded.verified and loaded.labels == ["a", "b", "c"]


def test_merging_gives_the_same_outputs(family, tmp_path):
    name, folder = family
    model = load_base(folder)
    method = LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    model = get_peft_model(model, method).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.normal_(std=0.1)
    pixels = load_processor(folder)(picture(), return_tensors="pt")["pixel_values"]
    loaded = load_adapter(save_adapter(model, tmp_path / "zoo", processor=load_processor(folder)))
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        found = loaded.merge().model(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max()), msg=name)


def test_a_base_of_the_user_that_load_base_has_not_seen(family, tmp_path):
    """Wrapped MobileNets need help (FACTS): it must come with load_adapter, too."""
    _, folder = family
    base = hf.AutoModelForImageClassification.from_pretrained(folder).eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=lora_targets(base)))
    folder = save_adapter(model, tmp_path / "zoo", processor=load_processor(folder))
    assert load_adapter(folder, base=base).deviation < 1e-4


class Net(nn.Module):
    base_model_prefix = "body"

    def __init__(self, body, **heads):
        super().__init__()
        self.body = body
        for name, head in heads.items():
            self.add_module(name, head)


def test_lora_leaves_out_grouped_convolutions_the_head_and_wide_ones_next_to_attention():
    layers = [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)]
    model = Net(nn.Sequential(*layers), head=nn.Linear(8, 2), drop=nn.Dropout())
    assert lora_targets(model) == lora_targets(model, "attention") == ["body.0", "body.2", "body.3"]
    assert head_modules(model) == ["head"]
    model.body.append(Block())
    attention = ["body.4.attn.qkv", "body.4.attn.proj", "body.4.mlp.0", "body.4.mlp.2"]
    assert lora_targets(model) == ["body.0", "body.3", *attention]


def pad_in_front(layer, x):
    return nn.functional.conv2d(nn.functional.pad(x, (1, 0, 1, 0)), layer.weight, layer.bias)


@pytest.mark.parametrize(
    ("make", "linearly", "as_torch"),
    [
        (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), True, True),
        (lambda: nn.Linear(4, 6), True, True),
        (lambda: type("Padded", (nn.Conv2d,), {"forward": pad_in_front})(4, 6, 3), True, False),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), True, False),
        (lambda: WeightStandardizedConv2d(4, 8, 3, stride=2, padding="SAME"), False, False),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), False, False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), False, False),
    ],
)
def test_what_a_layer_makes_of_its_weight_is_found_out(make, linearly, as_torch):
    for device in ("cpu", "meta"):
        with torch.device(device if linearly or as_torch else "cpu"):
            layer = make()
        assert (uses_weight_linearly(layer), computes_as_torch(layer)) == (linearly, as_torch)


def test_lora_next_to_standardised_weights_is_refused():
    model = build_network("Bit")
    with pytest.raises(InlayError, match=r"of BitForImageClassification make another weight .* use lora-conv"):
        lora_targets(model)


def test_what_cannot_be_told_is_said():
    with pytest.raises(InlayError, match=r"Linear has no backbone and task head to tell apart; its children are none"):
        head_modules(nn.Linear(2, 2))
    with pytest.raises(InlayError, match=r"its children are 0, 1. Name the head by modules_to_save yourself"):
        head_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(InlayError, match=r"no linear layer or convolution in Net; give target_modules"):
        lora_targets(Net(nn.Conv2d(3, 3, 3, groups=3), head=nn.Linear(3, 2)))
    with pytest.raises(InlayError, match=r"sites must be all or attention, got 'qv'"):
        lora_targets(Net(nn.Linear(3, 3), head=nn.Linear(3, 2)), "qv")


WORDS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 20,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "add_cross_attention": True, "pad_token_id": 0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 20}
CLIP = {"vision_config": VIT, "text_config": TEXT}
SAM_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64,
    "patch_size": 16, "output_channels": 16, "window_size": 3, "global_attn_indexes": [1], "initializer_range": 0.02,
    "num_pos_feats": 8,
}  # fmt: skip
SAM_DECODER = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "mlp_dim": 32}
SAM = {
    "vision_config": SAM_VISION, "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16},
    "mask_decoder_config": {**SAM_DECODER, "iou_head_hidden_dim": 16},
}  # fmt: skip
SWIN = {**WINDOWS, "depths": [2, 1]}
REGISTERS = {**BLOCKS, "use_swiglu_ffn": True}
MOBILE_V1, MOBILE_V2 = FAMILIES["MobileNetV1"][0], FAMILIES["MobileNetV2"][0]

# model class: config, number of norms, head
LISTED = {
    "ViTForImageClassification": (VIT, 5, ["classifier"]),
    "ViTModel": (VIT, 5, []),
    "DeiTForImageClassificationWithTeacher": (VIT, 5, ["cls_classifier", "distillation_classifier"]),
    "Dinov2ForImageClassification": (BLOCKS, 5, ["classifier"]),
    "Dinov2WithRegistersForImageClassification": (REGISTERS, 5, ["classifier"]),
    "CLIPForImageClassification": (CLIP, 6, ["classifier"]),
    "CLIPVisionModel": (VIT, 6, []),
    "CLIPVisionModelWithProjection": (VIT, 6, ["visual_projection"]),
    "SwinForImageClassification": (SWIN, 9, ["classifier"]),
    "SamModel": (SAM, 6, ["mask_decoder"]),
    "SamVisionModel": (SAM_VISION, 6, []),
    "GPT2LMHeadModel": (GPT2, 5, ["lm_head"]),
    "GPT2ForSequenceClassification": (GPT2, 5, ["score"]),
    "GPT2Model": (GPT2, 5, []),
    "BertForSequenceClassification": (WORDS, 5, ["classifier"]),
    "BertForMaskedLM": (WORDS, 5, ["cls"]),
    "BertModel": (WORDS, 5, []),
    "RobertaForTokenClassification": (WORDS, 5, ["classifier"]),
    "DistilBertForSequenceClassification": (DISTIL, 5, ["pre_classifier", "classifier"]),
    "LlamaForCausalLM": (WORDS, 5, ["lm_head"]),
    "LlamaForQuestionAnswering": (WORDS, 5, ["qa_outputs"]),
    "LlamaModel": (WORDS, 5, []),
    "MobileNetV1ForImageClassification": (MOBILE_V1, 27, ["classifier"]),
    "MobileNetV2ForImageClassification": (MOBILE_V2, 52, ["classifier"]),
    "MobileNetV2Model": (MOBILE_V2, 52, []),
}
AROUND = ["around_attention", "around_mlp"]
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
# The same of models without a row, and the fields that are not found.
UNLISTED = {
    "BeitForImageClassification": (VIT, 4, ["classifier"], []),
    "SiglipVisionModel": (VIT, 5, [], []),
    "AlbertForSequenceClassification": ({**WORDS, "num_hidden_layers": 1}, 3, ["classifier"], AROUND),
    "ElectraForSequenceClassification": ({**WORDS, "embedding_size": 8}, 5, ["classifier"], []),
    "OPTForCausalLM": ({**WORDS, "ffn_dim": 64, "word_embed_proj_dim": 32}, 5, ["lm_head"], ["around_mlp"]),
    "GPTNeoXForCausalLM": (WORDS, 5, ["lm_head"], []),
    "Qwen2ForCausalLM": ({**WORDS, "num_key_value_heads": 1}, 5, ["lm_head"], []),
    "Gemma2ForCausalLM": ({**WORDS, "head_dim": 8, "num_key_value_heads": 1}, 9, ["lm_head"], AROUND),
    "Phi3ForCausalLM": (WORDS, 5, ["lm_head"], []),
    "Swinv2ForImageClassification": (WINDOWS, 7, ["classifier"], AROUND),
    "T5EncoderModel": (T5, 5, [], []),
}  # fmt: skip
WITHOUT_ATTENTION = ["attention", "around_attention", "around_mlp", "q", "k", "v", "out"]
LINEAR = ["q", "k", "v", "out", "mlp_in", "mlp_out"]


def build(name, config):
    torch.manual_seed(0)
    cls = getattr(hf, name)
    return cls(cls.config_class(**config)).eval()


def forward(model):
    if model.main_input_name == "pixel_values":
        side = getattr(getattr(model.config, "vision_config", model.config), "image_size", 32)
        return model(pixel_values=torch.randn(1, 3, side, side))
    return model(input_ids=torch.tensor([[3, 4, 5, 6]]))


def size(layer):
    """Input and output size, read from the weight."""
    out, into = layer.weight.shape[:2]
    return (out, into) if type(layer).__name__ == "Conv1D" else (into, out)


def check(model, found, norms, head, missing):
    """Names, kinds, shapes and counts; then every site is used once or more by a forward, and the blocks in order."""
    assert all(
        model.get_submodule(name) is not None for field in fields(found)[1:] for name in getattr(found, field.name)
    )
    assert [field.name for field in fields(found) if not getattr(found, field.name) and field.name != "head"] == missing
    assert list(found.head) == head and len(found.norms) == norms == len(set(found.norms))
    assert all("Norm" in type(model.get_submodule(name)).__name__ for name in found.norms)
    for field in ("attention", "around_attention", "around_mlp", *LINEAR):
        names = getattr(found, field)
        assert all(type(model.get_submodule(name)).__name__ in ("Linear", "Conv1D", "Conv2d") for name in names) or (
            field not in LINEAR
        )
        each, rest = divmod(len(names), len(found.blocks))
        if names and found.source != "mobilenet_v1":
            assert rest == 0 and each == (2 if field == "mlp_in" and "gate_proj" in names[0] else 1)
            owners = [block for block in found.blocks for _ in range(each)]
            assert all(name.startswith(f"{block}.") for block, name in zip(owners, names, strict=True))

    called = []
    named = {name for field in fields(found)[1:] for name in getattr(found, field.name)}
    for name in named:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        forward(model)
    assert set(called) == named - {"shared"}  # T5's embed_tokens has the same weight
    assert [name for name in called if name in found.blocks] == list(found.blocks)

    def sizes(field):
        return [size(model.get_submodule(name)) for name in getattr(found, field)]

    hidden = [into for into, _ in sizes("q")]
    if hidden:
        parts = 3 if found.fused else 1
        assert [out for _, out in sizes("out")] == hidden
        assert [into for into, _ in sizes("out")] == [out // parts for _, out in sizes("q")]
        assert all(k == v and k[0] == q[0] for q, k, v in zip(sizes("q"), sizes("k"), sizes("v"), strict=True))
        assert [out for _, out in sizes("mlp_out")] == hidden
        assert {into for into, _ in sizes("mlp_in")} == set(hidden)


@pytest.mark.parametrize("name", LISTED)
def test_every_name_of_a_listed_model_is_there_fits_and_is_used(name):
    config, norms, head = LISTED[name]
    model = build(name, config)
    found = sites(model)
    missing = {"mobilenet_v1": [*WITHOUT_ATTENTION, "mlp_in"], "mobilenet_v2": WITHOUT_ATTENTION}
    assert found.source == model.config.model_type
    assert len(found.blocks) == {"mobilenet_v1": 26, "mobilenet_v2": 16, "swin": 3}.get(found.source, 2)
    check(model, found, norms, head, missing.get(found.source, []))


# family: blocks, the first one's mlp_in and mlp_out (of the model, where it is not a block's), norms, stem, head
CONVOLUTIONAL_SITES = {
    "MobileNetV1": (26, "", "layer.1.convolution", 27, "conv_stem", ["classifier"]),
    "MobileNetV2": (
        16, "layer.0.expand_1x1.convolution", "layer.0.reduce_1x1.convolution", 52, "conv_stem", ["classifier"]
    ),
    "MobileViT": (
        9, "encoder.layer.2.transformer.layer.0.intermediate.dense",
        "encoder.layer.2.transformer.layer.0.output.dense", 53, "conv_stem", ["classifier"],
    ),
    "MobileViTV2": (
        3, "encoder.layer.2.transformer.layer.0.ffn.conv1.convolution",
        "encoder.layer.2.transformer.layer.0.ffn.conv2.convolution", 34, "conv_stem", ["classifier"],
    ),
    "EfficientNet": (
        3, "encoder.blocks.1.expansion.expand_conv", "encoder.blocks.0.projection.project_conv", 10, "embeddings",
        ["classifier"],
    ),
    "Levit": (
        10, "encoder.stages.0.layers.1.module.linear_up.linear", "encoder.stages.0.layers.1.module.linear_down.linear",
        26, "patch_embeddings", ["classifier"],
    ),
    "SwiftFormer": (
        4, "encoder.network.0.blocks.0.linear.fc1", "encoder.network.0.blocks.0.linear.fc2", 14, "patch_embed",
        ["head", "dist_head"],
    ),
    "PoolFormer": (
        4, "encoder.block.0.0.output.conv1", "encoder.block.0.0.output.conv2", 9, "encoder.patch_embeddings.0",
        ["classifier"],
    ),
    "RegNet": (
        3, "encoder.stages.0.layers.0.layer.0.convolution", "encoder.stages.0.layers.0.layer.3.convolution", 12,
        "embedder", ["classifier"],
    ),
    "ResNet": (
        3, "encoder.stages.0.layers.0.layer.0.convolution", "encoder.stages.0.layers.0.layer.2.convolution", 11,
        "embedder", ["classifier"],
    ),
    "ConvNext": (
        3, "encoder.stages.0.layers.0.pwconv1", "encoder.stages.0.layers.0.pwconv2", 6, "embeddings", ["classifier"]
    ),
    "ConvNextV2": (
        3, "encoder.stages.0.layers.0.pwconv1", "encoder.stages.0.layers.0.pwconv2", 6, "embeddings", ["classifier"]
    ),
    "HGNetV2": (
        3, "encoder.stages.0.blocks.0.aggregation.0.convolution", "encoder.stages.0.blocks.0.aggregation.1.convolution",
        22, "embedder", ["fc"],
    ),
    "SqueezeNet": (2, "blocks.0.squeeze", "blocks.0.expand1x1", 0, "stem", ["classifier"]),
    "ShuffleNetV1": (
        3, "blocks.0.reduce_1x1.convolution", "blocks.0.expand_1x1.convolution", 10, "stem", ["classifier"]
    ),
    "ShuffleNetV2": (
        3, "blocks.0.first_1x1.convolution", "blocks.0.last_1x1.convolution", 15, "stem", ["classifier"]
    ),
    "Bit": (3, "encoder.stages.0.layers.0.conv1", "encoder.stages.0.layers.0.conv3", 10, "embedder", ["classifier"]),
}  # fmt: skip


@pytest.mark.parametrize("family", CONVOLUTIONAL_SITES)
def test_a_convolutional_network_has_blocks_norms_a_stem_and_a_head(family):
    """Every site is used by a forward, the blocks in order; a block's 1x1 pair goes in and out of its inner width."""
    count, mlp_in, mlp_out, norms, stem, head = CONVOLUTIONAL_SITES[family]
    model = build_network(family)
    found = sites(model)
    prefix = f"{model.base_model_prefix}." if family != "HGNetV2" else ""
    assert found.source == model.config.model_type and len(found.blocks) == count and len(found.norms) == norms
    assert found.mlp_in[:1] == ((prefix + mlp_in,) if mlp_in else ()) and found.mlp_out[0] == prefix + mlp_out
    assert found.embeddings == (prefix + stem,) and list(found.head) == head == head_modules(model)
    assert all(is_norm(model.get_submodule(name)) for name in found.norms)
    for name in (*found.mlp_in, *found.mlp_out):
        layer = model.get_submodule(name)
        assert is_linear(layer) or layer.kernel_size == (1, 1)
    inner = [model.get_submodule(name).weight.shape[1] for name in found.mlp_out]
    inner = [n * getattr(model.get_submodule(name), "groups", 1) for n, name in zip(inner, found.mlp_out, strict=True)]
    outer = [model.get_submodule(name).weight.shape[0] for name in found.mlp_in]
    assert not mlp_in or inner[-len(outer) :] == outer

    called = []
    named = {name for field in fields(found)[1:] for name in getattr(found, field.name)}
    for name in named:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(**draw_batch(family))
    assert set(called) == named
    assert [name for name in called if name in found.blocks] == list(found.blocks)


def test_a_norm_in_front_of_the_head_belongs_to_the_base(tmp_path):
    """It is loaded with the base, and no part of an adapter's head; weights of a bare backbone have none."""
    build_network("PoolFormer").poolformer.save_pretrained(tmp_path)
    model = load_base(tmp_path, labels=["a", "b"])
    assert sites(model).norms[-1] == "norm" and head_modules(model) == ["classifier"]
    adapted = METHODS["lora"].adapt(model, 2)
    assert not any("norm" in name for name, value in adapted.named_parameters() if value.requires_grad)
    adapted = METHODS["norm"].adapt(load_base(tmp_path, labels=["a", "b"]), 2)  # one of them around it
    assert sites(adapted.get_base_model()).norms[-1] == "norm"


def test_the_blocks_of_a_small_resnet_have_no_inner_width():
    config = hf.ResNetConfig(**CONVOLUTIONAL["ResNet"], layer_type="basic")
    found = sites(hf.ResNetForImageClassification(config))
    assert len(found.blocks) == 3 and found.mlp_in == found.mlp_out == ()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.narrow = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)


def test_a_convolutional_network_without_a_row_is_read_by_structure():
    """Blocks are the innermost elements of lists with a wide convolution and another layer, in stages or not."""
    stage = nn.Sequential(Residual(), Residual())
    squeeze = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))  # no wide convolution: no block
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    found = sites(Net(nn.Sequential(stem, stage, squeeze, Residual()), head=nn.Linear(8, 2)))
    assert found.source == "structure" and found.blocks == ("body.1.0", "body.1.1", "body.3")
    assert found.embeddings == ("body.0",) and found.head == ("head",)
    assert found.norms == ("body.0.1", "body.1.0.norm", "body.1.1.norm", "body.3.norm")
    assert found.mlp_in == found.mlp_out == found.q == ()


def test_the_table_is_tested_whole():
    listed = {getattr(hf, name).config_class.model_type for name in LISTED}
    listed |= {build_network(name).config.model_type for name in CONVOLUTIONAL}
    assert listed | {"sam2", "sam2_video", "sam2_vision_model"} == set(SITES)  # tests/tasks/masks/test_sam2.py
    assert set(CONVOLUTIONAL_SITES) == set(CONVOLUTIONAL)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_model_is_read_by_structure_and_that_is_said(name, caplog, monkeypatch):
    config, norms, head, missing = UNLISTED[name]
    model = build(name, config)
    monkeypatch.setattr("inlay.bases.sites._said", set())
    found = sites(model)
    assert found.source == "structure" and model.config.model_type not in SITES
    (line,) = caplog.messages
    assert line.startswith(f"{name} ({model.config.model_type}) by structure: {len(found.blocks)} block")
    assert f"out {found.out[0]}" in line and all(f"{field} not found" in line for field in missing)
    check(model, found, norms, head, missing)


def test_what_was_found_by_structure_is_seen_once_without_any_setting_of_logs(capsys, monkeypatch):
    name = next(iter(UNLISTED))
    monkeypatch.setattr("inlay.bases.sites._said", set())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own, which a user does not have
    for _ in range(2):
        sites(build(name, UNLISTED[name][0]))
    said = capsys.readouterr().err
    assert said.count("by structure") == said.count(name) == 1 and "the first of each: " in said


def names(blocks, *leaves):
    return tuple(f"{block}.{leaf}" for block in blocks for leaf in leaves)


EXPECTED = {
    "ViTForImageClassification": {
        "blocks": ("vit.layers.0", "vit.layers.1"), "attention": "attention", "around_attention": "attention",
        "around_mlp": "mlp", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
        "out": "attention.o_proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2", "embeddings": ("vit.embeddings",),
    },
    "SamModel": {
        "blocks": ("vision_encoder.layers.0", "vision_encoder.layers.1"), "attention": "attn",
        "around_attention": "attn", "around_mlp": "mlp", "q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv",
        "out": "attn.proj", "mlp_in": "mlp.lin1", "mlp_out": "mlp.lin2",
        "norms": (
            "vision_encoder.layers.0.layer_norm1", "vision_encoder.layers.0.layer_norm2",
            "vision_encoder.layers.1.layer_norm1", "vision_encoder.layers.1.layer_norm2",
            "vision_encoder.neck.layer_norm1", "vision_encoder.neck.layer_norm2",
        ),
        "embeddings": ("vision_encoder.patch_embed",),
    },
    "GPT2LMHeadModel": {
        "blocks": ("transformer.h.0", "transformer.h.1"), "attention": "attn", "around_attention": "attn",
        "around_mlp": "mlp", "q": "attn.c_attn", "k": "attn.c_attn", "v": "attn.c_attn", "out": "attn.c_proj",
        "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj", "embeddings": ("transformer.wte", "transformer.wpe"),
        "norms": (
            "transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.h.1.ln_1", "transformer.h.1.ln_2",
            "transformer.ln_f",
        ),
    },
    "BertForSequenceClassification": {
        "blocks": ("bert.encoder.layer.0", "bert.encoder.layer.1"), "attention": "attention.self",
        "around_attention": "attention.output", "around_mlp": "output", "q": "attention.self.query",
        "k": "attention.self.key", "v": "attention.self.value", "out": "attention.output.dense",
        "mlp_in": "intermediate.dense", "mlp_out": "output.dense", "embeddings": ("bert.embeddings",),
    },
    "LlamaForCausalLM": {
        "blocks": ("model.layers.0", "model.layers.1"), "attention": "self_attn", "around_attention": "self_attn",
        "around_mlp": "mlp", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "out": "self_attn.o_proj", "mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": "mlp.down_proj",
        "embeddings": ("model.embed_tokens",),
    },
    "MobileNetV2ForImageClassification": {
        "blocks": tuple(f"mobilenet_v2.layer.{i}" for i in range(16)), "mlp_in": "expand_1x1.convolution",
        "mlp_out": "reduce_1x1.convolution", "q": (), "attention": (), "embeddings": ("mobilenet_v2.conv_stem",),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_names_are_these(name):
    found = sites(build(name, LISTED[name][0]))
    for field, expected in EXPECTED[name].items():
        if field not in ("blocks", "norms", "embeddings"):
            leaves = (expected,) if isinstance(expected, str) else expected
            expected = names(EXPECTED[name]["blocks"], *leaves)
        assert getattr(found, field) == expected
    assert found.fused == (name in ("SamModel", "GPT2LMHeadModel"))


def test_mobilenet_v1_gives_its_pointwise_convolutions():
    found = sites(build("MobileNetV1ForImageClassification", MOBILE_V1))
    assert found.mlp_out == tuple(f"mobilenet_v1.layer.{i}.convolution" for i in range(1, 26, 2))


PRE_NORM = [
    "ViTModel", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification", "CLIPVisionModel", "SamModel",
    "SwinForImageClassification", "GPT2LMHeadModel", "LlamaForCausalLM", "BeitForImageClassification",
    "Phi3ForCausalLM", "GPTNeoXForCausalLM", "T5EncoderModel",
]  # fmt: skip


@pytest.mark.parametrize("name", PRE_NORM)
def test_what_is_added_around_attention_and_mlp_reaches_the_residual(name):
    """The last block's output moves by just that, when the MLP's own output, which depends on it, is zeroed."""
    model = build(name, {**LISTED, **UNLISTED}[name][0])
    found, delta = sites(model), torch.randn(32)

    def change(add, keep):
        def hook(module, inputs, output):
            first, *others = output if isinstance(output, tuple) else (output,)
            new = keep * first + add
            return (new, *others) if others else new

        return hook

    def output(add):
        torch.manual_seed(1)
        block, seen = model.get_submodule(found.blocks[-1]), []
        hooks = [
            model.get_submodule(found.around_attention[-1]).register_forward_hook(change(add, 1)),
            model.get_submodule(found.around_mlp[-1]).register_forward_hook(change(2 * add, 0)),
            block.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)),
        ]
        with torch.no_grad():
            forward(model)
        for hook in hooks:
            hook.remove()
        return seen[0]

    scale = 0.1 if name.startswith("Beit") else 1  # BEiT multiplies both by a learned layer scale
    torch.testing.assert_close(output(delta), output(0 * delta) + 3 * scale * delta)


@pytest.mark.parametrize("name", ["BertModel", "RobertaForTokenClassification", "ElectraForSequenceClassification"])
def test_bert_adds_the_second_input_of_the_module_around_to_the_residual(name):
    model = build(name, {**LISTED, **UNLISTED}[name][0])
    found = sites(model)
    for place in (*found.around_attention, *found.around_mlp):
        module, seen = model.get_submodule(place), []
        hook = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append((i, o)))
        with torch.no_grad():
            forward(model)
        hook.remove()
        (hidden_states, input_tensor), output = seen[0]
        torch.testing.assert_close(output, module.LayerNorm(module.dense(hidden_states) + input_tensor))


def test_adapters_that_are_already_in_are_looked_through():
    model = build("ViTForImageClassification", VIT)
    before = sites(model)
    method = LoraConfig(r=2, target_modules=["q_proj", "fc2"], modules_to_save=["classifier", "layernorm"])
    assert sites(get_peft_model(model, method).get_base_model()) == before


def test_a_listed_model_with_other_names_is_read_by_structure():
    """Other versions of transformers name modules otherwise; the row is then of no use, but not an error."""
    model = build("ViTModel", VIT)
    for layer in model.layers:
        layer.attention.query, layer.attention.key = layer.attention.q_proj, layer.attention.k_proj
        layer.attention.value = layer.attention.v_proj
        del layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj
    found = sites(model)
    assert found.source == "structure" and found.q == ("layers.0.attention.query", "layers.1.attention.query")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Encoder(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.side = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(8)


def test_a_hand_written_module_with_an_mlp_as_wide_as_its_input():
    found = sites(Encoder(Block(), Block()))
    blocks = ("blocks.0", "blocks.1")
    assert found == Sites(
        source="structure",
        blocks=blocks,
        attention=names(blocks, "attn"),
        around_attention=names(blocks, "attn"),
        around_mlp=names(blocks, "mlp"),
        q=names(blocks, "attn.qkv"),
        k=names(blocks, "attn.qkv"),
        v=names(blocks, "attn.qkv"),
        out=names(blocks, "attn.proj"),
        mlp_in=names(blocks, "mlp.0"),
        mlp_out=names(blocks, "mlp.2"),
        norms=(*names(blocks, "norm1", "norm2"), "norm"),
        embeddings=("patch_embed",),
        head=(),
    )
    assert found.fused
    inside = sites(Net(Encoder(Block()), head=nn.Linear(8, 2)))
    assert inside.blocks == ("body.blocks.0",) and inside.head == ("head",) and inside.norms[-1] == "body.norm"


@pytest.mark.parametrize(
    "model, children",
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential (no model_type) has no single stack"),
        (lambda: nn.Linear(2, 2), "its children are none. "),
        (lambda: Encoder(Block(), Block(nn.Identity)), "its children are patch_embed, side, blocks, norm. "),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)), "its children are 0, 1. "),
        (lambda: build("T5Model", T5), "its children are shared, encoder, decoder. "),
    ],
)
def test_where_there_is_no_stack_of_attention_blocks_that_is_said(model, children):
    with pytest.raises(
        InlayError, match=r"has no single stack of equal blocks with query.* Give target_modules by"
    ) as e:
        sites(model())
    assert children in str(e.value)


_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
REACHED = {
    "gemma3": {
        "text_config": _TEXT,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61,
    },
    "mamba": {"state_size": 4, **_SIZE},
    "falcon_mamba": {"state_size": 4, **_SIZE},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, **_SIZE},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        **_SIZE, **_ATTENTION,
    },
    "nemotron_h": {
        "vocab_size": 64, "hidden_size": 32, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 1, **_ATTENTION,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False,
        "mamba_d_state": 4, "mamba_dt_rank": 4, **_SIZE, **_ATTENTION,
    },
    "bamba": {"attn_layer_indices": [1], **_MAMBA2, **_SIZE, **_ATTENTION},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
        **_MAMBA2, **_SIZE, **_ATTENTION,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], **_SIZE, **_ATTENTION},
    "recurrent_gemma": {
        "lru_width": 32, "head_dim": 8, "attention_window_size": 8, "vocab_size": 64, "hidden_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REACHED)
def test_lora_gets_a_gradient_wherever_it_is_put_by_default(kind):
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **REACHED[kind]))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=lora_targets(base), task_type="CAUSAL_LM"))
    ids = torch.arange(3, 19)[None]
    more = {"token_type_ids": torch.zeros_like(ids)} if kind == "gemma3" else {}
    model.train()(input_ids=ids, labels=ids, **more).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())


def test_the_sites_of_a_model_that_sees_are_those_of_its_text():
    base = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model("gemma3", **REACHED["gemma3"]))
    found = sites(base)
    assert found.blocks == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert found.head == ("lm_head",)
    assert all(name.startswith("model.language_model.") for name in lora_targets(base, "attention"))
