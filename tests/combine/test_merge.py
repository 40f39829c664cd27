"""Adapters folded into their bases: equal outputs, no trace of inlay and peft, and a refusal where bits are too few."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from inlay import InlayError, TextProcessor, load_adapter, load_base, load_processor, load_tokenizer, save_adapter
from inlay.bases.sites import lora_targets, sites
from inlay.cli.app import main
from inlay.combine.merge import compute_outputs, merge, read_report
from inlay.methods import METHODS, BottleneckConfig, CompositeConfig, SsfConfig
from inlay.methods._peft import layers_disabled

VIT, GPT2, SAM = "builtin:vit-tiny", "builtin:gpt2-tiny", "builtin:sam-tiny"
LABELS = ["cat", "dog", "emu"]
AUTO = {VIT: AutoModelForImageClassification, GPT2: AutoModelForCausalLM, SAM: AutoModelForMaskGeneration}


def pixels(side=32, rows=3):
    return {"pixel_values": torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(7))}


def tokens():
    ids = torch.randint(2000, (3, 12), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


INPUTS = {VIT: pixels(), GPT2: tokens(), SAM: pixels(128, 1)}


def base_of(name):
    torch.manual_seed(2)
    return load_base(name, labels=LABELS) if name == VIT else load_base(name)


def adapted(name, method, std=0.03):
    """A base with a random adapter of a method by name, or of a config."""
    torch.manual_seed(1)
    model = base_of(name)
    model = METHODS[method].adapt(model, 4) if isinstance(method, str) else get_peft_model(model, method(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def save(model, name, folder):
    processor = TextProcessor(load_tokenizer(name), max_length=64) if name == GPT2 else load_processor(name)
    return save_adapter(model, folder, processor=processor, metrics={"validation": {"accuracy": 0.5}})


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of each kind of base, saved."""
    folder = tmp_path_factory.mktemp("lora")
    return {name: save(adapted(name, "lora"), name, folder / name[8:]) for name in (VIT, GPT2)}


MERGING = ["lora", "rslora", "dora", "ia3", "ssf", "bottleneck-linear", "partial", "bias", "norm"]


@pytest.mark.parametrize(
    ("name", "method"),
    [*((VIT, m) for m in MERGING), *((GPT2, m) for m in ("lora", "ia3", "bottleneck-linear", "bias"))],
)
def test_a_merged_model_answers_as_the_adapter(name, method, tmp_path):
    model = adapted(name, method)
    report = merge(save(model, name, tmp_path / "adapter"), tmp_path / "merged", inputs=INPUTS[name])
    assert report.error < 1e-4 and report.effect > 1e-3 and report.inputs == "given"
    plain = AUTO[name].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (compute_outputs(plain, INPUTS[name]) - compute_outputs(model, INPUTS[name])).abs().max() < 1e-4
    assert not [n for n, _ in plain.named_parameters() if "lora" in n or "inlay" in n or "base_layer" in n]
    if name == VIT:
        assert plain.config.id2label == dict(enumerate(LABELS))


def two_parts(model):
    linear = BottleneckConfig(width=3, activation=None, sites=["mlp"])
    lora = LoraConfig(r=2, target_modules=lora_targets(model))
    return CompositeConfig(parts=[lora, linear], modules_to_save=["classifier"])


def with_bias(model):
    return LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=["classifier"], lora_bias=True)


def mixed_ranks(model):
    names = lora_targets(model)
    ranks = {"rank_pattern": {names[0]: 5}, "alpha_pattern": {names[1]: 31}}
    return LoraConfig(r=2, target_modules=names, modules_to_save=["classifier"], **ranks)


def convolution(model):
    return LoraConfig(r=2, target_modules=["patch_embeddings.projection"], modules_to_save=["classifier"])


@pytest.mark.parametrize("method", [two_parts, with_bias, mixed_ranks, convolution])
def test_composites_biases_ranks_and_convolutions(method, tmp_path):
    model = adapted(VIT, method)
    report = merge(save(model, VIT, tmp_path / "adapter"), tmp_path / "merged")
    assert report.error < 1e-4 and report.effect > 1e-3 and report.inputs == "random"
    plain = AUTO[VIT].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(compute_outputs(plain, INPUTS[VIT]), compute_outputs(model, INPUTS[VIT]), atol=1e-5)


def test_sam(tmp_path):
    model = adapted(SAM, lambda base: LoraConfig(r=2, target_modules=lora_targets(base)))
    report = merge(save(model, SAM, tmp_path / "adapter"), tmp_path / "merged")
    assert report.error < 1e-4 and report.effect > 1e-3
    plain = AUTO[SAM].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found, wanted = compute_outputs(plain, INPUTS[SAM]), compute_outputs(model, INPUTS[SAM])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert load_processor(tmp_path / "merged").size == load_processor(SAM).size


def test_a_token_embedding_that_is_the_head_too(tmp_path):
    """Merged into the one weight that both are, LoRA on the embedding would change the head."""
    model = adapted(GPT2, lambda base: LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM"), std=0.1)
    report = merge(save(model, GPT2, tmp_path / "adapter"), tmp_path / "merged", inputs=INPUTS[GPT2])
    assert report.error < 1e-4 and report.effect > 1e-3
    plain = AUTO[GPT2].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert plain.config.tie_word_embeddings is False
    assert torch.equal(plain.lm_head.weight, load_base(GPT2).lm_head.weight)
    assert not torch.equal(plain.transformer.wte.weight, plain.lm_head.weight)
    assert (compute_outputs(plain, INPUTS[GPT2]) - compute_outputs(model, INPUTS[GPT2])).abs().max() < 1e-4


def test_the_report_and_the_card(lora, tmp_path):
    report = merge(lora[VIT], tmp_path / "merged")
    facts = read_report(tmp_path / "merged")
    assert facts["error"] == report.error and facts["labels"] == LABELS and facts["folder"] == "merged"
    assert facts["base"] == VIT and facts["method"] == "LoRA r=4, alpha=8" and facts["stored"] == "float32"
    assert facts["metrics"]["validation"] == {"accuracy": 0.5}
    card = (tmp_path / "merged/README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageClassification" in card and "vit-tiny" in card and "On random inputs" in card
    written = "".join(p.read_text("utf-8") for p in (tmp_path / "merged").glob("*.json"))
    assert str(tmp_path) not in written and "/tmp" not in written
    AutoImageProcessor.from_pretrained(tmp_path / "merged")
    with pytest.raises(InlayError, match=r"has no merge\.json"):
        read_report(lora[VIT])


def test_half_the_bits_are_refused_where_they_cost_too_much(tmp_path):
    folder = save(adapted(VIT, "lora", std=0.015), VIT, tmp_path / "adapter")
    with pytest.raises(InlayError, match=r"would change the outputs by .* allowed.: store float32") as found:
        merge(folder, tmp_path / "merged", dtype="bfloat16")
    assert "bfloat16" in str(found.value) and sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    report = merge(folder, tmp_path / "merged", dtype="bfloat16", limit=1.0)
    assert 0.05 < report.error < 1
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert AUTO[VIT].from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert merge(folder, tmp_path / "merged", dtype="float16").error < 0.05  # replaces the earlier one
    assert AUTO[VIT].from_pretrained(tmp_path / "merged").dtype == torch.float16


@pytest.mark.parametrize("name", [VIT])
def test_into_four_bits_by_way_of_what_they_stand_for(lora, name, tmp_path):
    with pytest.raises(InlayError, match=r"storing 4bit .*: give a dtype too"):
        merge(lora[name], tmp_path / "merged", quantize="4bit", inputs=INPUTS[name])
    report = merge(lora[name], tmp_path / "merged", quantize="4bit", dtype="float32", inputs=INPUTS[name])
    assert report.stored == "float32" and report.error < 1e-4
    few = load_adapter(lora[name], quantize="4bit")  # what a user of the unmerged adapter has
    plain = AUTO[name].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found, wanted, whole = (
        compute_outputs(m, INPUTS[name]) for m in (plain, few.model, load_adapter(lora[name]).model)
    )
    assert (found - wanted).norm() < 1e-3 * (wanted - whole).norm()


def test_an_adapter_of_a_base_in_few_bits_is_told_of_them(tmp_path, caplog):
    torch.manual_seed(1)
    model = METHODS["lora"].adapt(load_base(VIT, labels=LABELS, quantize="4bit"), 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    folder = save(model, VIT, tmp_path / "adapter")
    report = merge(folder, tmp_path / "merged", quantize="4bit", dtype="float32", inputs=INPUTS[VIT])
    plain = AUTO[VIT].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert report.error < 1e-4 and not caplog.records
    assert (compute_outputs(plain, INPUTS[VIT]) - compute_outputs(model, INPUTS[VIT])).abs().max() < 1e-4
    merge(folder, tmp_path / "whole")
    assert "was trained on a base in 4bit: quantize='4bit' merges into those weights" in caplog.text


@pytest.mark.parametrize("name", [GPT2])
def test_a_model_that_is_stored_in_eight_bits_again(lora, name, tmp_path):
    report = merge(lora[name], tmp_path / "merged", quantize="8bit", limit=1.0)
    assert 0 < report.error < 1 and report.stored == "8bit"
    found = AUTO[name].from_pretrained(tmp_path / "merged")
    held = [m for m in found.modules() if type(m).__name__ == "Linear8bitLt"]
    assert len(held) == len([n for n in lora_targets(load_base(name)) if "classifier" not in n])
    wanted = compute_outputs(load_adapter(lora[name]).model, INPUTS[name])
    assert (compute_outputs(found, INPUTS[name]) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("name", [GPT2, VIT])
def test_the_figure_is_that_of_the_written_model(name, bits, lora, tmp_path):
    """Loaded as it is, activations of 8 bits included, against the adapter on the base in these bits.

    By load_base, as some CPUs compute 4-bit layers in bfloat16 where transformers loads them.
    """
    report = merge(lora[name], tmp_path / "merged", quantize=bits, limit=10.0, inputs=INPUTS[name])
    used = load_adapter(lora[name], quantize=bits)
    unmerged = compute_outputs(used.model, INPUTS[name])
    with layers_disabled(used.model):
        plain = compute_outputs(used.model, INPUTS[name])
    written = compute_outputs(load_base(tmp_path / "merged"), INPUTS[name])
    change = (unmerged - plain).norm()
    assert report.error == pytest.approx(float((written - unmerged).norm() / change), rel=0.01)
    assert report.effect == pytest.approx(float(change / plain.norm()), rel=1e-3)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck-linear", "attention-prefix", "bias"])
@pytest.mark.parametrize("name", [GPT2, VIT])
def test_an_adapter_loads_on_its_base_in_few_bits(name, method, bits, tmp_path):
    model = adapted(name, method)
    wanted = compute_outputs(model, INPUTS[name])
    folder = save(model, name, tmp_path / "adapter")
    found = compute_outputs(load_adapter(folder, quantize=bits).model, INPUTS[name])
    assert (found - wanted).norm() < {"8bit": 0.03, "4bit": 0.25}[bits] * wanted.norm()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_few_bits_of_whole_weights_are_compared_with_what_they_stand_for(tmp_path, bits):
    """Whole weights of an adapter (partial) cannot stand on a base in few bits, but can be merged into one."""
    folder = save(adapted(VIT, "partial"), VIT, tmp_path / "adapter")
    with pytest.raises(InlayError, match="a base that is not quantised"):
        load_adapter(folder, quantize=bits)
    assert 0 < merge(folder, tmp_path / "merged", quantize=bits, limit=10.0).error < 1


def test_eight_bits_of_a_dora_are_compared_with_what_they_stand_for(tmp_path):
    """peft cannot run it unmerged on such a base."""
    folder = save(adapted(VIT, "dora"), VIT, tmp_path / "adapter")
    with pytest.raises(InlayError, match="peft loses the scales"):
        load_adapter(folder, quantize="8bit")
    assert 0 < merge(folder, tmp_path / "merged", quantize="8bit", limit=10.0).error < 10


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        (VIT, "bottleneck", "activation relu"),
        (VIT, "adapter-plus", "activation gelu"),
        (VIT, "convpass", "convolve over the grid of patches"),
        (VIT, "visual-prompt", "tokens, not weights"),
        (VIT, "attention-prefix", "keys and values that no weight gives"),
        (VIT, "lora-prompt", "tokens, not weights"),
        (GPT2, "prompt", "no weight can stand for"),
        (GPT2, "mam", "no weight gives|does not fold"),
    ],
)
def test_what_no_weight_can_stand_for(name, method, reason, tmp_path):
    folder = save(adapted(name, method), name, tmp_path / "adapter")
    with pytest.raises(InlayError, match=reason):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_an_effect(tmp_path):
    torch.manual_seed(1)
    folder = save(METHODS["lora"].adapt(base_of(VIT), 4), VIT, tmp_path / "adapter")
    with pytest.raises(InlayError, match="changes nothing on these inputs"):
        merge(folder, tmp_path / "merged")


def test_mistakes_in_the_arguments(lora, tmp_path):
    (tmp_path / "note").mkdir()
    (tmp_path / "note/text").write_text("mine")
    with pytest.raises(InlayError, match="is not a model that inlay merged"):
        merge(lora[VIT], tmp_path / "note")
    with pytest.raises(InlayError, match="unknown dtype 'int4'"):
        merge(lora[VIT], tmp_path / "a", dtype="int4")
    with pytest.raises(InlayError, match="unknown quantize '2bit'"):
        merge(lora[VIT], tmp_path / "a", quantize="2bit")
    with pytest.raises(InlayError, match="limit must be"):
        merge(lora[VIT], tmp_path / "a", limit=float("nan"))
    assert (tmp_path / "note/text").read_text() == "mine" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck-linear", "bias", two_parts, with_bias])
def test_unmerging_gives_the_base_back_bit_for_bit(method, tmp_path):
    loaded = load_adapter(save(adapted(VIT, method), VIT, tmp_path / "adapter"))
    base = loaded.model.get_base_model()
    wrapped = [m.original_module for m in base.modules() if hasattr(m, "original_module")]
    before = compute_outputs(loaded.model, INPUTS[VIT])
    with loaded.model.disable_adapter():
        plain = compute_outputs(loaded.model, INPUTS[VIT])
    weights = {n: p.clone() for n, p in load_base(VIT).named_parameters() if "classifier" not in n}
    for _ in range(3):
        loaded.merge()
        assert loaded.model is base and (compute_outputs(base, INPUTS[VIT]) - before).abs().max() < 1e-4
        loaded.unmerge()
        assert torch.equal(compute_outputs(loaded.model, INPUTS[VIT]), before)
    with loaded.model.disable_adapter():
        assert torch.equal(compute_outputs(loaded.model, INPUTS[VIT]), plain)
    assert [m.original_module for m in base.modules() if hasattr(m, "original_module")] == wrapped
    loaded.model.unload()
    found = {n: p for n, p in base.named_parameters() if "classifier" not in n}
    assert found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)
    with pytest.raises(InlayError, match="is not merged"):
        loaded.unmerge()


def test_a_merge_that_fails_leaves_the_model_as_it_was(lora):
    loaded = load_adapter(lora[VIT])
    before = compute_outputs(loaded.model, INPUTS[VIT])
    last = sites(loaded.model.get_base_model()).mlp_out[-1]
    layer = loaded.model.get_base_model().get_submodule(last)
    right = layer.lora_B["default"].weight.data.clone()
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(InlayError, match=r"cannot be merged .NaNs"):
        loaded.merge()
    layer.lora_B["default"].weight.data = right
    assert torch.equal(compute_outputs(loaded.model, INPUTS[VIT]), before)


def test_the_command(lora, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inlay", "merge", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = run(lora[VIT], "-o", tmp_path / "merged", "--base", VIT)
    assert code == 0 and "merging by" in said.out and (tmp_path / "merged/model.safetensors").is_file()
    code, said = run(lora[VIT], "-o", tmp_path / "few", "--quantize", "4bit")
    assert code == 2 and said.err.startswith("error: merging 'vit-tiny'") and not (tmp_path / "few").exists()
    code, said = run(lora[VIT], "-o", tmp_path / "few", "--quantize", "4bit", "--force")
    assert code == 0 and "4bit" in said.out


@pytest.mark.parametrize("add_biases", [False, True])
def test_a_bias_that_transformers_would_drop_is_refused(add_biases, tmp_path):
    """Behind projections without a bias SSF scales only, or merges in memory only."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(
        ViTConfig(**sizes, image_size=32, patch_size=16, qkv_bias=False, num_labels=2)
    ).save_pretrained(tmp_path / "base")
    load_processor(VIT).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"))
    model = get_peft_model(model, SsfConfig(add_biases=add_biases, init_weights=False)).eval()
    folder = save_adapter(model, tmp_path / "adapter", processor=load_processor(VIT))
    inputs = pixels()
    if not add_biases:
        assert merge(folder, tmp_path / "merged", inputs=inputs).error < 1e-4
        return
    with pytest.raises(InlayError, match=r"merging adds vit\.layers\.0\.attention\.q_proj\.bias .* transformers drops"):
        merge(folder, tmp_path / "merged", inputs=inputs)
    wanted = model(**inputs).logits
    assert torch.allclose(load_adapter(folder).merge().model(**inputs).logits, wanted, atol=1e-5)
