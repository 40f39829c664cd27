"""Bases by name: what is loaded, what is refused, and that it is done quietly. Processors have test_processors.py."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from inlay.bases.load import list_builtin_bases, resolve_base
from inlay.bases.processors import load_processor
from inlay.bases.quantize import find_stored_form
from inlay.errors import InlayError
from inlay.measure.footprint import describe_quantized
from inlay.tasks.base import load_base, load_skeleton, read_task

LABELS = ["cat", "dog", "emu", "fox", "gnu"]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a random ViT of five classes: not to be changed."""
    torch.manual_seed(0)
    config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: i for i, label in enumerate(LABELS)}
    folder = tmp_path_factory.mktemp("small") / "vit"
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(small, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "vit"))


def edit(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(message, name, load=load_base, **options):
    with pytest.raises(InlayError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# what is loaded


def test_an_embedded_base_is_frozen_and_in_eval_mode():
    base = load_base("builtin:vit-tiny")
    assert "builtin:vit-tiny" in list_builtin_bases() and base.config.model_type == "vit"
    assert not base.training and not any(module.training for module in base.modules())
    assert not any(value.requires_grad for value in base.parameters())
    assert base.name_or_path == base.config._name_or_path == "builtin:vit-tiny"
    assert {value.dtype for value in base.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_local_folder(kind, small):
    base = load_base(kind(small))
    assert base.name_or_path == str(small) and not base.new_head
    stored = load_file(small / "model.safetensors")
    assert torch.equal(base.classifier.weight, stored["classifier.weight"])
    assert sum(value.double().sum() for value in base.state_dict().values()) == pytest.approx(
        float(sum(value.double().sum() for value in stored.values()))
    )


def test_without_labels_or_with_its_own_the_head_is_kept(small):
    stored = load_file(small / "model.safetensors")["classifier.weight"]
    for labels in (None, LABELS, tuple(LABELS)):
        base = load_base(small, labels=labels)
        assert torch.equal(base.classifier.weight, stored) and list(base.config.id2label.values()) == LABELS
        assert not base.new_head


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["a", "b", "c", "d", "e"], LABELS[::-1]])
def test_other_labels_give_a_new_head(labels, small):
    """Also where there are as many: the old head under new names would be silently wrong."""
    stored = load_file(small / "model.safetensors")
    torch.manual_seed(1)
    base = load_base(small, labels=labels)
    head = base.classifier
    assert head.weight.shape == (len(labels), 64) and base.new_head
    assert not torch.equal(head.weight[:3], stored["classifier.weight"][:3])
    assert 0.01 < head.weight.std() < 0.03 and not head.bias.any()
    assert base.config.label2id == {label: i for i, label in enumerate(labels)}
    assert base.config.num_labels == base.num_labels == len(labels)
    torch.testing.assert_close(base.vit.state_dict(), load_base(small).vit.state_dict(), rtol=0, atol=0)
    torch.manual_seed(1)
    assert torch.equal(load_base(small, labels=labels).classifier.weight, head.weight)


@pytest.mark.parametrize("labels", ["cats", [], ["one"], ["a", "a"]])
def test_labels_that_are_none(labels, small):
    refused(r"labels must be a list of two or more different names, got", small, labels=labels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, small):
    base = load_base(small, dtype=dtype, labels=["a", "b"])
    assert {value.dtype for value in base.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("quantize", "kind"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_quantised_outside_the_head(quantize, kind, small):
    pytest.importorskip("bitsandbytes")
    base = load_base(small, quantize=quantize, labels=["a", "b"])
    kinds = {
        name: type(module).__name__ for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert kinds.pop("classifier") == "Linear" and set(kinds.values()) == {kind} and len(kinds) == 12
    assert base.classifier.weight.dtype == torch.float32 and base.new_head
    assert not any(value.requires_grad for value in base.parameters())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = load_base(small)
    with torch.no_grad():
        expected, found = (m.vit(pixel_values=pixels).last_hidden_state for m in (whole, base))
    assert (found - expected).norm() / expected.norm() < {"8bit": 0.02, "4bit": 0.2}[quantize]


def test_4_bits_leave_layers_whole_that_bitsandbytes_would_spoil():
    pytest.importorskip("bitsandbytes")
    base = load_base("builtin:vit-tiny", quantize="4bit")
    kinds = {
        module.in_features: type(module).__name__
        for _, module in base.vit.named_modules()
        if hasattr(module, "in_features")
    }
    assert kinds == {96: "Linear", 384: "Linear4bit"}


def test_training_after_an_evaluation_of_a_4_bit_base(small):
    """On a CPU with AVX512-BF16 bitsandbytes would repack the weights at the first evaluation, without a gradient."""
    pytest.importorskip("bitsandbytes")
    base = load_base(small, quantize="4bit")
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        first = base(pixel_values=pixels.detach()).logits
    base.train()
    second = base(pixel_values=pixels).logits
    second.sum().backward()
    torch.testing.assert_close(second.detach(), first)
    assert pixels.grad.abs().sum() > 0


# what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:nothing", r"unknown embedded model 'builtin:nothing'; choose one of .*builtin:vit-tiny"),
        ("builtin:../models", r"unknown embedded model"),
        (
            "./nowhere",
            r"no model folder at './nowhere'; give a folder, a Hub id .* or one of .*builtin:vit-tiny",
        ),
        ("/nowhere/at/all", r"no model folder at"),
        ("a/b/c", r"no model folder at"),
        ("", r"no model folder at ''"),
        (__file__, r"no model folder at"),
        (
            "someone/something",
            r"someone/something is not in the cache and the Hub cannot be reached; check the network",
        ),
        ("bert", r"bert is not in the cache and the Hub cannot be reached"),
        ("what a name", r"what a name (could not be loaded|is not in the cache)|no model 'what a name'"),
    ],
)
def test_a_name_that_leads_nowhere(name, message):
    refused(message, name)
    refused(message, name, load_processor)


def test_a_folder_without_a_model(tmp_path):
    refused(r"has neither config.json nor model_index.json, so it is no model", tmp_path)
    assert resolve_base("someone/something") == "someone/something"


def test_a_language_model(tmp_path):
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert type(base) is GPT2LMHeadModel and not base.training and not base.new_head
    assert not any(p.requires_grad for p in base.parameters())
    assert base.lm_head.weight is base.transformer.wte.weight
    refused(r"is a language model, which has no classes; leave labels out", tmp_path, labels=["a", "b"])


@pytest.mark.parametrize(("quantize", "share"), [("8bit", 0.26), ("4bit", 0.14)])
def test_a_quantised_language_model(quantize, share, tmp_path):
    """GPT-2's Conv1D become layers of bitsandbytes; embeddings, norms and the tied head stay whole."""
    pytest.importorskip("bitsandbytes")
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    whole, base = load_base(tmp_path), load_base(tmp_path, quantize=quantize)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected, found = whole(input_ids=ids).logits, base(input_ids=ids).logits
    assert (found - expected).norm() / expected.norm() < {"8bit": 0.02, "4bit": 0.2}[quantize]
    said = describe_quantized(base)
    assert said.startswith("8 linear layers (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj) hold 393,216 weights")
    assert f", {share} of float32" in said and "transformer.wte" in said and "ln_1" in said


def test_a_model_that_reads_both_ways_is_no_language_model(tmp_path):
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    assert read_task(tmp_path).name == "text-classification"
    refused(r"'bert.pooler.dense.bias' first. Give the labels of your task for a new head", tmp_path)
    refused(r"\(bert\) cannot be loaded for text-generation", tmp_path, task="text-generation")


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(r"has no model.safetensors, and inlay reads neither pickled weights nor exported graphs", folder)


@pytest.mark.parametrize("length", [0, 5, 100, 20_000])
def test_truncated_weights(length, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(r"the weights of .* are not a whole safetensors file \(.*\); download it again", folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 32}, r"do not fit its config: \d+ tensors are missing or of another shape"),
        ({"intermediate_size": 64}, r"6 tensors are missing or of another shape, 'vit.layers.0.mlp.fc1.bias' first"),
        ({"num_hidden_layers": 3}, r"16 tensors are missing or of another shape, 'vit.layers.2"),
        ({"num_hidden_layers": 1}, r"do not fit its config: it has no place for 'vit.layers.1"),
        ({"image_size": 64}, r"1 tensors are missing or of another shape, 'vit.embeddings.position_embeddings'"),
        ({"id2label": {"0": "a", "1": "b"}}, r"'classifier.bias' first. Give the labels of your task for a new head"),
        ({"hidden_size": "wide"}, r"could not be loaded"),
        ({"num_attention_heads": 3}, r"do not fit its config: 14 tensors|could not be loaded"),
        ({"model_type": "unheard-of"}, r"could not be loaded"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(settings, message, folder):
    edit(folder / "config.json", **settings)
    refused(message, folder)
    if "id2label" in settings:
        assert load_base(folder, labels=["x", "y", "z"]).config.num_labels == 3
    else:
        refused(message.replace("6 tensors", r"\d+ tensors"), folder, labels=["x", "y", "z"])


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    refused(r"could not be loaded", folder)


def test_a_backbone_without_a_head(folder):
    path = folder / "model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if "classifier" not in key}
    save_file(weights, path, {"format": "pt"})
    refused(r"2 tensors are missing .* Give the labels of your task for a new head", folder)
    assert load_base(folder, labels=["x", "y"]).new_head


def test_code_in_a_repository_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    edit(folder / "config.json", auto_map=auto, model_type="unheard-of")
    refused(r"needs code from its repository, which inlay never runs", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.Processor"}}))
    refused(r"preprocessor_config.json of .* cannot be used|needs code", folder, load_processor)


def test_bits_that_do_nothing_or_do_not_exist(tmp_path, small, monkeypatch):
    pytest.importorskip("bitsandbytes")
    MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35)).save_pretrained(tmp_path)
    refused(r"has no linear layer outside its head that 8 bits can hold; leave quantize out", tmp_path, quantize="8bit")
    refused(r"quantize must be '8bit' or '4bit', got '3bit'", small, quantize="3bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(r"a 4-bit base needs bitsandbytes: pip install 'inlay\[quantize\]'", small, quantize="4bit")


def test_what_load_base_silences_speaks_again_afterwards(small, folder):
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    before = [logger.level for logger in loggers]
    load_base(small)
    edit(folder / "config.json", hidden_size=32)
    refused("do not fit its config", folder)
    assert [logger.level for logger in loggers] == before and transformers_logging.is_progress_bar_enabled()


OLD_BUFFERS = {
    "gpt2": ["transformer.h.0.attn.masked_bias", "transformer.h.0.attn.bias"],
    "gpt_neo": ["transformer.h.0.attn.attention.masked_bias", "transformer.h.0.attn.attention.bias"],
    "gptj": ["transformer.h.0.attn.masked_bias", "transformer.h.0.attn.bias", "transformer.h.0.attn.embed_positions"],
    "codegen": ["transformer.h.0.attn.causal_mask"],
    "swinv2": [
        f"swinv2.encoder.layers.0.blocks.0.attention.self.{name}"
        for name in ("relative_coords_table", "relative_position_index")
    ],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
}
_HEADS_2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
OLD_CONFIGS = {
    "gpt2": _HEADS_2,
    "gpt_neo": {
        "hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
        "max_position_embeddings": 8,
    },
    "gptj": {**_HEADS_2, "rotary_dim": 4},
    "codegen": {**_HEADS_2, "n_head": 4, "rotary_dim": 4},
    "swinv2": {"image_size": 16, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4},
    "llama": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def make_checkpoint(folder, kind, more):
    """A tiny base whose file holds `more`, and what transformers makes of it."""
    torch.manual_seed(0)
    ends = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2} if kind != "swinv2" else {}
    config = transformers.AutoConfig.for_model(kind, **OLD_CONFIGS[kind], **ends)
    loader = transformers.AutoModelForImageClassification if kind == "swinv2" else transformers.AutoModelForCausalLM
    loader.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **more}, folder / "model.safetensors", {"format": "pt"})
    return loader.from_pretrained(folder)


@pytest.mark.parametrize("kind", OLD_BUFFERS)
def test_buffers_of_older_checkpoints_are_no_weights(kind, tmp_path):
    right = make_checkpoint(tmp_path, kind, {key: torch.ones(1, 1, 8, 8) for key in OLD_BUFFERS[kind]})
    for name, parameter in load_base(tmp_path).named_parameters():
        assert torch.equal(parameter, right.get_parameter(name)), name


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.0.attn.q_norm.weight"),
        ("gpt2", "transformer.h.1.ln_1.bias"),
        ("swinv2", "swinv2.encoder.layers.0.blocks.0.layer_scale"),
    ],
)
def test_weights_without_a_place_are_refused(kind, key, tmp_path):
    make_checkpoint(tmp_path, kind, {key: torch.ones(16)})
    refused(r"it has no place for '" + key.replace(".", r"\."), tmp_path)


@pytest.mark.parametrize("stored", ["8bit", "4bit"])
def test_weights_that_are_stored_in_other_bits_than_asked_for(stored, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    load_base(tmp_path / "whole", quantize=stored).save_pretrained(tmp_path / "few")
    other = {"8bit": "4bit", "4bit": "8bit"}[stored]
    message = f"are stored in {stored} already, so quantize='{other}' would have no effect"
    refused(message, tmp_path / "few", quantize=other)
    refused(message, tmp_path / "few", load_skeleton, quantize=other)
    kind = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[stored]
    for quantize in (None, stored):
        assert kind in {type(module).__name__ for module in load_base(tmp_path / "few", quantize=quantize).modules()}


def test_a_form_that_is_not_bitsandbytes_is_named():
    config = transformers.LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    assert find_stored_form("x", config, None) == "gptq"
    with pytest.raises(InlayError, match="stored in gptq already"):
        find_stored_form("x", config, "4bit")


@pytest.mark.parametrize("load", [load_base, load_processor, load_skeleton])
def test_a_revision_of_what_is_no_hub_id(load, small):
    refused("revision 'v2' needs a Hub id, and builtin:vit-tiny is none", "builtin:vit-tiny", load, revision="v2")
    refused("revision 'v2' needs a Hub id, but .* is a folder here", small, load, revision="v2")
