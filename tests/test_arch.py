"""Adapters attach, train and come back on every family of image classifiers, found by structure alone."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from inlay.arch import head_modules, lora_targets
from inlay.errors import InlayError
from inlay.models import load_base, load_processor
from inlay.store.golden import picture
from inlay.store.load import load_adapter
from inlay.store.save import save_adapter

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
    "ConvNext": ({"image_size": 32, **STAGES}, {"pwconv1", "pwconv2"}, 8, 8, ["classifier"]),
    "ResNet": ({"embedding_size": 8, **STAGES}, {"convolution"}, 11, 11, ["classifier"]),
    "MobileNetV1": ({"image_size": 32, "depth_multiplier": 0.25}, {"convolution"}, 13, 13, ["classifier"]),
    "MobileNetV2": ({"image_size": 32, "depth_multiplier": 0.35}, {"convolution"}, 34, 34, ["classifier"]),
    "PoolFormer": ({**STAGES, "num_channels": 3}, {"conv1", "conv2"}, 8, 8, ["norm", "classifier"]),
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


def test_grouped_and_wide_convolutions_and_the_head_are_left_alone():
    body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    model = Net(body, head=nn.Linear(8, 2), drop=nn.Dropout())
    assert lora_targets(model) == lora_targets(model, "attention") == ["body.0", "body.3"]
    assert head_modules(model) == ["head"]


def test_what_cannot_be_told_is_said():
    with pytest.raises(InlayError, match=r"expected a backbone and a task head in Linear, found the children none"):
        head_modules(nn.Linear(2, 2))
    with pytest.raises(InlayError, match=r"found the children 0, 1; name the head by modules_to_save yourself"):
        head_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(InlayError, match=r"no linear layer or 1x1 convolution in Net; give target_modules"):
        lora_targets(Net(nn.Conv2d(3, 3, 3), head=nn.Linear(3, 2)))
    with pytest.raises(InlayError, match=r"sites must be all or attention, got 'qv'"):
        lora_targets(Net(nn.Linear(3, 3), head=nn.Linear(3, 2)), "qv")
