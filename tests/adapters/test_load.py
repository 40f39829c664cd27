"""Loading on the base that is given, merging, and adapters that inlay has not written."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from inlay.adapters.file import CONFIG, read_adapter
from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.errors import InlayError
from inlay.tasks.base import load_base

LABELS = ["cat", "dog", "emu", "fox", "gnu"]


# the base


def test_on_a_base_that_was_loaded_for_other_labels(original, outputs):
    base = load_base("builtin:vit-tiny", labels=["yes", "no"])
    loaded = load_adapter(original[1], base=base)
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]))
    assert loaded.labels == LABELS and base.config.num_labels == base.num_labels == 5
    assert base.config.label2id == {label: i for i, label in enumerate(LABELS)}


def test_on_a_base_with_as_many_other_labels(original, outputs):
    base = load_base("builtin:vit-tiny", labels=["a", "b", "c", "d", "e"])
    loaded = load_adapter(original[1], base=base)
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]))
    assert loaded.labels == LABELS == list(base.config.id2label.values())


def test_on_a_base_given_by_name_or_folder(original, outputs, tmp_path):
    load_base("builtin:vit-tiny").save_pretrained(tmp_path / "copy")
    for base in ("builtin:vit-tiny", tmp_path / "copy", str(tmp_path / "copy")):
        torch.testing.assert_close(outputs(load_adapter(original[1], base=base).model), outputs(original[0]))


def test_the_loss_knows_the_new_number_of_labels(original, pixels):
    base = load_base("builtin:vit-tiny", labels=["yes", "no"])
    model = load_adapter(original[1], base=base).model
    assert model(pixel_values=pixels, labels=torch.tensor([3, 4])).loss.isfinite()


def test_a_base_that_carries_an_adapter_is_refused_and_stays_as_it_was(original, outputs):
    base = load_base("builtin:vit-tiny", labels=LABELS)
    first = load_adapter(original[1], base=base)
    before = outputs(first.model)
    for given in (
        base,
        get_peft_model(load_base("builtin:vit-tiny"), LoraConfig(target_modules=["fc1"])).base_model.model,
    ):
        with pytest.raises(InlayError, match="this base carries an adapter already; give another copy"):
            load_adapter(original[1], base=given)
    torch.testing.assert_close(outputs(first.model), before, rtol=0, atol=0)
    with pytest.raises(InlayError, match="base must be a name or a model of transformers, got PeftModel"):
        load_adapter(original[1], base=first.model)


def test_a_base_on_which_an_adapter_failed_can_take_the_right_one(original, zoo, rewrite, outputs):
    base = load_base("builtin:vit-tiny", labels=["yes", "no"])
    head, keys = base.classifier, set(base.state_dict())
    rewrite(zoo, config=lambda config: config.update(lora_alpha=80))
    with pytest.raises(InlayError, match="its output differs"):
        load_adapter(zoo, base=base)
    assert base.classifier is head and set(base.state_dict()) == keys and base.config.num_labels == 2
    torch.testing.assert_close(outputs(load_adapter(original[1], base=base).model), outputs(original[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_hidden_layers": 5},
            r"trained on builtin:vit-tiny \(blocks 4\), but this base has 5. Load it on the base",
        ),
        ({"hidden_size": 48}, r"trained on builtin:vit-tiny \(width 96\), but this base has 48. Load it on the base"),
        ({"intermediate_size": 100}, r"\([0-9,]+ parameters\), but this base has [0-9,]+. Load it"),
        ({"patch_size": 8}, r"\([0-9,]+ parameters\), but this base has"),
        (
            {"initializer_range": 0.3},
            r"this base has other weights of the same shape \(sketches [12]\.\d+ apart, 0.005",
        ),
    ],
)
def test_another_base(settings, message, original):
    config = copy.deepcopy(load_base("builtin:vit-tiny").config)
    config.update(settings)
    torch.manual_seed(1)
    with pytest.raises(InlayError, match=message):
        load_adapter(original[1], base=ViTForImageClassification(config))


def test_another_kind_of_model(original):
    from transformers import ResNetConfig, ResNetForImageClassification

    other = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(InlayError, match=r"\(model type vit\), but this base has resnet"):
        load_adapter(original[1], base=other)


def test_the_named_base_is_gone(zoo, rewrite):
    rewrite(zoo, record=lambda record: record["base"].update(name="/somewhere/else"))
    with pytest.raises(InlayError, match="no model folder at '/somewhere/else'"):
        load_adapter(zoo)
    assert load_adapter(zoo, base="builtin:vit-tiny").verified


# merging


def test_merging_keeps_the_outputs(original, outputs):
    loaded = load_adapter(original[1])
    assert loaded.merge() is loaded
    assert type(loaded.model) is ViTForImageClassification
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=1e-5)
    assert not any("lora" in key or "modules_to_save" in key for key in loaded.model.state_dict())
    with pytest.raises(InlayError, match="merged already"):
        loaded.merge()


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"quantize": "8bit"}, "int8"),
        ({"quantize": "4bit"}, "nf4"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_merging_into_a_coarse_base_is_refused(form, kind, original):
    if "quantize" in form:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(InlayError, match=f"merging into {kind} weights would round the adapter away; load the base in"):
        load_adapter(original[1], **form).merge()


# adapters of plain peft


PLAIN = pytest.mark.filterwarnings("ignore:Could not find a config file in builtin")  # peft knows no builtin:


@PLAIN
def test_an_adapter_of_plain_peft_is_loaded_but_not_verified(make, outputs, tmp_path, five):
    model = make()
    model.save_pretrained(tmp_path / "plain")
    loaded = load_adapter(tmp_path / "plain", base=five)
    assert not loaded.verified and loaded.deviation is None and loaded.file.record == {}
    assert loaded.labels == LABELS  # of the base
    torch.testing.assert_close(outputs(loaded.model), outputs(model))
    assert read_adapter(tmp_path / "plain").base_name == "builtin:vit-tiny"
    with pytest.raises(InlayError, match=r"classifier.bias should be \(\d+,\), the file has \(5,\).* labels=\.\.\."):
        load_adapter(tmp_path / "plain")


@PLAIN
def test_an_adapter_of_plain_peft_without_a_head_or_a_base(make, outputs, tmp_path):
    model = make(labels=None, modules_to_save=None)
    model.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(load_adapter(tmp_path / "plain").model), outputs(model))
    path = tmp_path / "plain" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(InlayError, match="adapter 'plain' names no base; give base="):
        load_adapter(tmp_path / "plain")
    assert load_adapter(tmp_path / "plain", base="builtin:vit-tiny").labels == list(model.config.id2label.values())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}, {"r": 1}])
def test_the_variants_of_lora_load_equal(settings, make, outputs, processor, tmp_path):
    model = make(**settings)
    loaded = load_adapter(save_adapter(model, tmp_path / "zoo", processor=processor))
    torch.testing.assert_close(outputs(loaded.model), outputs(model))
    torch.testing.assert_close(outputs(loaded.merge().model), outputs(model), rtol=0, atol=1e-5)


def test_a_small_head_behind_a_norm_is_replaced_alone(tmp_path, processor, make, outputs):
    """A head may be more than one layer: only the one that gives the logits depends on the labels."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    base = ViTForImageClassification(config)
    base.classifier = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    five = copy.deepcopy(base)
    five.classifier[2] = torch.nn.Linear(8, 5)
    five.config.id2label = dict(enumerate(LABELS))
    model = make(five)
    loaded = load_adapter(save_adapter(model, tmp_path / "zoo", processor=processor), base=base)
    torch.testing.assert_close(outputs(loaded.model), outputs(model))
