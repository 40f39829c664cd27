"""What save_adapter accepts, load_adapter loads; a base that is not as it was loaded is refused before that."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from inlay import (
    METHODS,
    PartialConfig,
    TextProcessor,
    load_adapter,
    load_base,
    load_processor,
    load_tokenizer,
    save_adapter,
)
from inlay.bases.load import resolve_base
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.tasks.sequences.processor import SequenceProcessor
from inlay.train.evaluation import set_train_mode

TEXT, VIEW = resolve_base("builtin:gpt2-tiny"), resolve_base("builtin:vit-tiny")
HEADS = {
    "GPT2ForTokenClassification": "TOKEN_CLS",
    "GPT2ForQuestionAnswering": "QUESTION_ANS",
    "GPT2ForSequenceClassification": "SEQ_CLS",
    "ViTForMaskedImageModeling": None,
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def processor_of(base):
    return load_processor("builtin:vit-tiny") if base == VIEW else TextProcessor(load_tokenizer("builtin:gpt2-tiny"))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_another_task_is_refused(name, tmp_path):
    base = VIEW if name.startswith("ViT") else TEXT
    model = getattr(transformers, name).from_pretrained(base)
    target = "q_proj" if base == VIEW else "c_attn"
    model = get_peft_model(model, LoraConfig(target_modules=[target], task_type=HEADS[name]))
    with pytest.raises(Unsupported, match=f"a {name} is not what inlay loads for"):
        save_adapter(model, tmp_path / "a", processor=processor_of(base))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("labels", [2, 5])
def test_a_classifier_of_texts_with_its_own_processor_loads(labels, tmp_path):
    """Its labels are LABEL_0, LABEL_1, as those of a base that has no head."""
    kind = transformers.GPT2ForSequenceClassification
    model = kind.from_pretrained(TEXT, num_labels=labels, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], task_type="SEQ_CLS"))
    processor = SequenceProcessor(load_tokenizer("builtin:gpt2-tiny"))
    loaded = load_adapter(save_adapter(model, tmp_path / "a", processor=processor))
    assert loaded.deviation < 1e-4 and len(loaded.labels) == labels


@pytest.mark.parametrize("settings", [{"num_labels": 2}, {"num_labels": 5}])
def test_a_head_that_is_no_part_of_the_adapter_is_refused(settings, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(VIEW, ignore_mismatched_sizes=True, **settings)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(BadInput, match=r"the head is not that of .* train it: modules_to_save=\['classifier'\]"):
        save_adapter(model, tmp_path / "a", processor=processor_of(VIEW))


def test_a_base_s_own_head_loads(tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(VIEW, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert load_adapter(save_adapter(model, tmp_path / "a", processor=processor_of(VIEW))).deviation < 1e-4


def take_steps(model, set_mode):
    set_mode(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        pixels = torch.randn(4, 3, 32, 32, generator=generator)
        model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    return model.eval()


def test_statistics_that_moved_are_refused(resnet, tmp_path):
    """On a base that transformers loaded, in a loop that only calls model.train()."""
    load, settings = ResNetForImageClassification.from_pretrained, LoraConfig(target_modules=["convolution"])
    settings.modules_to_save = ["classifier"]
    moved = take_steps(get_peft_model(load(resnet), settings), torch.nn.Module.train)
    with pytest.raises(BadInput, match=r"of \d+ BatchNorm layers moved .*freeze_statistics.*merge_and_unload"):
        save_adapter(moved, tmp_path / "a", processor=load_processor(resnet))
    assert not (tmp_path / "a").exists()
    still = take_steps(get_peft_model(load(resnet), settings), set_train_mode)
    assert load_adapter(save_adapter(still, tmp_path / "a", processor=load_processor(resnet))).deviation < 1e-4


@pytest.mark.parametrize(
    "adapt",
    [
        lambda folder: get_peft_model(load_base(folder), LoraConfig(target_modules=["convolution"])),
        lambda folder: METHODS["lora"].adapt(ResNetForImageClassification.from_pretrained(folder), 2),
        lambda folder: get_peft_model(ResNetForImageClassification.from_pretrained(folder), PartialConfig(last=1)),
        lambda folder: METHODS["full"].adapt(ResNetForImageClassification.from_pretrained(folder), 2),
    ],
    ids=["load_base", "METHODS", "a method of inlay", "full fine-tuning"],
)
def test_batch_norms_keep_their_statistics_in_any_loop(adapt, resnet, tmp_path):
    """A plain loop calls model.train(): the statistics stay, and the adapter loads as what was trained."""
    stored = ResNetForImageClassification.from_pretrained(resnet)
    model = take_steps(adapt(resnet), torch.nn.Module.train)
    found = {name: value for name, value in model.named_buffers() if "running" in name}
    assert found and all(
        torch.equal(value, stored.get_buffer(name.replace("base_model.model.", "").replace("base_layer.", "")))
        for name, value in found.items()
    )
    if isinstance(model, PeftModel):
        folder = save_adapter(model, tmp_path / "a", processor=load_processor(resnet))
        assert load_adapter(folder).deviation < 1e-6
        said = (folder / "README.md").read_text()
        assert f"Its {len(found) // 2} batch norms keep the base's running statistics" in said


def test_parameters_that_were_trained_outside_the_adapter_are_refused(tmp_path):
    model = get_peft_model(load_base("builtin:vit-tiny"), LoraConfig(target_modules=["q_proj"]))
    model.get_base_model().vit.layernorm.requires_grad_(True)
    with pytest.raises(BadInput, match=r"2 parameters of the base are trained .*\(vit\.layernorm\.weight\)"):
        save_adapter(model, tmp_path / "a", processor=processor_of(VIEW))


def test_biases_in_the_adapter_are_a_part_of_it(tmp_path):
    model = get_peft_model(load_base("builtin:vit-tiny"), LoraConfig(target_modules=["q_proj"], bias="all"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter += 0.1
    assert load_adapter(save_adapter(model, tmp_path / "a", processor=processor_of(VIEW))).deviation < 1e-4


def test_a_setting_without_effect_on_a_given_base_is_refused(tmp_path):
    model = get_peft_model(load_base("builtin:vit-tiny"), LoraConfig(target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path / "a", processor=processor_of(VIEW))
    for setting in ({"quantize": "8bit"}, {"dtype": "bfloat16"}):
        with pytest.raises(InlayError, match="has no effect on a base that is a model already"):
            load_adapter(folder, load_base("builtin:vit-tiny"), **setting)
